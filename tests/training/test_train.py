"""Complete runs as a user starts them: training, resuming, evaluating, and refusals."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from runs_made import assert_same_run, rows, small_config

from idml_jax.errors import UserError
from idml_jax.runtime.files import write_json
from idml_jax.training import embedder, loop, train, workdir
from idml_jax.training.build import data_of

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_writes_all_its_outputs(finished):
    workdir, result = finished
    assert json.loads((workdir / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["config"]["epochs"] == 3 and result["versions"]["jax"] == jax.__version__
    for when in ("untrained", "final", "best"):
        for name in ("R@1", "R@2", "R@4", "R@8", "RP", "MAP@R"):
            assert 0 <= result[when][name] <= 1
    assert result["final"]["queries"] == 96
    assert 0 <= result["final"]["P(u_mixed>u)"] <= 1
    assert result["images_per_second"] > 0 and result["seconds_to_first_step"] > 0
    steps = [r["step"] for r in rows(workdir) if "train/loss" in r]
    # Nine steps in three epochs, a row every two steps and at the end of each epoch.
    assert steps == [2, 3, 4, 6, 8, 9]
    assert [r["step"] for r in rows(workdir) if "eval/R@1" in r] == [0, 3, 6, 9]
    kept = {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}
    assert 9 in kept and result["best"]["step"] in kept and len(kept) <= 3


def test_best_is_the_best_of_the_history(finished):
    _, result = finished
    best = max(r["R@1"] for r in result["history"])
    assert result["best"]["R@1"] == pytest.approx(best)
    assert next(r for r in result["history"] if r["step"] == result["best"]["step"])["R@1"] == pytest.approx(best)


# Without the probes of the last evaluation, which other tests read.
QUICK = {"eval.ambiguity_images": 0, "eval.cluster": False}


def test_training_helps(image_folder, tmp_path):
    config = small_config(image_folder, **{"epochs": 15, "eval.every_epochs": 15, "optim.warmup_epochs": 0}, **QUICK)
    result = train.train_and_evaluate(config, tmp_path)
    assert result["final"]["MAP@R"] > result["untrained"]["MAP@R"] + 0.1


@pytest.mark.parametrize("task", ["retrieval", "classification"])
def test_the_images_are_embedded_once_at_the_end(task, image_folder, tmp_path, monkeypatch):
    real, times = embedder.pipeline.eval_batches, []

    def counted(*args, **kwargs):
        times.append(len(args[0]))
        return real(*args, **kwargs)

    monkeypatch.setattr(embedder.pipeline, "eval_batches", counted)
    kind = {} if task == "retrieval" else {"task": task, "eval.best_metric": "top1", "mixup.enabled": False}
    if task == "classification":
        test = image_folder.with_name("same_classes")
        shutil.copytree(image_folder / "train", test / "train")
        shutil.copytree(image_folder / "train", test / "test")
        image_folder = test
    config = small_config(image_folder, **{"epochs": 2, "eval.untrained": False, **kind}, **QUICK)
    result = train.train_and_evaluate(config, tmp_path / "run")
    measured = {
        name: result["history"][-1][name] for name in ("R@1", "MAP@R", "top1", "nll") if name in result["final"]
    }
    assert measured == {name: result["final"][name] for name in measured} and len(measured) == 2
    best = result["best"]["step"] != result["history"][-1]["step"]
    assert len(times) == 2 + best and len(set(times)) == 1


def test_grain_is_imported_before_the_threads_of_the_writers_import_anything(image_folder, tmp_path, monkeypatch):
    called = []

    class Reached(Exception):
        pass

    def writer(*args, **kwargs):
        raise Reached

    monkeypatch.setattr(train.pipeline, "load_reader", lambda: called.append("grain"))
    monkeypatch.setattr(train, "MetricWriter", writer)
    with pytest.raises(Reached):
        train.train_and_evaluate(small_config(image_folder, **QUICK), tmp_path)
    assert called == ["grain"]


def train_killed_at(config, workdir, call, monkeypatch):
    """Trains until the given step is about to run, then as if killed there, then to the end."""
    real, calls = loop.steps.jit_train_step, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(loop.steps, "jit_train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train.train_and_evaluate(config, workdir)
    monkeypatch.setattr(loop.steps, "jit_train_step", real)
    assert not (workdir / "result.json").exists()
    return train.train_and_evaluate(config, workdir)


def test_stopped_and_resumed_equals_uninterrupted(image_folder, finished, tmp_path, monkeypatch):
    """Killed in the middle of the second epoch and started again: same parameters, same log, to the bit."""
    reference, _ = finished
    config = small_config(image_folder)
    train_killed_at(config, tmp_path, 5, monkeypatch)
    assert_same_run(config, reference, tmp_path)


def test_memory_and_learned_boundary_survive_a_stop(image_folder, tmp_path, monkeypatch):
    changes = {"loss.name": "margin_distance_weighted", "loss.learned": "per_class", "memory.size": 64, "epochs": 2}
    config = small_config(image_folder, **changes, **{"eval.untrained": False, "optim.warmup_epochs": 0}, **QUICK)
    train.train_and_evaluate(config, tmp_path / "whole")
    train_killed_at(config, tmp_path / "stopped", 5, monkeypatch)
    state = assert_same_run(config, tmp_path / "whole", tmp_path / "stopped")
    assert state.memory.valid.all() and state.params["loss"]["beta"].shape == (8,)


def test_a_finished_run_is_left_alone_and_a_missing_result_made_again(image_folder, finished, tmp_path):
    workdir, result = finished
    shutil.copytree(workdir, tmp_path / "copy")
    assert train.train_and_evaluate(small_config(image_folder), tmp_path / "copy") == result
    (tmp_path / "copy" / "result.json").unlink()
    # And fields that do not change the outcome may differ.
    again = train.train_and_evaluate(small_config(image_folder, **{"data.threads": 1}), tmp_path / "copy")
    assert again["final"] == result["final"] and again["history"] == result["history"]


def test_evaluation_of_a_checkpoint(finished):
    workdir, result = finished
    metrics = train.evaluate_checkpoint(workdir)
    assert metrics["R@1"] == pytest.approx(result["best"]["R@1"]) and metrics["step"] == result["best"]["step"]
    assert json.loads((workdir / "eval.json").read_text())["R@1"] == metrics["R@1"]


def test_another_config_or_architecture_in_the_workdir_is_refused(image_folder, finished, tmp_path):
    workdir, _ = finished
    with pytest.raises(UserError, match="other settings: config.optim.learning_rate = 0.003 there, 0.1 here"):
        train.train_and_evaluate(small_config(image_folder, **{"optim.learning_rate": 0.1}), workdir)
    # The same settings on paper, another network in the checkpoint.
    shutil.copytree(workdir, tmp_path / "copy")
    changed = small_config(image_folder, **{"model.embedding_dim": 24})
    write_json(tmp_path / "copy" / "config.json", changed.to_dict())
    (tmp_path / "copy" / "result.json").unlink()
    with pytest.raises(UserError, match=r"another architecture: .*semantic.* is \(16,\) there, \(24,\) here"):
        train.train_and_evaluate(changed, tmp_path / "copy")


def test_a_non_finite_loss_stops_the_run(image_folder, tmp_path):
    config = small_config(image_folder, **{"data.std": (1e-38,), "eval.untrained": False})
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step 1;"):
        train.train_and_evaluate(config, tmp_path)
    assert not (tmp_path / "result.json").exists()


def command(*arguments, cwd=ROOT):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "idml_jax.main", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--config=configs/glyphs.py:slow", "--workdir={tmp}/run"], "known variants: quick"),
        (["--config=configs/folder.py:scratch", "--config.data.root={tmp}/x", "--workdir={tmp}/run"], "no such folder"),
    ],
)
def test_the_command_reports_bad_input_in_one_line(tmp_path, arguments, message):
    """Runs the command as a separate process; ``test_bad_input.py`` has more cases."""
    done = command(*(a.format(tmp=tmp_path) for a in arguments))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_command_trains_evaluates_and_writes_tensorboard(image_folder, tmp_path):
    workdir = tmp_path / "run"
    # From another folder: nothing may depend on the current one.
    done = command(
        f"--config={ROOT}/configs/omniglot.py",
        f"--workdir={workdir}",
        f"--config.data.root={image_folder}",
        "--config.epochs=1",
        "--config.batch_size=32",
        "--config.eval.batch_size=32",
        "--config.eval.ambiguity_images=0",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for text in ("96 training images of 8 classes", "untrained  R@1", "trained    R@1", "MAP@R", "to go", "images/s"):
        assert text in done.stdout, text
    assert str(workdir / "checkpoints") in done.stdout
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    done = command("--mode=eval", f"--workdir={workdir}", cwd=tmp_path)
    assert done.returncode == 0 and "R@1" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "name,size,message",
    [
        ("vit_tiny", 20, r"patches of 8 pixels needs images of a multiple of it; got 20 x 20 \(config.model.name"),
        ("convnet4", 12, r"depth 4 needs images of at least 16 pixels; got 12 x 12 .*config.data.image_size"),
    ],
)
def test_image_sizes_that_the_network_cannot_see_are_refused_before_anything_is_written(
    image_folder, tmp_path, name, size, message
):
    sizes = {"model.name": name, "data.image_size": size, "data.resize": size}
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(small_config(image_folder, **sizes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_learns_where_its_images_have_moved_to(image_folder, tmp_path):
    run, there = tmp_path / "a run", tmp_path / "gone"
    run.mkdir()
    workdir.remember(small_config(there), run)
    stored = workdir.read(run)
    command = rf"no such folder \(config.data.root\); if .* --mode=eval --workdir='{run}' --config.data.root=PATH"
    with pytest.raises(UserError, match=command), workdir.finding_images(stored, run):
        data_of(stored)
    told = workdir.remember_places(small_config(image_folder), run)
    assert told == [f"config.data.root = {image_folder} in place of {there}"]
    assert len(data_of(workdir.read(run)).train) == 96
    # The images are at the old place too.
    assert workdir.remember_places(small_config(image_folder.parent), run) == []
    assert workdir.read(run).data.root == str(image_folder)


def test_a_run_finds_its_data_from_any_folder(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(image_folder.parent)
    workdir.remember(small_config(image_folder.name, **{"data.data_dir": "~/sets"}), tmp_path)
    monkeypatch.chdir(tmp_path)
    stored = workdir.read(tmp_path).data
    assert stored.root == str(image_folder) and stored.data_dir == str(Path.home() / "sets")
    assert len(data_of(workdir.read(tmp_path)).train) == 96
    # A resumed run does not depend on the folder that it was started from.
    workdir.remember(small_config(image_folder), tmp_path)
