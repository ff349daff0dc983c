"""Errors as single lines, text that is safe to show, and the end of a command."""

import contextlib
import io
import logging
import multiprocessing
import os
import sys
import threading
import unicodedata
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn


class UserError(Exception):
    """A file, a setting or a value that the user can mend. The message names it and says what would be right."""


# Joiners within words and pictographs; they show nothing of their own and change no order.
_HARMLESS = "\u200c\u200d"


def _shown(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _HARMLESS:
        return character.encode("unicode_escape").decode("ascii")
    return character


def printable(text: object) -> str:
    """Text from elsewhere, safe for a terminal, a table or a page: one line that steers nothing.

    Control characters (a terminal obeys some of them), marks that turn the direction of writing, line breaks and bytes
    of file names that are not UTF-8 are shown as escapes such as ``\\x1b``; all else stays.
    """
    text = str(text)
    return text if text.isascii() and text.isprintable() else "".join(map(_shown, text))


def warn(line: str) -> None:
    """Shows a warning as one line of standard error."""
    print(f"warning: {printable(line)}", file=sys.stderr)


def show_progress() -> None:
    """Shows the progress of training on standard output, as ``python -m idml_jax.main`` does; for notebooks."""
    own = logging.getLogger("idml_jax")
    for handler in list(own.handlers):  # of an earlier call
        own.removeHandler(handler)
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(_Lines("%(message)s"))
    own.addHandler(console)
    own.setLevel(logging.INFO)
    own.propagate = False


class _Lines(logging.Formatter):
    """Log messages, of which each line is safe for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return "\n".join(map(printable, super().format(record).split("\n")))


def _wants_traceback() -> bool:
    return "--traceback" in sys.argv or os.environ.get("IDML_JAX_TRACEBACK", "0") != "0"


def stop(error: Exception) -> NoReturn:
    """Ends a command with the error as one line and exit code 1, or with its traceback where that is asked for.

    It is asked for by the flag ``--traceback`` of ``idml_jax.main``, and everywhere by ``IDML_JAX_TRACEBACK=1``.
    """
    if _wants_traceback():
        raise error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any("Traceback" in line for line in lines):  # ml_collections puts one into its message
        lines = lines[-1:]
    print(f"error: {printable(' '.join(lines) or type(error).__name__)}", file=sys.stderr)
    sys.exit(1)


def end_now(code: int, message: str = "") -> NoReturn:
    """Ends this process at once, without the clean-up of Python, during which threads of XLA that still run may crash.

    Args:
      code: exit code.
      message: for standard error.
    """
    if message:
        print(printable(message), file=sys.stderr)
    for child in multiprocessing.active_children():  # the data loader's, which nobody else would end
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


# Of exceptions in background threads that only follow from a failed write of the storage layer.
_CONSEQUENCES = ("Event loop is closed", "RESOURCE_EXHAUSTED", "cannot schedule new futures")


def hide_consequences() -> None:
    """Keeps background threads silent about writes that failed: the command reports the first of them in one line.

    A full disk would otherwise fill the terminal with one traceback per array. Other exceptions are shown as before.
    """
    if _wants_traceback():
        return
    from absl import logging

    logging.set_verbosity(logging.FATAL)  # the storage layer logs what it raises
    shown, shown_of_thread, shown_ignored = sys.excepthook, threading.excepthook, sys.unraisablehook
    consequence = lambda error: any(text in str(error) for text in _CONSEQUENCES)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if threading.current_thread() is threading.main_thread() or not consequence(error):
            shown(kind, error, trace)

    def hook_of_thread(arguments: threading.ExceptHookArgs) -> None:
        if not consequence(arguments.exc_value):
            shown_of_thread(arguments)

    def hook_of_ignored(arguments: "sys.UnraisableHookArgs") -> None:
        if not consequence(arguments.exc_value):
            shown_ignored(arguments)

    sys.excepthook, threading.excepthook, sys.unraisablehook = hook, hook_of_thread, hook_of_ignored


def run_command(action: Callable[[], object], stopped: str = "stopped") -> None:
    """Runs what a command line asks for.

    An error of the user becomes one line and exit code 1, Ctrl-C one line and exit code 130.

    Args:
      action: the command.
      stopped: what to say after Ctrl-C.
    """
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    hide_consequences()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without the characters of a name shows their codes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        action()
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        sys.exit(1)
    except (UserError, OSError) as error:
        stop(error)
    except KeyboardInterrupt:
        end_now(130, stopped)
