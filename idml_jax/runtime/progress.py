"""What commands say while they work: one line that is rewritten in a terminal or a notebook, plain lines in a log."""

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable

from idml_jax import errors
from idml_jax.errors import printable, verbosity

_REWRITE_SECONDS = 0.2
_FIRST_SECONDS = 0.5  # before which there is no speed to tell


def tell(line: str) -> None:
    """Prints a line about the work, unless the command was told to be quiet."""
    if verbosity() >= 0:
        with _lock:
            erase()
            print(printable(line), flush=True)


def say_next(command: str) -> None:
    """Says what a finished command is usually followed by."""
    tell(f"next: {command}")


def is_live() -> bool:
    """Whether standard output shows one line that is rewritten: a terminal or a notebook."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules


def show_progress() -> None:
    """Shows the progress of training on standard output, as ``python -m idml_jax.main`` does; for notebooks."""
    own = logging.getLogger("idml_jax")
    for handler in list(own.handlers):  # of an earlier call
        own.removeHandler(handler)
    console = _Console(sys.stdout)
    console.setFormatter(_Lines("%(message)s"))
    own.addHandler(console)
    own.setLevel({-1: logging.WARNING, 0: logging.INFO, 1: logging.DEBUG}[verbosity()])
    own.propagate = False


def is_shown() -> bool:
    """Whether ``show_progress`` was called, on an output with a line that is rewritten."""
    shown = any(isinstance(handler, _Console) for handler in logging.getLogger("idml_jax").handlers)
    return shown and is_live()


class _Console(logging.StreamHandler):
    """Prints log records above the line that is rewritten."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record."""
        with _lock:
            erase()
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Where the reader of the output has closed it (``| head``), the work goes on without it."""
        if not isinstance(sys.exc_info()[1], BrokenPipeError):
            super().handleError(record)
            return
        logging.getLogger("idml_jax").removeHandler(self)
        # Nor does Python's flush at the end fail.
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())


class _Lines(logging.Formatter):
    """Formats log records so that every line is safe for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return "\n".join(map(printable, super().format(record).split("\n")))


# Loggers of other threads print, too.
_lock = threading.RLock()
_drawn: "Ticker | None" = None  # whose line is on the screen


def erase() -> None:
    """Removes the line that is rewritten from the screen, so that another line can be printed in its place."""
    global _drawn
    with _lock:
        ticker, _drawn = _drawn, None
        if ticker is not None:
            ticker.erased()


errors.before_line = erase


class Ticker:
    """Shows the progress of a long work.

    Args:
      say: receives the lines where they are not rewritten.
      seconds: time between two such lines.
      live: whether one line is rewritten; by default as ``is_live`` says.
    """

    def __init__(self, say: Callable[[str], None], seconds: float = 5.0, live: bool | None = None):
        self._say, self._live = say, is_live() if live is None else live
        self._seconds = _REWRITE_SECONDS if self._live else seconds
        self._last, self._width = time.monotonic(), 0

    def due(self) -> bool:
        """Whether it is time for another line."""
        return time.monotonic() - self._last >= self._seconds and verbosity() >= 0

    def show(self, line: str) -> None:
        """Shows a line, in the place of the last one where lines are rewritten."""
        global _drawn
        self._last = time.monotonic()
        if not self._live:
            self._say(line)
            return
        line = printable(line)
        if sys.stdout.isatty():  # a longer line would wrap, and could not be rewritten
            line = line[: shutil.get_terminal_size().columns - 1]
        with _lock:
            if _drawn is not self:
                erase()
            sys.stdout.write(f"\r{line.ljust(self._width)}")
            sys.stdout.flush()
            self._width, _drawn = len(line), self

    def note(self, line: str) -> None:
        """Shows a line at once, but only where lines are rewritten."""
        if self._live and verbosity() >= 0:
            self.show(line)

    def erased(self) -> None:
        """Overwrites the line with blanks."""
        sys.stdout.write(f"\r{' ' * self._width}\r")
        sys.stdout.flush()
        self._width = 0

    def close(self) -> None:
        """Ends a rewritten line, so that other lines follow below it."""
        global _drawn
        with _lock:
            if self._live and self._width:
                sys.stdout.write("\n")
                sys.stdout.flush()
                self._width, _drawn = 0, None if _drawn is self else _drawn


class Progress:
    """Shows how much of a long work is done, its speed, and the remaining time.

    Args:
      total: how many there are to do.
      done: how many are done already.
      ticker: shows the lines.
      words: the line for a number of done ones and a speed per second, up to the remaining time; by default about
        images.

    Attributes:
      done: how many are done.
    """

    def __init__(self, total: int, done: int, ticker: Ticker, words: Callable[[int, float], str] | None = None):
        self.done, self._total, self._first, self._ticker = done, total, done, ticker
        self._words = words or (lambda done, rate: f"{done:,} of {total:,} images, {rate:,.0f}/s")
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time since the start, without pauses."""
        return time.monotonic() - self._start

    @property
    def fresh(self) -> int:
        """How many were done since the start."""
        return self.done - self._first

    @property
    def rate(self) -> float:
        """How many are done in a second."""
        return self.fresh / max(self.seconds, 1e-9)

    def add(self, count: int) -> None:
        """Counts some more, and shows a line if it is time."""
        self.done = min(self.done + count, self._total)
        if self._ticker.due() and self.seconds >= _FIRST_SECONDS:
            left = format_seconds((self._total - self.done) / max(self.rate, 1e-9))
            words = self._words(self.done, self.rate)
            self._ticker.show(f"{bar(self.done, self._total)} {words}, {left} to go")

    def note(self, words: str) -> None:
        """Shows what is done in between, where a line is rewritten."""
        self._ticker.note(f"{bar(self.done, self._total)} {words}")

    def restart(self, done: int) -> None:
        """Measures the speed from here on, where so many are done."""
        self.done = self._first = done
        self._start = time.monotonic()

    def pause(self, seconds: float) -> None:
        """Excludes time that was not spent on this work."""
        self._start += seconds

    def close(self) -> None:
        """Ends the line of the progress."""
        self._ticker.close()


def bar(done: int, total: int, width: int = 20) -> str:
    """A bar of text."""
    filled = width * done // max(total, 1)
    return f"[{'#' * filled}{'.' * (width - filled)}]"


def format_seconds(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
