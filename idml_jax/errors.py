"""One-line errors, text that is safe to display, and the way a command exits."""

import contextlib
import io
import logging as logs  # of absl is imported where it is used
import multiprocessing
import os
import re
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NoReturn


class UserError(Exception):
    """An error that the user can fix. The message names the file, setting or value and says what would be right."""


# Joiners within words and pictographs; they are invisible and do not change the text direction.
_HARMLESS = "\u200c\u200d"


def _shown(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _HARMLESS:
        return character.encode("unicode_escape").decode("ascii")
    return character


def printable(text: object) -> str:
    """External text made safe for a terminal, a table or a page: one line without control characters.

    Control characters (a terminal obeys some of them), marks that change the text direction, line breaks and bytes
    of file names that are not UTF-8 are shown as escapes such as ``\\x1b``; everything else is unchanged.
    """
    text = str(text)
    return text if text.isascii() and text.isprintable() else "".join(map(_shown, text))


def is_utf8(text: str) -> bool:
    """Whether text is free of undecodable bytes, which Python keeps as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


VERBOSITY = "IDML_JAX_VERBOSITY"


def verbosity() -> int:
    """How much commands say: -1 only results and warnings (``-q``), 0 as usual, 1 also what libraries log (``-v``)."""
    return {"-1": -1, "1": 1}.get(os.environ.get(VERBOSITY, "0"), 0)


before_line: Callable[[], None] = lambda: None  # removes what ``runtime.progress`` has on the screen


def warn(line: str) -> None:
    """Prints a warning as one line on standard error."""
    before_line()
    print(f"warning: {printable(line)}", file=sys.stderr)


class _Lines(logs.Handler):
    """Prints records on standard error, each as one line without a prefix."""

    def emit(self, record: logs.LogRecord) -> None:
        """Prints a record."""
        before_line()
        print(printable(record.getMessage()), file=sys.stderr)


@contextlib.contextmanager
def _log_as_lines() -> Iterator[None]:
    """Shows the package's warnings in a command, as ``runtime.progress.show_progress`` does, which may take over."""
    own, handler = logs.getLogger("idml_jax"), _Lines(logs.WARNING)
    if own.handlers:
        yield
        return
    before, own.propagate = own.propagate, False
    own.addHandler(handler)
    try:
        yield
    finally:
        if handler in own.handlers:  # otherwise ``show_progress`` has taken its place
            own.removeHandler(handler)
            own.propagate = before


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps the storage layer and other libraries from logging anything below an error, for as long as it lasts."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(min(before, logging.ERROR))  # absl's numbers fall with severity
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _wants_traceback() -> bool:
    return "--traceback" in sys.argv or os.environ.get("IDML_JAX_TRACEBACK", "0") != "0"


def stop(error: Exception) -> NoReturn:
    """Ends a command with the error as one line and exit code 1, or with its traceback if requested.

    ``idml_jax.main --traceback``, or ``IDML_JAX_TRACEBACK=1`` with any command, requests the traceback.
    """
    if _wants_traceback():
        raise error
    told: object = error
    while isinstance(told, BaseException) and told.args and isinstance(told, KeyError | AttributeError):
        told = told.args[0]  # str of a KeyError quotes its text, and ml_collections wraps one
    lines = [line.strip() for line in str(told).splitlines() if line.strip()]
    if any("Traceback" in line for line in lines):  # ml_collections puts one into its message
        lines = lines[-1:]
    before_line()
    print(f"error: {printable(' '.join(lines) or type(error).__name__)}", file=sys.stderr)
    sys.exit(1)


def lack_of_memory(error: Exception, advice: str) -> UserError | None:
    """The error of a device whose memory does not suffice, in one line; ``None`` for another error.

    Args:
      error: what jax raised.
      advice: what needs less memory.
    """
    text = str(error)
    if not isinstance(error, RuntimeError) or "out of memory" not in text.lower():
        return None
    asked = re.search(r"allocat\w* (\d+) bytes", text)
    used = re.search(r"Used (\S+) of (\S+)", text)  # the compiler of TPUs
    size = ""
    if asked:
        size = f" (another {int(asked[1]) / 2**30:.3g} GiB were wanted)"
    elif used:
        size = f" ({used[1]} wanted of {used[2]})"
    return UserError(f"the memory of the device does not suffice{size}: {advice}")


@contextlib.contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Turns a device's lack of memory inside into a ``UserError`` with advice."""
    try:
        yield
    except RuntimeError as error:
        if told := lack_of_memory(error, advice):
            raise told from error
        raise


def end_now(code: int, message: str = "") -> NoReturn:
    """Ends this process at once, without Python's clean-up, during which running XLA threads may crash.

    Args:
      code: exit code.
      message: text for standard error; empty: none.
    """
    if message:
        before_line()
        print(printable(message), file=sys.stderr)
    for child in multiprocessing.active_children():  # those of the data loader, which nothing else would end
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
    """Runs a command and turns its errors into exit codes.

    A ``UserError`` ends in one line and exit code 1, Ctrl-C in one line and exit code 130. Warnings of the package's
    log are lines of standard error.

    Args:
      action: the command.
      stopped: message after Ctrl-C.
    """
    from absl import logging

    # By default jax preallocates three quarters of a GPU's memory, which a training run may already hold.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    logging.set_verbosity(logging.ERROR)
    hide_consequences()
    if verbosity() > 0:
        logging.set_verbosity(logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character shows its code
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _log_as_lines():
            action()
    except BrokenPipeError:  # the reader of the output has closed the pipe
        sys.stderr.close()
        sys.exit(1)
    except (UserError, OSError) as error:
        stop(error)
    except RuntimeError as error:
        told = lack_of_memory(error, "JAX_PLATFORMS=cpu computes in the memory of the machine")
        if told is None:
            raise
        stop(told)
    except KeyboardInterrupt:
        end_now(130, stopped)
