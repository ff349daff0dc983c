"""Which of this package's networks the tensors of a file are of: by names and shapes."""

import math
import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from idml_jax.models import MODELS, catalogue, create_model, naming
from idml_jax.training.weights import wrapped
from idml_jax.training.weights.tensors import Tensors

# A block of a network, by the beginning of its tensors' names.
_BLOCK = re.compile(r"^(layer\d+\.\d+|blocks\.\d+)\.")
_SIZE = 224  # px, of the images that shapes are computed for where the catalogue has no other
_MOST = 4  # networks named in a message


def is_head(name: str, torch: bool = True) -> bool:
    """Whether a tensor belongs to one of this package's heads."""
    return name.startswith(tuple(f"{n}." for n in naming.HEADS.values()) if torch else "params/heads/")


def known() -> str:
    """The networks of this package, for messages."""
    return ", ".join(sorted(name for name in MODELS if not _is_toy(name)))


def networks(tensors: Tensors) -> list[str]:
    """Keys of ``MODELS`` whose trunk has these tensors, the most usual first; networks for tests only if no other.

    Different networks may have the same tensors (ResNets v1 and v1.5, activations of vision transformers).
    """
    fitting = [name for name in MODELS if _fits(tensors, name)]
    usual = [name for name in fitting if not _is_toy(name)] or fitting
    return usual[:_MOST]


def _is_toy(name: str) -> bool:
    return (name.endswith(("_tiny", "_toy")) and name != "convnext_tiny") or "_tiny_" in name


def _fits(tensors: Tensors, name: str) -> bool:
    blocks = _blocks(MODELS[name]())
    if not tensors.torch:
        values = {naming.torch_name(p): naming.to_torch(p, v) for p, v in tensors.values.items()}
        return _holds(values, name, blocks)
    trees = wrapped.sub_trees(tensors.containers or {"": tensors.values})
    return any(_holds(tree.values, name, blocks) for tree in trees)


def _holds(values: Any, name: str, blocks: int | None) -> bool:
    if blocks is not None and blocks != len({match[1] for n in values if (match := _BLOCK.match(n))}):
        return False  # so that the shapes of few networks have to be computed
    wanted = shapes(name)
    rest = [n for n in values if n not in wanted and not wrapped.is_beside(n) and not is_head(n)]
    return wrapped.count(values, wanted) == len(wanted) and not rest


def _blocks(trunk: Any) -> int | None:
    """The number of a trunk's blocks, where its settings tell it."""
    if hasattr(trunk, "stage_sizes"):
        return sum(trunk.stage_sizes)
    return trunk.depth if hasattr(trunk, "heads") else None


@cache
def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a trunk's tensors by their names in timm, for images of its usual size."""
    size = catalogue.CATALOGUE[name].image_size if name in catalogue.CATALOGUE else _SIZE
    model = create_model(name)
    like = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    flat = naming.flatten(like)
    return {naming.torch_name(p): naming.shape_in_torch(p, x.shape) for p, x in flat.items() if "/trunk/" in p}


def size_of(tensors: Tensors, name: str) -> int:
    """Side in pixels of the images that a transformer's position embeddings belong to; 0 if there are none."""
    trunk = MODELS[name]()
    patch = getattr(trunk, "patch", 0)
    positions = _named(tensors).get("pos_embed")
    if not patch or positions is None:
        return 0
    for first in (1, 0):  # with and without a position for the class token
        side = math.isqrt(max(positions.shape[1] - first, 0))
        if side * side == positions.shape[1] - first:
            return side * patch
    return 0


def looks_like(tensors: Tensors) -> str:
    """What tensors look like, for the message about an unknown network."""
    values = _named(tensors)
    blocks = len({match[1] for n in values if (match := _BLOCK.match(n))})
    first = next((f"{n} {tuple(v.shape)}" for n, v in values.items() if v.ndim == 4), "no convolution")
    return f"{len(values)} tensors{f', {blocks} blocks' if blocks else ''}, first {first}"


def _named(tensors: Tensors) -> Any:
    """The tensors under timm's names, of the place in the file where most is known."""
    if not tensors.torch:
        return {naming.torch_name(p): naming.to_torch(p, v) for p, v in tensors.values.items()}
    trees = wrapped.sub_trees(tensors.containers or {"": tensors.values})
    known = lambda tree: sum(bool(_BLOCK.match(n)) or n == "pos_embed" for n in tree.values)
    return max(trees, key=known).values
