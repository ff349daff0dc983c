"""Global pooling: the generalised mean with its learned power, and maxima that are compared safely."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from idml_jax import models, pretrained
from idml_jax.models import layers, naming


def naive(x, power):
    return np.mean(np.maximum(np.float64(x), 1e-6) ** np.float64(power), axis=(1, 2)) ** (1 / np.float64(power))


def test_generalized_mean_is_the_formula():
    x = np.maximum(np.random.default_rng(0).normal(size=(2, 3, 4, 5)), 0).astype(np.float32)
    for power in (1.0, 3.0, 20.0):
        got = layers.generalized_mean(x, jnp.asarray([power]))
        np.testing.assert_allclose(got, naive(x, power), rtol=2e-5)
    np.testing.assert_allclose(layers.generalized_mean(x, jnp.asarray([1e4])), x.max((1, 2)), rtol=1e-3)
    assert layers.generalized_mean(jnp.asarray(x, jnp.bfloat16), jnp.asarray([3.0])).dtype == jnp.float32


def test_generalized_mean_has_the_formulas_gradients():
    rng = np.random.default_rng(1)
    x, weights = rng.uniform(0.1, 2.0, (2, 3, 3, 4)), rng.normal(size=(2, 4))
    loss = lambda x, p: jnp.sum(jnp.asarray(weights, jnp.float32) * layers.generalized_mean(x, p))
    towards_x, towards_p = jax.grad(loss, (0, 1))(jnp.asarray(x, jnp.float32), jnp.asarray([3.0]))
    pooled = naive(x, 3.0)
    expected = weights[:, None, None] * (x / pooled[:, None, None]) ** 2 / 9
    np.testing.assert_allclose(towards_x, expected, rtol=1e-4)
    step = 1e-5
    slope = np.sum(weights * (naive(x, 3 + step) - naive(x, 3 - step))) / (2 * step)
    np.testing.assert_allclose(towards_p, [slope], rtol=1e-3)


@pytest.mark.parametrize("power", [3.0, 40.0])
def test_generalized_mean_is_finite_where_nothing_fires(power):
    x = jnp.zeros((1, 2, 2, 3)).at[0, 0, 0, 0].set(1.0)
    loss = lambda x, p: jnp.sum(layers.generalized_mean(x, p))
    value, gradient = jax.value_and_grad(loss, (0, 1))(x, jnp.asarray([power]))
    chex.assert_tree_all_finite((value, gradient))
    assert float(gradient[0][0, 0, 0, 0]) > 0 and not jnp.any(gradient[0][..., 1:])


@pytest.mark.torch
def test_generalized_mean_agrees_with_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra 'parity')")
    x = np.maximum(np.random.default_rng(2).normal(size=(2, 4, 4, 3)), 0).astype(np.float32)
    same = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    power = torch.tensor([3.0], requires_grad=True)
    pooled = torch.nn.functional.avg_pool2d(same.clamp(min=1e-6).pow(power), 4).pow(1.0 / power)
    pooled.square().sum().backward()
    loss = lambda x, p: jnp.sum(jnp.square(layers.generalized_mean(x, p)))
    value, (towards_x, towards_p) = jax.value_and_grad(loss, (0, 1))(jnp.asarray(x), jnp.asarray([3.0]))
    np.testing.assert_allclose(value, pooled.square().sum().item(), rtol=1e-5)
    np.testing.assert_allclose(towards_x, same.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(towards_p, power.grad.numpy(), rtol=1e-4)


def test_maximum_and_its_gradient_are_jaxs():
    x = jnp.round(jax.random.normal(jax.random.key(0), (2, 4, 4, 3)) * 2)  # with equal maxima
    weights = jax.random.normal(jax.random.key(1), (2, 3))
    ours = jax.value_and_grad(lambda x: jnp.sum(weights * layers.max_global(x)))(x)
    jaxs = jax.value_and_grad(lambda x: jnp.sum(weights * jnp.max(x, (1, 2))))(x)
    chex.assert_trees_all_equal(ours, jaxs)


def gem_model(pooling="gem", **options):
    return models.create_model(
        "resnet_tiny", embedding_dim=4, uncertainty_dim=3, uncertainty_hidden=5, pooling=pooling, **options
    )


def variables_of(model):
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.uniform(0.2, 0.6, x.shape).astype(np.float32), dict(like))


def test_the_power_belongs_to_the_trunk():
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    model = gem_model()
    variables, plain = variables_of(model), variables_of(gem_model("avg"))
    paths, others = set(naming.flatten(variables)), set(naming.flatten(plain))
    assert set(variables["params"]) == {"trunk", "heads"}
    assert paths - others == {"params/trunk/pool_p"} and others <= paths
    variables["params"]["trunk"]["pool_p"] = np.float32([2.5])
    # As in a step with accumulation: features from the parameters of the trunk alone.
    alone = {"params": {"trunk": variables["params"]["trunk"]}, "batch_stats": variables["batch_stats"]}

    @jax.jit
    def run(v, x):
        features = lambda v: model.apply(v, x, method="features")
        maps = model.apply(v, x, method=lambda m, x: m.trunk(x))
        return maps, features(v), jax.grad(lambda v: jnp.sum(features(v)))(v)

    maps, features, gradient = run(alone, images)
    np.testing.assert_allclose(features, naive(maps, 2.5), rtol=1e-4)
    assert float(gradient["params"]["trunk"]["pool_p"][0]) > 0


def test_files_with_and_without_a_power_fit_both(tmp_path):
    plain = gem_model("avg")
    variables = variables_of(gem_model())
    variables["params"]["trunk"]["pool_p"] = np.float32([4.5])
    named = {naming.torch_name(p): naming.to_torch(p, np.asarray(v)) for p, v in naming.flatten(variables).items()}
    named = {name: value for name, value in named.items() if not name.startswith(("embedding", "uncertainty"))}
    safetensors.save_file(named, tmp_path / "gem.safetensors")
    safetensors.save_file({n: v for n, v in named.items() if n != "pool.p"}, tmp_path / "plain.safetensors")
    loaded, told = pretrained.load(tmp_path / "gem.safetensors", variables)
    assert float(loaded["params"]["trunk"]["pool_p"][0]) == 4.5 and "left out" not in told
    loaded, _ = pretrained.load(tmp_path / "plain.safetensors", variables)
    merged = pretrained.merge(variables, loaded)
    assert "pool_p" not in loaded["params"]["trunk"] and float(merged["params"]["trunk"]["pool_p"][0]) == 4.5
    like = variables_of(plain)
    loaded, told = pretrained.load(tmp_path / "gem.safetensors", like)
    assert "left out: pool.p" in told and "pool_p" not in loaded["params"]["trunk"]
    # Through a folder and back nothing is lost.
    pretrained.convert(tmp_path / "gem.safetensors", tmp_path / "ours", model="resnet_tiny", size=16)
    pretrained.convert(tmp_path / "ours", tmp_path / "back.safetensors")
    back = safetensors.load_file(tmp_path / "back.safetensors")
    chex.assert_trees_all_equal(back, named)
    loaded, told = pretrained.load(tmp_path / "ours", like)
    assert "left out: params/trunk/pool_p" in told


def test_maps_with_negative_numbers_are_refused():
    for name in ("vit_tiny", "convnext_toy"):
        with pytest.raises(ValueError, match=f"those of {name} may be negative; use avg, max or avg_max"):
            models.create_model(name, pooling="gem")
