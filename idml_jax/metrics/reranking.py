"""Changes queries, gallery or the order of answers by the neighbours of neighbours, without labels or training.

* ``expanded``: alpha query expansion, ``q' = l2(q + sum of max(0, q.x)^alpha x over the k nearest x)`` (Radenovic,
  Tolias and Chum, TPAMI 2018).
* ``augmented``: database augmentation, each gallery row ``x' = l2(sum over r = 0..k of (k + 1 - r) x_r)`` with its r-th
  neighbour ``x_r`` and itself at r = 0 (Turcot and Lowe, 2009; the weights of Gordo et al., IJCV 2017).
* ``reciprocal``: k-reciprocal re-ranking (Zhong, Zheng, Cao and Li, CVPR 2017), sparse: a row of its encoding has at
  most ``(k1 + 1) (k1 / 2 + 2)`` entries before and ``k2`` times as many after its local expansion, in practice far
  fewer.

All compare rows at length 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.metrics.checks import Array, embedding_rows
from idml_jax.metrics.closed_form import unit_rows
from idml_jax.metrics.retrieval import Neighbours, neighbours

_ROWS = 4096  # rows at a time
_ROUNDING = 1e-5  # of a cosine distance, with some room


class Reciprocal(NamedTuple):
    """Settings of k-reciprocal re-ranking, by default those of the paper.

    Attributes:
      k1: neighbours that are compared.
      k2: neighbours, itself included, whose encodings are averaged; 1: none.
      weight: lambda, the share of the original distance.
    """

    k1: int = 20
    k2: int = 6
    weight: float = 0.3


def unit_float32(rows: Float[Array, "n d"], name: str) -> Float[np.ndarray, "n d"]:
    """Rows at length 1; ValueError, with the name, for empty or non-finite ones."""
    return unit_rows(embedding_rows(rows, name)[0].astype(np.float64)).astype(np.float32)


def expanded(
    queries: Float[Array, "n d"],
    gallery: Float[Array, "m d"],
    k: int = 10,
    alpha: float = 3.0,
    *,
    own: Int[Array, "n"] | None = None,
) -> Float[np.ndarray, "n d"]:
    """Alpha query expansion.

    Args:
      queries: ``[n, d]``.
      gallery: ``[m, d]``.
      k: number of neighbours, at least 1; all rows if the gallery has fewer.
      alpha: power of their similarity; 0 weights all alike.
      own: ``[n]`` gallery row that each query leaves out, -1: none.

    Raises:
      ValueError: for a k below 1, a negative alpha, and mismatched or non-finite input.
    """
    if k < 1 or not 0 <= alpha < np.inf:
        raise ValueError(f"k, alpha: expected at least 1 and at least 0, got {k} and {alpha}")
    rows, searched = unit_float32(queries, "queries"), unit_float32(gallery, "gallery")
    k = min(k, len(searched) - (own is not None))
    if k < 1:
        return rows
    index = neighbours(rows, searched, k, own=own).index
    result = np.empty_like(rows)
    for start in range(0, len(rows), _ROWS):
        cut = slice(start, start + _ROWS)
        near = searched[index[cut]]
        weights = np.maximum(np.einsum("nd,nkd->nk", rows[cut], near), 0) ** np.float32(alpha)
        result[cut] = rows[cut] + np.einsum("nk,nkd->nd", weights, near)
    return unit_rows(result)


def augmented(gallery: Float[Array, "m d"], k: int = 10) -> Float[np.ndarray, "m d"]:
    """Database augmentation; arguments and errors as for ``expanded``."""
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    rows = unit_float32(gallery, "gallery")
    k = min(k, len(rows) - 1)
    if k < 1:
        return rows
    index = neighbours(rows, k=k).index
    weights = np.arange(k, 0, -1, dtype=np.float32)
    result = np.empty_like(rows)
    for start in range(0, len(rows), _ROWS):
        cut = slice(start, start + _ROWS)
        result[cut] = (k + 1) * rows[cut] + np.einsum("k,nkd->nd", weights, rows[index[cut]])
    return unit_rows(result)


def reciprocal(
    queries: Float[Array, "n d"],
    gallery: Float[Array, "m d"] | None = None,
    depth: int = 10,
    *,
    own: Int[Array, "n"] | None = None,
    setting: Reciprocal = Reciprocal(),  # noqa: B008 (immutable)
) -> Neighbours:
    """k-reciprocal re-ranking of the whole gallery.

    With ``d`` the cosine distance 1 - a.b (for unit rows half of the squared distance of the paper) and ``N(p, k)`` the
    k nearest rows of queries and gallery together, ``p`` itself not counted but always added:
    ``R(p, k) = {q in N(p, k): p in N(q, k)}``; ``R*(p)`` is ``R(p, k1)`` joined with every ``R(q, k1/2)``, q in it, of
    which two thirds lie in ``R(p, k1)``; ``V_p(q) = exp(-d(p, q))`` on ``R*(p)``, scaled to the sum 1, then averaged
    over the k2 nearest; ``J(p, q) = 1 - sum min(V_p, V_q) / sum max(V_p, V_q)``; the result is ordered by
    ``(1 - weight) J + weight d``.

    Args:
      queries: ``[n, d]``; without a gallery each searches all the others.
      gallery: ``[m, d]``.
      depth: number of answers for each query.
      own: ``[n]`` gallery row that is the query's own image, -1: none.
      setting: numbers of neighbours and the weight.

    Returns:
      The ``depth`` nearest by the new distance, equal ones by index.

    Raises:
      ValueError: for settings out of range, a depth that the gallery cannot serve, mismatched or non-finite input.
    """
    k1, k2, weight = setting
    if not (k1 >= 1 and 1 <= k2 <= k1 + 1 and 0 <= weight <= 1):
        raise ValueError(f"setting: expected k1 >= 1, 1 <= k2 <= k1 + 1 and a weight from 0 to 1, got {setting}")
    asked = unit_float32(queries, "queries")
    if gallery is None:
        every, place, size = asked, np.arange(len(asked)), len(asked)
        own = place
        listed = neighbours(asked, k=depth).index
    else:
        rows = unit_float32(gallery, "gallery")
        own = np.full(len(asked), -1) if own is None else np.asarray(own)
        listed = neighbours(asked, rows, depth, own=own if (own >= 0).any() else None).index
        new = own < 0  # the others are in the gallery
        every, size = np.concatenate([rows, asked[new]]), len(rows)
        place = np.where(new, size + np.cumsum(new) - 1, own)
    codes = _encoded(every, min(k1, len(every) - 1), k2)
    inverse = _inverse(codes, size)
    distance, index = np.empty((len(asked), depth), np.float32), np.empty((len(asked), depth), np.int32)
    for query, row in enumerate(place.tolist()):
        common = _common(codes, inverse, row, size)
        jaccard = 1 - common / (2 - common)
        # All other rows are at least as far as the last of these, which decides whether they can be among the answers.
        near = 1 - every[listed[query]] @ asked[query]
        last = ((1 - weight) * jaccard[listed[query]] + weight * near).max()
        some = np.flatnonzero((common > 0) & ((1 - weight) * jaccard + weight * (near.max() - _ROUNDING) <= last))
        some = np.union1d(some, listed[query])
        some = some[some != own[query]]
        new_distance = (1 - weight) * jaccard[some] + weight * (1 - every[some] @ asked[query])
        order = np.lexsort((some, new_distance))[:depth]
        distance[query], index[query] = new_distance[order], some[order]
    return Neighbours(distance, index)


class _Rows(NamedTuple):
    """A sparse matrix by rows: row i has `values` at `columns` from `starts[i]` to `starts[i + 1]`."""

    starts: Int[np.ndarray, "n1"]
    columns: Int[np.ndarray, "e"]
    values: Float[np.ndarray, "e"]


def _rows_of(parts: list[tuple[np.ndarray, np.ndarray]]) -> _Rows:
    starts = np.concatenate([[0], np.cumsum([len(columns) for columns, _ in parts])])
    return _Rows(starts, np.concatenate([x for x, _ in parts]), np.concatenate([x for _, x in parts]))


def _encoded(rows: Float[np.ndarray, "n d"], k1: int, k2: int) -> _Rows:
    """V of all rows, after the local expansion."""
    size, half = len(rows), round(k1 / 2)
    near = np.arange(size, dtype=np.int32)[:, None]
    if k1:
        near = np.concatenate([near, neighbours(rows, k=k1).index], axis=1)
    mutual, mutual_half = _mutual(near), _mutual(near[:, : half + 1])
    first = []
    for row in range(size):
        members = near[row, mutual[row]]
        candidates, valid = near[members, : half + 1], mutual_half[members]
        shared = np.isin(candidates, members) & valid
        taken = 3 * shared.sum(axis=1) >= 2 * valid.sum(axis=1)
        members = np.union1d(members, candidates[taken][valid[taken]]).astype(np.int32)
        values = np.exp(rows[members] @ rows[row] - 1)
        first.append((members, (values / values.sum()).astype(np.float32)))
    if k2 == 1:
        return _rows_of(first)
    averaged = []
    for row in range(size):
        around = near[row, :k2].tolist()
        columns, where = np.unique(np.concatenate([first[one][0] for one in around]), return_inverse=True)
        values = np.bincount(where, np.concatenate([first[one][1] for one in around])) / len(around)
        averaged.append((columns, values.astype(np.float32)))
    return _rows_of(averaged)


def _mutual(near: Int[np.ndarray, "n k"]) -> Bool[np.ndarray, "n k"]:
    """Whether each row is among the listed neighbours of each of its own."""
    found = np.empty(near.shape, bool)
    for start in range(0, len(near), _ROWS):
        cut = slice(start, start + _ROWS)
        found[cut] = (near[near[cut]] == near[cut, :1, None]).any(axis=2)
    return found


def _inverse(codes: _Rows, size: int) -> _Rows:
    """The entries of the first `size` rows by their columns: `columns` are then rows."""
    end = int(codes.starts[size])
    order = np.argsort(codes.columns[:end], kind="stable")
    rows = np.repeat(np.arange(size, dtype=np.int32), np.diff(codes.starts[: size + 1]))[order]
    counts = np.bincount(codes.columns[:end], minlength=len(codes.starts) - 1)
    return _Rows(np.concatenate([[0], np.cumsum(counts)]), rows, codes.values[:end][order])


def _common(codes: _Rows, inverse: _Rows, row: int, size: int) -> Float[np.ndarray, "size"]:
    """Sum of the smaller of the encodings of a row and of each of the first `size` rows."""
    cut = slice(codes.starts[row], codes.starts[row + 1])
    columns, own = codes.columns[cut], codes.values[cut]
    begins, lengths = inverse.starts[columns], inverse.starts[columns + 1] - inverse.starts[columns]
    entries = np.repeat(begins - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths) + np.arange(lengths.sum())
    least = np.minimum(np.repeat(own, lengths), inverse.values[entries])
    return np.bincount(inverse.columns[entries], least, size)
