"""Metrics where a right answer is not simply an image of the query's class: with several labels per image, with groups
whose images are not found (cameras), and where queries are in the gallery themselves.

All distances are ranked (`full_ranking`), so these metrics take longer than those of `retrieval`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from idml_jax.metrics import full_ranking, retrieval, uncertainty
from idml_jax.metrics.embedded import Embedded
from idml_jax.metrics.full_ranking import Groups, Ranking
from idml_jax.metrics.retrieval import Neighbours, Ranks

# What needs one class for each image, or every answer list as it is.
LEFT_OUT = (
    "clusters (NMI, AMI, F1), the vote, the confidence, scores that compare neighbours, open-set and verification "
    "metrics are left out, as they are defined for one class per image and a whole gallery"
)


def own_rows(queries: Embedded, gallery: Embedded | None) -> Int[np.ndarray, "n"] | None:
    """Gallery row of each query itself, -1 for none; ``None`` if no query is in the gallery."""
    if gallery is None or queries.ids is None or gallery.ids is None:
        return None
    known = {name: row for row, name in enumerate(gallery.ids.tolist())}
    own = np.asarray([known.get(name, -1) for name in queries.ids.tolist()])
    return own if (own >= 0).any() else None


def is_special(queries: Embedded, gallery: Embedded | None = None) -> bool:
    """Whether a right answer is not simply an image of the query's class."""
    special = queries.sets is not None or queries.groups is not None
    return special or own_rows(queries, gallery) is not None


def rank(queries: Embedded, gallery: Embedded | None = None) -> Ranking:
    """Ranks of all right answers."""
    labels = lambda side: side.labels if side.sets is None else side.sets
    groups = None
    if queries.groups is not None and (gallery is None or gallery.groups is not None):
        groups = Groups(queries.groups, None if gallery is None else gallery.groups)
    searched = (None, None) if gallery is None else (gallery.semantic, labels(gallery))
    own = own_rows(queries, gallery)
    return full_ranking.rank_all(queries.semantic, labels(queries), *searched, groups=groups, own=own)


def relevant(queries: Embedded, gallery: Embedded, rows: Int[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Whether each query shares a label with one gallery row."""
    return shared(queries.every_label, gallery.every_label[rows])


def shared(one: Int[np.ndarray, "n l"], other: Int[np.ndarray, "n k"]) -> Bool[np.ndarray, "n"]:
    """Whether two rows of labels, filled up with -1, share one."""
    mine, theirs = one[:, :, None], other[:, None, :]
    return ((mine == theirs) & (mine >= 0)).any(axis=(1, 2))


def nearest_found(queries: Embedded, gallery: Embedded, k: int, own: Int[np.ndarray, "n"] | None = None) -> Neighbours:
    """The k nearest images that each query can find: with groups, not those of its class and group.

    Where a query can find fewer than k, the others follow the ones that it can find.

    Args:
      queries: the queries.
      gallery: images that are searched.
      k: number of neighbours.
      own: ``[n]`` gallery row of each query itself; -1: none.
    """
    if queries.groups is None or gallery.groups is None:
        return retrieval.neighbours(queries.semantic, gallery.semantic, k, own=own)
    most = len(gallery.labels) - (own is not None)
    depth = min(most, k + _most_excluded(gallery.every_label, gallery.groups))
    found = retrieval.neighbours(queries.semantic, gallery.semantic, depth, own=own)
    out = np.stack(
        [relevant(queries, gallery, rows) & (gallery.groups[rows] == queries.groups) for rows in found.index.T],
        axis=1,
    )
    order = np.argsort(out, axis=1, kind="stable")[:, :k]
    return Neighbours(*(np.take_along_axis(part, order, axis=1) for part in (found.distance, found.index)))


def _most_excluded(sets: Int[np.ndarray, "m l"], groups: Shaped[np.ndarray, "m"]) -> int:
    """No query has more images of its class and group in a gallery than this."""
    groups = np.unique(groups, return_inverse=True)[1]
    keys = (sets.astype(np.int64) * (int(groups.max()) + 1) + groups[:, None])[sets >= 0]
    return sets.shape[1] * int(np.unique(keys, return_counts=True)[1].max())


def as_ranks(found: Ranking) -> Ranks:
    """The results of each query as `retrieval.retrieval_ranks` gives them; distances are unknown (NaN)."""
    positives = np.diff(found.starts)
    query = np.repeat(np.arange(len(positives)), positives)
    place = np.arange(len(found.ranks)) - found.starts[query] + 1
    near = found.ranks <= positives[query]
    divided = lambda sums: np.where(positives > 0, sums / np.maximum(positives, 1), np.nan)
    mean = lambda values: divided(np.bincount(query, values, len(positives)))
    return Ranks(
        found.first_hit.astype(np.int32),
        found.first_hit == 1,
        mean(near.astype(np.float64)),
        mean(np.where(near, place / found.ranks, 0.0)),
        positives.astype(np.int32),
        np.full(len(positives), np.nan),
    )


def short_report(queries: Embedded, gallery: Embedded | None, ks: Sequence[int]) -> dict[str, float]:
    """``R@K``, ``RP``, ``MAP@R``, ``MRR``, ``mAP`` and, with groups, ``CMC@K``."""
    return _short(rank(queries, gallery), queries, ks)[0]


def _short(found: Ranking, queries: Embedded, ks: Sequence[int]) -> tuple[dict[str, float], Ranks]:
    ranks = as_ranks(found)
    more = full_ranking.summarise(found, ks, cmc=queries.groups is not None)
    return retrieval.summarise(ranks, ks) | {k: v for k, v in more.items() if not k.startswith("P@")}, ranks


def report(
    queries: Embedded, gallery: Embedded | None, ks: Sequence[int], seed: int = 0
) -> tuple[dict[str, float], list[str]]:
    """`short_report`, its 95% interval of R@1, and how well the scores of single images find wrong answers.

    Returns:
      The metrics, with the names of `summary.full_report`, and a line about what is left out.
    """
    found, ranks = _short(rank(queries, gallery), queries, ks)
    interval = uncertainty.recall_interval(ranks.nearest_correct, seed=seed)
    found |= {"R@1_low": interval.low, "R@1_high": interval.high}
    warnings = [LEFT_OUT]
    scores: dict[str, Float[np.ndarray, "n"]] = {}
    if queries.semantic_norm is not None:
        scores["norm"] = -queries.semantic_norm
    if queries.uncertainty is not None:
        length = scores["uncertainty"] = queries.uncertainty_norm
        found |= {"uncertainty_mean": float(length.mean()), "uncertainty_std": float(length.std())}
        warnings = [*uncertainty.failure_signs(queries.semantic, queries.uncertainty), *warnings]
    for name, score in scores.items():
        curve = uncertainty.risk_coverage(score, ranks.nearest_correct)
        found[f"R-AUROC({name})"] = uncertainty.r_auroc(score, ranks.nearest_correct)
        found[f"AURC({name})"], found[f"E-AURC({name})"] = curve.aurc, curve.excess_aurc
    return {name: float(value) for name, value in found.items()}, warnings
