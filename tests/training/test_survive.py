"""A run that is killed, asked to stop, or meets a full disk, a damaged checkpoint or a NaN."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from runs_made import assert_same_run, rows, small_config

from idml_jax.errors import UserError
from idml_jax.runtime import hosts, interrupt
from idml_jax.runtime.checkpoint import Checkpoints
from idml_jax.runtime.writers import MetricWriter
from idml_jax.training import embedder, loop, train, watch

HERE = Path(__file__).resolve().parents[1]


def calls_at(monkeypatch, module, name, number, action):
    """Replaces one call of a function by another action."""
    real, calls = getattr(module, name), []

    def counting(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, counting)
    return lambda: monkeypatch.setattr(module, name, real)


def terminate(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


QUICK = ("inside an epoch and a log window", "in an evaluation between epochs")
# Of nine steps in three epochs; an evaluation of 96 images has three batches, the untrained network's is the first.
MOMENTS = {
    "in the first evaluation": (embedder, "jit_embed_step", 2, signal.SIGTERM, None),
    "inside an epoch and a log window": (loop.steps, "jit_train_step", 5, signal.SIGUSR1, 5),
    "in the last step of an epoch": (loop.steps, "jit_train_step", 6, signal.SIGTERM, 6),
    "in an evaluation between epochs": (embedder, "jit_embed_step", 8, signal.SIGTERM, 6),
    "in the last evaluation": (embedder, "jit_embed_step", 14, signal.SIGTERM, 9),
}


@pytest.mark.parametrize("moment", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in MOMENTS])
def test_a_signal_saves_and_stops_and_nothing_is_lost(image_folder, finished, tmp_path, monkeypatch, moment):
    module, name, call, number, step = MOMENTS[moment]
    config = small_config(image_folder)
    before = signal.getsignal(number)
    restore = calls_at(monkeypatch, module, name, call, lambda: terminate(number))
    told = "nothing is saved yet" if step is None else f"saved at step {step}"
    with pytest.raises(interrupt.Stopped, match=f"stopped by {number.name}; {told} .*rerun the same command to|{told}"):
        train.train_and_evaluate(config, tmp_path)
    restore()
    assert signal.getsignal(number) is before
    assert not (tmp_path / "result.json").exists()
    result = train.train_and_evaluate(config, tmp_path)
    assert_same_run(config, finished[0], tmp_path)
    assert result["history"] == finished[1]["history"] and result["best"] == finished[1]["best"]
    assert not (tmp_path / "stopped").exists()


def start(folder, workdir, epochs):
    return subprocess.Popen(
        [sys.executable, str(HERE / "runs_made.py"), str(folder), str(workdir), str(epochs)],
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_for(process, condition, seconds=600):  # a guard, for machines that are very busy
    """True once the condition holds; false if the process ended before."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.0005)
    return True


@pytest.mark.slow  # so are some of the twenty moments below
def test_killed_while_saving(image_folder, finished, tmp_path):
    workdir = tmp_path / "run"
    process = start(image_folder, workdir, 3)
    saving = lambda: any((workdir / "checkpoints").glob("3*tmp*")) or (workdir / "checkpoints" / "3").exists()
    assert wait_for(process, saving), process.stderr.read().decode()
    process.kill()
    process.communicate()
    config = small_config(image_folder)
    train.train_and_evaluate(config, workdir)
    assert_same_run(config, finished[0], workdir)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(image_folder, tmp_path):
    config, rng, killed = small_config(image_folder, epochs=12), random.Random(0), 0
    expected = train.train_and_evaluate(config, tmp_path / "whole")
    workdir = tmp_path / "killed"
    log = workdir / "metrics.jsonl"
    while killed < 20:
        size = log.stat().st_size if log.exists() else 0
        process = start(image_folder, workdir, 12)
        # From the first sign of life on: before a step, in one, while evaluating, while saving.
        running = wait_for(process, lambda size=size: log.exists() and log.stat().st_size != size)
        assert running, f"ended after {killed} kills: {process.stderr.read().decode()[-500:]}"
        time.sleep(rng.uniform(0, 0.8))
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if (workdir / "result.json").exists():
            break
    assert killed >= 5
    result = train.train_and_evaluate(config, workdir)
    assert_same_run(config, tmp_path / "whole", workdir)
    assert result["history"] == expected["history"] and result["best"] == expected["best"]
    print(f"killed {killed} times")


