"""Exact retrieval metrics: R@K for any K, R-precision, MAP@R, mean reciprocal rank.

Conventions. Distance is Euclidean, on float32. Within one set a query is excluded from its own answer list by its
index. Neighbours are ordered by distance, equal distances by gallery index (what a stable sort would give). The list
is never cut at the class size. A lone query (nothing in the gallery shares its class) is a miss for R@K and MRR, and
is left out of RP and MAP@R. R-precision and MAP@R follow Musgrave, Belongie and Lim, "A Metric Learning Reality
Check", ECCV 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_TILE = 256


class Ranks(NamedTuple):
    """What retrieval says about each of n queries (host arrays).

    first_hit: rank of the nearest same-class image, 1 = nearest of all; 0 for a lone query.
    nearest_correct: the nearest image is of the query's class (False for a lone query).
    r_precision: share of the R nearest that are of the query's class, R = positives; NaN for a lone query.
    average_precision: the query's term of MAP@R; NaN for a lone query.
    positives: R, the number of gallery images of the query's class, the query itself not counted.
    nearest_distance: Euclidean distance to the nearest image.
    """

    first_hit: Int[np.ndarray, "n"]
    nearest_correct: Bool[np.ndarray, "n"]
    r_precision: Float[np.ndarray, "n"]
    average_precision: Float[np.ndarray, "n"]
    positives: Int[np.ndarray, "n"]
    nearest_distance: Float[np.ndarray, "n"]


def retrieval_metrics(
    embeddings: Float[Array, "n d"],
    labels: Int[Array, "n"],
    gallery: Float[Array, "m d"] | None = None,
    gallery_labels: Int[Array, "m"] | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
) -> dict[str, float]:
    """Retrieval quality of embeddings [n, d] (any norm) with class labels [n], all in [0, 1].

    Without a gallery every row queries all the others; with gallery [m, d] and gallery_labels [m] every row queries
    the gallery, and nothing is excluded. A K beyond the gallery's size means the whole gallery.

    Returns 'R@K' for each K, 'RP', 'MAP@R' (both NaN when every query is lone), 'MRR', and the counts 'queries' and
    'lone_queries'. Raises ValueError, naming the argument, for empty, mismatched or non-finite input.
    """
    ks = _checked_ks(ks)
    ranks = retrieval_ranks(embeddings, labels, gallery, gallery_labels)
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
) -> Ranks:
    """Per-query results (see `Ranks`) behind `retrieval_metrics`; same arguments, same errors."""
    queries, q_labels, gallery_, g_labels = _checked(embeddings, labels, gallery, gallery_labels)
    same_set = gallery is None
    n, m = len(queries), len(gallery_)
    # Shapes are rounded up so that sets of similar size share one compiled program.
    columns = _round_up(m)
    gallery_ = np.pad(gallery_, ((0, columns - m), (0, 0)))
    g_labels = np.pad(g_labels, (0, columns - m), constant_values=-1)
    gallery_, g_labels = jnp.asarray(gallery_), jnp.asarray(g_labels)
    norms = jnp.sum(gallery_ * gallery_, axis=1)
    parts = []
    for start in range(0, n, _TILE):
        rows = slice(start, start + _TILE)
        pad = start + _TILE - min(start + _TILE, n)
        tile = np.pad(queries[rows], ((0, pad), (0, 0)))
        tile_labels = np.pad(q_labels[rows], (0, pad), constant_values=-2)
        itself = np.arange(start, start + _TILE) if same_set else np.full(_TILE, -1)
        part = _rank_tile(tile, tile_labels, itself.astype(np.int32), gallery_, g_labels, norms, np.int32(m))
        parts.append(jax.device_get(part))
    return Ranks(*(np.concatenate(column)[:n] for column in zip(*parts, strict=True)))


@jax.jit
def _rank_tile(queries, labels, itself, gallery, gallery_labels, norms, size):
    columns = jnp.arange(gallery.shape[0])[None, :]
    product = jnp.matmul(queries, gallery.T, precision=jax.lax.Precision.HIGHEST)
    # The query's own squared norm changes no order; it is added only to the distance that is reported.
    score = norms[None, :] - 2 * product
    out = (columns == itself[:, None]) | (columns >= size)
    score = jnp.where(out, jnp.inf, score)
    order = jnp.argsort(score, axis=1, stable=True)
    hits = gallery_labels[order] == labels[:, None]
    hits &= ~jnp.take_along_axis(out, order, axis=1)
    positives = jnp.sum(hits, axis=1)
    seen = jnp.cumsum(hits, axis=1)
    rank = columns + 1
    inside = hits & (rank <= positives[:, None])
    r_precision = jnp.sum(inside, axis=1) / positives
    average = jnp.sum(jnp.where(inside, seen / rank, 0), axis=1) / positives
    first = jnp.where(positives > 0, jnp.argmax(hits, axis=1) + 1, 0)
    nearest = jnp.sqrt(jnp.maximum(jnp.min(score, axis=1) + jnp.sum(queries * queries, axis=1), 0))
    return Ranks(first, hits[:, 0], r_precision, average, positives, nearest)


def _checked_ks(ks):
    ks = tuple(ks)
    if not ks or any(k != int(k) or k < 1 for k in ks):
        raise ValueError(f"ks: expected one or more whole numbers >= 1, got {ks}")
    return tuple(int(k) for k in ks)


def _checked(embeddings, labels, gallery, gallery_labels):
    """Host arrays: float32 embeddings and labels renumbered 0, 1, ... over queries and gallery together."""
    if (gallery is None) != (gallery_labels is None):
        missing = "gallery" if gallery is None else "gallery_labels"
        raise ValueError(f"{missing}: missing; gallery and gallery_labels go together")
    queries, labels = _checked_set(embeddings, labels, "embeddings", "labels")
    if gallery is None:
        if len(queries) < 2:
            raise ValueError("embeddings: a single row has nothing to retrieve; give at least 2 rows or a gallery")
        labels = np.unique(labels, return_inverse=True)[1].astype(np.int32)
        return queries, labels, queries, labels
    gallery, gallery_labels = _checked_set(gallery, gallery_labels, "gallery", "gallery_labels")
    if gallery.shape[1] != queries.shape[1]:
        raise ValueError(f"gallery: width {gallery.shape[1]} differs from the embeddings' width {queries.shape[1]}")
    both = np.unique(np.concatenate([labels, gallery_labels]), return_inverse=True)[1].astype(np.int32)
    return queries, both[: len(labels)], gallery, both[len(labels) :]


def _checked_set(embeddings, labels, name, labels_name):
    embeddings, labels = np.asarray(embeddings), np.asarray(labels)
    if embeddings.ndim != 2 or embeddings.shape[1] == 0:
        raise ValueError(f"{name}: expected shape [rows, width], got {embeddings.shape}")
    if len(embeddings) == 0:
        raise ValueError(f"{name}: no rows")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"{labels_name}: expected shape ({len(embeddings)},) as {name} has rows, got {labels.shape}")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise ValueError(f"{labels_name}: not finite")
    embeddings = embeddings.astype(np.float32, copy=False)
    # One sum finds NaN and infinity in the rows, and squares that float32 cannot hold.
    if not np.isfinite(np.einsum("nd,nd->n", embeddings, embeddings)).all():
        raise ValueError(f"{name}: NaN, infinite or too large for float32")
    return embeddings, labels


def _round_up(size: int) -> int:
    """The next multiple of 4096, or below that the next power of two (at least 16)."""
    return -(-size // 4096) * 4096 if size > 4096 else max(16, 1 << (size - 1).bit_length())


def _mean(values) -> float:
    return float(np.mean(values, dtype=np.float64)) if len(values) else float("nan")
