"""Gradient accumulation and rematerialisation: the same step with less memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_runtime import batch, fresh, objective, optimizer, setup, tiny
from test_train import small_config

from idml_jax import models
from idml_jax.errors import UserError
from idml_jax.models import EmbeddingModel
from idml_jax.runtime import sharding
from idml_jax.training import steps, train
from idml_jax.training.optim import Schedule

# Without moments, a step is the scaled gradient.
GRADIENT = optimizer(
    name="sgd", schedule=Schedule("constant", 0.1, 100), factors=(), momentum=0.0, weight_decay=0.0, clip_value=0.0
)

OBJECTIVES = {
    "proxies": {},
    "memory": dict(loss="contrastive", memory_size=48),
    "learned": dict(loss="margin_distance_weighted", learned="per_class"),
}


def two_steps(parts, model, **changes):
    s = setup(model, accumulate=parts, optimizer=GRADIENT, **changes)
    state = fresh(s)
    for i in range(2):
        state, metrics = steps.jit_train_step(state, batch(seed=i), setup=s)
    return jax.tree.map(np.asarray, (state, metrics))


@pytest.mark.parametrize(
    "name,alpha",
    [
        pytest.param("proxies", 1.0, marks=pytest.mark.slow),  # in parts on eight devices: test_golden.py
        pytest.param("learned", 1.0, marks=pytest.mark.slow),
        pytest.param("memory", 1.0, marks=pytest.mark.slow),
        pytest.param("memory", 0.0, marks=pytest.mark.slow),
    ],
)
def test_frozen_statistics_give_the_same_step_in_parts(name, alpha):
    """Compares the loss over the whole batch, all gradients, and the cross-batch memory."""
    changes = dict(objective=objective(**OBJECTIVES[name]), mixup_alpha=alpha)
    whole, whole_metrics = two_steps(1, tiny(frozen=True), **changes)
    parts, parts_metrics = two_steps(4, tiny(frozen=True), **changes)
    chex.assert_trees_all_close(whole_metrics, parts_metrics, rtol=1e-4)
    chex.assert_trees_all_close(whole.memory, parts.memory, rtol=1e-4, atol=1e-5)
    start = jax.tree.map(np.asarray, fresh(setup(tiny(frozen=True), **changes)).params)
    for group in whole.params:
        move = lambda state, group=group: jax.tree.map(lambda a, b: a - b, state.params[group], start[group])
        moves = move(whole), move(parts)
        size = max(np.abs(x).max() for x in jax.tree.leaves(moves[0]))
        assert size > 1e-4, group
        chex.assert_trees_all_close(*moves, rtol=1e-3, atol=1e-3 * size)


@pytest.mark.slow
def test_a_loss_per_part_would_be_another():
    """Pairs across parts count: losses of two separate halves differ from the loss of the batch in two parts."""
    s = setup(tiny(frozen=True), objective=objective(loss="contrastive"), mixup_alpha=0.0, accumulate=2)
    data = batch()
    _, together = steps.jit_train_step(fresh(s), data, setup=s)
    halves = [steps.jit_train_step(fresh(s), jax.tree.map(lambda x, i=i: x[i::2], data), setup=s)[1] for i in (0, 1)]
    assert abs(float(together["loss"]) - np.mean([float(h["loss"]) for h in halves])) > 1e-4


def test_live_statistics_are_those_of_every_part():
    """Compares with the parts one by one: each part has its statistics, and the running ones are updated in turn."""
    s = setup(tiny(), objective=objective(), mixup_alpha=0.0, accumulate=2, optimizer=GRADIENT)
    state, data = fresh(s), batch()
    images = steps.normalize(data["image"], s.mean, s.std)

    def total(params):
        stats, features = state.batch_stats, jnp.zeros((16, 8))
        for part in (0, 1):
            variables = {"params": {"trunk": params["trunk"]}, "batch_stats": stats}
            some, new = s.model.apply(
                variables, images[part::2], True, method=EmbeddingModel.features, mutable=["batch_stats"]
            )
            features, stats = features.at[part::2].set(some), new["batch_stats"]
        out = s.model.apply({"params": {"heads": params["heads"]}}, features, method=EmbeddingModel.embed)
        embedding = steps.Embedding(out["semantic"], out["uncertainty"])
        return s.objective(params, embedding, data["label"]), stats

    (loss, stats), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(state.params)
    expected, _ = GRADIENT.update(grads, state.opt_state, state.params, state.step)
    stats, expected = jax.tree.map(np.asarray, (stats, expected))
    after, metrics = steps.jit_train_step(state, data, setup=s)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    chex.assert_trees_all_close(jax.tree.map(np.asarray, after.batch_stats), stats, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(jax.tree.map(np.asarray, after.params), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_frozen_trunk_stays_unchanged_in_parts():
    s = setup(tiny(frozen=True), accumulate=4, optimizer=GRADIENT)
    one = setup(tiny(frozen=True), optimizer=GRADIENT)
    before = jax.tree.map(np.asarray, fresh(s))
    after, _ = steps.jit_train_step(fresh(s), batch(), setup=s, train_trunk=False)
    expected, _ = steps.jit_train_step(fresh(one), batch(), setup=one, train_trunk=False)
    chex.assert_trees_all_equal(before.params["trunk"], jax.tree.map(np.asarray, after.params["trunk"]))
    chex.assert_trees_all_close(after.params, expected.params, rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # three steps in parts on eight devices are in test_golden.py
def test_the_same_in_parts_on_eight_devices():
    s = setup(tiny(frozen=True), accumulate=2, optimizer=GRADIENT)
    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = sharding.data_mesh(devices)
        state = sharding.replicate(fresh(s), mesh)
        data = sharding.shard_batch({k: np.asarray(v) for k, v in batch().items()}, mesh)
        with jax.transfer_guard("disallow"):
            state, metrics = steps.jit_train_step(state, data, setup=s)
        results.append(jax.tree.map(np.asarray, (state.params, metrics)))
    chex.assert_trees_all_close(*results, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name,run",
    [("resnet_tiny", True), pytest.param("vit_tiny", True, marks=pytest.mark.slow), ("pyramidnet_tiny", False)],
)
def test_rematerialised_blocks_give_the_same_gradient(name, run):
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    results, variables = [], None
    for remat in (False, True):
        model = models.create_model(name, embedding_dim=4, uncertainty_dim=3, remat=remat)
        variables = variables or jax.jit(model.init)(jax.random.key(0), images)

        def loss(params, model=model, variables=variables):
            out, updated = model.apply({**variables, "params": params}, images, True, mutable=["batch_stats"])
            return jnp.sum(out["semantic"][:, 0]), updated

        gradient = jax.grad(loss, has_aux=True)
        assert ("remat" in str(jax.make_jaxpr(gradient)(variables["params"]))) is remat
        if run:
            results.append(jax.jit(gradient)(variables["params"]))
    if run:
        chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


def test_parts_need_less_memory():
    def held(parts):
        s = setup(tiny(frozen=True), accumulate=parts)
        state = jax.eval_shape(lambda: fresh(s))
        compiled = steps.jit_train_step.lower(state, batch(1024), setup=s).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert held(16) < 0.5 * held(1)


def test_settings_reach_the_step_and_impossible_ones_are_refused(image_folder):
    run = train.build(small_config(image_folder, **{"optim.accumulate": 4}))
    assert run.setup.accumulate == 4
    with pytest.raises(UserError, match=r"batch_size \(32\) must be a multiple of config.optim.accumulate \(3\)"):
        train.build(small_config(image_folder, **{"optim.accumulate": 3}))
    with pytest.raises(UserError, match="remat: convnet_tiny has no blocks to compute again"):
        train.build(small_config(image_folder, **{"model.remat": True}))
    with pytest.raises(UserError, match="pooling 'token' needs a class token, which convnet_tiny does not have"):
        train.build(small_config(image_folder, **{"model.pooling": "token"}))
