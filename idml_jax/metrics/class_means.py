"""Mean directions of the classes, and what they say about an answer."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from idml_jax.metrics import visible
from idml_jax.metrics.checks import Array
from idml_jax.metrics.retrieval import Neighbours
from idml_jax.metrics.vote import cosines

# Scores of `mean_scores`.
SCORES = ("mean_distance", "mean_margin")
_TILE = 2**22  # numbers of a tile of rows
_ROUNDING = 1e-9  # a sum of unit rows shorter than this is 0


class ClassMeans(NamedTuple):
    """The classes of n rows.

    Attributes:
      labels: ``[c]`` the classes, ascending.
      codes: ``[n]`` place of each row's class among them.
      sizes: ``[c]`` number of rows.
      sums: ``[c, d]`` sum of their unit rows.
    """

    labels: Int[np.ndarray, "c"]
    codes: Int[np.ndarray, "n"]
    sizes: Int[np.ndarray, "c"]
    sums: Float[np.ndarray, "c d"]

    @property
    def directions(self) -> Float[np.ndarray, "c d"]:
        """Mean direction of each class, a unit row."""
        return unit(self.sums, _ROUNDING).astype(np.float32)


def unit(rows: Float[np.ndarray, "n d"], least: float = 1e-30) -> Float[np.ndarray, "n d"]:
    """Rows of length 1; zero rows stay zero, and those shorter than ``least`` stay short."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), least)


def class_means(rows: Float[Array, "n d"], labels: Int[Array, "n"]) -> ClassMeans:
    """The mean directions of the classes of embeddings, summed in float64.

    Args:
      rows: semantic embeddings.
      labels: class of each row.
    """
    rows, (classes, codes) = np.asarray(rows), np.unique(labels, return_inverse=True)
    sums = np.zeros((len(classes), rows.shape[1]))
    step = max(1, _TILE // rows.shape[1])
    for start in range(0, len(rows), step):
        cut = slice(start, start + step)
        order = np.argsort(codes[cut], kind="stable")
        here, first = np.unique(codes[cut][order], return_index=True)
        sums[here] += np.add.reduceat(unit(rows[cut][order].astype(np.float64)), first)
    return ClassMeans(classes, codes, np.bincount(codes, minlength=len(classes)), sums)


def own_cosines(means: ClassMeans, rows: Float[Array, "m d"], chosen: Int[np.ndarray, "m"]) -> Float[np.ndarray, "m"]:
    """Cosine of some rows to the mean direction of the other rows of their class; 0 where there is no other.

    Args:
      means: result of ``class_means``.
      rows: embeddings that are in it.
      chosen: place of each of them there.
    """
    found, step = np.empty(len(chosen)), max(1, _TILE // means.sums.shape[1])
    for start in range(0, len(chosen), step):
        cut = slice(start, start + step)
        mine, codes = unit(np.asarray(rows)[cut].astype(np.float64)), means.codes[chosen[cut]]
        others = np.where(means.sizes[codes, None] > 1, means.sums[codes] - mine, 0.0)
        found[cut] = np.einsum("nd,nd->n", mine, unit(others, _ROUNDING))
    return found


def mean_scores(
    queries: Float[Array, "n d"],
    gallery: Float[Array, "m d"],
    labels: Int[Array, "m"],
    found: Neighbours,
    own: Int[Array, "n"] | None = None,
    *,
    absent: Int[Array, "n"] | None = None,
) -> dict[str, Float[np.ndarray, "n"]]:
    """Scores of the nearest image as the answer by the mean directions of the classes; larger = less certain.

    mean_distance: 1 minus the cosine of the query and the mean of the answer's class.
    mean_margin: cosine to the nearest mean of another class, less that to the mean of the answer's class. Left out if
        the gallery has one class.

    A query that is itself in the gallery does not count in the mean of its class. The distance to a class as that to
    its mean: Mensink, Verbeek, Perronnin, Csurka, PAMI 2013.

    Args:
      queries: rows.
      gallery: rows.
      labels: class of each gallery row.
      found: nearest gallery rows of each query, without its own.
      own: gallery row of each query; -1: none.
      absent: class of which each query saw no image when ``found`` was made.
    """
    queries = np.asarray(queries)
    means = class_means(gallery, labels)
    answer, nobody = means.codes[found.index[:, 0]], np.full(len(queries), -1)
    rows = nobody if own is None else np.asarray(own)
    mine = np.where(rows >= 0, means.codes[np.maximum(rows, 0)], -1)
    hidden = nobody if absent is None else _places(means.labels, np.asarray(absent))
    directions = means.directions
    without = np.zeros(len(queries))  # cosine to the mean of the query's class, the query taken out of it
    inside = np.flatnonzero(rows >= 0)
    without[inside] = own_cosines(means, queries[inside], rows[inside])
    near = np.where(answer == mine, without, cosines(queries, directions, answer[:, None])[:, 0])
    scores = {"mean_distance": 1.0 - near}
    if len(means.labels) < 2:
        return scores
    rival = np.full(len(queries), -1.0)  # without any other class, as in `vote.label_scores`
    unseen = np.column_stack([answer, mine, hidden])
    some = np.flatnonzero(visible.visible_rows(unseen, np.arange(len(means.labels))) > 0)
    rival[some] = _nearest_cosines(queries[some], directions, unseen[some])
    counts = (mine >= 0) & (mine != answer) & (mine != hidden) & (means.sizes[np.maximum(mine, 0)] > 1)
    rival = np.where(counts, np.maximum(rival, without), rival)
    return scores | {"mean_margin": rival - near}


def _nearest_cosines(
    queries: Float[np.ndarray, "n d"], directions: Float[np.ndarray, "c d"], hidden: Int[np.ndarray, "n h"]
) -> Float[np.ndarray, "n"]:
    """Cosine of each query to the nearest direction but those in its hidden places (-1: none)."""
    nearest = np.empty((len(queries), 1), np.int64)
    step = max(1, _TILE // len(directions))
    for start in range(0, len(queries), step):
        cut = slice(start, start + step)
        cosine = unit(queries[cut].astype(np.float32)) @ directions.T
        row, column = np.nonzero(hidden[cut] >= 0)
        cosine[row, hidden[cut][row, column]] = -np.inf
        nearest[cut, 0] = cosine.argmax(axis=1)
    return cosines(queries, directions, nearest)[:, 0]


def _places(labels: Int[np.ndarray, "c"], wanted: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Place of each wanted class among ascending classes; -1 for one that is not there."""
    place = np.minimum(np.searchsorted(labels, wanted), len(labels) - 1)
    return np.where(labels[place] == wanted, place, -1)
