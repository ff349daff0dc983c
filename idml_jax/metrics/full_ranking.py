"""Metrics of the whole ranking: P@k, mean average precision over all ranks, CMC with exclusions, R@1 by class.

Distances, ties and lone queries as in `retrieval`, whose lists end at the class size. Here the rank of every positive
is computed, from a block of distances at a time: rows are sorted as numbers, and ties counted by index. Memory is the
rows, one block, and the ranks of all positives.

An image may have several labels: then every image that shares one of them is a positive.

Exclusions: with a group for each image (a camera, a recording, an album), a query does not find the images of its own
class and group, as in person re-identification (Zheng et al., "Scalable person re-identification", ICCV 2015): they are
neither hits nor misses. Images of its group and another class stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, Shaped

from idml_jax.metrics import nearest, ranking
from idml_jax.metrics.checks import Array, check_pair, check_width, embedding_rows, label_array, label_column


class Groups(NamedTuple):
    """A group for each image; a query does not find images of its class and group.

    Attributes:
      queries: ``[n]`` of any kind.
      gallery: ``[m]``; ``None`` without a gallery.
    """

    queries: Shaped[np.ndarray, "n"]
    gallery: Shaped[np.ndarray, "m"] | None = None


class Ranking(NamedTuple):
    """Ranks of all positives of n queries.

    Attributes:
      ranks: ``[p]`` ranks from 1, of one query after the other, each in ascending order.
      starts: ``[n + 1]`` where the ranks of each query start.
      found: ``[n]`` number of gallery images that each query can find.
      codes: ``[n]`` class of each query, a number.
      classes: ``[c]`` the class of each number.
    """

    ranks: Int[np.ndarray, "p"]
    starts: Int[np.ndarray, "n1"]
    found: Int[np.ndarray, "n"]
    codes: Int[np.ndarray, "n"]
    classes: Shaped[np.ndarray, "c"]

    @property
    def first_hit(self) -> Int[np.ndarray, "n"]:
        """``[n]`` rank of the nearest positive; 0 for a lone query."""
        some = np.diff(self.starts) > 0
        first = np.zeros(len(some), np.int64)
        first[some] = self.ranks[self.starts[:-1][some]]
        return first


def rank_all(
    embeddings: Float[Array, "n d"],
    labels: Shaped[Array, "n"] | Int[Array, "n l"],
    gallery: Float[Array, "m d"] | None = None,
    gallery_labels: Shaped[Array, "m"] | Int[Array, "m l"] | None = None,
    *,
    groups: Groups | None = None,
    own: Int[Array, "n"] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Ranking:
    """Ranks the positives of every query among all that it can find.

    Args:
      embeddings: ``[n, d]`` queries; without a gallery each searches all the others.
      labels: ``[n]`` classes of any kind, or ``[n, l]`` numbers of several classes, filled up with -1.
      gallery: ``[m, d]``.
      gallery_labels: ``[m]`` or ``[m, l]``.
      groups: groups whose images of the query's class it does not find.
      own: ``[n]`` gallery row of each query itself, which it does not find; -1: none. Only with a gallery.
      devices: devices that share the distances; all of this process by default.

    Raises:
      ValueError: naming the argument, for empty, mismatched or non-finite input.
    """
    queries = embedding_rows(embeddings, "embeddings")[0]
    own_labels = _labels(labels, len(queries), "labels", "embeddings")
    same_set = gallery is None
    check_pair(gallery, gallery_labels, labels)
    if gallery is None or gallery_labels is None:
        rows, row_labels = queries, own_labels
    else:
        rows = embedding_rows(gallery, "gallery")[0]
        row_labels = _labels(gallery_labels, len(rows), "gallery_labels", "gallery")
        check_width(queries, rows)
        if row_labels.ndim != own_labels.ndim:
            raise ValueError("gallery_labels: one side has several labels per image, the other one")
    classes, row_codes, own_codes = _codes(row_labels, own_labels)
    own_groups, row_groups = _groups(groups, len(queries), len(rows), same_set)
    hidden = np.arange(len(queries)) if same_set else _own(own, len(queries), len(rows))
    members = _members(row_codes, len(classes))
    (near, near_norms), (far, norms) = nearest.moved(queries, rows)
    devices = list(jax.local_devices() if devices is None else devices)
    ranks: list[np.ndarray] = []
    found = np.empty(len(queries), np.int64)
    for start, block in ranking.all_distances(near, near_norms, far, norms, devices):
        for query, distances in enumerate(np.array(block), start):
            same = _sharing(members, own_codes[query])
            out = np.zeros(len(same), bool) if own_groups is None else row_groups[same] == own_groups[query]
            out |= same == hidden[query]
            distances[same[out]] = np.inf
            found[query] = len(rows) - out.sum()
            if hidden[query] >= 0 and not np.isinf(distances[hidden[query]]):  # labelled otherwise there
                distances[hidden[query]] = np.inf
                found[query] -= 1
            ranks.append(_ranks(distances, same[~out]))
    starts = np.concatenate([[0], np.cumsum([len(x) for x in ranks])])
    first = own_codes if own_codes.ndim == 1 else own_codes[:, 0]
    return Ranking(np.concatenate(ranks), starts, found, first, classes)


def _labels(
    labels: Shaped[Array, "n"] | Int[Array, "n l"], rows: int, name: str, of: str
) -> Shaped[np.ndarray, "n"] | Int[np.ndarray, "n l"]:
    labels = label_array(labels, name)
    if labels.ndim != 2:
        return label_column(labels, rows, name, of)
    if labels.shape[0] != rows or labels.dtype.kind not in "iu" or (labels[:, :1] < 0).any() or not labels.shape[1]:
        raise ValueError(f"{name}: expected ({rows}, l) whole numbers, filled up with -1, the first at least 0")
    return labels


def _codes(rows: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The classes, and labels as their numbers; -1 stays where there is no label."""
    if rows.ndim == 1:
        classes, codes = np.unique(np.concatenate([rows, own]), return_inverse=True)
        return classes, codes[: len(rows)], codes[len(rows) :]
    both = np.concatenate([rows.reshape(-1), own.reshape(-1)])
    classes = np.unique(both[both >= 0])
    number = lambda labels: np.where(labels < 0, -1, np.searchsorted(classes, labels))
    return classes, number(rows), number(own)


