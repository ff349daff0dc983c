"""Metrics of the training steps: averages for the log, and detection of non-finite losses."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from idml_jax.data.pipeline import Batch
from idml_jax.errors import UserError
from idml_jax.runtime import cpus

# JAX's own checks, enabled by ``config.debug``.
CHECKS = ("nans", "infs", "leaks", "ranks", "transfers")


def debug_checks(setting: str) -> tuple[str, ...]:
    """The checks that ``config.debug`` names, in the order of ``CHECKS``.

    Raises:
      UserError: for an unknown check.
    """
    names = {name.strip() for name in setting.split(",") if name.strip()}
    if names == {"all"}:
        return CHECKS
    if unknown := sorted(names - set(CHECKS)):
        raise UserError(f"config.debug = {setting!r}: {unknown[0]!r} is not a check; known: {', '.join(CHECKS)}, all")
    return tuple(name for name in CHECKS if name in names)


@contextlib.contextmanager
def debugging(checks: tuple[str, ...]) -> Iterator[None]:
    """Enables JAX's checks during a step: NaN and Inf, leaked tracers, rank promotion, implicit transfers."""
    contexts: dict[str, Callable[[], Any]] = {
        "nans": lambda: jax.debug_nans(True),
        "infs": lambda: jax.debug_infs(True),
        "leaks": jax.checking_leaks,
        "ranks": lambda: jax.numpy_rank_promotion("raise"),
        "transfers": lambda: jax.transfer_guard("disallow"),
    }
    with contextlib.ExitStack() as stack:
        for name in checks:
            stack.enter_context(contexts[name]())
        try:
            yield
        except Exception as error:
            # After a NaN jax computes the step again, operation by operation, which needs transfers of its own.
            if "transfers" in checks and "Disallowed" in str(error) and _follows_from_a_nan(error):
                what = "NaN or infinity (config.debug=nans,infs without transfers names the operation)"
                raise FloatingPointError(what) from error
            raise


def _follows_from_a_nan(error: BaseException | None) -> bool:
    while error is not None:
        if "FloatingPointError" in type(error).__name__:
            return True
        error = error.__cause__ or error.__context__
    return False


class Broken(NamedTuple):
    """A step with a non-finite loss or gradient.

    Attributes:
      step: counted from 1.
      what: name and value of the non-finite metric.
      records: ``[b]`` records of the batch; with several hosts, those of this host.
    """

    step: int
    what: str
    records: Int[np.ndarray, "b"]


class Window:
    """Averages step metrics since the last log row and reports non-finite values.

    The metrics of a step are fetched once the next step is under way, so the device never waits for the host.

    Args:
      report: called with a broken step; must raise.
      stored: result of ``state`` saved when the run was stopped.
    """

    def __init__(self, report: Callable[[Broken], None], stored: dict[str, Any] | None = None):
        self._report = report
        self._pending: list[tuple[int, dict[str, jax.Array], np.ndarray]] = []
        self._sums: dict[str, float] = dict(stored["sums"]) if stored else {}
        self._count: int = stored["count"] if stored else 0

    def add(self, step: int, metrics: dict[str, jax.Array], records: Int[np.ndarray, "b"]) -> None:
        """Adds the metrics of a step and the records of its batch."""
        self._pending.append((step, metrics, records))
        if len(self._pending) > 1:
            self._fetch(*self._pending.pop(0))

    def _fetch(self, step: int, metrics: dict[str, jax.Array], records: np.ndarray) -> None:
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        for name, words in (("loss", "the loss"), ("gradient_norm", "the length of the gradient")):
            if not math.isfinite(values[name]):
                self._report(Broken(step, f"{words} is {values[name]}", records))
        for k, v in values.items():
            self._sums[k] = self._sums.get(k, 0.0) + v
        self._count += 1

    def settle(self) -> None:
        """Fetches the metrics of steps that are still under way."""
        while self._pending:
            self._fetch(*self._pending.pop(0))

    def flush(self) -> dict[str, float]:
        """Returns the averages and starts a new window."""
        self.settle()
        means = {k: v / self._count for k, v in self._sums.items()}
        self._sums, self._count = {}, 0
        return means

    def state(self) -> dict[str, Any]:
        """Content of the window, as JSON without loss, for a run that is resumed."""
        self.settle()
        return {"sums": dict(self._sums), "count": self._count}


class Waiting:
    """Measures for how much of a run its devices wait for images, and says once what would make them wait less.

    While the host waits for a batch the devices still compute the last step, so only what exceeds the time of the steps
    counts. That time is measured where the loop waits for a step anyway, to log its metrics.

    Args:
      threads: number of threads that read in one process (``config.data.threads``).
      processes: number of processes that read on this host.
    """

    SHARE, SECONDS = 0.25, 5.0

    def __init__(self, threads: int, processes: int = 1):
        self._threads, self._processes, self._told = threads, processes, False
        self.restart()

    def restart(self) -> None:
        """Measures from now on."""
        self._start, self._waited, self._busy, self._steps = time.monotonic(), 0.0, 0.0, 0

    def pause(self, seconds: float) -> None:
        """Leaves out a time in which the run did something else, an evaluation."""
        self._start += seconds

    def over(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches."""
        iterator = iter(batches)
        while True:
            start = time.monotonic()
            batch = next(iterator, None)
            self._waited += time.monotonic() - start
            if batch is None:
                return
            self._steps += 1
            yield batch

    def computed(self, seconds: float) -> None:
        """The devices took so long for the last step, and so for each one since the last call."""
        self._busy += self._steps * seconds
        self._steps = 0

    def told(self) -> str:
        """A sentence for the log if the devices waited much and more threads could read; else nothing.

        To be asked after ``computed``.
        """
        seconds, count = time.monotonic() - self._start, cpus.available()
        idle = min(self._waited, seconds - self._busy)
        reading = self._threads * self._processes
        if self._told or seconds < self.SECONDS or idle < self.SHARE * seconds or count <= reading:
            return ""
        self._told = True
        return (
            f"{100 * idle / seconds:.0f} % of the time went into waiting for images: {reading} threads read them on "
            f"{count} CPUs; config.data.threads={-(-count // self._processes)} uses all"
        )
