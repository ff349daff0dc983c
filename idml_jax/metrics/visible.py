"""Exact nearest rows where each query may see only a part of the gallery: all classes but one, say."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from idml_jax.metrics import nearest
from idml_jax.metrics.retrieval import Neighbours

_TILE = 2**22  # distances at a time
_GATHERED = 2**22  # numbers of candidate rows at a time


def nearest_of_other_classes(
    queries: Float[np.ndarray, "n d"],
    hidden: Int[np.ndarray, "n h"],
    gallery: Float[np.ndarray, "m d"],
    labels: Int[np.ndarray, "m"],
    k: int,
    *,
    own: Int[np.ndarray, "n"] | None = None,
) -> Neighbours:
    """The k nearest gallery rows of each query outside of its hidden classes, nearest first, equal ones by index.

    Distances are Euclidean, of the differences in float64; these decide the order, as in ``retrieval.neighbours``. The
    work is done in tiles on the host.

    Args:
      queries: finite rows.
      hidden: classes that each query does not see, perhaps none (h = 0).
      gallery: finite rows.
      labels: class of each gallery row.
      k: number of neighbours.
      own: gallery row that each query does not see either; -1: none.

    Raises:
      ValueError: if some query sees fewer than k rows.
    """
    seen = visible_rows(hidden, labels, own)
    if not len(queries) or not 1 <= k <= seen.min():
        raise ValueError(f"k: expected 1 to {seen.min() if len(seen) else 0}, the rows that every query sees, got {k}")
    queries, gallery = np.asarray(queries, np.float32), np.asarray(gallery, np.float32)
    (near, near_squares), (far, far_squares) = nearest.moved(queries, gallery)
    largest = np.sqrt(far_squares.max(), dtype=np.float64)
    bound = nearest.rounding(near.shape[1]) * (np.sqrt(near_squares, dtype=np.float64) + largest) ** 2
    distance, index = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int32)
    step = max(1, _TILE // len(gallery))
    for start in range(0, len(queries), step):
        cut = slice(start, start + step)
        squares = near_squares[cut, None] + far_squares[None] - 2 * near[cut] @ far.T
        for column in hidden[cut].T:
            squares[column[:, None] == labels[None]] = np.inf
        if own is not None:
            mine = np.flatnonzero(own[cut] >= 0)
            squares[mine, own[cut][mine]] = np.inf
        last = np.partition(squares, k - 1, axis=1)[:, k - 1]
        # Any row within the rounding error of the k-th may be among the k nearest.
        row, column = np.nonzero(squares <= (last + 2 * bound[cut])[:, None])
        exact = _squared_distances(queries[cut], gallery, row, column)
        order = np.lexsort((column, exact, row))
        place = np.searchsorted(row[order], np.arange(len(squares)))[:, None] + np.arange(k)
        index[cut] = column[order][place]
        distance[cut] = np.sqrt(exact[order][place])
    return Neighbours(distance, index)


def visible_rows(
    hidden: Int[np.ndarray, "n h"], labels: Int[np.ndarray, "m"], own: Int[np.ndarray, "n"] | None = None
) -> Int[np.ndarray, "n"]:
    """Number of gallery rows that each query of ``nearest_of_other_classes`` sees."""
    different = np.sort(hidden, axis=1)
    repeated = np.zeros(different.shape, bool)
    repeated[:, 1:] = different[:, 1:] == different[:, :-1]
    seen = len(labels) - np.where(repeated, 0, sizes_of(different, labels)).sum(axis=1)
    if own is None:
        return seen
    return seen - ((own >= 0) & (labels[np.maximum(own, 0), None] != hidden).all(axis=1))


def sizes_of(classes: Int[np.ndarray, "..."], labels: Int[np.ndarray, "m"]) -> Int[np.ndarray, "..."]:
    """Number of rows with each of the given labels; 0 for a label that no row has."""
    known, counts = np.unique(labels, return_counts=True)
    place = np.minimum(np.searchsorted(known, classes), len(known) - 1)
    return np.where(known[place] == classes, counts[place], 0)


def _squared_distances(
    queries: Float[np.ndarray, "n d"],
    gallery: Float[np.ndarray, "m d"],
    row: Int[np.ndarray, "p"],
    column: Int[np.ndarray, "p"],
) -> Float[np.ndarray, "p"]:
    """Squared distances of pairs by differences, in float64."""
    step = max(1, _GATHERED // queries.shape[1])
    cuts = [slice(start, start + step) for start in range(0, len(row), step)]
    return np.concatenate(
        [np.sum(np.square(np.subtract(queries[row[c]], gallery[column[c]], dtype=np.float64)), axis=1) for c in cuts]
    )
