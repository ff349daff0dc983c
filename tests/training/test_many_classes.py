"""Proxies split over devices by classes: the same training, and no device ever has them all."""

import re

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from runs_made import small_config
from test_runtime import batch, objective, optimizer, setup, tiny

from idml_jax import ism
from idml_jax.errors import UserError
from idml_jax.ism import Embedding
from idml_jax.runtime import sharding
from idml_jax.runtime.checkpoint import Checkpoints
from idml_jax.training import steps, train
from idml_jax.training.config import SPLIT_CLASSES
from idml_jax.training.state import create_state, create_state_on
from idml_jax.training.tasks import TASKS

CLASSES = 1009  # a prime, found nowhere else in a program; 3840 rows when split
ROWS = sharding.padded_rows(CLASSES)


def made(mesh, split):
    """Setup, state and a batch on a mesh."""
    what = objective(num_classes=CLASSES, mesh=mesh if split else None)
    # The rate is that of SGD without moments, so a step shows the gradient and not its sign alone.
    rule = optimizer(name="sgd", momentum=0.5, weight_decay=1e-2, clip_value=0.0)
    s = setup(tiny(frozen=True), objective=what, optimizer=rule)
    state = create_state_on(mesh, jax.random.key(0), s.model, s.objective, s.optimizer, (8, 8, 1))
    data = {k: np.asarray(v) for k, v in batch().items()}
    data["label"] = np.random.default_rng(1).integers(0, CLASSES, 16).astype(np.int32)
    return s, state, sharding.shard_batch(data, mesh)


def has_axis(compiled, size):
    """Whether the program of one device knows an array with an axis of this size."""
    return re.search(rf"[\[,]{size}[\],]", compiled.as_text()) is not None


CASES = {
    "introspective ProxyAnchor": dict(loss="proxy_anchor"),
    "introspective ProxyNCA": dict(loss="proxy_nca"),
    "plain ProxyAnchor": dict(loss="proxy_anchor", introspective=False),
    "plain ProxyNCA": dict(loss="proxy_nca", introspective=False),
    "absolute ProxyAnchor": dict(loss="proxy_anchor", variant="absolute"),
    "released ProxyAnchor": dict(loss="proxy_anchor", variant="released"),
}
QUICK = "introspective ProxyNCA"  # its softmax is over all devices


@pytest.mark.parametrize("case", [c if c == QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_loss_and_gradients_of_split_proxies_are_those_of_whole_ones(case):
    """With the proxies of three images very near to them, and ten classes that no image has."""
    mesh, results = sharding.data_mesh(), []
    keys = jax.random.split(jax.random.key(0), 2)
    semantic = ism.l2_normalize(jax.random.normal(keys[0], (16, 8)))
    embedding = Embedding(semantic, jax.random.normal(keys[1], (16, 4)))
    labels = np.random.default_rng(1).integers(0, CLASSES - 10, 16).astype(np.int32)
    for split in (False, True):
        what = objective(num_classes=CLASSES, mesh=mesh if split else None, **CASES[case])
        params = what.init(jax.random.key(2))
        params["proxies"] = params["proxies"].at[labels[:3]].set(1.001 * semantic[:3])
        loss = lambda params, embedding, labels, what=what: what(params, embedding, labels)
        placed = jax.device_put(params, sharding.placement(params, mesh, what.split))
        rows = sharding.shard_batch({"s": semantic, "u": embedding.uncertainty, "l": labels}, mesh)
        arguments = placed, Embedding(rows["s"], rows["u"]), rows["l"]
        compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
        assert has_axis(compiled, CLASSES) is not split  # so what is asserted next can fail
        assert not has_axis(compiled, ROWS)
        value, (of_params, of_embedding) = jax.tree.map(np.asarray, compiled(*arguments))
        assert not np.any(of_params["proxies"][CLASSES:])
        results.append((value, of_params["proxies"][:CLASSES], of_embedding))
    (value, *gradients), (split_value, *split_gradients) = results
    np.testing.assert_allclose(split_value, value, rtol=1e-5)
    largest = max(np.abs(one).max() for one in jax.tree.leaves(gradients))
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(split_gradients), strict=True):
        # In the published formula nothing but rounding is left of the uncertainty's gradient.
        size = largest if case.startswith("released") else np.abs(one).max()
        assert size > 0 or case.startswith(("plain", "released"))  # of the uncertainty, there
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-4 * size)