@pytest.fixture
def copied(finished, tmp_path):
    """A finished run without its result: it has everything but the last evaluation to do."""
    shutil.copytree(finished[0], tmp_path / "copy")
    (tmp_path / "copy" / "result.json").unlink()
    return tmp_path / "copy"


def contents(workdir):
    return sorted(p for p in (workdir / "checkpoints" / "9").rglob("*") if p.is_file())


@pytest.mark.parametrize("share", [pytest.param(0, marks=pytest.mark.slow), 0.5])
def test_every_truncation_of_the_newest_checkpoint_is_noticed_or_harmless(image_folder, finished, copied, share):
    config = small_config(image_folder)
    like = train.build(config).initial_state()
    original = Checkpoints(finished[0] / "checkpoints", "R@1", read_only=True)
    expected, record = original.resume(like)
    original.close()
    moved = 0
    for path in contents(finished[0]):
        relative, data = path.relative_to(finished[0]), path.read_bytes()
        kept = int(share * len(data))
        (copied / relative).write_bytes(data[:kept])
        checkpoints = Checkpoints(copied / "checkpoints", "R@1")
        state, got = checkpoints.resume(like)
        checkpoints.close()
        aside = copied / "damaged" / "9"
        if aside.exists():
            moved += 1
            assert int(state.step) < 9 and len(got["history"]) < 3, relative
            # Nothing is lost: what was moved is as it was found.
            assert (aside / path.relative_to(finished[0] / "checkpoints" / "9")).read_bytes() == data[:kept]
            shutil.rmtree(copied / "damaged")
            shutil.copytree(finished[0] / "checkpoints" / "9", copied / "checkpoints" / "9", dirs_exist_ok=True)
        else:
            jax.tree.map(np.testing.assert_array_equal, expected, state)
            assert got == record, relative
        (copied / relative).write_bytes(data)
    assert moved >= 3


