"""The train step on ConvNeXt, EfficientNet-Lite and GeM pooling: parts, frozen parameters, a run to the end."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs_made import last_state
from test_runtime import objective, optimizer
from test_train import QUICK, small_config

from idml_jax.errors import UserError
from idml_jax.inference import model as inference
from idml_jax.models import MODELS, EmbeddingModel, naming
from idml_jax.models.heads import Heads
from idml_jax.training import steps, train
from idml_jax.training.state import create_state


def setup(name, pooling, accumulate):
    return steps.StepSetup(
        model=EmbeddingModel(MODELS[name](frozen_statistics=True), Heads(8, 4, uncertainty_hidden=16), pooling),
        objective=objective(),
        optimizer=optimizer(name="sgd", momentum=0.0, weight_decay=0.0, frozen_norm=True),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        accumulate=accumulate,
    )


@pytest.mark.parametrize(
    "name,pooling",
    [pytest.param("convnext_toy", "avg", marks=pytest.mark.slow), ("efficientnet_toy", "gem")],
)
def test_a_step_in_parts_is_the_step_and_frozen_batchnorm_stays(name, pooling):
    rng = np.random.default_rng(0)
    data = {
        "image": jnp.asarray(rng.integers(0, 256, (8, 16, 16, 3)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, 4, 8), jnp.int32),
    }
    whole = setup(name, pooling, 1)

    @jax.jit
    def create(key):
        state = create_state(key, whole.model, whole.objective, whole.optimizer, (16, 16, 3))
        # With the 1e-6 that LayerScale starts from, blocks have no gradient to compare.
        scaled = lambda path, x: jnp.ones_like(x) if "gamma" in str(path) else x
        return state.replace(params=jax.tree_util.tree_map_with_path(scaled, state.params))

    before = naming.flatten(jax.tree.map(np.asarray, create(jax.random.key(0)).params["trunk"]))
    results = []
    for parts in (1, 2):
        state, metrics = steps.jit_train_step(create(jax.random.key(0)), data, setup=setup(name, pooling, parts))
        results.append(jax.tree.map(np.asarray, (state.params, metrics)))
    chex.assert_trees_all_close(*results, rtol=1e-3, atol=1e-5)
    after = naming.flatten(results[0][0]["trunk"])
    stayed = {path for path in before if np.array_equal(before[path], after[path])}
    assert stayed == {path for path in before if "bn" in path}


def test_frozen_normalisation_has_no_gradient():
    """It is not computed: only what learns counts in the gradient's length, and the backward pass has less to do."""
    frozen = setup("resnet_tiny", "avg", 1)
    learning = dataclasses.replace(frozen, optimizer=dataclasses.replace(frozen.optimizer, frozen_norm=False))
    rng = np.random.default_rng(0)
    data = {
        "image": jnp.asarray(rng.integers(0, 256, (8, 16, 16, 3)), jnp.uint8),
        "label": jnp.asarray(rng.integers(0, 4, 8), jnp.int32),
    }
    create = jax.jit(lambda key: create_state(key, frozen.model, frozen.objective, frozen.optimizer, (16, 16, 3)))
    before = create(jax.random.key(0))
    (still, metrics), (moved, others) = (
        jax.jit(partial(steps.train_step, setup=s))(before, data) for s in (frozen, learning)
    )
    flat = lambda state: naming.flatten(state.params["trunk"])
    old, new = flat(before), flat(moved)
    # A step of SGD without momentum, decay or clipping: the way of every parameter is its gradient.
    rate = float(metrics["learning_rate"])
    way = {path: np.square((np.asarray(old[path], np.float64) - new[path]) / rate).sum() for path in old}
    of_norm = sum(square for path, square in way.items() if "bn" in path)
    assert of_norm > 0.01 * sum(way.values())
    np.testing.assert_allclose(metrics["gradient_norm"] ** 2, others["gradient_norm"] ** 2 - of_norm, rtol=1e-3)
    for path, value in flat(still).items():
        np.testing.assert_allclose(value, old[path] if "bn" in path else new[path], rtol=1e-6, atol=1e-9, err_msg=path)
    flops = [
        jax.jit(partial(steps.train_step, setup=s)).lower(before, data).cost_analysis()["flops"]
        for s in (frozen, learning)
    ]
    assert flops[0] < flops[1]


def test_an_unknown_pooling_is_refused(image_folder):
    with pytest.raises(UserError, match="known: avg, max, avg_max, gem, token"):
        train.build(small_config(image_folder, **{"model.pooling": "median"}))


@pytest.mark.slow
def test_a_run_learns_its_power_after_warm_up(image_folder, tmp_path):
    config = small_config(image_folder, **{"model.pooling": "gem", "epochs": 2}, **QUICK)
    train.train_and_evaluate(config, tmp_path)
    learned, _ = last_state(config, tmp_path)
    power = learned.params["trunk"]["pool_p"]
    assert power.shape == (1,) and abs(float(power[0]) - 3) > 1e-4
    assert "params/trunk/pool_p" in naming.flatten(inference.load(tmp_path).variables)
