"""Linear metrics of features in closed form: within-class whitening, LDA and total whitening, with shrinkage.

    mu, M_c: mean of all features, of class c;  S_w = cov(f - M_c);  S = S_w + lambda tr(S_w)/d I = V diag(w) V^T
    W = V diag(1/sqrt(w));  to fewer dimensions W U, U the principal axes of (f - mu) W;  s = l2((f - mu) W U)

Sources: within-class covariance normalisation (Hatch, Kajarekar and Stolcke, Interspeech 2006); whitening for retrieval
(Jegou and Chum, ECCV 2012; Radenovic, Tolias and Chum, TPAMI 2018); linear discriminants (Fisher 1936; Rao 1948). All
in float64. Memory is d^2 and one chunk of features, whatever the number of images.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

METHODS = ("whiten", "lda", "pca")
# Features [m, d] of some images, and their labels [m]; iterated over more than once.
Chunks = Iterable[tuple[Float[np.ndarray, "m d"], Int[np.ndarray, "m"]]]


class Moments(NamedTuple):
    """Sums over the features of all images, from which the statistics of any folds of classes follow.

    Attributes:
      counts: ``[c]`` images by class.
      sums: ``[c, d]`` sum of features by class.
      scatter: ``[k, d, d]`` for each fold of classes, the sum of (f - M_c)(f - M_c)^T.
      fold_of: ``[c]`` fold of each class.
    """

    counts: Int[np.ndarray, "c"]
    sums: Float[np.ndarray, "c d"]
    scatter: Float[np.ndarray, "k d d"]
    fold_of: Int[np.ndarray, "c"]


class Statistics(NamedTuple):
    """Mean and covariances of the features of some classes.

    Attributes:
      mean: ``[d]`` mean of all images.
      within: ``[d, d]`` covariance within the classes of at least two images.
      between: ``[c, d]`` rows sqrt(n_c / n) (M_c - mu), so that the covariance of all images is
        ``share * within + between^T between``.
      share: factor of ``within`` in the covariance of all images.
      images: number of images.
      lone: number of classes with one image, which tell nothing about ``within``.
    """

    mean: Float[np.ndarray, "d"]
    within: Float[np.ndarray, "d d"]
    between: Float[np.ndarray, "c d"]
    share: float
    images: int
    lone: int


class Projection(NamedTuple):
    """A linear map of features; an embedding is ``l2(f kernel + bias)``.

    Attributes:
      kernel: ``[d, width]``.
      bias: ``[width]``.
      used: number of columns that are not 0.
    """

    kernel: Float[np.ndarray, "d width"]
    bias: Float[np.ndarray, "width"]
    used: int

    def __call__(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n width"]:
        """Unit embeddings of features, in the features' precision."""
        kernel, bias = (x.astype(features.dtype, copy=False) for x in (self.kernel, self.bias))
        return unit_rows(features @ kernel + bias)


