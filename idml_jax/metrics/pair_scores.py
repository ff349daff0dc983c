"""Scores of pairs of images, larger for "the same class": cosine, and the log-likelihood ratio of PLDA.

Every score here has the form ``score(x, y) = a(x) . a(y) + o(x) + o(y)``, so all pairs are one matrix product and two
columns.

PLDA. A feature is ``x = y + e`` with the class ``y ~ N(mu, B)`` and the image ``e ~ N(0, W)``. The score is
``log p(x1, x2 | one y) - log p(x1) - log p(x2)``. With ``V`` such that ``V^T W V = I`` and ``V^T B V = diag(p)``, and
``z = V^T (x - mu)``, it is the sum over the axes of

    p / (1 + 2p) z1 z2 - p^2 / (2 (1 + p) (1 + 2p)) (z1^2 + z2^2) + log(1 + p) - log(1 + 2p) / 2

Sources: Prince and Elder, ICCV 2007; Kenny, "Bayesian speaker verification with heavy-tailed priors", Odyssey 2010;
Brummer and de Villiers, "The speaker partitioning problem", Odyssey 2010 (two covariances).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from idml_jax.metrics.checks import Array, embedding_rows, label_column
from idml_jax.metrics.closed_form import moments, statistics, unit_rows


class Scored(NamedTuple):
    """What the images of a set contribute to the scores of pairs; see the module's docstring.

    Attributes:
      rows: ``[n, d]`` float32, ``a(x)``.
      offsets: ``[n]`` float32, ``o(x)``.
    """

    rows: Float[np.ndarray, "n d"]
    offsets: Float[np.ndarray, "n"]


def cosine(embeddings: Float[Array, "n d"]) -> Scored:
    """Cosine similarity; a row of zeros has similarity 0 to all. Raises ValueError for empty or non-finite input."""
    rows = embedding_rows(embeddings, "embeddings")[0]
    rows = unit_rows(rows.astype(np.float64)).astype(np.float32)
    return Scored(rows, np.zeros(len(rows), np.float32))


class Plda(NamedTuple):
    """A fitted two-covariance model of unit embeddings.

    Attributes:
      mean: ``[d]`` mu.
      axes: ``[d, r]`` columns of ``V`` along which classes differ.
      between: ``[r]`` variance of the classes along them, ``p``; that within classes is 1.
      shrinkage: lambda of the covariance within classes.
    """

    mean: Float[np.ndarray, "d"]
    axes: Float[np.ndarray, "d r"]
    between: Float[np.ndarray, "r"]
    shrinkage: float

    def __call__(self, embeddings: Float[Array, "n d"]) -> Scored:
        """The parts of embeddings in the log-likelihood ratio, in nats."""
        rows = embedding_rows(embeddings, "embeddings")[0]
        if rows.shape[1] != len(self.mean):
            raise ValueError(f"embeddings: width {rows.shape[1]}, the model was fitted on width {len(self.mean)}")
        p = self.between
        z = (unit_rows(rows.astype(np.float64)) - self.mean) @ self.axes
        constant = np.sum(np.log1p(p) - 0.5 * np.log1p(2 * p))
        offsets = 0.5 * constant - np.square(z) @ (p**2 / (2 * (1 + p) * (1 + 2 * p)))
        return Scored((z * np.sqrt(p / (1 + 2 * p))).astype(np.float32), offsets.astype(np.float32))


# From embeddings to their part of the scores.
PairScore: TypeAlias = Callable[[Float[Array, "n d"]], Scored] | Plda


def fit_plda(embeddings: Float[Array, "n d"], labels: Int[Array, "n"], shrinkage: float = 0.1) -> Plda:
    """Fits the model by moments: covariances within and between classes, of embeddings at length 1.

    ``W`` is the pooled covariance within classes plus ``shrinkage * trace / d`` times the identity. ``B`` is the
    covariance of the class means less the part that ``W`` explains (the estimator of the analysis of variance for
    classes of unequal size), with negative variances set to 0.

    Args:
      embeddings: ``[n, d]``.
      labels: ``[n]`` classes of any kind.
      shrinkage: lambda, above 0 (0 needs more images than dimensions).

    Raises:
      ValueError: for fewer than 2 classes, or none with two different images, and for empty or non-finite input.
    """
    rows = embedding_rows(embeddings, "embeddings")[0]
    codes = np.unique(label_column(labels, len(rows), "labels", "embeddings"), return_inverse=True)[1]
    classes = int(codes.max()) + 1
    if classes < 2:
        raise ValueError("labels: one class; at least 2 are needed to learn how classes differ")
    if not 0 <= shrinkage < np.inf:
        raise ValueError(f"shrinkage: expected a number of at least 0, got {shrinkage}")
    found = statistics(moments([(rows, codes)], classes, unit=True))
    values, turn = np.linalg.eigh(found.within)
    values = np.maximum(values, 0) + shrinkage * np.trace(found.within) / len(values)
    if not values[0] > 1e-10 * values[-1]:
        raise ValueError("shrinkage: 0 needs more images than dimensions")
    whiten = turn / np.sqrt(values)
    counts = np.bincount(codes)
    size = (len(rows) - np.square(counts).sum() / len(rows)) / (classes - 1)
    means = found.between @ whiten
    scatter = means.T @ means * (len(rows) / (classes - 1))
    between, axes = np.linalg.eigh((scatter - whiten.T @ found.within @ whiten) / size)
    kept = between > 1e-9
    return Plda(found.mean, (whiten @ axes)[:, kept], between[kept], float(shrinkage))
