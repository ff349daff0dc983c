"""Writes the metrics of a run: metrics.jsonl itself, TensorBoard's files and trackers each in a thread of its own."""

import contextlib
import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from idml_jax.errors import UserError
from idml_jax.runtime import trackers
from idml_jax.runtime.background import Background
from idml_jax.runtime.files import check_target, write_text
from idml_jax.runtime.tensorboard import open_events

logger = logging.getLogger("idml_jax")


class MetricWriter:
    """Writes scalars by step.

    Args:
      workdir: folder of the run, for ``metrics.jsonl`` and ``tensorboard/``.
      active: false on all hosts but the first; an inactive writer writes nothing.
      tensorboard: also write TensorBoard logs.
      rows: number of rows of ``metrics.jsonl`` that belong to the resumed state, 0 for a new run. Later rows are
        dropped, since the run will write them again.
      tracking: trackers to write to as well, and what they are told about the run.

    Attributes:
      rows: number of rows written so far, including the kept ones.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        active: bool = True,
        tensorboard: bool = True,
        rows: int = 0,
        tracking: trackers.Tracking | None = None,
    ):
        self._active, self.rows = active, rows
        self._tensorboard: Background | None = None
        self._writers: list[Background] = []
        self._file: Any = None
        if not active:
            return
        path = workdir / "metrics.jsonl"
        check_target(path)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        keep = [line for line in lines if _is_row(line)][:rows]
        if len(keep) < rows:
            logger.warning("warning: %s holds %d of the %d rows that it had; continuing", path, len(keep), rows)
            self.rows = len(keep)
        if keep != lines:
            write_text(path, "".join(line + "\n" for line in keep))
        self._file = path.open("a")
        if tensorboard:
            # TensorFlow's import would slow down tracing and compiling.
            events = lambda: open_events(workdir / "tensorboard")
            self._tensorboard = Background("TensorBoard logs", events, at_once=False)
            self._writers.append(self._tensorboard)
        if tracking is not None:
            self._writers += trackers.start(tracking, workdir)

    @property
    def tensorboard(self) -> bool:
        """Whether TensorBoard logs are written."""
        return self._tensorboard is not None and not self._tensorboard.failed

    def begin(self) -> None:
        """Opens the writers that have waited; called after the first step."""
        for writer in self._writers:
            writer.begin()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one row: the scalars of a step.

        Raises:
          UserError: if the row cannot be written.
        """
        self.rows += 1
        if not self._active:
            return
        values = {k: float(v) for k, v in scalars.items()}
        # JSON has no NaN; other readers understand null.
        row = {"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._cannot(error) from error
        for writer in self._writers:
            writer.scalars(step, values)

    def sync(self) -> None:
        """Flushes the rows to disk; called before a checkpoint that relies on them."""
        if not self._file:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno != errno.EINVAL:  # a pipe or a device, which cannot be synced
                raise self._cannot(error) from error

    def _cannot(self, error: OSError) -> UserError:
        return UserError(
            f"{self._file.name}: cannot be written ({error.strerror}); "
            "once that is fixed, rerun the same command to resume from the last checkpoint"
        )

    def progress(self, total: int, first: int) -> "Progress":
        """An object that reports progress and the remaining time every few seconds."""
        return Progress(total, first, self._tensorboard)

    def close(self, finished: bool = True) -> None:
        """Flushes everything to disk and to the trackers, which are told whether the run is finished."""
        for writer in self._writers:
            writer.close(finished)
        if self._file:
            with contextlib.suppress(OSError):  # reported when the row was written
                self._file.close()


def _is_row(line: str) -> bool:
    try:
        row = json.loads(line)
        return isinstance(row, dict) and "step" in row
    except (ValueError, RecursionError):
        return False  # a line cut short by a kill


class Progress:
    """Measures speed and remaining time; TensorBoard's writer reports the steps per second every few seconds."""

    def __init__(self, total: int, first: int, tensorboard: Background | None = None):
        self._total, self._step, self._time = total, first, time.monotonic()
        self._tensorboard = tensorboard
        self._report: Callable[[int], object] | None = None

    def tick(self, step: int) -> None:
        """Must be called after every step."""
        if self._tensorboard and self._tensorboard.writer and not self._report:  # opened by now
            self._report = self._tensorboard.writer.speed(self._total, self._tensorboard.scalars)
        if self._report:
            self._report(step)

    def pause(self, seconds: float) -> None:
        """Excludes time, in seconds, that was not spent on training."""
        self._time += seconds

    def measure(self, step: int) -> tuple[float, float]:
        """Steps per second since the last measurement, and the remaining seconds; NaN if there was no step since."""
        now = time.monotonic()
        if step == self._step:
            self._time = now
            return math.nan, math.nan
        rate = (step - self._step) / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return rate, (self._total - step) / max(rate, 1e-9)
