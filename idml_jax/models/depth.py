"""Depth of a trunk's parameters: the block that each belongs to, counted from the images to the features.

The blocks are found by their names (``blocks_3``, ``layer2_1``, ``stages_0/blocks_2``, ``BasicBlock_4``) and ordered as
the trunk applies them, which is also the order in which Flax creates their parameters. A trunk whose names do not tell
says its blocks in a property ``block_entries``: for every block, in order, the paths of its entries.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from idml_jax.models.naming import flatten

_BLOCK = re.compile(r"\w*?(block|layer|stage)s?[\d_]*\d(_blocks?_\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Depths:
    """Depth of every part of a trunk. Hashable.

    Attributes:
      blocks: number of blocks.
      parts: path and depth of every part: 0 for what comes before the first block (patch, position, class token, stem),
        ``i`` for the i-th block and what lies between it and the block before, ``blocks`` also for what comes after the
        last block (a final norm). By default nothing is known, and everything has depth 0.
    """

    blocks: int = 0
    parts: tuple[tuple[str, int], ...] = ()

    def of(self, path: str) -> int:
        """Depth of a parameter or a running statistic, by its path ``layer1_0/conv1/kernel``."""
        known, names = dict(self.parts), path.split("/")
        prefixes = ("/".join(names[:end]) for end in range(len(names), 0, -1))
        return next((known[prefix] for prefix in prefixes if prefix in known), 0)


UNKNOWN = Depths()


def depths_of(model: nn.Module, image_shape: tuple[int, int, int]) -> Depths:
    """The depths of the parts of a model's trunk. Nothing is computed: the model is only traced.

    Args:
      model: an ``EmbeddingModel``. What it does after the trunk with the trunk's parameters (a norm of the pooled
        feature, a learned power of the pooling) comes after the last block.
      image_shape: ``(h, w, c)`` of an image.

    Raises:
      ValueError: if the trunk has no blocks that can be told by their names, and no ``block_entries``.
    """
    paths: list[str] = []

    def trace(key: jax.Array, images: jax.Array) -> None:
        # In the order of creation, which a result of ``eval_shape`` would lose.
        paths.extend(flatten(model.init(key, images)["params"]["trunk"]))

    jax.eval_shape(trace, jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    trunk = model.trunk
    entries = getattr(trunk, "block_entries", None) or _named_blocks(paths)
    if not entries:
        raise ValueError(
            f"{type(trunk).__name__} has no blocks that its names tell (blocks_0, layer1_0, ...), and no block_entries"
        )
    return _depths(paths, entries)


def _named_blocks(paths: Sequence[str]) -> list[tuple[str]]:
    """The blocks that names tell, each with one entry; a stage that holds blocks is none itself."""
    found: dict[str, None] = {}
    for path in paths:
        leading = ""
        for name in path.split("/")[:-1]:
            if not _BLOCK.fullmatch(name):
                break
            leading += f"/{name}"
            if "block" in name.lower():  # a stage holds blocks, but a block none
                break
        if leading:
            found[leading[1:]] = None
    return [(name,) for name in found if not any(other.startswith(f"{name}/") for other in found)]


def _depths(paths: Sequence[str], entries: Sequence[Sequence[str]]) -> Depths:
    block_of = {entry: index for index, block in enumerate(entries, 1) for entry in block}
    parts, reached = dict(block_of), 0
    for path in paths:
        part = ""
        for name in path.split("/"):
            part = f"{part}/{name}" if part else name
            # Neither above a block nor inside of a part that is known.
            if part in block_of or not any(entry.startswith(f"{part}/") for entry in block_of):
                break
        if part in block_of:
            reached = max(reached, block_of[part])
        elif part not in parts:
            parts[part] = reached if reached in (0, len(entries)) else reached + 1
    return Depths(len(entries), tuple(parts.items()))
