"""Runs of several processes: connecting, agreeing on errors, and ending together."""

import contextlib
import faulthandler
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from idml_jax.errors import UserError, lack_of_memory
from idml_jax.runtime.files import first_line

Arrays = dict[str, np.ndarray]
_Made = TypeVar("_Made")
_GOODBYE_SECONDS = 5  # that a process waits for the others when all of them end
LOST = 134  # exit code where another process is gone; jax itself ends a process with it
# Status codes of XLA with which a process fails by itself, whatever the others do.
_OWN = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND", "OUT_OF_RANGE", "PERMISSION_DENIED")


def connect(coordinator: str, processes: int, index: int, timeout: int = 300) -> None:
    """Connects the processes of a run; must be called before JAX creates a device.

    Args:
      coordinator: ``host:port`` of process 0; ``auto`` if the platform provides all three (TPU pod slice, Slurm).
      processes: number of processes.
      index: index of this process, from 0.
      timeout: seconds to wait for the others.

    Raises:
      UserError: for impossible values, or if the other processes do not connect in time.
    """
    if coordinator == "auto":
        arguments: dict[str, Any] = {}
    else:
        port = coordinator.rpartition(":")[2]
        if ":" not in coordinator or not port.encode().isdigit() or not 0 < int(port) < 65536:
            raise UserError(f"--coordinator={coordinator}: host:port of process 0, or auto")
        if not 0 <= index < processes:
            raise UserError(f"--process_index={index} must be in [0, {processes}), of --processes={processes}")
        arguments = {"coordinator_address": coordinator, "num_processes": processes, "process_id": index}
    try:
        # A dead process is detected at the heartbeat limit; the others then exit instead of hanging.
        jax.distributed.initialize(**arguments, initialization_timeout=timeout, heartbeat_timeout_seconds=30)
    except Exception as error:
        if "RPC server" in str(error):  # which process 0 runs
            raise UserError(
                f"--coordinator={coordinator}: process 0 cannot open this port; another program may use it"
            ) from error
        raise UserError(
            f"--coordinator={coordinator}: the processes do not find each other ({first_line(error)})"
        ) from error
    # If another process dies, jax aborts this one with a message; Python's list of all threads below says no more.
    faulthandler.disable()


def first_of(true: bool) -> int | None:
    """Index of the first process where ``true`` is set; ``None`` if there is none. All processes must call it."""
    if jax.process_count() == 1:
        return 0 if true else None
    found = np.flatnonzero(multihost_utils.process_allgather(np.asarray([true])))
    return int(found[0]) if found.size else None


def wait(what: str) -> None:
    """Waits until all processes have reached this call."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agree(problem: Exception | None) -> None:
    """Raises on all processes if one of them has a problem. All processes must call it.

    Raises:
      Exception: the problem of this process.
      UserError: if another process has a problem.
    """
    failed = first_of(problem is not None)
    if problem is not None:
        raise problem
    if failed is not None:
        raise UserError(f"process {failed} of this run has stopped with an error; see its output")


def together(make: Callable[[], _Made]) -> _Made:
    """What ``make`` returns in each process, or an error in all of them. All processes must call it.

    Raises:
      UserError: if it raises one, or an ``OSError``, in one of them.
    """
    if jax.process_count() == 1:
        return make()
    made: list[_Made] = []
    problem = None
    try:
        made.append(make())
    except (UserError, OSError) as error:
        problem = error
    agree(problem)
    return made[0]


def text_of_first(text: str) -> str:
    """The text that process 0 gives. All processes must call it."""
    if jax.process_count() == 1:
        return text
    own = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.asarray(own.size)))
    sent = np.resize(own, size)  # the others' content does not matter
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent))).decode()


def from_first(make: Callable[[], Arrays], like: Arrays) -> Arrays:
    """Arrays that process 0 makes, on all processes. All processes must call it.

    Args:
      make: called by process 0 alone.
      like: arrays of the same shapes and types.

    Raises:
      UserError: on all processes if ``make`` raises one.
    """
    if jax.process_count() == 1:
        return make()
    made, problem = like, None
    if jax.process_index() == 0:
        try:
            made = make()
        except UserError as error:
            problem = error
    agree(problem)
    return {name: np.asarray(value) for name, value in multihost_utils.broadcast_one_to_all(made).items()}


def is_of_others(error: Exception) -> bool:
    """Whether an error is jax's when another process does not answer: one with a status that is not its own fault.

    Some arrive as ``ValueError``, depending on where the result is read.
    """
    if lack_of_memory(error, ""):
        return False
    status = first_line(error).partition(":")[0]
    if isinstance(error, jax.errors.JaxRuntimeError):
        return status not in _OWN
    return isinstance(error, ValueError) and re.fullmatch("[A-Z]+(_[A-Z]+)*", status) is not None and status not in _OWN


def lost(error: Exception) -> NoReturn:
    """Exits with ``LOST`` because another process is gone, without waiting for it as a normal exit would."""
    leave(
        f"another process of this run has died or cannot be reached ({first_line(error)[:200]}); "
        "rerun the same command on all hosts to resume from the last checkpoint",
        LOST,
    )


def leave(message: str, code: int = 1) -> NoReturn:
    """Exits at once, so that processes waiting for this one in a collective operation notice.

    Where all of them leave, for an error that they agree on, none takes another for dead.
    """
    print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()

    def say_goodbye() -> None:
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()

    goodbye = threading.Thread(target=say_goodbye, daemon=True)
    goodbye.start()
    goodbye.join(_GOODBYE_SECONDS)
    os._exit(code)
