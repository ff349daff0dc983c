"""``optim.trunk`` and ``optim.layer_decay``: the part of the trunk that learns, and the rate of every depth."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from runs_made import last_state, rows, small_config
from test_runtime import batch, objective, optimizer

from idml_jax import models
from idml_jax.errors import UserError
from idml_jax.models.convnet import ConvNet
from idml_jax.models.depth import depths_of
from idml_jax.models.naming import flatten
from idml_jax.runtime import sharding
from idml_jax.training import steps, train
from idml_jax.training.learning import TrunkLearning
from idml_jax.training.optim import Schedule
from idml_jax.training.state import create_state

SIZE = (16, 16, 1)
GRADIENT = dict(
    name="sgd", momentum=0.0, weight_decay=0.0, clip_value=0.0, factors=(), schedule=Schedule("constant", 0.1, 100)
)
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
    trunk = models.create_model(name).trunk
    depths = depths_of(trunk, (32, 32, 3))
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
    depths = depths_of(Staged(), SIZE)
    assert depths.blocks == 4
    assert of_depth(depths, 0) == ["stem_0"]
    assert of_depth(depths, 2) == ["stages_0/blocks_1"]
    assert set(of_depth(depths, 3)) == {"stages_1/blocks_0", "stages_1/downsample_1"}
    assert set(of_depth(depths, 4)) == {"stages_1/blocks_1", "final_norm"}
    assert depths.of("stages_1/blocks_0/layers_0/kernel") == 3


def test_rates_fall_with_the_distance_from_the_last_block():
    trunk = models.create_model("vit_tiny").trunk
    params = {"trunk": trunk.init(jax.random.key(0), jnp.zeros((1, *SIZE)))["params"], "heads": {"w": jnp.ones(2)}}
    rule = optimizer(**GRADIENT | {"weight_decay": 0.5, "trunk": TrunkLearning(depths_of(trunk, SIZE), decay=0.5)})
    grads = jax.tree.map(jnp.ones_like, params)
    moved, _ = rule.update(grads, rule.init(params), params, jnp.asarray(0))
    expected = {
        "blocks_1": 1.0,
        "norm": 1.0,
        "blocks_0": 0.5,
        "patch_embed": 0.25,
        "cls_token": 0.25,
        "pos_embed": 0.25,
    }
    for part, factor in expected.items():
        new = jax.tree.map(lambda p, f=factor: p - 0.1 * f * (1 + 0.5 * p), params["trunk"][part])
        chex.assert_trees_all_close(moved["trunk"][part], new, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(moved["heads"]["w"], 1 - 0.1 * 1.5, rtol=1e-6)


def prepared(name, count, *, rule=GRADIENT, model=None, **changes):
    """The set-up of a step in which the last ``count`` blocks learn (``None``: everything), and a fresh state."""
    model = models.create_model(
        name, embedding_dim=8, uncertainty_dim=4, uncertainty_hidden=16, pooling="avg", **model or {}
    )
    depths = depths_of(model.trunk, SIZE)
    learning = TrunkLearning() if count is None else TrunkLearning(depths, depths.blocks - count + 1)
    s = steps.StepSetup(
        model=model, objective=objective(), optimizer=optimizer(**rule, trunk=learning), mean=(0.5,), std=(0.25,),
        mixup_alpha=1.0, **changes,
    )  # fmt: skip
    create = jax.jit(create_state, static_argnums=(1, 2, 3, 4, 5))
    return s, create(jax.random.key(0), model, s.objective, s.optimizer, SIZE, s.ema > 0)


def images(n=16):
    data = batch(n)
    return {**data, "image": jax.image.resize(data["image"], (n, *SIZE), "nearest")}


def flat(tree):
    return {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}


def test_what_learns_gets_the_gradient_of_the_whole_and_the_rest_no_moments():
    results = {}
    for count in (None, 1):
        s, state = prepared("vit_tiny", count)
        before = flat(state.params["trunk"])
        after, _ = steps.jit_train_step(state, images(), setup=s)
        results[count] = flat(after.params["trunk"])
    learnt = {path for path in before if not np.array_equal(before[path], results[1][path])}
    assert learnt and {path.split("/")[0] for path in learnt} == {"blocks_1", "norm"}
    for path in learnt:
        np.testing.assert_allclose(results[1][path], results[None][path], rtol=1e-5, atol=1e-6)
    momentum = {**GRADIENT, "momentum": 0.9}
    sizes = [
        sum(
            x.size
            for x in jax.tree.leaves(jax.eval_shape(lambda c=c: prepared("vit_tiny", c, rule=momentum)[1]).opt_state)
        )
        for c in (None, 1, 0)
    ]
    whole, learning = (sum(tree[p].size for p in paths) for tree, paths in ((before, before), (before, learnt)))
    assert sizes[0] - sizes[1] == whole - learning and sizes[0] - sizes[2] == whole


@pytest.mark.parametrize("remat", [False, True])
def test_the_backward_pass_ends_at_the_first_block_that_learns(remat):
    """Of four equal blocks the gradient costs twice what the forward pass does, and only where something learns."""
    depth = dict(depth=4, width=24, heads=3, patch=4)

    def flops(count):
        s, state = prepared("deep", count, model={"remat": remat})
        return steps.jit_train_step.lower(state, images(), setup=s).cost_analysis()["flops"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "deep", lambda **kw: models.vit.VisionTransformer(**depth, **kw))
        cost = {count: flops(count) for count in (None, 3, 1, 0)}
    steps_of = [cost[0], cost[1], cost[3], cost[None]]
    block = (cost[3] - cost[1]) / 2
    # Forward alone, and with the gradient of one block, three blocks, four blocks and what is before them.
    assert steps_of == sorted(steps_of)
    assert cost[1] - cost[0] == pytest.approx(block, rel=0.25)
    assert cost[None] - cost[3] == pytest.approx(block, rel=0.35)
    assert block > (0.45 if remat else 0.3) * cost[0] / 4 * 1.5


@pytest.mark.parametrize("accumulate,remat", [(1, False), pytest.param(2, True, marks=pytest.mark.slow)])
def test_a_frozen_block_keeps_weights_statistics_and_averages_on_eight_devices(accumulate, remat):
    changes = dict(accumulate=accumulate, ema=0.5, model={"remat": remat})
    s, state = prepared("resnet_tiny", 1, rule=GRADIENT | {"momentum": 0.9}, **changes)
    mesh = sharding.data_mesh(jax.devices())
    random = jax.random.uniform(jax.random.key(3), (64,))
    stats = jax.tree.map(lambda x: x + random[: x.size], state.batch_stats)  # running statistics of some training
    state = sharding.replicate(state.replace(batch_stats=stats).averaging(), mesh)
    data = sharding.shard_batch({k: np.asarray(v) for k, v in images().items()}, mesh)
    before = jax.tree.map(np.asarray, state)
    for train_trunk in (False, True, True):
        state, metrics = steps.jit_train_step(state, data, setup=s, train_trunk=train_trunk)
    assert np.isfinite(metrics["loss"])
    for tree in (lambda s: s.latest, lambda s: s.variables):
        old, new = flat(tree(before)), flat(tree(state))
        moved = {path for path in old if not np.array_equal(old[path], new[path])}
        frozen = {p for p in old if p.startswith(("params/trunk", "batch_stats")) and "/layer2_0/" not in p}
        assert not moved & frozen
        assert moved >= {p for p in old if "/layer2_0/" in p}
    assert set(state.opt_state["trunk"][-1].trace) == {"layer2_0"}


def test_a_frozen_layer_normalises_by_its_running_statistics():
    model = ConvNet(depth=2, width=4)
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    variables = model.init(jax.random.key(1), x)
    frozen = {"frozen_stats": {"bn1": variables["batch_stats"]["bn1"]}}
    out, updated = model.apply({**variables, **frozen}, x, True, mutable=["batch_stats"])
    chex.assert_trees_all_equal(updated["batch_stats"]["bn1"], variables["batch_stats"]["bn1"])
    assert np.any(updated["batch_stats"]["bn2"]["mean"] != 0)
    both = {"frozen_stats": variables["batch_stats"]}
    chex.assert_trees_all_equal(model.apply({**variables, **both}, x, True), model.apply(variables, x, False))
    assert np.any(out != model.apply(variables, x, False))


def test_a_run_with_warm_up_resumes_and_other_settings_are_refused(image_folder, tmp_path, caplog):
    changes = {"optim.trunk": "last:2", "optim.layer_decay": 0.5, "optim.ema": 0.5, "optim.accumulate": 2, "epochs": 2}
    config = small_config(image_folder, **changes, **{"eval.cluster": False, "eval.ambiguity_images": 0})
    run = train.build(config)
    start = flat(run.initial_state().params["trunk"])
    with caplog.at_level("INFO", "idml_jax"):
        train.train_and_evaluate(config, tmp_path / "run")
    assert "parameters learn, from conv3 on" in caplog.text and "freezes random weights" in caplog.text
    state, _ = last_state(config, tmp_path / "run")
    moved = {
        path.split("/")[0] for path, x in flat(state.params["trunk"]).items() if not np.array_equal(x, start[path])
    }
    assert moved == {"conv3", "bn3", "conv4", "bn4"}
    assert all(np.isfinite(list(row.values())).all() for row in rows(tmp_path / "run"))
    for field, value in (("optim.trunk", "all"), ("optim.layer_decay", 1.0)):
        with pytest.raises(UserError, match=f"config.{field} = .* there, .* here"):
            train.train_and_evaluate(small_config(image_folder, **{**changes, field: value}), tmp_path / "run")


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
        train.build(small_config(image_folder, **changes))


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
        train.build(small_config(image_folder, **{"optim.trunk": "none", "model.name": "foreign"}))
    train.build(small_config(image_folder, **{"optim.trunk": "last:1", "model.name": "foreign"}))


def test_a_trunk_without_named_blocks_is_refused():
    with pytest.raises(ValueError, match="Dense has no blocks that its names tell"):
        depths_of(nn.Dense(3), SIZE)
