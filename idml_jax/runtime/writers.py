"""Metric writers: metrics.jsonl, and TensorBoard and progress through CLU. The only importer of CLU.

CLU's writers import TensorFlow and TensorBoard. Without those, a run continues after one warning.
"""

import contextlib
import errno
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from idml_jax.errors import UserError
from idml_jax.runtime.files import check_target, write_text

logger = logging.getLogger("idml_jax")


def _clu() -> tuple[Any, Any] | None:
    """CLU's ``metric_writers`` and ``periodic_actions``, or ``None`` where they cannot be imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        from clu import metric_writers, periodic_actions
    except ImportError as error:
        logger.warning("no TensorBoard logs (%s); metrics still go to the console and to metrics.jsonl", error)
        return None
    return metric_writers, periodic_actions


class MetricWriter:
    """Writes scalars by step.

    Args:
      workdir: folder of the run, for ``metrics.jsonl`` and ``tensorboard/``.
      active: false on all hosts but the first; an inactive writer writes nothing.
      tensorboard: also write TensorBoard logs, if possible.
      rows: number of rows of ``metrics.jsonl`` that belong to the resumed state, 0 for a new run. Later rows are
        dropped, since the run will write them again.

    Attributes:
      rows: number of rows written so far, including the kept ones.
    """

    def __init__(self, workdir: Path, *, active: bool = True, tensorboard: bool = True, rows: int = 0):
        self._active, self.rows = active, rows
        self._clu: Any = None
        self._tensorboard: Any = None
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
        self._clu = _clu() if tensorboard else None
        if self._clu:
            metric_writers, _ = self._clu
            writer = metric_writers.SummaryWriter(str(workdir / "tensorboard"))
            self._tensorboard = metric_writers.AsyncWriter(writer)

    @property
    def tensorboard(self) -> bool:
        """Whether TensorBoard logs are written."""
        return self._tensorboard is not None

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
        if self._tensorboard:
            self._tensorboard.write_scalars(step, values)

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
        periodic = self._clu[1] if self._clu else None
        return Progress(total, first, periodic, self._tensorboard)

    def close(self) -> None:
        """Flushes everything to disk."""
        if self._tensorboard:
            self._tensorboard.flush()
            self._tensorboard.close()
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
    """Measures speed and remaining time; CLU's periodic action also reports steps per second to TensorBoard."""

    def __init__(self, total: int, first: int, periodic: Any, writer: Any):
        self._total, self._step, self._time = total, first, time.monotonic()
        self._action = None
        if periodic:
            self._action = periodic.ReportProgress(num_train_steps=total, writer=writer, every_secs=30.0)

    def tick(self, step: int) -> None:
        """Must be called after every step."""
        if self._action:
            self._action(step)

    def pause(self, seconds: float) -> None:
        """Excludes time, in seconds, that was not spent on training."""
        self._time += seconds

    def measure(self, step: int) -> tuple[float, float]:
        """Steps per second since the last measurement, and the remaining seconds."""
        now = time.monotonic()
        rate = (step - self._step) / max(now - self._time, 1e-9)
        self._step, self._time = step, now
        return rate, (self._total - step) / max(rate, 1e-9)


def format_seconds(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
