"""``optim.trunk`` and ``optim.layer_decay``: the part of the trunk that learns, and the rate of every depth."""

import os
import signal
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from runs_made import assert_same_run, last_state, small_config
from test_runtime import batch, objective, optimizer

from idml_jax import models
from idml_jax.errors import UserError
from idml_jax.models.depth import depths_of
from idml_jax.models.heads import Heads
from idml_jax.models.layers import BatchNorm
from idml_jax.models.naming import flatten
from idml_jax.runtime import sharding
from idml_jax.runtime.interrupt import Stopped
from idml_jax.training import loop, steps, train, workdir
from idml_jax.training.learning import WHOLE_TRUNK, TrunkLearning
from idml_jax.training.optim import Schedule
from idml_jax.training.state import create_state

SIZE = (16, 16, 1)
GRADIENT = dict(
    name="sgd", momentum=0.0, weight_decay=0.0, clip_value=0.0, factors=(), schedule=Schedule("constant", 0.1, 100)
)
four_layers = lambda folder, **changes: small_config(folder, **{"model.name": "convnet4"} | changes)
of_depth = lambda depths, depth: [part for part, own in depths.parts if own == depth]


@pytest.mark.parametrize(
    "name,blocks,first,last",
    [
        ("vit_tiny", 2, {"patch_embed", "cls_token", "pos_embed"}, {"blocks_1", "norm"}),
        ("resnet18_small", 8, {"conv1", "bn1"}, {"layer4_1"}),
        ("pyramidnet_tiny", 3, {"conv1", "bn1"}, {"layer3_0", "bn_final"}),
        ("convnet4", 4, set(), {"conv4", "bn4"}),
    ],
)
def test_every_part_has_a_depth(name, blocks, first, last):
    depths = depths_of(models.create_model(name), (32, 32, 3))
    assert depths.blocks == blocks
    assert set(of_depth(depths, 0)) == first and set(of_depth(depths, blocks)) == last
    middle = [part for part, depth in depths.parts if 0 < depth < blocks]
    assert [depths.of(f"{part}/conv1/kernel") for part in middle] == sorted(dict(depths.parts)[m] for m in middle)


