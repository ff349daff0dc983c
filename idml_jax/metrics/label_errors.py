"""How probably the label of each image is wrong, from the labels of the others.

The probability of a class is out of sample: the image itself does not count. It is the mean of two estimates: the vote
of the 50 nearest images with the weights ``exp(10 s)`` (`vote`), and a softmax of the cosines to the means of the
classes, the image taken out of its own. The softmax's temperature is the one under which the given labels are most
probable.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.metrics import class_means, vote
from idml_jax.metrics.choices import SCORES as SCORES
from idml_jax.metrics.retrieval import Neighbours

NEAREST, VOTE_TEMPERATURE, TEMPERATURES = 50, 10.0, (5.0, 10.0, 20.0, 40.0)
AGREEING = 10  # neighbours of `disagreement`
_TILE = 2**22  # numbers of a tile of images and classes
DAMPING = 0.1  # of `odds`


class Evidence(NamedTuple):
    """What the other images say about the label of each of n images.

    Attributes:
      given: ``[n]`` probability of the given class.
      other: ``[n]`` largest probability of another class.
      proposed: ``[n]`` that class.
      disagreement: ``[n]`` largest share that another class has of the 10 nearest, less that of the given class.
      judged: ``[n]`` whether the given class has another image; without one nothing speaks for it.
    """

    given: Float[np.ndarray, "n"]
    other: Float[np.ndarray, "n"]
    proposed: Int[np.ndarray, "n"]
    disagreement: Float[np.ndarray, "n"]
    judged: Bool[np.ndarray, "n"]

    @property
    def wrong(self) -> Bool[np.ndarray, "n"]:
        """Whether another class is more probable than the given one."""
        return self.judged & (self.other > self.given)

    def scores(self) -> dict[str, Float[np.ndarray, "n"]]:
        """Scores, larger = more probably wrong.

        odds: log of the probability of the best other class over that of the given class, 0.1 added to both. So it lies
            between ``log_odds``, which is best for labels that are wrong at random, and ``normalized_margin``, for
            labels of the most similar class.
        log_odds: the same, with nothing added.
        self_confidence, normalized_margin: minus the probability of the given class, and of the best other class less
            that (the two label quality scores of confident learning: Northcutt, Jiang, Chuang, JAIR 2021; Kuan and
            Mueller, 2022).
        disagreement: `disagreement`.
        """
        return {
            "odds": np.log((self.other + DAMPING) / (self.given + DAMPING)),
            "log_odds": np.log(self.other) - np.log(self.given),
            "self_confidence": -self.given,
            "normalized_margin": self.other - self.given,
            "disagreement": self.disagreement,
        }


def evidence(rows: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n"], found: Neighbours) -> Evidence:
    """What the other images say about each label.

    Args:
      rows: semantic embeddings.
      labels: class of each row, from 0.
      found: the ``NEAREST`` nearest other rows of each row, or fewer in a small set.
    """
    known = class_means.class_means(rows, labels)
    classes, labels, size = known.labels, known.codes, known.sizes
    unit, means = class_means.unit(np.asarray(rows, np.float32)), known.directions
    own = class_means.own_cosines(known, rows, np.arange(len(labels)))
    weight = np.exp(VOTE_TEMPERATURE * (s := vote.cosines(rows, rows, found.index)) - VOTE_TEMPERATURE * s[:, :1])
    weight = weight / weight.sum(axis=1, keepdims=True)
    step = max(1, _TILE // len(classes))
    tiles = [slice(start, start + step) for start in range(0, len(labels), step)]

    def by_means(cut: slice, temperature: float) -> Float[np.ndarray, "t c"]:
        cosine = unit[cut] @ means.T
        cosine[np.arange(len(cosine)), labels[cut]] = own[cut]
        odds = np.exp(temperature * (cosine - cosine.max(axis=1, keepdims=True)))
        return _spread(odds / odds.sum(axis=1, keepdims=True))

    def surprise(temperature: float) -> float:
        here = [by_means(cut, temperature)[np.arange(len(labels[cut])), labels[cut]] for cut in tiles]
        return -float(np.log(np.concatenate(here)).mean())

    temperature = min(TEMPERATURES, key=surprise)
    given, other, proposed = np.empty(len(labels)), np.empty(len(labels)), np.empty(len(labels), np.int64)
    for cut in tiles:
        voted = np.zeros((len(labels[cut]), len(classes)))
        place = np.arange(len(voted))
        np.add.at(voted, (place[:, None], labels[found.index[cut]]), weight[cut])
        both = (_spread(voted) + by_means(cut, temperature)) / 2
        given[cut] = both[place, labels[cut]]
        both[place, labels[cut]] = -1.0
        proposed[cut] = both.argmax(axis=1)
        other[cut] = both[place, proposed[cut]] if len(classes) > 1 else np.finfo(float).tiny
    near = labels[found.index[:, :AGREEING]]
    return Evidence(given, other, classes[proposed], _disagreement(near, labels), size[labels] > 1)


def own_class_cosines(rows: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Cosine of each row to the mean direction of the other rows of its class; NaN where it has no other.

    Args:
      rows: semantic embeddings.
      labels: class of each row.

    >>> own_class_cosines(np.eye(3)[[0, 0, 1, 2]], np.array([0, 0, 0, 1])).round(2).tolist()
    [0.71, 0.71, 0.0, nan]
    """
    known = class_means.class_means(rows, labels)
    own = class_means.own_cosines(known, rows, np.arange(len(labels)))
    return np.where(known.sizes[known.codes] > 1, own, np.nan)


def _spread(p: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    return (1.0 - vote.SPREAD) * p + vote.SPREAD / p.shape[1]


def _disagreement(near: Int[np.ndarray, "n k"], labels: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    same = near == labels[:, None]
    rival = np.zeros(len(labels))
    for place in range(near.shape[1]):
        count = np.mean(near == near[:, place, None], axis=1)
        rival = np.maximum(rival, np.where(same[:, place], 0.0, count))
    return rival - same.mean(axis=1)