def unit_rows(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows at length 1; a row of zeros stays."""
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
    return rows / np.where(length > 0, length, 1).astype(rows.dtype)


def moments(
    features: Chunks, num_classes: int, fold_of: Int[np.ndarray, "c"] | None = None, *, unit: bool = False
) -> Moments:
    """Sums over all features, in two passes: the means first, so that no digits cancel.

    Args:
      features: chunks of features with labels below ``num_classes``.
      num_classes: number of classes.
      fold_of: ``[c]`` fold of each class, from 0; ``None``: one fold.
      unit: whether to take features at length 1.

    Raises:
      ValueError: for no features, and for NaN or infinite ones.
    """
    fold_of = np.zeros(num_classes, np.int64) if fold_of is None else np.asarray(fold_of)
    counts, sums = np.zeros(num_classes, np.int64), None
    for rows, labels in _checked(features, unit):
        sums = np.zeros((num_classes, rows.shape[1])) if sums is None else sums
        np.add.at(sums, labels, rows)
        counts += np.bincount(labels, minlength=num_classes)
    if sums is None:
        raise ValueError("features: there are none")
    means = sums / np.maximum(counts, 1)[:, None]
    width, folds = sums.shape[1], int(fold_of.max()) + 1
    scatter = np.zeros((folds, width, width))
    for rows, labels in _checked(features, unit):
        rows -= means[labels]
        for fold in np.unique(fold_of[labels]):
            some = rows[fold_of[labels] == fold]
            scatter[fold] += some.T @ some
    return Moments(counts, sums, scatter, fold_of)


def _checked(features: Chunks, unit: bool) -> Chunks:
    """The chunks that have rows, as new float64 arrays."""
    start = 0
    for rows, labels in features:
        rows = np.array(rows, np.float64)
        if not np.isfinite(rows).all():
            bad = ~np.isfinite(rows).all(axis=1)
            raise ValueError(f"features: NaN or infinity in row {start + int(bad.argmax())}")
        if len(rows):
            yield (unit_rows(rows) if unit else rows), np.asarray(labels)
        start += len(rows)


def statistics(sums: Moments, folds: Bool[np.ndarray, "k"] | None = None) -> Statistics:
    """Mean and covariances of the classes of some folds.

    Args:
      sums: from ``moments``.
      folds: ``[k]`` folds to use; ``None``: all.

    Raises:
      ValueError: if no class has two images, or if all images of every class have equal features.
    """
    folds = np.ones(len(sums.scatter), bool) if folds is None else np.asarray(folds)
    kept = folds[sums.fold_of] & (sums.counts > 0)
    counts = sums.counts[kept]
    several = counts[counts > 1]
    freedom = int(several.sum()) - len(several)
    if not freedom:
        raise ValueError("labels: no class has two images, so there is nothing to learn within classes from")
    total = int(counts.sum())
    mean = sums.sums[kept].sum(axis=0) / total
    between = (sums.sums[kept] / counts[:, None] - mean) * np.sqrt(counts / total)[:, None]
    within = sums.scatter[folds].sum(axis=0) / freedom
    if not np.trace(within) > 1e-24 * (mean @ mean + np.square(between).sum()):  # more than rounding
        raise ValueError("features: all images of a class have the same, so there is nothing to learn within classes")
    return Statistics(mean, within, between, freedom / total, total, int((counts == 1).sum()))


class ClosedForm:
    """The projections of one set of statistics; eigenvectors are computed once for all shrinkages.

    Args:
      found: mean and covariances.
      centre: whether embeddings are of ``f - mu``; otherwise the bias is 0 and the length of a feature has no effect.
    """

    def __init__(self, found: Statistics, centre: bool = True):
        self._found, self._centre = found, centre

    def project(self, method: str, shrinkage: float, width: int) -> Projection:
        """The projection of one of ``METHODS``.

        Args:
          method: ``whiten`` (within classes), ``lda`` or ``pca`` (whitening of all images).
          shrinkage: lambda, at least 0; 0 needs a covariance of full rank.
          width: number of columns; those beyond the rank are 0.
        """
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
        return {"whiten": self.whiten, "lda": self.lda, "pca": self.pca}[method](shrinkage, width)

    @cached_property
    def _within(self) -> tuple[np.ndarray, np.ndarray]:
        values, axes = np.linalg.eigh(self._found.within)
        return np.maximum(values, 0.0), axes

    @cached_property
    def _total(self) -> tuple[np.ndarray, np.ndarray]:
        found = self._found
        values, axes = np.linalg.eigh(found.share * found.within + found.between.T @ found.between)
        return np.maximum(values, 0.0), axes

    @cached_property
    def _between(self) -> Float[np.ndarray, "c d"]:
        """Class means along the axes of the covariance within classes."""
        return self._found.between @ self._within[1]

    @cached_property
    def _spread(self) -> Float[np.ndarray, "d d"]:
        """Covariance of all images along the axes of that within classes."""
        spread = self._between.T @ self._between
        spread[np.diag_indices(len(spread))] += self._found.share * self._within[0]
        return spread

    def whiten(self, shrinkage: float, width: int) -> Projection:
        """Within-class whitening, reduced to the principal axes of the whitened features."""
        scale = _scale(self._within[0], shrinkage)
        values, turn = np.linalg.eigh(self._spread * scale[:, None] * scale)
        return self._projection((self._within[1] * scale) @ _largest(values, turn, width), width)

    def lda(self, shrinkage: float, width: int) -> Projection:
        """Linear discriminants: the axes of the class means after within-class whitening, at most classes - 1."""
        scale = _scale(self._within[0], shrinkage)
        means = self._between * scale
        if len(means) > means.shape[1]:
            values, turn = np.linalg.eigh(means.T @ means)
        else:
            singular, rows = np.linalg.svd(means, full_matrices=False)[1:]
            values, turn = singular[::-1] ** 2, rows[::-1].T
        return self._projection((self._within[1] * scale) @ _largest(values, turn, width), width)

    def pca(self, shrinkage: float, width: int) -> Projection:
        """Principal axes of all images, each divided by its deviation; labels are not used."""
        values, axes = self._total
        kept = _largest(values, axes * _scale(values, shrinkage), width)
        return self._projection(kept, width)

    def _projection(self, columns: Float[np.ndarray, "d used"], width: int) -> Projection:
        """The columns, each with its largest entry positive, followed by columns of zeros."""
        signs = np.sign(np.take_along_axis(columns, np.abs(columns).argmax(axis=0)[None], axis=0))
        kernel = np.zeros((len(columns), width))
        kernel[:, : columns.shape[1]] = columns * signs
        bias = -self._found.mean @ kernel if self._centre else np.zeros(width)
        return Projection(kernel, bias, columns.shape[1])


def _scale(values: Float[np.ndarray, "d"], shrinkage: float) -> Float[np.ndarray, "d"]:
    """1 / sqrt(w + lambda tr/d) for eigenvalues in ascending order."""
    if not 0 <= shrinkage < np.inf:
        raise ValueError(f"shrinkage: expected a number of at least 0, got {shrinkage}")
    rank = _rank(values)
    if shrinkage == 0 and rank < len(values):
        raise ValueError(f"shrinkage: 0 needs a covariance of full rank, and it has rank {rank} of {len(values)}")
    return 1.0 / np.sqrt(values + shrinkage * values.mean())


def _largest(values: Float[np.ndarray, "d"], axes: Float[np.ndarray, "e d"], width: int) -> Float[np.ndarray, "e used"]:
    """The axes of the largest eigenvalues, largest first, without those of eigenvalues that are 0."""
    used = min(width, _rank(values))
    return axes[:, ::-1][:, :used]


def _rank(values: Float[np.ndarray, "d"]) -> int:
    """Number of eigenvalues, in ascending order, that are more than rounding."""
    return int((values > 1e-10 * values[-1]).sum())
