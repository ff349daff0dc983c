"""Two and four processes as one run: same metrics as one process, only one writes, none hangs."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def environment_with(devices):
    """Environment of a process with the given number of devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"  # the last one counts
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}


def start(workdir, folder, processes, *more, devices=2, module="idml_jax.main", own=None):
    """Starts a run in the given number of processes with the given total number of devices.

    ``own`` has further arguments of single processes.
    """
    port, started = free_port(), []
    for index in range(processes):
        arguments = [
            f"--config={ROOT}/configs/omniglot.py",
            f"--workdir={workdir}",
            f"--config.data.root={folder}",
            "--config.batch_size=32",
            "--config.eval.batch_size=32",
            "--config.data.image_size=16",
            "--config.data.resize=16",
            "--config.log.tensorboard=False",
            "--config.eval.cluster=False",
            "--config.eval.ambiguity_images=0",
            "--config.log.every_steps=1",
            *more,
            *(own or {}).get(index, ()),
        ]
        if processes > 1:
            arguments += [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process_index={index}"]
        environment = environment_with(devices // processes)
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
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
    ((out, err, code),) = finish(start(two, image_folder, 1, "--config.epochs=2", "--config.max_steps=6"))
    assert code == 0 and "resuming from step 6" in out, out + err
    assert json.loads((two / "result.json").read_text())["final"]["R@1"] == pytest.approx(results[1]["final"]["R@1"])


@pytest.mark.slow
def test_four_processes_then_two_then_one_with_proxies_split_and_a_damaged_checkpoint(image_folder, tmp_path):
    four, one = tmp_path / "four", tmp_path / "one"
    settings = (  # three steps an epoch
        "--config.epochs=3", "--config.sharding.proxies=split", "--config.eval.every_epochs=3",
        "--config.checkpoint.every_epochs=1", "--config.eval.untrained=False",
    )  # fmt: skip

    def same(got, wanted):
        """Sums in another order differ by rounding, which Adam's division makes grow once the trunk learns."""
        got, wanted = list(got.values()), list(wanted.values())
        np.testing.assert_allclose(got[:3], wanted[:3], rtol=2e-4)
        np.testing.assert_allclose(got, wanted, rtol=1e-2)

    def run(workdir, processes):
        ends = finish(start(workdir, image_folder, processes, *settings, devices=4))
        assert [code for *_, code in ends] == [0] * processes, ends
        return ends

    ends = run(four, 4)
    assert "resuming" not in "".join(out for out, *_ in ends)
    run(one, 1)
    expected, first = losses(one), losses(four)
    assert list(first) == list(expected) == list(range(1, 10))  # one row a step: one process writes
    same(first, expected)
    whole = json.loads((four / "result.json").read_text())

    # What the last of four has written is read by some of two.
    newest = four / "checkpoints" / "9"
    broken = [p for p in (newest / "state").rglob("*") if p.is_file() and "process_3" in str(p) and "/d/" in str(p)]
    assert broken
    for path in broken:
        path.write_bytes(path.read_bytes()[:10])
    (four / "result.json").unlink()
    (_, err0, _), (_, err1, _) = ends = run(four, 2)
    assert all("resuming from step 6" in out for out, *_ in ends), ends
    assert "step 9: cannot be read" in ends[0][0] + err0 and "moved to" in ends[0][0] + err0, ends
    assert "moved to" not in ends[1][0] + err1
    assert [p.name for p in (four / "damaged").iterdir()] == ["9"]
    assert (four / "checkpoints" / "9").is_dir()
    same(losses(four), first)

    # Written by two, read by one.
    (four / "result.json").unlink()
    shutil.rmtree(four / "checkpoints" / "9")
    ((out, _, _),) = run(four, 1)
    assert "resuming from step 6" in out
    got = losses(four)
    assert list(got) == list(range(1, 10))
    same(got, first)
    final = json.loads((four / "result.json").read_text())["final"]
    assert final["R@1"] == pytest.approx(whole["final"]["R@1"], abs=0.03)


@pytest.mark.slow
def test_two_processes_fit_and_start_whitened_as_one_does(image_folder, tmp_path):
    """Both compute features; the first fits the head, and both have it."""
    results = {}
    for processes in (1, 2):
        for module, more in (
            ("idml_jax.fit", ()),
            ("idml_jax.main", ("--config.model.semantic_init=whiten", "--config.max_steps=2")),
        ):
            workdir = tmp_path / f"{module}{processes}"
            for out, err, code in finish(start(workdir, image_folder, processes, *more, module=module)):
                assert code == 0, out + err
            results[module, processes] = json.loads((workdir / "result.json").read_text())
    for module in ("idml_jax.fit", "idml_jax.main"):
        one, two = results[module, 1], results[module, 2]
        assert two["final"]["MAP@R"] == pytest.approx(one["final"]["MAP@R"], abs=0.03)
    assert (
        results["idml_jax.fit", 2]["closed_form"]["shrinkage"] == results["idml_jax.fit", 1]["closed_form"]["shrinkage"]
    )


AGREED = """
import os, signal, sys, time
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from idml_jax.runtime import hosts, interrupt, sharding
from idml_jax.runtime.checkpoint import Checkpoints
folder, port, index = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
hosts.connect(f"127.0.0.1:{port}", 2, index)
mesh, values = sharding.data_mesh(), np.random.default_rng(0).normal(size=(4096, 4)).astype(np.float32)
def state(step):
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    table = jax.make_array_from_callback(values.shape, split, lambda part: step * values[part])
    return {"proxies": table, "step": jax.make_array_from_callback((), whole, lambda part: np.int32(step))}
checkpoints = Checkpoints(folder / "checkpoints", "R@1", keep_latest=2)
for step in (3, 6):
    checkpoints.save(step, state(step), {"history": [step]}, {"R@1": 0.5})
checkpoints.wait()
checkpoints.close()
if index == 0:  # what the second process has written, and alone reads
    for path in (folder / "checkpoints" / "6" / "state" / "ocdbt.process_1" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:10])
hosts.wait("cut")
checkpoints = Checkpoints(folder / "checkpoints", "R@1", keep_latest=2)
read, record = checkpoints.resume(state(0))
for part in read["proxies"].addressable_shards:
    np.testing.assert_array_equal(part.data, 3 * values[part.index])
print("read", int(read["step"]), record["history"], checkpoints.latest, flush=True)
with interrupt.StopRequest() as stop:
    for count in range(1000):
        if count == 3 and index == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        try:
            stop.check()
        except interrupt.Stopped:
            print("stopped at", count, flush=True)
            break
        time.sleep(0.02)
checkpoints.close()
"""


@pytest.mark.slow
def test_two_processes_agree_on_the_checkpoint_and_on_where_to_stop(tmp_path):
    """The second cannot read its part of the newest, which the first can; a signal comes to the second alone."""
    port = free_port()
    command = [sys.executable, "-c", AGREED, str(tmp_path), str(port)]
    started = [
        subprocess.Popen(
            [*command, str(index)], env=environment_with(1), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for index in range(2)
    ]
    ends = finish(started, 300)
    assert [code for *_, code in ends] == [0, 0], ends
    # Gloo has lines of its own there.
    lines = [[x for x in out.splitlines() if x.startswith(("read", "stopped"))] for out, *_ in ends]
    read, stopped = zip(*lines, strict=True)
    assert set(read) == {"read 3 [3] 3"} and len(set(stopped)) == 1 and stopped[0].startswith("stopped at"), ends
    assert [p.name for p in (tmp_path / "damaged").iterdir()] == ["6"]
    assert "step 6: cannot be read by process 1; moved to" in ends[0][1]


STOPPED = """
import os, signal, sys, time
folder, workdir, port, index = sys.argv[1:]
from idml_jax.runtime import hosts, interrupt
from idml_jax.training import embedder, train
from runs_made import small_config
hosts.connect(f"127.0.0.1:{port}", 2, int(index))
real, calls = embedder.jit_embed_step, []
def slow(*args, **kwargs):
    calls.append(1)
    if len(calls) == 2 and index == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.5)
    return real(*args, **kwargs)
embedder.jit_embed_step = slow
try:
    train.train_and_evaluate(small_config(folder, **{"eval.batch_size": 4}), workdir)
except interrupt.Stopped as stopped:
    print(len(calls), stopped)
    sys.exit(interrupt.EXIT_CODE)
"""


@pytest.mark.slow
def test_a_signal_while_evaluating_stops_both_at_the_same_batch(image_folder, tmp_path):
    port, started = free_port(), []
    for index in range(2):
        command = [sys.executable, "-c", STOPPED, str(image_folder), str(tmp_path / "run"), str(port), str(index)]
        started.append(
            subprocess.Popen(
                command, env=environment_with(1), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
    ends = finish(started, 300)
    assert [code for *_, code in ends] == [75, 75], ends
    told = [re.search(r"^(\d+) stopped by SIG(TERM|USR1); nothing is saved yet", out, re.M) for out, *_ in ends]
    assert all(told), ends
    batches = {int(match.group(1)) for match in told}
    assert len(batches) == 1 and 2 <= batches.pop() < 24  # of the first evaluation, of 96 images


@pytest.mark.slow
def test_a_dead_process_stops_the_others_with_a_message(image_folder, tmp_path):
    more = ("--config.epochs=1000", "--config.eval.every_epochs=1000")
    started = start(tmp_path / "run", image_folder, 4, *more, devices=4)
    for line in started[0].stdout:
        if re.search(r"step 3/", line):
            break
    killed = started.pop(2)
    killed.kill()
    killed.communicate()
    for _, err, code in finish(started, 200):
        assert code in (134, -6)  # -6: ended by jax itself, which a shell calls 134
        assert "another process of this run has died" in err or "coordination service" in err.lower(), err[-2000:]


@pytest.mark.parametrize(
    "error, of_others",
    [
        (jax.errors.JaxRuntimeError("FAILED_PRECONDITION: Gloo all-reduce failed: Connection closed by peer"), True),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: the service does not answer"), True),
        (ValueError("UNKNOWN: Gloo all-reduce failed: Read error"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes"), False),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"), False),
        (ValueError("labels: 3 of 4"), False),
        (RuntimeError("dictionary changed size during iteration"), False),
    ],
)
def test_a_fault_of_this_process_is_not_taken_for_another_ones_death(error, of_others):
    """Whoever runs the command again after a lost process would do so for ever."""
    from idml_jax.runtime import hosts

    assert hosts.is_of_others(error) == of_others


def test_addresses_that_cannot_be_are_refused():
    from idml_jax.errors import UserError
    from idml_jax.runtime import hosts

    with pytest.raises(UserError, match="--coordinator=here: host:port of process 0, or auto"):
        hosts.connect("here", 2, 0)
    with pytest.raises(UserError, match="--coordinator=here:65536: host:port of process 0, or auto"):
        hosts.connect("here:65536", 2, 0)
    with pytest.raises(UserError, match=r"--process_index=2 must be in \[0, 2\), of --processes=2"):
        hosts.connect("here:1", 2, 2)


def test_processes_without_an_address_are_refused(tmp_path):
    """Each would train by itself, all in the same folder."""
    words = ["--config=glyphs:quick", f"--workdir={tmp_path / 'run'}", "--processes=2", "--process_index=1"]
    for more in ((), ("--coordinator=auto",)):
        command = [sys.executable, "-m", "idml_jax.main", *words, *more]
        done = subprocess.run(command, env=environment_with(1), capture_output=True, text=True)
        assert done.returncode == 1
        assert "error: --processes needs --coordinator=host:port of process 0" in done.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "index, more, told",
    [
        (1, "--config.optim.learning_rate=0.5", "config.optim.learning_rate = 0.002 there, 0.5 here"),
        (0, "--config.data.root=nowhere", "nowhere"),
        (1, "--config.data.root=nowhere", "nowhere"),
        (1, "--config.data.root=fewer", "other train images (96 there, 95 here)"),
        (1, "--config.model.init_from=/nowhere.safetensors", "nowhere.safetensors"),
    ],
)
def test_processes_that_would_train_something_else_all_end(image_folder, tmp_path, index, more, told):
    """With one line each, exit code 1 and nothing written."""
    shutil.copytree(image_folder, tmp_path / "fewer")
    next(path for path in sorted((tmp_path / "fewer" / "train").rglob("*")) if path.is_file()).unlink()
    more = more.replace("root=", f"root={tmp_path}/")
    ends = finish(start(tmp_path / "run", image_folder, 2, own={index: (more,)}))
    assert [code for *_, code in ends] == [1, 1], ends
    for process, (_, err, _) in enumerate(ends):
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        expected = told if process == index else f"process {index} of this run has stopped with an error"
        assert expected in line and "Fatal Python error" not in err, ends
    assert not (tmp_path / "run").exists()


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
