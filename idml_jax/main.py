"""Trains and evaluates: ``python -m idml_jax.main --config=configs/glyphs.py --workdir=runs/glyphs``.

``--config`` is a file with a function ``get_config()``. The files of this package are found from any folder, as
``configs/glyphs.py:quick`` or ``glyphs:quick`` (``idml_jax.recipes``). Flags such as
``--config.optim.learning_rate=1e-4`` override single settings. A workdir that holds a run needs no ``--config``: a
stopped run goes on, ``--resume=longer --config.epochs=90`` goes on with more epochs, ``--mode=eval`` evaluates the best
checkpoint, with other settings of evaluation if ``--config.eval.*`` names some.

Exit codes: 0, finished; 1, an error, reported in one line; 75, stopped by SIGTERM or SIGUSR1 after saving; 130, stopped
by Ctrl-C. After 75 and 130, rerun the same command to resume.
"""

from idml_jax.runtime import huge_pages, interrupt

if __name__ == "__main__":
    huge_pages.start_again()
    interrupt.end_when_asked()  # before the imports below, which take a while

import itertools
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

import idml_jax
from idml_jax.errors import UserError, end_now, hide_consequences, printable, run_command, stop
from idml_jax.runtime.compiled import loading
from idml_jax.runtime.files import user_path
from idml_jax.runtime.progress import show_progress
from idml_jax.training import recipes

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Settings file with a function get_config().", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train (or resume training), or evaluate a checkpoint.")
_RESUME = flags.DEFINE_enum(
    "resume", "auto", ["auto", "longer", "never"],
    "With a run in the workdir: go on if the settings are the same; or for more epochs; or refuse it.",
)  # fmt: skip
_COORDINATOR = flags.DEFINE_string("coordinator", None, "With several processes: host:port of process 0, or auto.")
_PROCESSES = flags.DEFINE_integer("processes", 1, "Number of processes.")
_INDEX = flags.DEFINE_integer("process_index", 0, "Index of this process.")
_TRACEBACK = flags.DEFINE_bool("traceback", False, "Show the full traceback of an error.")


# The settings as text, written by docs/settings_page.py: making it would load jax and all losses.
SETTINGS = Path(__file__).with_name("training") / "settings.txt"
_HELP = ("--help", "-h", "-help", "-?", "--helpshort", "--helpfull")
_FLAGS = ("config", "workdir", "mode", "resume", "coordinator", "processes", "process_index", "traceback")


def parse(argv: list[str], doc: str | None = __doc__, more: tuple[str, ...] = ()) -> list[str]:
    """Reads the flags of a command line; wrong ones end it in one line, and ``--help`` in the help of a command.

    Args:
      argv: name of the program and its arguments.
      doc: what the command is, for its help.
      more: names of flags of its own.
    """
    if "--version" in argv[1:]:
        print(f"idml_jax {idml_jax.__version__}")
        sys.exit(0)
    if any(word in _HELP for word in argv[1:]):
        run_command(lambda: print(_help(doc, more)))
        sys.exit(0)
    try:
        with loading():  # settings files load jax
            rest = flags.FLAGS(_with_path(argv))
    except SystemExit:
        raise
    except Exception as error:  # anything that a config file or a wrong override raises
        run_command(lambda: _check_overrides(argv))  # a name that is unknown says more than what came of it
        stop(error)
    if len(rest) > 1:
        stop(UserError(f"unexpected argument {rest[1]!r}; settings are given as --config.name=value"))
    return rest


def _check_overrides(argv: list[str]) -> None:
    """Raises UserError for a setting of the command line that does not exist."""
    from idml_jax.training.settings import check_named

    words = [word.lstrip("-").partition("=")[0] for word in argv[1:] if word.startswith("-")]
    check_named(word.removeprefix("config.") for word in words if word.startswith("config."))


def _help(doc: str | None, more: tuple[str, ...]) -> str:
    """The text of ``--help``: what the command is, its flags, and all settings with their defaults."""
    lines = [doc or "", "flags:"]
    for name in (*_FLAGS, *more):
        flag = flags.FLAGS[name]
        default = f" (default: {flag.default})" if flag.default not in (None, False) else ""
        lines.append(f"  --{name:<14} {' '.join((flag.help or '').split())}{default}")
    return "\n".join([*lines, "", "settings, with their defaults:", SETTINGS.read_text().rstrip("\n")])


def _with_path(argv: list[str]) -> list[str]:
    """The arguments, with full paths for settings files of this package."""
    argv = list(argv)
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in ("--config", "-config") and (equals or i + 1 < len(argv)):
            found = recipes.find(value if equals else argv[i + 1])
            if not Path(found.partition(":")[0]).is_file():
                raise UserError(f"--config={found}: no such file; by name there are {', '.join(recipes.names())}")
            del argv[i : i + (1 if equals else 2)]
            return [argv[0], f"{name}={found}", *argv[1:]]  # the flags read the file before settings that change it
    return _with_stored(argv)