def _members(codes: np.ndarray, classes: int) -> list[Int[np.ndarray, "r"]]:
    """The rows of each class, ascending."""
    rows, flat = np.arange(len(codes)), codes
    if codes.ndim == 2:
        rows, columns = np.nonzero(codes >= 0)
        flat = codes[rows, columns]
    order = np.argsort(flat, kind="stable")
    return np.split(rows[order], np.cumsum(np.bincount(flat, minlength=classes))[:-1])


def _sharing(members: list[np.ndarray], codes: np.ndarray) -> Int[np.ndarray, "r"]:
    """The rows with any of some classes, ascending."""
    if codes.ndim == 0:
        return members[int(codes)]
    several = [members[code] for code in codes[codes >= 0].tolist()]
    return several[0] if len(several) == 1 else np.unique(np.concatenate(several))


def _own(own: Int[Array, "n"] | None, queries: int, rows: int) -> Int[np.ndarray, "n"]:
    if own is None:
        return np.full(queries, -1)
    own = np.asarray(own)
    if own.shape != (queries,) or own.dtype.kind not in "iu" or own.min() < -1 or own.max() >= rows:
        raise ValueError(f"own: expected {queries} whole numbers from -1 to {rows - 1}, indices of gallery rows")
    return own


def _groups(
    groups: Groups | None, queries: int, rows: int, same_set: bool
) -> tuple[Int[np.ndarray, "n"] | None, Int[np.ndarray, "m"]]:
    """Groups as numbers."""
    if groups is None:
        return None, np.zeros(0, np.int64)
    own = label_column(groups.queries, queries, "groups.queries", "embeddings")
    if same_set != (groups.gallery is None):
        raise ValueError("groups.gallery: goes together with a gallery")
    others = own if groups.gallery is None else label_column(groups.gallery, rows, "groups.gallery", "gallery")
    if (own.dtype.kind in "US") != (others.dtype.kind in "US"):
        raise ValueError("groups: those of one side are text, those of the other numbers")
    codes = np.unique(np.concatenate([own, others]), return_inverse=True)[1]
    return codes[:queries], codes[queries:]


def _ranks(distances: Float[np.ndarray, "m"], positives: Int[np.ndarray, "r"]) -> Int[np.ndarray, "r"]:
    """Ranks of the positives, from 1, ascending; equal distances by index."""
    ordered = np.sort(distances)
    wanted = distances[positives]
    before = np.searchsorted(ordered, wanted, side="left")
    tied = np.searchsorted(ordered, wanted, side="right") - before > 1
    for value in np.unique(wanted[tied]):
        equal = np.flatnonzero(distances == value)
        here = wanted == value
        before[here] += np.searchsorted(equal, positives[here])
    return np.sort(before) + 1


def precision_at(found: Ranking, k: int) -> Float[np.ndarray, "n"]:
    """``[n]`` share of positives among the k nearest; among all that a query can find if those are fewer."""
    hits = np.add.reduceat(np.append(found.ranks <= k, False), found.starts[:-1]) * (np.diff(found.starts) > 0)
    return hits / np.maximum(np.minimum(k, found.found), 1)


def average_precision(found: Ranking) -> Float[np.ndarray, "n"]:
    """``[n]`` mean over all positives of the precision at their rank; NaN for a lone query."""
    positives = np.diff(found.starts)
    place = np.arange(len(found.ranks)) - np.repeat(found.starts[:-1], positives) + 1
    sums = np.bincount(np.repeat(np.arange(len(positives)), positives), place / found.ranks, len(positives))
    return np.where(positives > 0, sums / np.maximum(positives, 1), np.nan)


def summarise(found: Ranking, ks: Sequence[int], *, cmc: bool = False) -> dict[str, float]:
    """Means over the queries.

    Args:
      found: from ``rank_all``.
      ks: K of the names with @K.
      cmc: whether to add ``CMC@K``, the share of queries with a hit among the K nearest. Queries without a positive are
        left out of it, as in re-identification.

    Returns:
      ``P@K`` (a lone query has none right), ``mAP`` (without lone queries), ``CMC@K``.
    """
    some = np.diff(found.starts) > 0
    mean = lambda values: float(np.mean(values)) if len(values) else float("nan")
    report = {f"P@{k}": mean(precision_at(found, k)) for k in ks}
    report["mAP"] = mean(average_precision(found)[some])
    if cmc:
        report |= {f"CMC@{k}": mean(found.first_hit[some] <= k) for k in ks}
        report["CMC_queries"] = int(some.sum())
    return report


class ClassRecall(NamedTuple):
    """R@1 of one class, and its number of queries."""

    label: object
    recall: float
    queries: int


def class_recall(found: Ranking) -> list[ClassRecall]:
    """R@1 of every class of the queries, the worst first; of equal ones the class with more queries first."""
    counts = np.bincount(found.codes, minlength=len(found.classes))
    right = np.bincount(found.codes, found.first_hit == 1, minlength=len(found.classes))
    asked = np.flatnonzero(counts)
    rows = [ClassRecall(found.classes[c].item(), float(right[c] / counts[c]), int(counts[c])) for c in asked]
    return sorted(rows, key=lambda row: (row.recall, -row.queries))
