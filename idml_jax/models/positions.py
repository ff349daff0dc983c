"""Where a token lies in the image: learned position embeddings resized to other grids, and rotary positions.

Learned embeddings are resized bicubically, in one of two ways that differ even when the grid grows. PyTorch's plain
bicubic resize (``antialias=False``: Meta's DINOv2, all networks of transformers but DINOv2 with registers) uses the
cubic of -0.75 and repeats the border. Its antialiased resize (timm for every network, Meta's DINOv2 with registers)
uses the cubic of -0.5, as Pillow does, made wider where the grid shrinks. Both are a matrix along each axis.
"""

import math
from functools import lru_cache
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Grid = tuple[int, int]
Table = TypeVar("Table", np.ndarray, jax.Array)


@lru_cache(maxsize=64)
def bicubic_matrix(old: int, new: int, antialias: bool) -> Float[np.ndarray, "new old"]:
    """Weights of ``old`` places in each of ``new`` ones, as ``torch.nn.functional.interpolate`` has them."""
    scale, weights = old / new, np.zeros((new, old))
    for row in range(new):
        centre = scale * (row + 0.5)
        if antialias:
            reach, shrink = 2.0 * max(scale, 1.0), 1.0 / max(scale, 1.0)
            first, last = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), old)
            places = np.arange(first, last)
            weights[row, first:last] = _cubic((places - centre + 0.5) * shrink, -0.5)
            weights[row] /= weights[row].sum()
        else:
            places = math.floor(centre - 0.5) + np.arange(-1, 3)
            np.add.at(weights[row], np.clip(places, 0, old - 1), _cubic(places - centre + 0.5, -0.75))
    return weights.astype(np.float32)


def _cubic(x: Float[np.ndarray, "k"], a: float) -> Float[np.ndarray, "k"]:
    """The cubic convolution kernel with parameter ``a`` (Keys, IEEE TASSP 1981)."""
    x = np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a
    return np.where(x <= 1.0, near, np.where(x < 2.0, far, 0.0))


def resize(table: Table, old: Grid, new: Grid, antialias: bool) -> Table:
    """Resizes position embeddings to another grid; those before the grid's (of a class token) are kept.

    Args:
      table: ``[1, prefix + old height * old width, d]``, a numpy or a jax array.
      old: height and width of its grid, in patches.
      new: height and width of the grid wanted.
      antialias: which bicubic resize; see the module.

    Returns:
      ``[1, prefix + new height * new width, d]`` of the same kind.
    """
    if old == new:
        return table
    prefix, width = table.shape[1] - old[0] * old[1], table.shape[2]
    rows, columns = (bicubic_matrix(*sizes, antialias) for sizes in zip(old, new, strict=True))
    with jax.default_matmul_precision("highest"):
        grid = rows @ table[0, prefix:].reshape(old[0], old[1] * width)
        grid = columns @ grid.reshape(new[0], old[1], width)
    grid = grid.reshape(1, new[0] * new[1], width)
    join = np.concatenate if isinstance(table, np.ndarray) else jnp.concatenate
    return join([table[:, :prefix], grid], axis=1)


def square_grids(stored: int, wanted: int) -> tuple[Grid, Grid] | None:
    """The square grids of two numbers of position embeddings, both with or both without a class token's, if any."""
    for prefix in (0, 1):
        sides = [math.isqrt(max(count - prefix, 0)) for count in (stored, wanted)]
        if all(sides) and [side * side + prefix for side in sides] == [stored, wanted]:
            return (sides[0], sides[0]), (sides[1], sides[1])
    return None


@lru_cache(maxsize=64)
def rotary_angles(grid: Grid, dim: int, base: float) -> Float[np.ndarray, "t d"]:
    """Angles by which queries and keys are turned at every patch (DINOv3, Simeoni et al., 2025).

    The centre of a patch has coordinates between -1 and 1 in each direction, whatever the number of patches. The first
    half of the frequencies turns with the row, the second with the column; the angles are repeated for both halves of
    a vector.

    Args:
      grid: patches from top to bottom and from left to right.
      dim: width of an attention head, a multiple of 4.
      base: ratio of the longest wavelength to the shortest, nearly.

    Returns:
      ``[grid height * grid width, dim]``, in radians.
    """
    centres = [(2.0 * np.arange(count) + 1.0) / count - 1.0 for count in grid]
    frequencies = base ** -np.arange(0.0, 1.0, 4.0 / dim)
    places = np.stack(np.meshgrid(*centres, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    angles = (2.0 * math.pi * places * frequencies).reshape(len(places), -1)
    return np.tile(angles, 2).astype(np.float32)


def rotate(x: Float[Array, "n t h d"], angles: Float[np.ndarray, "p d"]) -> Float[Array, "n t h d"]:
    """Turns queries or keys of the last ``p`` tokens by their angles; those before (class and registers) stay."""
    turning = x.shape[1] - len(angles)
    patches = x[:, turning:].astype(jnp.float32)
    first, second = jnp.split(patches, 2, axis=-1)
    cosine, sine = (function(angles)[None, :, None] for function in (np.cos, np.sin))
    turned = patches * cosine + jnp.concatenate([-second, first], axis=-1) * sine
    return jnp.concatenate([x[:, :turning], turned.astype(x.dtype)], axis=1)
