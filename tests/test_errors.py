"""What reaches the console: one line per error, no tracebacks of what only follows from it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from idml_jax.errors import printable

ROOT = Path(__file__).resolve().parent.parent
THREADS = """
import threading
from idml_jax.errors import hide_consequences
hide_consequences()
def fail(error):
    raise error
for error in (RuntimeError("Event loop is closed"), ValueError("RESOURCE_EXHAUSTED: no space"), KeyError("another")):
    thread = threading.Thread(target=fail, args=(error,))
    thread.start()
    thread.join()
"""


@pytest.mark.parametrize("wanted", ["0", "1"])
def test_failures_that_follow_from_a_failed_write_are_silent_unless_asked_for(wanted):
    environment = {**os.environ, "IDML_JAX_TRACEBACK": wanted}
    done = subprocess.run(
        [sys.executable, "-c", THREADS], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "KeyError: 'another'" in done.stderr
    assert done.stderr.count("Traceback") == (3 if wanted == "1" else 1)


def test_what_a_full_disk_leaves_in_the_main_thread_is_shown():
    code = "from idml_jax.errors import hide_consequences; hide_consequences(); raise OSError('RESOURCE_EXHAUSTED')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "RESOURCE_EXHAUSTED" in done.stderr


@pytest.mark.parametrize(
    "text,expected",
    [
        ("plain ä 漢 a\\b", "plain ä 漢 a\\b"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("two\nlines\r", "two\\nlines\\r"),
        ("turned \u202e", "turned \\u202e"),
        (os.fsdecode(b"latin \xe4"), "latin \\xe4"),
    ],
)
def test_text_from_elsewhere_steers_nothing(text, expected):
    assert printable(text) == expected
