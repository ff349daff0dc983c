"""Stopping a run by a signal: it saves its state and ends with its own exit code.

Schedulers and clouds announce the end of a machine by SIGTERM; Slurm can send SIGUSR1 (``--signal=USR1@120``).
"""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command resumes the run.
EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """The run was asked to stop. The message says which step is saved."""


class StopRequest:
    """Remembers, inside a ``with`` block, that one of ``SIGNALS`` arrived, without interrupting anything.

    With several processes, JAX's own service listens to SIGTERM and makes all of them stop at the same call of
    ``check``; SIGUSR1 is forwarded as SIGTERM. Outside the main thread Python cannot catch signals, so none is caught.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._shared, self._checks = jax.process_count() > 1, 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGUSR1,) if self._shared else SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            with contextlib.suppress(TypeError):  # a handler that was not set from Python
                signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)

    def check(self) -> None:
        """Call it between two steps and between two batches of an evaluation, on all processes alike.

        Raises:
          Stopped: once a signal has arrived; with several processes, at the same call on all of them.
        """
        if self._shared:
            self._checks += 1
            if multihost_utils.reached_preemption_sync_point(self._checks):
                raise Stopped(self.requested or "SIGTERM")
        elif self.requested:
            raise Stopped(self.requested)