def _with_stored(argv: list[str]) -> list[str]:
    """The arguments, with the settings of the run in the workdir, where single ones are changed or it goes on."""
    words = dict(word.lstrip("-").partition("=")[::2] for word in argv[1:])
    for word, value in itertools.pairwise(argv):
        if word.startswith("-") and word.lstrip("-") in ("workdir", "mode"):
            words[word.lstrip("-")] = value
    folder = words.get("workdir", "")
    if not folder or not (user_path(folder) / "config.json").is_file():
        return argv
    if any(name.startswith("config.") for name in words) or words.get("mode", "train") == "train":
        from idml_jax.training import of_run

        return [argv[0], f"--config={of_run.__file__}:{folder}", *argv[1:]]
    return argv


def _main(_: list[str]) -> None:
    command(_run)


def command(action: Callable[[Any, str], object]) -> None:
    """Runs an action on settings and workdir as the flags give them, and turns its errors into exit codes.

    Args:
      action: called with the settings (``None`` if there are none) and the workdir.
    """
    show_progress()
    absl_logging.set_verbosity(absl_logging.ERROR)
    hide_consequences()
    try:
        if not _WORKDIR.value:
            raise UserError("--workdir is missing: the folder that the run is written to")
        if _MODE.value == "train" and _CONFIG.value is None:
            raise UserError("--config is missing: a settings file, e.g. --config=configs/glyphs.py")
        _check_config(_CONFIG.value)
        _check_processes()
        _connected(action)
    except (UserError, OSError) as error:
        if _COORDINATOR.value and not _TRACEBACK.value:
            from idml_jax.runtime import hosts

            hosts.leave(str(error))
        stop(error)
    except KeyboardInterrupt:
        end_now(130, "stopped by Ctrl-C; rerun the same command to resume from the last checkpoint")


def _check_processes() -> None:
    given = [name for name in ("processes", "process_index") if flags.FLAGS[name].present]
    if given and _COORDINATOR.value in (None, "auto") and (_PROCESSES.value, _INDEX.value) != (1, 0):
        raise UserError(f"--{given[0]} needs --coordinator=host:port of process 0 (auto finds all three by itself)")


def _check_config(config: Any) -> None:
    if config is None or isinstance(config, ConfigDict):
        return
    getattr(config, "batch_size", None)  # raises the reason if the file could not be read
    raise UserError(f"--config: its get_config() gave {config!r}, not settings (a ConfigDict)")


def _run(config: Any, workdir: str) -> None:
    with loading():
        from idml_jax.runtime import hosts
        from idml_jax.training import train  # imported late, so that wrong flags fail fast

    if _MODE.value == "eval":
        train.evaluate_checkpoint(workdir, config)
    else:
        settings = hosts.together(lambda: resolved(config, workdir))
        train.train_and_evaluate(settings, workdir, resume=_RESUME.value)
        say_next(workdir)


def say_next(workdir: str) -> None:
    """Says what a finished run is used with."""
    import jax

    from idml_jax.runtime import progress

    if jax.process_index() == 0:
        run = shlex.quote(printable(workdir))
        progress.say_next(f"python -m idml_jax.embed --workdir={run} --images=PHOTOS --out=photos.npz")


def resolved(config: Any, workdir: str) -> Any:
    """The settings with those that the pretrained weights decide; what the command line names stays."""
    from idml_jax.training import auto

    return auto.resolved(config, workdir, config_flags.get_override_values(flags.FLAGS["config"]))


def _connected(action: Callable[[Any, str], object]) -> None:
    """Runs the action together with the other processes, if there are any."""
    from idml_jax.runtime import hosts

    interrupt.as_exception()
    workdir = str(user_path(str(_WORKDIR.value)))
    if _COORDINATOR.value:
        hosts.connect(_COORDINATOR.value, _PROCESSES.value, _INDEX.value)
    try:
        action(_CONFIG.value, workdir)
    except interrupt.Stopped as stopped:
        if not _COORDINATOR.value:  # a step that is being compiled is not waited for
            end_now(interrupt.EXIT_CODE, str(stopped))
        print(stopped, file=sys.stderr)
        sys.exit(interrupt.EXIT_CODE)
    except (RuntimeError, ValueError) as error:
        if not _COORDINATOR.value or not hosts.is_of_others(error):
            raise
        hosts.lost(error)


def main() -> None:
    """The command line."""
    app.run(_main, flags_parser=parse)


if __name__ == "__main__":
    main()
