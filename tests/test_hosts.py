"""Two processes on this machine as one run: the same figures as one process, one of them writes, none hangs."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def start(workdir, folder, processes, *more):
    """Starts a run in so many processes with two devices in all."""
    port, started = free_port(), []
    for index in range(processes):
        arguments = [
            f"--config={ROOT}/configs/omniglot.py", f"--workdir={workdir}", f"--config.data.root={folder}",
            "--config.batch_size=32", "--config.eval.batch_size=32", "--config.data.image_size=16",
            "--config.data.resize=16", "--config.log.tensorboard=False", "--config.eval.cluster=False",
            "--config.eval.ambiguity_images=0", "--config.log.every_steps=1", *more,
        ]  # fmt: skip
        if processes > 1:
            arguments += [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process_index={index}"]
        devices = f"--xla_force_host_platform_device_count={2 // processes}"
        environment = {**os.environ, "XLA_FLAGS": devices, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(
            [sys.executable, "-m", "idml_jax.main", *arguments], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ))  # fmt: skip
    return started


def finish(started, seconds=600):
    try:
        return [(*process.communicate(timeout=seconds), process.returncode) for process in started]
    finally:
        for process in started:
            process.kill()


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["train/loss"] for r in rows if "train/loss" in r}


@pytest.mark.slow
def test_two_processes_are_one_run_and_one_process_goes_on(image_folder, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    for out, err, code in finish(start(two, image_folder, 2, "--config.epochs=2", "--config.max_steps=6")):
        assert code == 0, out + err
    for out, err, code in finish(start(one, image_folder, 1, "--config.epochs=2", "--config.max_steps=6")):
        assert code == 0, out + err
    expected, got = losses(one), losses(two)
    assert sorted(got) == sorted(expected) == list(range(1, 7))  # one row a step: one process writes
    np.testing.assert_allclose([got[s] for s in got], [expected[s] for s in got], rtol=2e-4)
    results = [json.loads((w / "result.json").read_text()) for w in (one, two)]
    assert results[1]["final"]["R@1"] == pytest.approx(results[0]["final"]["R@1"], abs=0.03)
    # Written by two processes, read by one.
    (two / "result.json").unlink()
    (out, err, code), = finish(start(two, image_folder, 1, "--config.epochs=2", "--config.max_steps=6"))
    assert code == 0 and "going on from step 6" in out, out + err
    assert json.loads((two / "result.json").read_text())["final"]["R@1"] == pytest.approx(results[1]["final"]["R@1"])


@pytest.mark.slow
def test_a_dead_process_stops_the_other_with_a_message(image_folder, tmp_path):
    started = start(tmp_path / "run", image_folder, 2, "--config.epochs=1000", "--config.eval.every_epochs=1000")
    for line in started[0].stdout:
        if re.search(r"step 3/", line):
            break
    started[1].kill()
    _, err, code = finish(started[:1], 200)[0]
    assert code != 0
    assert "another process of this run has died" in err or "coordination service" in err.lower(), err[-2000:]


def test_addresses_that_cannot_be_are_refused():
    from idml_jax import hosts
    from idml_jax.errors import UserError

    with pytest.raises(UserError, match="--coordinator=here: host:port of process 0, or auto"):
        hosts.connect("here", 2, 0)
    with pytest.raises(UserError, match=r"--process_index=2 must be in \[0, 2\), of --processes=2"):
        hosts.connect("here:1", 2, 2)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(image_folder, tmp_path):
    long = ("--config.epochs=1000", "--config.eval.every_epochs=1000", "--config.checkpoint.every_epochs=1000")
    started = start(tmp_path / "run", image_folder, 2, *long)
    for line in started[0].stdout:
        if re.search(r"step 4/", line):
            break
    started[1].terminate()
    ends = finish(started, 200)
    assert [code for _, _, code in ends] == [75, 75], ends
    steps = {re.search(r"saved at step (\d+)", err).group(1) for _, err, _ in ends}
    assert len(steps) == 1
    assert [p.name for p in (tmp_path / "run" / "stopped").iterdir() if p.name.isdigit()] == list(steps)
