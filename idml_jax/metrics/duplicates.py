"""Near-duplicates: pairs of images that are much nearer to each other than other images are to them, and their groups.

The distance alone does not tell, since dense regions have small distances. It is divided by the distances at which the
two images have their 5th neighbours (the local scale of Zelnik-Manor and Perona, "Self-Tuning Spectral Clustering",
NIPS 2004), so that up to three more copies of an image do not hide it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from idml_jax.metrics.choices import NEAR as NEAR
from idml_jax.metrics.retrieval import Neighbours

PLACE = 5
CANDIDATES = 10  # neighbours of an image that may be its copies


class Pairs(NamedTuple):
    """Pairs of rows, the most alike first.

    Attributes:
      rows: ``[p, 2]``, the smaller number first.
      ratio: ``[p]`` distance over the geometric mean of the distances of both to their 5th neighbour; 0 for equal rows.
      distance: ``[p]`` distance.
    """

    rows: Int[np.ndarray, "p 2"]
    ratio: Float[np.ndarray, "p"]
    distance: Float[np.ndarray, "p"]


def near_pairs(found: Neighbours, near: float = NEAR) -> Pairs:
    """Pairs whose ratio is at most ``near``, among each row's 10 nearest.

    Args:
      found: the 10 nearest other rows of each row, or more; fewer in a small set.
      near: largest ratio; infinity gives all pairs of neighbours.
    """
    count, depth = found.index.shape[0], min(CANDIDATES, found.index.shape[1])
    scale = found.distance[:, min(PLACE, found.index.shape[1]) - 1].astype(np.float64)
    one, two = np.repeat(np.arange(count), depth), found.index[:, :depth].reshape(-1).astype(np.int64)
    distance = found.distance[:, :depth].reshape(-1).astype(np.float64)
    rows = np.stack([np.minimum(one, two), np.maximum(one, two)], axis=1)
    rows, first = np.unique(rows, axis=0, return_index=True)
    distance = distance[first]
    scales = np.sqrt(scale[rows[:, 0]] * scale[rows[:, 1]])
    ratio = np.where(distance > 0, distance / np.where(scales > 0, scales, 1.0), 0.0)
    order = np.lexsort((rows[:, 1], rows[:, 0], ratio))
    order = order[ratio[order] <= near]
    return Pairs(rows[order], ratio[order], distance[order])


def groups(pairs: Iterable[tuple[int, int]], count: int) -> list[Int[np.ndarray, "g"]]:
    """The groups that pairs connect (union-find), each with ascending rows; rows without a pair are in none."""
    parent = list(range(count))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    touched = set()
    for one, two in pairs:
        touched |= {one, two}
        one, two = sorted((root(one), root(two)))
        parent[two] = one
    members: dict[int, list[int]] = {}
    for row in sorted(touched):
        members.setdefault(root(row), []).append(row)
    return [np.asarray(rows) for _, rows in sorted(members.items())]
