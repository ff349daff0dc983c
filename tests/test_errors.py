"""What reaches the console: one line per error, no tracebacks of what only follows from it."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from runs_made import small_config

import idml_jax
from idml_jax import errors
from idml_jax.errors import UserError, printable
from idml_jax.runtime import hosts
from idml_jax.training import embedder, steps, train

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


def test_commands_show_warnings_of_the_log_as_lines_like_all_others(capsys):
    log = logging.getLogger("idml_jax")

    def work():
        log.warning("%s: skipped 7 files\x1b", "photos")
        log.info("not shown")
        logging.getLogger("idml_jax.training.embedder").warning("warning: 2 images")
        errors.warn("another")

    other = logging.StreamHandler(sys.stderr)  # as other libraries leave one behind
    logging.getLogger().addHandler(other)
    before = log.handlers, log.propagate
    try:
        log.handlers = []
        errors.run_command(work)
    finally:
        logging.getLogger().removeHandler(other)
        log.handlers, log.propagate = before
    told = capsys.readouterr()
    assert told.err == "photos: skipped 7 files\\x1b\nwarning: 2 images\nwarning: another\n" and not told.out


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


class TestMemory:
    GPU = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 21474836480 bytes."
    TPU = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 29.91G of "
        "15.75G hbm. Exceeded hbm capacity by 14.16G."
    )

    @pytest.mark.parametrize(
        "text,size",
        [
            (GPU, " (another 20 GiB were wanted)"),
            (TPU, " (29.91G wanted of 15.75G)"),
            (
                "INTERNAL: Error dispatching computation: Out of memory allocating 14400000000 bytes.",
                " (another 13.4 GiB",
            ),
        ],
    )
    def test_a_device_without_memory_is_told_with_advice(self, text, size):
        error = jax.errors.JaxRuntimeError(text)
        words = re.escape(f"the memory of the device does not suffice{size}")
        with pytest.raises(UserError, match=words) as told, errors.enough_memory("take less"):
            raise error
        assert str(told.value).endswith(": take less") and told.value.__cause__ is error
        assert not hosts.is_of_others(error)

    @pytest.mark.parametrize(
        "error",
        [
            jax.errors.JaxRuntimeError("INTERNAL: something else"),
            ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device"),
            RuntimeError("cannot schedule new futures after shutdown"),
        ],
    )
    def test_other_errors_stay(self, error):
        with pytest.raises(type(error)) as told, errors.enough_memory("take less"):
            raise error
        assert told.value is error

    def test_training_and_embedding_say_what_needs_less(self, image_folder, tmp_path, monkeypatch):
        def lacks(*_, **__):
            raise jax.errors.JaxRuntimeError(self.GPU)

        config = small_config(image_folder, epochs=1)
        config.eval.untrained = False
        with monkeypatch.context() as patched:
            patched.setattr(steps, "jit_train_step", lacks)
            with pytest.raises(
                UserError, match=r"20 GiB .*config\.batch_size = 32 \(4 images a device\).*accumulate=2"
            ):
                train.train_and_evaluate(config, tmp_path / "run")
        train.train_and_evaluate(config, tmp_path / "run")
        model = idml_jax.load(tmp_path / "run")
        monkeypatch.setattr(embedder, "jit_embed_step", lacks)
        with pytest.raises(UserError, match=r"in batches of 40 \(5 a device\); smaller ones .*--batch_size"):
            model.embed(image_folder / "test")

    def test_a_command_without_other_advice_names_the_cpu(self, capsys):
        def lacks():
            raise jax.errors.JaxRuntimeError(self.GPU)

        with pytest.raises(SystemExit) as left:
            errors.run_command(lacks)
        assert left.value.code == 1
        assert capsys.readouterr().err == (
            "error: the memory of the device does not suffice (another 20 GiB were wanted): JAX_PLATFORMS=cpu computes "
            "in the memory of the machine\n"
        )
