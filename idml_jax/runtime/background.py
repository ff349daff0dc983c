"""Writers of metrics, and a thread for each of them, so that none delays or ends the training."""

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from idml_jax.errors import printable
from idml_jax.runtime.files import first_line

logger = logging.getLogger("idml_jax")


class Writer(Protocol):
    """Where metrics go. A writer may raise anything; ``Background`` turns that into one line."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""

    def close(self, finished: bool) -> None:
        """Flushes everything; ``finished`` tells whether the run has come to its end."""


class Background:
    """A writer that is opened and called in a thread of its own, in the order of the calls.

    Opening may take seconds (a server is asked), while the run compiles. If the writer fails, one line says so, what
    comes after is dropped, and the run goes on.

    Args:
      name: name of the writer, for messages.
      start: opens the writer.
      patience: seconds that ``close`` waits for what is still to be written; ``None``: as long as it takes.
      at_once: open it now; otherwise by ``begin``, since opening takes the CPU from what the run does now.
    """

    def __init__(self, name: str, start: Callable[[], Writer], patience: float | None = None, at_once: bool = True):
        self._name, self._start, self._patience = name, start, patience
        self._calls: queue.SimpleQueue[Callable[[Writer], None] | None] = queue.SimpleQueue()
        self.failed = False
        self.writer: Any = None  # what ``start`` gave, once it has
        self._thread = threading.Thread(target=self._work, name=f"idml_jax {name}", daemon=True)
        if at_once:
            self.begin()

    def begin(self) -> None:
        """Opens the writer, if that has not begun yet."""
        if self._thread.ident is None:
            self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Hands over the metrics of a step; returns at once."""
        self._calls.put(lambda writer: writer.scalars(step, values))

    def close(self, finished: bool = True) -> None:
        """Closes the writer after everything is written, or when the patience is at its end."""
        if self._thread.ident is None and self._calls.empty():
            return  # nothing to write
        self.begin()
        if not self._thread.is_alive():
            return
        self._calls.put(lambda writer: writer.close(finished))
        self._calls.put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            logger.warning(
                "warning: %s: does not answer; waited %.0f s, and what it has not taken yet is in metrics.jsonl",
                self._name,
                self._patience,
            )

    def _work(self) -> None:
        try:
            self.writer = self._start()
            while (call := self._calls.get()) is not None:
                call(self.writer)
        except (Exception, SystemExit) as error:
            self.failed = True
            logger.warning("warning: %s: %s; the run goes on without it", self._name, printable(first_line(error)))