def test_a_truncated_checkpoint_costs_an_epoch_and_nothing_else(image_folder, finished, copied, caplog):
    largest = max(contents(copied), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    with caplog.at_level("WARNING", "idml_jax"):
        train.train_and_evaluate(small_config(image_folder), copied)
    assert "step 9: cannot be read" in caplog.text and "moved to" in caplog.text
    assert_same_run(small_config(image_folder), finished[0], copied)


def test_a_checkpoint_that_another_process_cannot_read_is_set_aside_by_all(image_folder, copied, monkeypatch, caplog):
    like = train.build(small_config(image_folder)).initial_state()
    answers = [1, None]  # of the newest checkpoint, and of the one before
    monkeypatch.setattr(hosts, "first_of", lambda own: answers.pop(0))
    checkpoints = Checkpoints(copied / "checkpoints", "R@1")
    with caplog.at_level("WARNING", "idml_jax"):
        state, record = checkpoints.resume(like)
    checkpoints.close()
    assert int(state.step) == 6 and len(record["history"]) == 2 and not answers
    assert "step 9: cannot be read by process 1; moved to" in caplog.text and (copied / "damaged" / "9").is_dir()


def test_a_missing_readable_checkpoint_is_reported(image_folder, copied):
    for path in (copied / "checkpoints").rglob("_METADATA"):
        path.write_text("{")
    with pytest.raises(UserError, match="step 9: cannot be read .*there is no older one; use another --workdir"):
        train.train_and_evaluate(small_config(image_folder), copied)


def test_a_truncated_result_is_reported(image_folder, copied):
    (copied / "result.json").write_text("{")
    with pytest.raises(UserError, match="result.json is not valid JSON .*; without it the run is evaluated again"):
        train.train_and_evaluate(small_config(image_folder), copied)


def test_a_full_disk_keeps_the_checkpoint_before(image_folder, tmp_path):
    run = train.build(small_config(image_folder))
    state = run.initial_state()
    checkpoints = Checkpoints(tmp_path / "checkpoints", "R@1")
    checkpoints.save(3, state, {"history": []}, {"R@1": 0.5})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # What a disk of two kilobytes would do, for any user.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(UserError, match="of step 6 cannot be written to .*; what was saved before is whole"):
            checkpoints.save(6, state, {"history": []}, {"R@1": 0.6})
            checkpoints.wait()
        with pytest.raises(UserError, match="cannot be written"):
            checkpoints.save_stopped(7, state, {"history": []})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = Checkpoints(tmp_path / "checkpoints", "R@1")
    assert again.newest == 3
    restored, _ = again.resume(state)
    again.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_log_that_cannot_be_written_stops_the_run_in_one_line(tmp_path):
    writer = MetricWriter(tmp_path, tensorboard=False)
    writer._file = Path("/dev/full").open("a")  # noqa: SIM115
    with pytest.raises(UserError, match=os.strerror(errno.ENOSPC)):
        writer.write(1, {"a": 1.0})
    writer.close()


def test_the_log_keeps_the_rows_of_the_checkpoint_and_no_others(tmp_path):
    writer = MetricWriter(tmp_path, tensorboard=False)
    for step in range(4):
        writer.write(step, {"a": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "a": 0.')
    writer = MetricWriter(tmp_path, tensorboard=False, rows=2)
    writer.write(2, {"a": 5.0})
    assert writer.rows == 3
    writer.close()
    assert [r["a"] for r in rows(tmp_path)] == [0, 1, 5]


def test_a_non_finite_loss_names_step_images_and_checkpoint(image_folder, tmp_path, monkeypatch):
    real, calls = loop.steps.jit_train_step, []

    def breaks(state, *args, **kwargs):
        calls.append(1)
        state, metrics = real(state, *args, **kwargs)
        if len(calls) == 5:
            metrics = {**metrics, "loss": metrics["loss"] * np.float32("nan")}
        return state, metrics

    monkeypatch.setattr(loop.steps, "jit_train_step", breaks)
    config = small_config(image_folder)
    with pytest.raises(UserError) as caught:
        train.train_and_evaluate(config, tmp_path)
    told = json.loads((tmp_path / "broken_batch.json").read_text())
    run = train.build(config)
    assert told["images"] == [run.splits.train.name(int(i)) for i in run.sampler.batch(4)]
    message = str(caught.value)
    assert message.startswith(f"the loss is nan at step 5; its batch has {told['images'][0]}, ") and "\n" not in message
    assert "29 more images" in message and "the last good checkpoint is at step 3" in message
    # And the run resumes from there once the cause is removed.
    monkeypatch.setattr(loop.steps, "jit_train_step", real)
    assert train.train_and_evaluate(config, tmp_path)["history"][-1]["step"] == 9


@pytest.mark.slow
def test_debug_checks_find_the_step(image_folder, finished, tmp_path):
    quick = {"eval.untrained": False, "max_steps": 2, "eval.cluster": False, "eval.ambiguity_images": 0}
    # An implicit transfer or a promoted rank in a step would raise; 8 devices, Mixup, proxies.
    train.train_and_evaluate(small_config(image_folder, debug="ranks,transfers", **quick), tmp_path / "fine")
    losses = lambda workdir: [r["train/loss"] for r in rows(workdir) if "train/loss" in r]
    assert losses(tmp_path / "fine") == losses(finished[0])[:1]
    bad = small_config(image_folder, debug="nans", **{"data.std": (1e-38,)}, **quick)
    with pytest.raises(UserError, match=r"jax found: .*nan.* at step 1; its batch has .*png.*there is no checkpoint"):
        train.train_and_evaluate(bad, tmp_path / "bad")
    with pytest.raises(UserError, match=r"config.debug = 'nan': 'nan' is not a check; known: nans, infs, leaks"):
        train.build(small_config(image_folder, debug="nan"))


def test_all_debug_checks_together_report_a_nan(image_folder, tmp_path):
    """After a NaN jax computes the step again, which the check of transfers would refuse."""
    quick = {"eval.untrained": False, "max_steps": 2, "eval.cluster": False, "eval.ambiguity_images": 0}
    bad = small_config(image_folder, debug="all", **{"data.std": (1e-38,)}, **quick)
    with pytest.raises(UserError, match=r"found: NaN or infinity \(config\.debug=nans,infs .*\) at step 1; its"):
        train.train_and_evaluate(bad, tmp_path / "bad")
    assert (tmp_path / "bad" / "broken_batch.json").is_file()


def test_the_transfer_check_can_fail():
    with watch.debugging(("transfers",)), pytest.raises(Exception, match="[Dd]isallowed host-to-device transfer"):
        jax.numpy.ones(3) + np.ones(3, np.float32)


@pytest.mark.slow
def test_all_debug_checks_pass_in_both_phases(image_folder, finished, tmp_path):
    train.train_and_evaluate(small_config(image_folder, debug="all", max_steps=5), tmp_path)
    assert [r for r in rows(tmp_path) if r["step"] == 3 and "train/loss" in r]
