"""Names of tensors: this package's paths against those of torchvision, timm and the published checkpoints.

A flat tree is ``{"params/trunk/layer1_0/conv1/kernel": array}``. Paths and PyTorch names correspond one to one, for all
networks: ``layer1_0`` is ``layer1.0``, ``downsample_conv`` is ``downsample.0``, a convolution's ``kernel`` is a
``weight`` in another order of axes.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from jaxtyping import PyTree, Shaped

__all__ = ["flatten", "from_torch", "shape_in_torch", "to_torch", "torch_name", "unflatten"]

HEADS = {
    "semantic": "embedding", "uncertainty": "uncertainty", "uncertainty_hidden": "uncertainty_hidden",
    "classifier": "fc",
}  # fmt: skip
# Modules of trunks whose name is another in PyTorch.
SHORTCUT = {"downsample_conv": "downsample.0", "downsample_bn": "downsample.1", "head_norm": "head.norm"}
LEAVES = {
    "kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var",
    "pool_p": "pool.p",
}  # fmt: skip
_INDEXED = re.compile(r"^(layer\d+|blocks|stem|stages|downsample)_(\d+)(?:_(\d+))?$")
Leaf = TypeVar("Leaf")  # an array, or a shape with a type


def flatten(tree: Mapping[str, PyTree], prefix: str = "") -> dict[str, PyTree]:
    """Flattens nested mappings to ``{"a/b/c": leaf}``, each path behind the prefix."""
    flat: dict[str, PyTree] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}/"))
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: Mapping[str, Leaf]) -> dict[str, PyTree[Leaf]]:
    """Builds the nested dictionaries of paths ``a/b/c``; the reverse of ``flatten``."""
    tree: dict[str, PyTree[Leaf]] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def torch_name(path: str) -> str:
    """The PyTorch name of ``params/trunk/...``, ``params/heads/...`` or ``batch_stats/trunk/...``."""
    _, part, *inner, leaf = path.split("/")
    if part == "heads":
        inner = [HEADS[name] for name in inner]
    else:
        inner = [_INDEXED.sub(_dotted, SHORTCUT.get(name, name)) for name in inner]
    return ".".join([*inner, LEAVES.get(leaf, leaf)])


def _dotted(match: re.Match[str]) -> str:
    return ".".join(part for part in match.groups() if part)


def to_torch(path: str, value: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """A tensor in PyTorch's order of axes: convolutions ``[out, in, h, w]``, linear layers ``[out, in]``."""
    if path.endswith("/kernel"):
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return np.ascontiguousarray(value)


def from_torch(path: str, value: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """The reverse of ``to_torch``."""
    if path.endswith("/kernel"):
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return np.ascontiguousarray(value)


def shape_in_torch(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The PyTorch shape of one of this package's tensors."""
    if not path.endswith("/kernel"):
        return tuple(shape)
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else tuple(shape[::-1])