class Staged(nn.Module):
    """Blocks inside of stages, as ConvNeXt's, with a layer between two stages."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(4, name="stem_0")(x)
        for stage in range(2):
            x = Stage(stage > 0, name=f"stages_{stage}")(x)
        return nn.LayerNorm(name="final_norm")(x)


class Stage(nn.Module):
    downsample: bool

    @nn.compact
    def __call__(self, x):
        if self.downsample:
            x = nn.Dense(4, name="downsample_1")(x)
        for block in range(2):
            x = x + Inner(name=f"blocks_{block}")(x)
        return x


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="layers_0")(nn.LayerNorm(name="LayerNorm_0")(x))


def test_blocks_inside_of_stages():
    depths = depths_of(models.EmbeddingModel(Staged(), Heads(4, 4)), SIZE)
    assert depths.blocks == 4
    assert of_depth(depths, 0) == ["stem_0"]
    assert of_depth(depths, 2) == ["stages_0/blocks_1"]
    assert set(of_depth(depths, 3)) == {"stages_1/blocks_0", "stages_1/downsample_1"}
    assert set(of_depth(depths, 4)) == {"stages_1/blocks_1", "final_norm"}
    assert depths.of("stages_1/blocks_0/layers_0/kernel") == 3


def test_rates_fall_with_the_distance_from_the_last_block():
    model = models.create_model("vit_tiny")
    shapes = jax.eval_shape(model.trunk.init, jax.random.key(0), jnp.zeros((1, *SIZE)))["params"]
    params = {"trunk": jax.tree.map(lambda x: np.full(x.shape, 2, np.float32), shapes), "heads": np.ones(2, np.float32)}
    rule = optimizer(**GRADIENT | {"weight_decay": 0.5, "trunk": TrunkLearning(depths_of(model, SIZE), decay=0.5)})
    grads = jax.tree.map(np.ones_like, params)
    moved, _ = jax.jit(rule.update)(grads, rule.init(params), params, 0)
    factors = {"blocks_1": 1.0, "norm": 1.0, "blocks_0": 0.5, "patch_embed": 0.25, "cls_token": 0.25, "pos_embed": 0.25}
    assert set(moved["trunk"]) == set(factors)
    for part, factor in factors.items():
        for leaf in jax.tree.leaves(moved["trunk"][part]):
            np.testing.assert_allclose(leaf, 2 - 0.1 * factor * (1 + 0.5 * 2), rtol=1e-6)
    np.testing.assert_allclose(moved["heads"], 1 - 0.1 * 1.5, rtol=1e-6)


def prepared(name, count, *, rule=GRADIENT, model=None, **changes):
    """The set-up of a step in which the last ``count`` blocks learn (``None``: everything)."""
    settings = {"embedding_dim": 8, "uncertainty_dim": 4, "uncertainty_hidden": 16, "pooling": "avg"}
    net = models.create_model(name, **settings | (model or {}))
    depths = depths_of(net, SIZE)
    learning = WHOLE_TRUNK if count is None else TrunkLearning(depths, depths.blocks - count + 1)
    parts = dict(model=net, objective=objective(), optimizer=optimizer(**rule, trunk=learning))
    return steps.StepSetup(**parts, mean=(0.5,), std=(0.25,), **changes)


def fresh(s):
    return create_state(jax.random.key(0), s.model, s.objective, s.optimizer, SIZE, s.ema > 0)


def images():
    data = jax.tree.map(np.asarray, batch())
    return {**data, "image": data["image"].repeat(2, axis=1).repeat(2, axis=2)}


def flat(tree):
    return {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}


def test_what_learns_gets_the_gradient_of_the_whole_and_the_rest_no_moments():
    moved, state = {}, None
    for count in (None, 1):
        s = prepared("convnet4", count, model={"frozen_statistics": True}, rule=GRADIENT | {"momentum": 0.9})
        state = state or jax.jit(fresh, static_argnums=0)(s)
        state = state.replace(opt_state=s.optimizer.init(state.params))
        after, _ = jax.jit(steps.train_step, static_argnames="setup")(state, images(), setup=s)
        moved[count] = flat(after.params["trunk"]), sum(x.size for x in jax.tree.leaves(state.opt_state["trunk"]))
    before = flat(state.params["trunk"])
    (whole, moments), (some, fewer) = moved[None], moved[1]
    learnt = {path for path in before if not np.array_equal(before[path], some[path])}
    assert learnt == {"conv4/kernel", "bn4/scale", "bn4/bias"}
    for path in learnt:
        np.testing.assert_allclose(some[path], whole[path], rtol=1e-5, atol=1e-6)
    assert moments == sum(x.size for x in before.values()) and fewer == sum(before[path].size for path in learnt)


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_backward_pass_ends_at_the_first_block_that_learns(remat, monkeypatch):
    """Every block that learns adds the operations of its gradient, and the others add none."""
    vit = partial(models.vit.VisionTransformer, depth=3, width=24, heads=3, patch=4)
    monkeypatch.setitem(models.MODELS, "deep", vit)

    def operations(count):
        s = prepared("deep", count, model={"remat": remat})
        state = jax.eval_shape(lambda: fresh(s))
        return steps.jit_train_step.lower(state, images(), setup=s).cost_analysis()["flops"]

    forward, one, two, everything = (operations(count) for count in (0, 1, 2, None))
    # About twice the forward pass of a block, and with ``remat`` once more.
    gradients = one - forward, two - one, everything - two
    assert gradients == pytest.approx([two - one] * 3, rel=0.1)
    assert two - one > (2 if remat else 1.3) * forward / 3


@pytest.mark.parametrize(
    "name,accumulate,remat",
    [("convnet4", 1, False), pytest.param("resnet_tiny", 2, True, marks=pytest.mark.slow)],
)
def test_frozen_blocks_keep_weights_statistics_and_averages_on_eight_devices(name, accumulate, remat):
    rule = GRADIENT | {"momentum": 0.9}
    s = prepared(name, 1, rule=rule, mixup_alpha=1.0, accumulate=accumulate, ema=0.5, model={"remat": remat})
    last = {"convnet4": ("conv4", "bn4"), "resnet_tiny": ("layer2_0",)}[name]
    state = jax.jit(fresh, static_argnums=0)(s)
    values = np.random.default_rng(0).random(64, np.float32)
    stats = jax.tree.map(lambda x: x + values[: x.size], state.batch_stats)  # statistics of some training
    mesh = sharding.data_mesh(jax.devices())
    state = sharding.replicate(state.replace(batch_stats=stats).averaging(), mesh)
    data = sharding.shard_batch(images(), mesh)
    before = jax.tree.map(np.asarray, state)
    for train_trunk in (False, True) if accumulate > 1 else (True,):
        state, metrics = steps.jit_train_step(state, data, setup=s, train_trunk=train_trunk)
    assert np.isfinite(metrics["loss"])
    for of in (lambda state: state.latest, lambda state: state.variables):
        old, new = flat(of(before)), flat(of(state))
        moved = {path for path in old if not np.array_equal(old[path], new[path])}
        learning = {path for path in old if path.split("/")[2] in last and path.split("/")[1] == "trunk"}
        assert {path for path in moved if "/trunk/" in path} == learning
    assert set(state.opt_state["trunk"][-1].trace) == set(last)


def test_a_frozen_layer_normalises_by_its_running_statistics():
    x = np.random.default_rng(0).random((8, 2, 2, 3), np.float32)
    variables = {
        "params": {"scale": np.ones(3, np.float32), "bias": np.zeros(3, np.float32)},
        "batch_stats": {"mean": np.full(3, 2.0, np.float32), "var": np.full(3, 4.0, np.float32)},
    }
    frozen = {**variables, "frozen_stats": variables["batch_stats"]}
    out, updated = BatchNorm(use_running_average=False).apply(frozen, x, mutable=["batch_stats"])
    chex.assert_trees_all_equal(updated["batch_stats"], variables["batch_stats"])
    np.testing.assert_allclose(out, (x - 2) / 2, rtol=1e-5)
    live, updated = BatchNorm(use_running_average=False).apply(variables, x, mutable=["batch_stats"])
    assert np.any(updated["batch_stats"]["mean"] != 2) and np.any(live != out)


def test_settings_reach_the_step_and_belong_to_the_run(image_folder, tmp_path, caplog):
    changes = {"optim.trunk": "last:3", "optim.layer_decay": 0.5}
    run = train.build(four_layers(image_folder, **changes))
    learning = run.setup.optimizer.trunk
    assert (learning.first, learning.decay, learning.start) == (2, 0.5, "conv2")
    assert "freezes random weights" in caplog.text
    assert set(jax.eval_shape(lambda: fresh(run.setup)).opt_state["trunk"][1].mu) == {
        "conv2",
        "bn2",
        "conv3",
        "bn3",
        "conv4",
        "bn4",
    }
    workdir.remember(run.config, tmp_path)
    for field, value in (("optim.trunk", "all"), ("optim.layer_decay", 1.0)):
        with pytest.raises(UserError, match=f"config.{field} = .* there, .* here"):
            workdir.remember(four_layers(image_folder, **{**changes, field: value}), tmp_path)


@pytest.mark.slow
def test_a_run_of_which_a_part_learns_is_stopped_and_resumed(image_folder, tmp_path, caplog, monkeypatch):
    settings = {"epochs": 2, "eval.cluster": False, "eval.ambiguity_images": 0, "optim.ema": 0.5, "optim.accumulate": 2}
    config = four_layers(image_folder, **settings, **{"optim.trunk": "last:2", "optim.layer_decay": 0.5})
    start = flat(train.build(config).initial_state().params["trunk"])
    with caplog.at_level("INFO", "idml_jax"):
        train.train_and_evaluate(config, tmp_path / "whole")
    assert "parameters learn, from conv3 on" in caplog.text
    state, _ = last_state(config, tmp_path / "whole")
    after = flat(state.params["trunk"])
    moved = {path.split("/")[0] for path in after if not np.array_equal(after[path], start[path])}
    assert moved == {"conv3", "bn3", "conv4", "bn4"}
    real, calls = loop.steps.jit_train_step, []

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(loop.steps, "jit_train_step", stops)
        train.train_and_evaluate(config, tmp_path / "stopped")
    train.train_and_evaluate(config, tmp_path / "stopped")
    assert_same_run(config, tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"optim.trunk": "last:9"}, "'last:9': convnet4 has 4 blocks; use at most last:4, or all"),
        ({"optim.trunk": "last:-1"}, "known: all, none, last:N"),
        ({"optim.trunk": "half"}, "known: all, none, last:N"),
        ({"optim.layer_decay": 0.0}, "layer_decay = 0.0 must be above 0 and at most 1"),
        ({"optim.layer_decay": float("nan")}, "layer_decay = nan must be above 0"),
        ({"optim.layer_decay": 0.5, "optim.trunk": "last:0"}, "has no effect with config.optim.trunk = 'last:0'"),
    ],
)
def test_settings_that_cannot_work_are_refused(image_folder, changes, message):
    with pytest.raises(UserError, match=message):
        train.build(four_layers(image_folder, **changes))


class Foreign(nn.Module):
    """A trunk with the BatchNorm of Flax."""

    frozen_statistics: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(4, (3, 3), name="layer_0")(images)
        return nn.BatchNorm(use_running_average=not train, name="layer_1")(x)


def test_a_trunk_that_updates_frozen_statistics_is_refused(image_folder, monkeypatch):
    monkeypatch.setitem(models.MODELS, "foreign", Foreign)
    with pytest.raises(UserError, match="'none': foreign updates layer_1/mean although it is frozen"):
        train.build(four_layers(image_folder, **{"optim.trunk": "none", "model.name": "foreign"}))
    train.build(four_layers(image_folder, **{"optim.trunk": "last:1", "model.name": "foreign"}))


class Nameless(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Conv(4, (3, 3))(images)


def test_a_trunk_without_named_blocks_is_refused():
    with pytest.raises(ValueError, match="Nameless has no blocks that its names tell"):
        depths_of(models.EmbeddingModel(Nameless(), Heads(4, 4)), SIZE)
