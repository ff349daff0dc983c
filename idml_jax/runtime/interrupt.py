"""Stops a run on a signal: it saves its state and exits with a dedicated exit code.

Schedulers and cloud providers send SIGTERM before they take a machine away; Slurm can send SIGUSR1
(``--signal=USR1@120``). JAX is imported late, so that a command handles signals before anything else is loaded.
"""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

from idml_jax.errors import end_now

# EX_TEMPFAIL of sysexits.h: not a failure; the same command resumes the run.
EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):
    """The run was asked to stop. The message says which step is saved."""


def end_when_asked() -> None:
    """Makes ``SIGNALS`` and Ctrl-C exit with a one-line message while there is nothing to save yet.

    ``as_exception`` makes Ctrl-C an exception again: raised during an import, it would look like an import error.
    """
    owner = os.getpid()

    def end(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker process of the data loader stays silent
            os._exit(EXIT_CODE)
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        code = 128 + signal.SIGINT if number == signal.SIGINT else EXIT_CODE
        end_now(code, f"stopped by {name} before there was anything to save; the same command starts again")

    for number in (*SIGNALS, signal.SIGINT):
        if number != signal.SIGINT or signal.getsignal(number) is signal.default_int_handler:
            signal.signal(number, end)


_ctrl_c: list[int] = []  # recorded, since an exception inside a callback or a finaliser is lost


def as_exception() -> None:
    """Makes Ctrl-C raise ``KeyboardInterrupt`` again, unless it is ignored; ``StopRequest.check`` raises lost ones."""

    def interrupt(number: int, _: FrameType | None) -> None:
        _ctrl_c.append(number)
        raise KeyboardInterrupt

    if callable(signal.getsignal(signal.SIGINT)):
        _ctrl_c.clear()
        signal.signal(signal.SIGINT, interrupt)


class StopRequest:
    """Records, inside a ``with`` block, that one of ``SIGNALS`` has arrived, without interrupting anything.

    With several processes, JAX's preemption service receives SIGTERM and makes all of them stop at the same call of
    ``check``; SIGUSR1 is forwarded as SIGTERM. Python handles signals in the main thread only; in other threads no
    signal is caught.
    """

    def __init__(self) -> None:
        import jax

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
        """Raises if the run should stop. Call it after every step and every evaluation batch, on all processes.

        Raises:
          Stopped: once a signal has arrived; with several processes, at the same call on all of them.
          KeyboardInterrupt: after a Ctrl-C whose exception was lost.
        """
        if _ctrl_c:
            raise KeyboardInterrupt
        if self._shared:
            from jax.experimental import multihost_utils

            self._checks += 1
            if multihost_utils.reached_preemption_sync_point(self._checks):
                raise Stopped(self.requested or "SIGTERM")
        elif self.requested:
            raise Stopped(self.requested)