def test_two_steps_with_split_proxies_and_no_device_has_them_all():
    mesh, ends = sharding.data_mesh(), []
    for split in (False, True):
        s, state, data = made(mesh, split)
        start = jax.tree.map(np.asarray, state.params)
        compiled = steps.jit_train_step.lower(state, data, setup=s).compile()
        assert has_axis(compiled, CLASSES) is not split and not has_axis(compiled, ROWS)
        for _ in range(2):
            state, metrics = compiled(state, data)
        if split:
            for path, leaf in jax.tree_util.tree_leaves_with_path(state):
                table = "proxies" in jax.tree_util.keystr(path) and leaf.ndim == 2
                assert leaf.sharding.is_fully_replicated is not table, path
                assert not table or {x.data.shape for x in leaf.addressable_shards} == {(ROWS // 8, 8)}
        state, metrics = jax.tree.map(np.asarray, (state, metrics))
        if split:
            # Padding is no class: zero at the start, and never moved.
            assert not np.any(start["proxies"][CLASSES:]) and not np.any(state.params["proxies"][CLASSES:])
            start["proxies"], state.params["proxies"] = (p["proxies"][:CLASSES] for p in (start, state.params))
        ends.append((start, state.params, metrics))
    (start, params, metrics), (split_start, split_params, split_metrics) = ends
    chex.assert_trees_all_equal(start, split_start)
    chex.assert_trees_all_close(metrics, split_metrics, rtol=1e-5)
    for group in params:
        move, split_move = (jax.tree.map(lambda a, b: a - b, p[group], start[group]) for p in (params, split_params))
        size = max(np.abs(x).max() for x in jax.tree.leaves(move))
        assert size > 1e-5, group
        chex.assert_trees_all_close(move, split_move, rtol=1e-3, atol=1e-3 * size)


def abstract(s, mesh):
    """Shapes and places of a state and a batch, of which nothing is computed."""
    state = jax.eval_shape(lambda: create_state(jax.random.key(0), s.model, s.objective, s.optimizer, (8, 8, 1)))
    put = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    return (
        jax.tree.map(put, state, sharding.placement(state, mesh, s.objective.split)),
        jax.tree.map(lambda x: put(x, rows), batch()),
    )


def test_split_proxies_are_saved_and_read_on_other_numbers_of_devices(tmp_path):
    s, state, _ = made(sharding.data_mesh(), True)
    # Moments that are not all zero.
    moments = jax.tree.map(lambda x: 2.0 * state.params["proxies"] if x.ndim == 2 else x, state.opt_state["proxies"])
    state = state.replace(opt_state={**state.opt_state, "proxies": moments})
    written = jax.tree.map(np.asarray, state)
    checkpoints = Checkpoints(tmp_path / "checkpoints", "R@1")
    checkpoints.save(1, state, {"history": []}, {"R@1": 0.5})
    checkpoints.wait()
    for devices in (8, 2, 1):
        read, _ = checkpoints.resume(abstract(s, sharding.data_mesh(jax.devices()[:devices]))[0])
        chex.assert_trees_all_equal(jax.tree.map(np.asarray, read), written)
        tables = [x for x in jax.tree.leaves(read.opt_state["proxies"]) if x.ndim == 2]
        assert len(tables) == 1
        for table in (read.params["proxies"], *tables):
            assert {x.data.shape for x in table.addressable_shards} == {(ROWS // devices, 8)}
    checkpoints.close()


@pytest.mark.slow
def test_memory_of_a_device_is_an_eighth():
    """Of a step that is compiled only: 100,000 classes."""
    mesh, classes = sharding.data_mesh(), 100_000
    s = setup(tiny(frozen=True), objective=objective(num_classes=classes, mesh=mesh))
    compiled = steps.jit_train_step.lower(*abstract(s, mesh), setup=s).compile()
    rows = sharding.padded_rows(classes)
    assert has_axis(compiled, rows // 8) and not has_axis(compiled, rows) and not has_axis(compiled, classes)
    table = 3 * 4 * 8 * rows  # and both moments
    assert table / 8 < compiled.memory_analysis().argument_size_in_bytes < 1.2 * table / 8


def test_when_proxies_are_split(image_folder):
    config = small_config(image_folder)
    splits = TASKS["retrieval"]._splits_proxies
    assert not splits(config, SPLIT_CLASSES - 1) and splits(config, SPLIT_CLASSES)
    config.sharding.proxies = "whole"
    assert not splits(config, SPLIT_CLASSES)
    config.sharding.proxies = "split"
    assert splits(config, 2)
    run = train.build(config)
    assert run.setup.objective.mesh == run.mesh and run.setup.objective.proxy_rows == sharding.ROW_MULTIPLE
    config.loss.name = "contrastive"
    with pytest.raises(UserError, match="config.sharding.proxies = 'split': the loss contrastive has no proxies"):
        train.build(config)
    config.sharding.proxies = "everywhere"
    with pytest.raises(UserError, match="config.sharding.proxies = 'everywhere'; known: auto, split, whole"):
        train.build(config)
    with pytest.raises(UserError, match="3840 rows for 12 classes do not split over 7 devices; use a number of"):
        sharding.check_rows(12, sharding.data_mesh(jax.devices()[:7]))
