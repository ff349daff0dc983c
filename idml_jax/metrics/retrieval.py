"""Exact retrieval metrics: R@K for any K, R-precision, MAP@R, mean reciprocal rank.

Conventions. Distance is Euclidean, on float32, measured from a centre of the rows (`nearest.centre`) if these are far
from the origin: distances that differ by less than about 1e-6 of the spread may swap places, those of equal rows never.
Within one set a query is excluded from its own answer list by its index. Neighbours are ordered by distance, equal
distances by gallery index (what a stable sort would give). The list is never cut at the class size. A lone query
(nothing in the gallery shares its class) is a miss for R@K and MRR, and is left out of RP and MAP@R. R-precision and
MAP@R follow Musgrave, Belongie and Lim, "A Metric Learning Reality Check", ECCV 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, PyTree, Shaped

from idml_jax.metrics import nearest, ranking
from idml_jax.metrics.checks import Array, check_pair, check_width, embedding_rows, label_column

# What takes several labels per row, as errors about labels say.
_SEVERAL = "full_ranking.rank_all takes [n, l], numbers filled up with -1"

# An array, or a tree (tuple, dict) of arrays with the same first axis.
Tree: TypeAlias = PyTree[Shaped[Array, "_ ..."]]


class Ranks(NamedTuple):
    """Retrieval results of each of n queries (host arrays).

    first_hit: rank of the nearest same-class image, 1 = nearest of all; 0 for a lone query.
    nearest_correct: the nearest image is of the query's class (False for a lone query).
    r_precision: share of the R nearest that are of the query's class, R = positives; NaN for a lone query.
    average_precision: the query's term of MAP@R; NaN for a lone query.
    positives: R, the number of gallery images of the query's class, the query itself not counted.
    nearest_distance: Euclidean distance to the nearest image, from squared distances in float32: near 0 it is good to
        about 5e-4 of the rows' distance from their centre (`neighbours` is exact there).
    """

    first_hit: Int[np.ndarray, "n"]
    nearest_correct: Bool[np.ndarray, "n"]
    r_precision: Float[np.ndarray, "n"]
    average_precision: Float[np.ndarray, "n"]
    positives: Int[np.ndarray, "n"]
    nearest_distance: Float[np.ndarray, "n"]


class Neighbours(NamedTuple):
    """The k nearest rows of each of n queries, nearest first (host arrays)."""

    distance: Float[np.ndarray, "n k"]
    index: Int[np.ndarray, "n k"]  # type: ignore[assignment]  # in place of tuple.index


def retrieval_metrics(
    embeddings: Float[Array, "n d"],
    labels: Int[Array, "n"],
    gallery: Float[Array, "m d"] | None = None,
    gallery_labels: Int[Array, "m"] | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    devices: Sequence[jax.Device] | None = None,
) -> dict[str, float]:
    """Retrieval quality of embeddings [n, d] (any norm that float32 holds) with class labels [n], all in [0, 1].

    Without a gallery every row queries all the others; with gallery [m, d] and gallery_labels [m] every row queries
    the gallery, and nothing is excluded. A K beyond the gallery's size means the whole gallery. The work is shared by
    `devices` (default: all of this process); the result does not depend on them.

    Returns 'R@K' for each K, 'RP', 'MAP@R' (both NaN when every query is lone), 'MRR', and the counts 'queries' and
    'lone_queries'. Raises ValueError, naming the argument, for empty, mismatched or non-finite input, and for rows
    whose squares float32 cannot hold (numbers all above about 1e18, or all below about 3e-16).
    """
    ks = _checked_ks(ks)
    ranks = retrieval_ranks(embeddings, labels, gallery, gallery_labels, devices=devices)
    return summarise(ranks, ks)


def summarise(ranks: Ranks, ks: Sequence[int] = (1, 2, 4, 8)) -> dict[str, float]:
    """Averages of per-query results: the dictionary that `retrieval_metrics` returns."""
    ks = _checked_ks(ks)
    found = ranks.positives > 0
    result = {f"R@{k}": float(np.mean(found & (ranks.first_hit <= k))) for k in ks}
    result["RP"] = _mean(ranks.r_precision[found])
    result["MAP@R"] = _mean(ranks.average_precision[found])
    result["MRR"] = float(np.sum(1.0 / ranks.first_hit[found], dtype=np.float64) / len(found))
    result["queries"] = len(found)
    result["lone_queries"] = int(np.sum(~found))
    return result


def retrieval_ranks(
    embeddings: Float[Array, "n d"],
    labels: Int[Array, "n"],
    gallery: Float[Array, "m d"] | None = None,
    gallery_labels: Int[Array, "m"] | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Ranks:
    """Per-query results (see `Ranks`) behind `retrieval_metrics`; same arguments, same errors."""
    task = _task(embeddings, labels, gallery, gallery_labels)
    devices = list(jax.local_devices() if devices is None else devices)
    few = task.positives <= ranking.COUNTING_LIMIT
    ways = ((ranking.by_counting, np.flatnonzero(few)), (ranking.by_top_k, np.flatnonzero(~few)))
    parts = [(rows, rank(task, rows, devices)) for rank, rows in ways if len(rows)]
    back = np.argsort(np.concatenate([rows for rows, _ in parts]))
    found = ranking.Found(*(np.concatenate(c)[back] for c in zip(*(part for _, part in parts), strict=True)))
    return _as_ranks(task, found, np.sqrt(np.maximum(found.nearest, 0)))


def ranks_by_distance(
    distance: Callable[[Tree, Tree], Float[jax.Array, "n m"]],
    queries: Tree,
    labels: Int[Array, "n"],
    gallery: Tree | None = None,
    gallery_labels: Int[Array, "m"] | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Ranks:
    """Per-query results under any distance: distance(a, b) -> [rows of a, rows of b], smaller = more alike.

    queries and gallery are arrays, or trees of arrays such as `ism.Embedding`, with one entry per image in front. The
    distance is jitted and sees some queries and the whole gallery at a time, filled up with zeros. It is compiled
    again for every new function object: pass a named function, not a lambda made in a loop. Raises ValueError for
    empty or mismatched input and for a distance that gives NaN.
    """
    check_pair(gallery, gallery_labels, labels)
    queries, labels = _tree_set(queries, labels, "queries", "labels")
    same_set = gallery is None
    if same_set:
        if len(labels) < 2:
            raise ValueError("queries: a single row has nothing to retrieve; give at least 2 rows or a gallery")
        gallery, gallery_labels = queries, labels
    else:
        assert gallery_labels is not None  # see `_check_pair`
        gallery, gallery_labels = _tree_set(gallery, gallery_labels, "gallery", "gallery_labels")
    task = ranking.make_task(queries, None, labels, gallery, None, gallery_labels, same_set)
    devices = list(jax.local_devices() if devices is None else devices)
    found = ranking.by_top_k(task, np.arange(len(labels)), devices, distance)
    if np.isnan(found.nearest).any():
        raise ValueError("distance: gave NaN")
    return _as_ranks(task, found, found.nearest)


def neighbours(
    embeddings: Float[Array, "n d"],
    gallery: Float[Array, "m d"] | None = None,
    k: int = 1,
    *,
    own: Int[Array, "n"] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Neighbours:
    """The k nearest rows of each of n queries, nearest first, equal distances by index; exact for any origin.

    Without a gallery every row queries all the others. With one, `own` [n] may name the gallery row that each query
    leaves out (its own unchanged image, say; -1: none). Distances are Euclidean, of the differences in float64; these
    decide the order. Raises ValueError, naming the argument, for empty, mismatched or non-finite input and for a k
    that the gallery cannot serve.
    """
    queries = embedding_rows(embeddings, "embeddings")[0]
    same_set = gallery is None
    rows = queries if gallery is None else embedding_rows(gallery, "gallery")[0]
    check_width(queries, rows)
    own = _own_rows(own, same_set, len(queries), len(rows))
    leaves_out = bool(np.any(own >= 0))
    if not 1 <= k <= len(rows) - leaves_out:
        raise ValueError(f"k: expected 1 to {len(rows) - leaves_out}, the rows there are to find, got {k}")
    devices = list(jax.local_devices() if devices is None else devices)
    return Neighbours(*nearest.nearest(queries, rows, int(k), own, devices))


def _own_rows(own: Int[Array, "n"] | None, same_set: bool, size: int, rows: int) -> Int[np.ndarray, "n"]:
    """The gallery row that each of `size` queries leaves out, -2 for none.

    Raises ValueError for indices outside the gallery, for another shape or type, and without a gallery.
    """
    if own is None:
        return np.arange(size) if same_set else np.full(size, -2)
    own = np.asarray(own)
    if same_set:
        raise ValueError("own: needs a gallery; without one every query leaves itself out")
    if own.shape != (size,) or not np.issubdtype(own.dtype, np.integer) or own.min() < -1 or own.max() >= rows:
        raise ValueError(f"own: expected {size} whole numbers from -1 to {rows - 1}, indices of gallery rows")
    return np.where(own < 0, -2, own)


def _task(
    embeddings: Float[Array, "n d"],
    labels: Shaped[Array, "n"],
    gallery: Float[Array, "m d"] | None,
    gallery_labels: Shaped[Array, "m"] | None,
) -> ranking.Task:
    """The validated Euclidean task, its rows moved to their centre."""
    check_pair(gallery, gallery_labels, labels)
    queries = embedding_rows(embeddings, "embeddings")[0]
    labels = label_column(labels, len(queries), "labels", "embeddings", _SEVERAL)
    if gallery is None:
        if len(queries) < 2:
            raise ValueError("embeddings: a single row has nothing to retrieve; give at least 2 rows or a gallery")
        row_labels = labels
        ((rows, norms),) = nearest.moved(queries)
        queries, query_norms = rows, norms
    else:
        rows = embedding_rows(gallery, "gallery")[0]
        assert gallery_labels is not None  # see `_check_pair`
        row_labels = label_column(gallery_labels, len(rows), "gallery_labels", "gallery", _SEVERAL)
        check_width(queries, rows)
        (queries, query_norms), (rows, norms) = nearest.moved(queries, rows)
    return ranking.make_task(queries, query_norms, labels, rows, norms, row_labels, gallery is None)


def _as_ranks(task: ranking.Task, found: ranking.Found, nearest_distance: Float[np.ndarray, "n"]) -> Ranks:
    """The results as callers get them, lone queries marked."""
    some = task.positives > 0
    first_hit = np.where(some, found.first_hit, 0).astype(np.int32)
    return Ranks(
        first_hit=first_hit,
        nearest_correct=first_hit == 1,
        r_precision=np.where(some, found.r_precision, np.nan),
        average_precision=np.where(some, found.average_precision, np.nan),
        positives=task.positives.astype(np.int32),
        nearest_distance=nearest_distance,
    )


def _tree_set(
    tree: Tree, labels: Shaped[Array, "n"], name: str, labels_name: str
) -> tuple[PyTree[Shaped[np.ndarray, "n ..."]], Shaped[np.ndarray, "n"]]:
    """The arrays of a tree and their labels on the host; ValueError, naming the argument, where rows do not match."""
    tree = jax.tree.map(np.asarray, tree)
    leaves = jax.tree.leaves(tree)
    sizes = {leaf.shape[:1] for leaf in leaves}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise ValueError(f"{name}: expected arrays with the same number of rows, got {[x.shape for x in leaves]}")
    return tree, label_column(labels, len(leaves[0]), labels_name, name, _SEVERAL)


def _checked_ks(ks: Sequence[int]) -> tuple[int, ...]:
    """The Ks as integers; ValueError unless all are whole numbers from 1 on."""
    ks = tuple(ks) if np.iterable(ks) else (ks,)  # one K is told by its number too
    if not ks or any(k != int(k) or k < 1 for k in ks):
        raise ValueError(f"ks: expected one or more whole numbers >= 1, got {ks}")
    return tuple(int(k) for k in ks)


def _mean(values: Float[np.ndarray, "n"]) -> float:
    """Mean in float64; NaN if there are none."""
    return float(np.mean(values, dtype=np.float64)) if len(values) else float("nan")
