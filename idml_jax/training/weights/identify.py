"""Which of this package's networks the tensors of a file are of: by names and shapes."""

import math
import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from idml_jax.models import MODELS, catalogue, create_model, is_for_tests, naming
from idml_jax.training.weights import wrapped
from idml_jax.training.weights.tensors import Named, Tensors

# A block of a network, by the beginning of its tensors' names.
_BLOCK = re.compile(r"^(layer\d+\.\d+|stages\.\d+\.blocks\.\d+|blocks\.\d+)\.")
_SIZE = 224  # px, of the images that shapes are computed for where the catalogue has no other
_MOST = 4  # networks named in a message


def is_head(name: str, torch: bool = True) -> bool:
    """Whether a tensor belongs to one of this package's heads."""
    return name.startswith(tuple(f"{n}." for n in naming.HEADS.values()) if torch else "params/heads/")


def networks(tensors: Tensors) -> list[str]:
    """Keys of ``MODELS`` whose trunk has these tensors, the most usual first; networks for tests only if no other.

    Different networks may have the same tensors (ResNets v1 and v1.5, activations of vision transformers).
    """
    trees = _trees(tensors)
    for toys in (False, True):
        fitting = [n for n in MODELS if is_for_tests(n) == toys and any(_holds(values, n) for values in trees)]
        if fitting:
            return fitting[:_MOST]
    return []


def _trees(tensors: Tensors) -> list[Named]:
    """The tensors under timm's names, for every place where a network may begin."""
    if not tensors.torch:
        return [{naming.torch_name(p): naming.to_torch(p, v) for p, v in tensors.values.items()}]
    return [tree.values for tree in wrapped.sub_trees(tensors.containers or {"": tensors.values})]


def _holds(values: Named, name: str) -> bool:
    if not _may_hold(values, MODELS[name]()):
        return False
    wanted = shapes(name)
    rest = [n for n in values if n not in wanted and not wrapped.is_beside(n) and not is_head(n)]
    return wrapped.count(values, wanted) == len(wanted) and not rest


def _may_hold(values: Named, trunk: Any) -> bool:
    """Whether number of blocks and size of the first kernel are a trunk's: few shapes then have to be computed."""
    if _number_of_blocks(trunk) not in (None, len(_blocks_in(values))):
        return False
    side = getattr(trunk, "patch", {"imagenet": 7, "small": 3}.get(getattr(trunk, "stem", ""), 0))
    first = values.get("patch_embed.proj.weight" if hasattr(trunk, "patch") else "conv1.weight")
    return not side or (first is not None and (first.shape[0], first.shape[-1]) == (trunk.width, side))


def _blocks_in(values: Named) -> set[str]:
    return {match[1] for name in values if (match := _BLOCK.match(name))}


def _number_of_blocks(trunk: Any) -> int | None:
    """The number of a trunk's blocks, as far as its settings tell it."""
    for sizes in ("stage_sizes", "depths"):
        if hasattr(trunk, sizes):
            return sum(getattr(trunk, sizes))
    if hasattr(trunk, "stages"):  # EfficientNet, whose blocks are counted by stage
        return len(trunk.stages)
    if hasattr(trunk, "bottleneck"):  # PyramidNet
        return (trunk.depth - 2) // (3 if trunk.bottleneck else 2)
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


def shape_of(tensors: Tensors, name: str) -> tuple[int, ...]:
    """The shape of the tensor of a name in timm; empty if there is none."""
    named = _named(tensors)
    return tuple(named[name].shape) if name in named else ()


def looks_like(tensors: Tensors) -> str:
    """What tensors look like, for the message about an unknown network."""
    values = _named(tensors)
    blocks = len(_blocks_in(values))
    first = next((f"{n} {tuple(v.shape)}" for n, v in values.items() if v.ndim == 4), "no convolution")
    return f"{len(values)} tensors{f', {blocks} blocks' if blocks else ''}, first {first}"


def _named(tensors: Tensors) -> Named:
    """The tensors under timm's names, of the place in the file where most is known."""
    known = lambda values: sum(bool(_BLOCK.match(n)) or n == "pos_embed" for n in values)
    return max(_trees(tensors), key=known)
