"""Networks: shapes, published sizes, frozen BatchNorm, PyTorch's conventions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idml_jax import models
from idml_jax.models import layers
from idml_jax.models.heads import Heads


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


# Published sizes of torchvision's networks less their classifiers.
@pytest.mark.parametrize(
    "name,expected",
    [
        ("resnet18", 11_689_512 - 513_000),
        ("resnet34", 21_797_672 - 513_000),
        ("resnet50", 25_557_032 - 2_049_000),
        ("resnet101", 44_549_160 - 2_049_000),
        ("resnet152", 60_192_808 - 2_049_000),
    ],
)
def test_parameter_counts_are_the_published_ones(name, expected):
    model = models.create_model(name)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert count(shapes["params"]["trunk"]) == expected


def test_imagenet_resnet_shapes_at_odd_sizes():
    # 227 pixels: explicit padding gives 114, 57, 29, 15, 8 as in PyTorch; SAME would not at every stage.
    model = models.create_model("resnet50")
    images = jax.ShapeDtypeStruct((2, 227, 227, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    maps = jax.eval_shape(lambda v, x: model.apply(v, x, method=lambda m, x: m.trunk(x)), variables, images)
    assert maps.shape == (2, 8, 8, 2048)


@pytest.mark.parametrize("name,size,channels", [("convnet4", 28, 1), ("resnet_tiny", 32, 3)])
def test_model_outputs(name, size, channels):
    model = models.create_model(name, embedding_dim=12, uncertainty_dim=5)
    images = jax.random.normal(jax.random.key(1), (3, size, size, channels))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    assert set(variables["params"]) == {"trunk", "heads"}
    out = jax.jit(model.apply)(variables, images)
    chex.assert_shape([out["semantic"], out["uncertainty"], out["semantic_norm"]], [(3, 12), (3, 5), (3,)])
    chex.assert_trees_all_close(jnp.linalg.norm(out["semantic"], axis=1), jnp.ones(3), rtol=1e-5)
    # Not normalised: the length is what it says.
    assert float(jnp.std(jnp.linalg.norm(out["uncertainty"], axis=1))) > 1e-3


def test_bfloat16_trunk_has_float32_heads_and_parameters():
    model = models.create_model("resnet_tiny", dtype="bfloat16")
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
    maps = model.apply(variables, images, method=lambda m, x: m.trunk(x))
    assert maps.dtype == jnp.bfloat16
    out = model.apply(variables, images)
    assert all(x.dtype == jnp.float32 for x in out.values())
    exact = models.create_model("resnet_tiny").apply(variables, images)
    assert 1e-7 < float(jnp.max(jnp.abs(out["semantic"] - exact["semantic"]))) < 0.05


def test_frozen_statistics_stay_and_live_ones_move():
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3)) + 2.0
    for frozen in (True, False):
        model = models.create_model("resnet_tiny", frozen_statistics=frozen)
        variables = jax.jit(model.init)(jax.random.key(0), images)
        out, updated = model.apply(variables, images, True, mutable=["batch_stats"])
        moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), variables["batch_stats"], updated["batch_stats"])
        assert all(m is not frozen for m in jax.tree.leaves(moved))
        if frozen:
            chex.assert_trees_all_close(out["semantic"], model.apply(variables, images)["semantic"], rtol=1e-6)


def test_batchnorm_running_statistics_are_pytorchs():
    # momentum 0.1 in PyTorch's sense, running variance unbiased.
    x = np.random.default_rng(0).normal(3.0, 2.0, (4, 5, 5, 2)).astype(np.float32)
    norm = layers.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), jnp.asarray(x))
    y, updated = norm.apply(variables, jnp.asarray(x), mutable=["batch_stats"])
    stats = updated["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.1 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1), rtol=1e-5)
    np.testing.assert_allclose(y, (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5), rtol=1e-4, atol=1e-4)


def test_pooling():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    average, maximum = x.mean((1, 2)), x.max((1, 2))
    chex.assert_trees_all_close(layers.pool_global(x, "avg"), average, rtol=1e-5)
    chex.assert_trees_all_close(layers.pool_global(x, "max"), maximum, rtol=1e-5)
    chex.assert_trees_all_close(layers.pool_global(x, "avg_max"), average + maximum, rtol=1e-5)
    with pytest.raises(ValueError, match="known: avg, max, avg_max"):
        layers.pool_global(x, "median")


def test_max_pool_drops_an_odd_row_and_column():
    x = jnp.arange(25.0).reshape(1, 5, 5, 1)
    chex.assert_trees_all_equal(layers.max_pool_2x2(x)[0, :, :, 0], jnp.asarray([[6.0, 8.0], [16.0, 18.0]]))


def test_uncertainty_heads_see_what_they_should():
    features = jax.random.normal(jax.random.key(0), (4, 20))
    for name, blind_to_norm in (("mlp", True), ("linear", False)):
        heads = Heads(8, 6, name)
        variables = heads.init(jax.random.key(1), features)
        small = heads.apply(variables, features)["uncertainty"]
        large = heads.apply(variables, 7.0 * features)["uncertainty"]
        assert bool(jnp.allclose(small, large, rtol=1e-4, atol=1e-5)) is blind_to_norm
    none = Heads(8, 6, "none")
    out = none.apply(none.init(jax.random.key(1), features), features)
    assert not jnp.any(out["uncertainty"])
    with pytest.raises(ValueError, match="known: mlp, linear, none"):
        Heads(8, 6, "deep").init(jax.random.key(1), features)


def test_heads_are_finite_for_a_zero_feature():
    heads = Heads(8, 6)
    variables = heads.init(jax.random.key(1), jnp.zeros((2, 20)))
    total = lambda v, x: sum(jnp.sum(o) for o in heads.apply(v, x).values())
    chex.assert_tree_all_finite(jax.grad(total, (0, 1))(variables, jnp.zeros((2, 20))))


def test_proxies_have_the_fan_out_variance():
    proxies = models.init_proxies(jax.random.key(0), 200, 64)
    assert proxies.shape == (200, 64)
    assert float(jnp.std(proxies)) == pytest.approx(np.sqrt(2 / 200), rel=0.02)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="unknown model 'resnet51'; known: .*resnet50"):
        models.create_model("resnet51")
    with pytest.raises(ValueError, match="unknown dtype 'float16'; known: float32, bfloat16"):
        models.create_model("resnet50", dtype="float16")
    small = models.create_model("convnet4")
    with pytest.raises(ValueError, match="at least 16 pixels; got 12 x 12"):
        small.init(jax.random.key(0), jnp.zeros((1, 12, 12, 1)))


@pytest.mark.parametrize(
    "size,kernel,stride,padding", [(9, 3, 1, 1), (8, 3, 2, 1), (11, 7, 2, 3), (6, 1, 2, 0), (5, 3, 2, 0)]
)
def test_convolution_for_loops_has_the_same_gradients(size, kernel, stride, padding):
    x = jax.random.normal(jax.random.key(0), (2, size, size, 3))
    results, programs = [], []
    for looped in (False, True):
        layer = layers.Conv(4, (kernel, kernel), (stride, stride), padding, looped=looped)
        variables = layer.init(jax.random.key(1), x)
        weights = jax.random.normal(jax.random.key(2), layer.apply(variables, x).shape)
        loss = lambda variables, x, layer=layer, weights=weights: jnp.sum(weights * layer.apply(variables, x))
        results.append(jax.jit(jax.value_and_grad(loss, (0, 1)))(variables, x))
        programs.append(jax.jit(jax.grad(loss)).lower(variables, x).compile().as_text())
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-5)
    # Its gradient by the kernel is no convolution, which would be slow in a loop.
    assert [" convolution(" in program for program in programs] == [kernel > 1, False]
