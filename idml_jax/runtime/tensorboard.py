"""TensorBoard's event files: by CLU where TensorFlow is installed, otherwise by TensorBoard's own writer.

Both write the same tags, steps and values. The only importer of CLU and TensorBoard.
"""

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Scalars = Callable[[int, Mapping[str, float]], None]
EVERY_SECONDS = 30.0  # between two reports of the speed


def installed(package: str) -> bool:
    """Whether a package can be imported, found out without importing it."""
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def open_events(folder: Path) -> "Clu | EventFiles":
    """A writer of event files in a folder; slow, since it may import TensorFlow."""
    if installed("tensorflow") and installed("clu"):
        try:
            return Clu(folder)
        except ImportError:  # a TensorFlow that does not load here
            pass
    return EventFiles(folder)


class Clu:
    """CLU's writer, and its report of the speed."""

    def __init__(self, folder: Path):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
        from clu import metric_writers, periodic_actions

        self._periodic: Any = periodic_actions
        self._writer: Any = metric_writers.SummaryWriter(str(folder))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""
        self._writer.write_scalars(step, values)

    def close(self, finished: bool) -> None:
        """Flushes and closes the file."""
        self._writer.flush()
        self._writer.close()

    def speed(self, total: int, scalars: Scalars) -> Callable[[int], object]:
        """What is called after every step to report steps per second every few seconds."""
        return self._periodic.ReportProgress(num_train_steps=total, writer=_AsWriter(scalars), every_secs=EVERY_SECONDS)


class _AsWriter:
    """What CLU's report of the speed writes to."""

    def __init__(self, scalars: Scalars):
        self.write_scalars = scalars


class EventFiles:
    """TensorBoard's own writer of event files, which needs no TensorFlow."""

    def __init__(self, folder: Path):
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events, self._summary, self._tensor, self._types = event_pb2, summary_pb2, tensor_pb2, types_pb2
        self._writer: Any = EventFileWriter(str(folder))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step, as TensorFlow's scalar summaries."""
        plugin = self._summary.SummaryMetadata.PluginData(plugin_name="scalars")
        metadata = self._summary.SummaryMetadata(plugin_data=plugin, data_class=self._summary.DATA_CLASS_SCALAR)
        for tag, value in values.items():
            tensor = self._tensor.TensorProto(dtype=self._types.DT_FLOAT, float_val=[value])
            tensor.tensor_shape.SetInParent()  # a scalar: a shape without dimensions
            row = self._summary.Summary.Value(tag=tag, tensor=tensor, metadata=metadata)
            summary = self._summary.Summary(value=[row])
            self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, summary=summary))

    def close(self, finished: bool) -> None:
        """Flushes and closes the file."""
        self._writer.close()

    def speed(self, total: int, scalars: Scalars) -> Callable[[int], object]:
        """What is called after every step to report steps per second every few seconds."""
        return _Speed(total, scalars)


class _Speed:
    """Reports steps per second and the time since the start, with CLU's tags."""

    def __init__(self, total: int, scalars: Scalars):
        self._total, self._scalars = total, scalars
        self._start = time.monotonic()
        self._last: tuple[int, float] | None = None

    def __call__(self, step: int) -> None:
        now = time.monotonic()
        if self._last is None:
            self._last = step, now
            return
        since, then = self._last
        if step > since and (now - then > EVERY_SECONDS or step == self._total):
            self._scalars(step, {"steps_per_sec": (step - since) / max(now - then, 1e-9)})
            self._scalars(step, {"uptime": now - self._start})
            self._last = step, now
