"""What commands say while they work: one line that is rewritten in a terminal or a notebook, plain lines in a log."""

import sys
import time
from collections.abc import Callable

from idml_jax.errors import printable, verbosity

_REWRITE_SECONDS = 0.2


def tell(line: str) -> None:
    """Prints a line about the work, unless the command was told to be quiet."""
    if verbosity() >= 0:
        print(printable(line), flush=True)


def say_next(command: str) -> None:
    """Says what a finished command is usually followed by."""
    tell(f"next: {command}")


def is_live() -> bool:
    """Whether standard output shows one line that is rewritten: a terminal or a notebook."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules


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
        self._last = time.monotonic()
        if not self._live:
            self._say(line)
            return
        line = printable(line)
        sys.stdout.write(f"\r{line.ljust(self._width)}")
        sys.stdout.flush()
        self._width = len(line)

    def close(self) -> None:
        """Ends a rewritten line, so that other lines follow below it."""
        if self._live and self._width:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._width = 0


def bar(done: int, total: int, width: int = 20) -> str:
    """A bar of text."""
    filled = width * done // max(total, 1)
    return f"[{'#' * filled}{'.' * (width - filled)}]"
