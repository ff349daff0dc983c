"""Commands stopped early, by signals and by Ctrl-C."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from idml_jax.runtime import interrupt

ROOT = Path(__file__).resolve().parents[2]


def listens(pid, number):
    """Whether a process has a handler for a signal."""
    with contextlib.suppress(OSError, TypeError):
        found = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())
        return bool(int(found[1], 16) >> (number - 1) & 1)
    return False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("name,code", [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_a_command_that_has_just_started_ends_in_one_line(tmp_path, name, code):
    number = signal.Signals[name]
    process = subprocess.Popen(
        [sys.executable, "-m", "idml_jax.main", "--config=glyphs:quick", f"--workdir={tmp_path}/run"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job that a script starts in the background ignores Ctrl-C, and so would this child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        started = time.monotonic()
        # Python itself listens to SIGINT from the start; both handlers are set together.
        while not listens(process.pid, signal.SIGTERM) and time.monotonic() < started + 60:
            time.sleep(0.005)
        time.sleep(0.1)
        process.send_signal(number)
        told = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code
    shown = "Ctrl-C" if name == "SIGINT" else name
    assert told == ("", f"stopped by {shown} before there was anything to save; the same command starts again\n")
    assert not list(tmp_path.iterdir())


def test_a_ctrl_c_that_was_lost_comes_at_the_next_check():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        interrupt.as_exception()
        with interrupt.StopRequest() as stop:
            stop.check()
            with contextlib.suppress(KeyboardInterrupt):  # as Python does within finalisers
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            with pytest.raises(KeyboardInterrupt):
                stop.check()
        interrupt.as_exception()
        with interrupt.StopRequest() as stop:
            stop.check()
    finally:
        signal.signal(signal.SIGINT, before)
