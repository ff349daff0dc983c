"""The commands of idml_jax in one: ``idml-jax COMMAND`` or ``python -m idml_jax COMMAND``.

    idml-jax train --config=folder --config.data.root=PHOTOS --workdir=runs/mine
    idml-jax embed --workdir=runs/mine --images=PHOTOS --out=photos.npz
    idml-jax search --index=photos.npz --query=bird.jpg -k 10

Every command is a module too: ``idml-jax embed`` is ``python -m idml_jax.embed``, and ``idml-jax train`` is ``python -m
idml_jax.main``.
"""

import difflib
import importlib
import os
import sys
from typing import NamedTuple

import idml_jax
from idml_jax.errors import VERBOSITY, run_command


class Command(NamedTuple):
    """A command.

    Attributes:
      module: its module in the package.
      does: what it does.
      example: arguments that work.
      extra: arguments added to those given.
    """

    module: str
    does: str
    example: str
    extra: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("main", "train a run, or resume it", "--config=glyphs:quick --workdir=runs/glyphs"),
    "fit": Command(
        "fit",
        "make a run from pretrained features, without training",
        "--config=folder --config.data.root=PHOTOS --workdir=runs/fitted",
    ),
    "eval": Command("main", "evaluate the best checkpoint of a run", "--workdir=runs/glyphs", ("--mode=eval",)),
    "prepare": Command(
        "prepare", "store a downloaded data set for training", "--dataset=cub --source=CUB_200_2011.tgz"
    ),
    "embed": Command("embed", "embed images into a file", "--workdir=runs/glyphs --images=PHOTOS --out=photos.npz"),
    "search": Command("search", "find the images nearest to a query", "--index=photos.npz --query=bird.jpg -k 10"),
    "evaluate": Command("evaluate", "compute all metrics of a file of embeddings", "--embeddings=photos.npz"),
    "compare": Command("compare", "tell whether two images are of one class", "a.jpg b.jpg --workdir=runs/glyphs"),
    "risk": Command("risk", "learn from which images alone answers will be wrong", "--workdir=runs/glyphs"),
    "audit": Command("audit", "find wrong labels, copies and junk in a set", "--index=photos.npz --out=audited"),
    "report": Command("report", "write a page about a run", "--workdir=runs/glyphs"),
    "export": Command("export", "write a run as a program, or an index for faiss", "--workdir=runs/glyphs --out=model"),
    "pretrained": Command("pretrained", "show, fetch or convert weights", "show timm/resnet50.a1_in1k"),
}
COMPUTING = ("main", "fit", "embed")  # modules of the commands for which huge pages pay


def usage() -> str:
    """The commands, with an example of each."""
    lines = ["usage: idml-jax COMMAND [options]", "", "commands:"]
    for name, command in COMMANDS.items():
        lines += [f"  {name:<11} {command.does}", f"  {'':<11} idml-jax {name} {command.example}"]
    lines += [
        "",
        "options:",
        "  --help         show this text; idml-jax COMMAND --help shows the options of a command",
        "  --version      show the version",
        "  -q, --quiet    with a command: print only results and warnings",
        "  -v, --verbose  with a command: print also what libraries log",
        "",
        "completion of commands and options in the shell, for bash (or zsh, fish):",
        '  eval "$(idml-jax completion bash)"',
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line.

    Args:
      argv: a command and its arguments; by default those of the process.
    """
    of_process = argv is None
    argv = _without_verbosity(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("--help", "-h", "help"):
        _print(usage())
        sys.exit(0 if argv else 2)
    if argv[0] in ("--version", "version"):
        _print(f"idml_jax {idml_jax.__version__}")
        return
    name, *rest = argv
    if name == "completion":
        run_command(lambda: _print_completion(rest[0] if rest else "bash"))
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        print(f"error: {name!r} is no command; {hint}known: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    command = COMMANDS[name]
    if of_process and command.module in COMPUTING:
        from idml_jax.runtime import huge_pages

        huge_pages.start_again()
    if command.module in ("main", "fit"):
        from idml_jax.runtime import interrupt

        interrupt.end_when_asked()  # before the imports below, which take a while
    sys.argv = [f"idml-jax {name}", *rest, *command.extra]
    importlib.import_module(f"idml_jax.{command.module}").main()


def _print(text: str) -> None:
    """Prints a text, of which the reader may want only the beginning."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # as in `errors.run_command`, whose imports nobody should wait for here
        sys.stderr.close()
        sys.exit(1)


def _without_verbosity(argv: list[str]) -> list[str]:
    """The arguments without those that say how much is printed, which the environment tells the command."""
    levels = {"-q": "-1", "--quiet": "-1", "-v": "1", "--verbose": "1"}
    for word in argv:
        if word in levels:
            os.environ[VERBOSITY] = levels[word]
    return [word for word in argv if word not in levels]


def _print_completion(shell: str) -> None:
    from idml_jax.runtime import completion

    known = {module: completion.options_of(f"idml_jax.{module}") for module in {c.module for c in COMMANDS.values()}}
    print(completion.script(shell, {name: known[command.module] for name, command in COMMANDS.items()}))


if __name__ == "__main__":
    main()
