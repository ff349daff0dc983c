"""The first step is compiled beside what comes before it, once, and for the state and the batches that come."""

import csv
import logging
import threading
from types import SimpleNamespace

import chex
import jax
import pytest
from runs_made import small_config

from idml_jax.runtime import interrupt, sharding
from idml_jax.training import steps, train
from idml_jax.training.ahead import Ahead, batch_shapes
from idml_jax.training.loop import Trainer


def table_of_label_sets(folder):
    """The images of a folder as a table in which each has two labels."""
    files = sorted(folder.glob("*/*/*.*"))
    path = folder / "sets.csv"
    with open(path, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["path", "labels", "split"])
        for file in files:
            labels = f"{file.parent.name}|{'even' if int(file.parent.name[-1], 36) % 2 else 'odd'}"
            writer.writerow([file.relative_to(folder), labels, file.parents[1].name])
    return path


def compiled_by_main_thread(config, workdir, caplog):
    """Number of times that the calling thread compiled the train step; ``jax.log_compiles`` covers only that thread."""
    with caplog.at_level(logging.WARNING, "jax"), jax.log_compiles():
        train.train_and_evaluate(config, workdir)
    return sum("Finished XLA compilation of jit(train_step)" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss.name": "multi_similarity", "data.root": "sets"},
        pytest.param({"model.semantic_init": "whiten"}, marks=pytest.mark.slow),
        pytest.param(
            {"loss.name": "contrastive", "memory.size": 64, "memory.warmup_epochs": 0}, marks=pytest.mark.slow
        ),
    ],
    ids=["label sets", "whitened", "memory"],
)
def test_the_first_step_finds_the_program_compiled_ahead(image_folder, tmp_path, caplog, monkeypatch, changes):
    if "data.root" in changes:
        changes = {**changes, "data.root": str(table_of_label_sets(image_folder))}
    config = small_config(image_folder, **{"epochs": 1, "max_steps": 2, "optim.warmup_epochs": 0, **changes})
    order, measure, wait = [], train._measure_untrained, Ahead.wait
    monkeypatch.setattr(train, "_measure_untrained", lambda trainer: (order.append("measured"), measure(trainer)))
    monkeypatch.setattr(
        Ahead, "wait", lambda ahead, check: (order.append(ahead._thread is not None), wait(ahead, check))
    )
    assert compiled_by_main_thread(config, tmp_path / "run", caplog) == 0
    assert order == ["measured", True, False]  # the second step has nothing to wait for


def test_without_it_the_first_step_compiles(image_folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(Ahead, "start", lambda *_: None)
    # A seed of its own: no other test of this process has compiled that step.
    config = small_config(image_folder, **{"epochs": 1, "max_steps": 1, "eval.untrained": False, "seed": 4321})
    assert compiled_by_main_thread(config, tmp_path / "run", caplog) == 1


def test_the_shapes_ahead_are_those_of_the_batches(image_folder, tmp_path):
    for root in (image_folder, table_of_label_sets(image_folder)):
        config = small_config(root, **{"loss.name": "multi_similarity"})
        run = train.build(config)
        trainer = Trainer.__new__(Trainer)
        trainer.run, trainer.step = run, 0
        batch = next(iter(trainer._batches()))
        placed = sharding.shard_batch({k: batch[k] for k in ("image", "label")}, run.mesh)
        for name, expected in batch_shapes(run).items():
            assert (placed[name].shape, placed[name].dtype) == (expected.shape, expected.dtype)
            assert placed[name].sharding == expected.sharding


@pytest.mark.parametrize("changes", [{}, {"optim.ema": 0.9}, {"sharding.proxies": "split"}])
def test_the_shapes_ahead_are_those_of_the_state(image_folder, changes):
    run = train.build(small_config(image_folder, **changes))
    state, shapes = run.initial_state(), run.state_shapes()
    chex.assert_trees_all_equal_structs(state, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, shapes)
    for array, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert array.sharding == shape.sharding and array.weak_type == shape.weak_type


def test_what_cannot_be_compiled_ahead_is_left_to_the_step(image_folder, monkeypatch):
    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    run = train.build(small_config(image_folder))
    shapes = run.state_shapes().replace(params={})
    ahead = Ahead()
    with monkeypatch.context() as patch:
        patch.setattr(type(run), "state_shapes", lambda _: shapes)
        ahead.start(run)
    assert ahead._thread is not None
    ahead.wait(lambda: None)
    assert not raised


def test_no_step_is_compiled_ahead_with_debug_checks(image_folder):
    run = train.build(small_config(image_folder, debug="nans"))
    ahead = Ahead()
    ahead.start(run)
    assert ahead._thread is None


def test_a_stop_does_not_wait_for_the_compiler(image_folder, monkeypatch):
    """As when a machine is taken away within half a minute: the check raises, and the wait ends."""
    run = train.build(small_config(image_folder))
    compiling = threading.Event()
    monkeypatch.setattr(steps, "jit_train_step", SimpleNamespace(lower=lambda *_, **__: compiling.wait(60)))
    ahead = Ahead()
    ahead.start(run)

    def check():
        raise interrupt.Stopped("SIGTERM")

    with pytest.raises(interrupt.Stopped):
        ahead.wait(check)
    assert ahead._thread.is_alive()
    compiling.set()
    ahead.wait(check)
