"""Chooses the shrinkage and the width of a closed form on training classes that are held out of it, in folds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from idml_jax.metrics.closed_form import ClosedForm, Moments, Projection, statistics, unit_rows
from idml_jax.metrics.retrieval import retrieval_metrics

FEWEST = 2  # classes of at least two images in a fold
# From the indices of some images to their features.
RowsOf = Callable[[Int[np.ndarray, "m"]], Float[np.ndarray, "m d"]]


class Candidate(NamedTuple):
    """A closed form to try.

    Attributes:
      method: key of ``closed_form.METHODS``; ``zero_shot`` for the features as they are, or a name of ``fixed``.
      shrinkage: lambda.
      width: number of columns.
    """

    method: str
    shrinkage: float = 0.0
    width: int = 0


def fold_classes(counts: Int[np.ndarray, "c"], folds: int, seed: int) -> Int[np.ndarray, "c"]:
    """Deals classes into folds of about equal numbers of classes.

    Args:
      counts: ``[c]`` images by class.
      folds: number of folds wanted.
      seed: seed of the order.

    Returns:
      ``[c]`` the fold of each class, from 0. There are fewer folds if a fold would have fewer than ``FEWEST`` classes
      of at least two images; a single one, which cannot be held out, below twice that number.
    """
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(counts))
    order = order[np.argsort(counts[order] < 2, kind="stable")]  # classes of one image last, so that all folds get some
    folds = max(1, min(folds, int((counts > 1).sum()) // FEWEST))
    fold_of = np.empty(len(counts), np.int64)
    fold_of[order] = np.arange(len(counts)) % folds
    return fold_of


def held_out_scores(
    sums: Moments,
    labels: Int[np.ndarray, "n"],
    rows_of: RowsOf,
    candidates: Sequence[Candidate],
    *,
    centre: bool = True,
    fixed: Mapping[str, Projection] | None = None,
) -> dict[Candidate, dict[str, float]]:
    """R@1 and MAP@R of every candidate, learned from all folds but one and measured on that one; means over folds.

    The images of a held-out fold search each other.

    Args:
      sums: moments by fold of the training classes, at least two folds.
      labels: ``[n]`` of the training images.
      rows_of: gives the features of some of them.
      candidates: closed forms to try.
      centre: as for ``ClosedForm``.
      fixed: projections that learn nothing, by name.

    Returns:
      ``R@1`` and ``MAP@R`` by candidate.
    """
    folds = len(sums.scatter)
    found: dict[Candidate, list[dict[str, float]]] = {candidate: [] for candidate in candidates}
    for fold in range(folds):
        form = ClosedForm(statistics(sums, np.arange(folds) != fold), centre)
        chosen = np.flatnonzero(sums.fold_of[labels] == fold)
        rows = rows_of(chosen)
        for candidate in candidates:
            if candidate.method == "zero_shot":
                embedded = unit_rows(rows)
            elif fixed and candidate.method in fixed:
                embedded = fixed[candidate.method](rows)
            else:
                embedded = form.project(*candidate)(rows)
            found[candidate].append(retrieval_metrics(embedded, labels[chosen], ks=(1,)))
    return {
        candidate: {name: float(np.mean([one[name] for one in values])) for name in ("R@1", "MAP@R")}
        for candidate, values in found.items()
    }


def best_of(scores: Mapping[Candidate, Mapping[str, float]], method: str, metric: str) -> Candidate:
    """The candidate of a method with the highest mean of a metric; of equal ones the first."""
    return max((candidate for candidate in scores if candidate.method == method), key=lambda c: scores[c][metric])
