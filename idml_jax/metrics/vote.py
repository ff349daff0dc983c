"""The vote of the nearest images for a class: its answer, its probabilities, and what it says about an answer.

A weighted k-nearest-neighbour classifier (Wu, Xiong, Yu, Lin, "Unsupervised Feature Learning via Non-Parametric
Instance Discrimination", CVPR 2018): each of the k nearest images votes for its class with the weight ``exp(t s)``,
where s is the cosine of query and image.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.metrics import uncertainty, visible
from idml_jax.metrics.checks import Array
from idml_jax.metrics.classification import calibration_error
from idml_jax.metrics.retrieval import Neighbours

# Scores of `label_scores`.
SCORES = ("vote_share", "vote_rival", "agreement", "class_margin")
# What `chosen` tries.
NEIGHBOURS, TEMPERATURES = (5, 10, 20), (10.0, 20.0, 40.0)
# Share of the probability that all classes of the gallery get alike, so that none has the probability 0; also added to
# both sides of the log odds.
SPREAD = 0.01
DIGITS = 12  # of a share


class Vote(NamedTuple):
    """Settings of the vote.

    Attributes:
      k: number of neighbours that vote, at most 20; in a smaller gallery all.
      temperature: t of ``exp(t s)``; the larger, the more the nearest ones count.
      balanced: whether a neighbour's weight is divided by the size of its class in the gallery, so that large classes
        are not favoured (a correction for the prior).
    """

    k: int = 10
    temperature: float = 20.0
    balanced: bool = False


class Ballot(NamedTuple):
    """The vote of n queries.

    Attributes:
      labels: ``[n, k]`` class of each voting neighbour, nearest first.
      share: ``[n, k]`` share of the whole vote that this class gets.
      first: ``[n, k]`` whether the neighbour is the nearest of its class; exactly these shares sum to 1.
    """

    labels: Int[np.ndarray, "n k"]
    share: Float[np.ndarray, "n k"]
    first: Bool[np.ndarray, "n k"]

    @property
    def places(self) -> Int[np.ndarray, "n k"]:
        """Columns by share, the largest first, those of a class already listed last; of equal shares the nearest."""
        return np.argsort(-np.where(self.first, self.share, -1.0), axis=1, kind="stable")

    @property
    def winner(self) -> Int[np.ndarray, "n"]:
        """Class with the largest share; of equal shares that of the nearest image."""
        return self.labels[np.arange(len(self.labels)), self.places[:, 0]]

    def share_of(self, classes: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        """Share of one class per query; 0 for a class that no voting neighbour has."""
        return np.max(np.where(self.labels == classes[:, None], self.share, 0.0), axis=1)


def cosines(
    queries: Float[Array, "n d"], gallery: Float[Array, "m d"], index: Int[Array, "n k"]
) -> Float[np.ndarray, "n k"]:
    """Cosine of each query and its neighbours, in float64; 0 for a zero row."""
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    queries, gallery, result = np.asarray(queries), np.asarray(gallery), np.empty(np.shape(index))
    step = max(1, 2**20 // max(1, result.shape[1] * queries.shape[1]))
    for start in range(0, len(result), step):
        cut = slice(start, start + step)
        one, others = unit(queries[cut].astype(np.float64)), unit(gallery[index[cut]].astype(np.float64))
        result[cut] = np.einsum("nd,nkd->nk", one, others)
    return result


def cast(
    queries: Float[Array, "n d"],
    gallery: Float[Array, "m d"],
    labels: Int[Array, "m"],
    found: Neighbours,
    setting: Vote = Vote(),  # noqa: B008 (immutable)
    own: Int[Array, "n"] | None = None,
) -> Ballot:
    """The vote of the nearest images.

    Args:
      queries: rows.
      gallery: rows.
      labels: class of each gallery row.
      found: nearest gallery rows of each query, without its own.
      setting: settings of the vote.
      own: gallery row of each query, -1: none; only for the sizes of classes, which do not count it.

    Raises:
      ValueError: for settings out of range.
    """
    if setting.k < 1 or not (np.isfinite(setting.temperature) and setting.temperature >= 0):
        raise ValueError(f"vote: k from 1 on and a temperature from 0 on, got {setting.k} and {setting.temperature}")
    index, labels = found.index[:, : setting.k], np.asarray(labels)
    near, similarity = labels[index], cosines(queries, gallery, index)
    weight = np.exp(setting.temperature * (similarity - similarity.max(axis=1, keepdims=True)))
    if setting.balanced:
        sizes = visible.sizes_of(near, labels)
        if own is not None:
            mine = np.asarray(own)[:, None]
            sizes = sizes - ((mine >= 0) & (near == labels[np.maximum(mine, 0)]))
        weight = weight / sizes
    weight = weight / weight.sum(axis=1, keepdims=True)
    share, first = np.empty_like(weight), np.empty(weight.shape, bool)
    for place in range(near.shape[1]):
        same = near == near[:, place, None]
        share[:, place] = np.sum(weight * same, axis=1)
        first[:, place] = ~same[:, :place].any(axis=1)
    # Rounded, because sums of the same votes in another order differ in their last digits: unanimous votes are equal.
    return Ballot(near, share.round(DIGITS), first)


def label_scores(
    queries: Float[Array, "n d"],
    gallery: Float[Array, "m d"],
    labels: Int[Array, "m"],
    found: Neighbours,
    setting: Vote = Vote(),  # noqa: B008 (immutable)
    own: Int[Array, "n"] | None = None,
    *,
    absent: Int[Array, "n"] | None = None,
) -> dict[str, Float[np.ndarray, "n"]]:
    """Scores of the nearest image as the answer that use the classes of the gallery; larger = less certain.

    vote_share: log odds against the answer's class: ``log((1 - p + 0.01) / (p + 0.01))`` for its share p of the vote.
    vote_rival: log of the largest share of another class over that of the answer's class, 0.01 added to both.
    agreement: share of the k nearest that are of another class than the answer.
    class_margin: minus the cosine similarity to the answer less that to the nearest image of another class, however far
        down the list that is. Left out if the gallery has one class.

    Arguments as for ``cast``; ``found`` are the 20 nearest, or fewer in a small gallery. ``absent`` [n] may name a
    class of which each query saw no image when ``found`` was made.
    """
    labels = np.asarray(labels)
    ballot = cast(queries, gallery, labels, found, setting, own)
    answer = labels[found.index[:, 0]]
    rivals = np.max(np.where(ballot.labels != answer[:, None], ballot.share, 0.0), axis=1)
    scores = {
        "vote_share": np.log((1.0 - ballot.share[:, 0] + SPREAD) / (ballot.share[:, 0] + SPREAD)),
        "vote_rival": np.log((rivals + SPREAD) / (ballot.share[:, 0] + SPREAD)),
        "agreement": np.mean(ballot.labels != answer[:, None], axis=1),
    }
    if (labels == labels[0]).all():
        return scores
    other = labels[found.index] != answer[:, None]
    near = cosines(queries, gallery, found.index)
    rival = near[np.arange(len(near)), other.argmax(axis=1)]
    hidden = answer[:, None] if absent is None else np.column_stack([answer, absent])
    seen = visible.visible_rows(hidden, labels, None if own is None else np.asarray(own))
    # The only image of another class may be the query itself; then there is no rival at all.
    rival[seen == 0] = -1.0
    deep = np.flatnonzero(~other.any(axis=1) & (seen > 0))
    if len(deep):
        rows, mine = np.asarray(queries)[deep], None if own is None else np.asarray(own)[deep]
        beyond = visible.nearest_of_other_classes(rows, hidden[deep], np.asarray(gallery), labels, 1, own=mine)
        rival[deep] = cosines(rows, gallery, beyond.index)[:, 0]
    return scores | {"class_margin": rival - near[:, 0]}


def accuracy(
    ballot: Ballot, truth: Int[np.ndarray, "n"], labels: Int[np.ndarray, "m"], lone: Bool[np.ndarray, "n"]
) -> dict[str, float]:
    """Quality of the vote as a classifier.

    Args:
      ballot: the vote.
      truth: class of each query.
      labels: classes of the gallery.
      lone: whether a query's class has no (other) image in the gallery. Such a query is a miss for ``top1`` and
        ``top5``, as for R@K, and is left out of ``nll``, where no class is right.

    Returns:
      ``top1``, ``top5`` (the five classes with the largest shares), ``nll`` in nats, and ``ece`` of the winner's share
      in 15 equal bins. For ``nll`` a hundredth of the probability is spread over all classes of the gallery.
    """
    places, rows = ballot.places, np.arange(len(truth))
    winner, sure = ballot.winner, ballot.share[rows, places[:, 0]]
    best = np.take_along_axis(ballot.labels, places[:, :5], axis=1)
    listed = np.take_along_axis(ballot.first, places[:, :5], axis=1)
    right = (winner == truth) & ~lone
    probability = smoothed(ballot.share_of(truth), len(np.unique(labels)))
    return {
        "top1": float(right.mean()),
        "top5": float(np.mean(((best == truth[:, None]) & listed).any(axis=1) & ~lone)),
        "nll": float(-np.log(probability[~lone]).mean()) if not lone.all() else float("nan"),
        "ece": calibration_error(sure, right),
    }


def smoothed(share: Float[np.ndarray, "n"], classes: int) -> Float[np.ndarray, "n"]:
    """Probability of a class with this share of the vote, among so many classes; never 0."""
    return (1.0 - SPREAD) * share + SPREAD / classes


def chosen(
    queries: Float[Array, "n d"],
    truth: Int[Array, "n"],
    gallery: Float[Array, "m d"],
    labels: Int[Array, "m"],
    found: Neighbours,
    own: Int[Array, "n"] | None = None,
    *,
    balanced: bool = False,
) -> Vote:
    """The settings with which the vote's share detects wrong answers best (R-AUROC), among ``NEIGHBOURS`` and
    ``TEMPERATURES``.

    Choose on classes that the network was not trained on. Arguments as for ``cast``; truth: class of each query.
    Without a right and a wrong answer: the default.
    """
    right = np.asarray(labels)[found.index[:, 0]] == np.asarray(truth)
    if uncertainty.r_auroc_undefined(right) is not None:
        return Vote(balanced=balanced)
    settings = [
        Vote(k, t, balanced)
        for k in NEIGHBOURS
        for t in TEMPERATURES
        if k <= found.index.shape[1] or k == NEIGHBOURS[0]
    ]
    quality = lambda vote: uncertainty.r_auroc(-cast(queries, gallery, labels, found, vote, own).share[:, 0], right)
    return max(settings, key=quality)
