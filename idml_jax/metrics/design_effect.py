"""Queries of one class err together: how many independent queries nested samples of them are worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int


def design_effects(
    correct: Bool[np.ndarray, "n"],
    groups: Int[np.ndarray, "n"],
    strata: Int[np.ndarray, "n"] | None,
    sizes: Sequence[int] | Int[np.ndarray, "k"],
) -> Float[np.ndarray, "k"]:
    """Design effects of the share of right answers among the first queries (Kish, Survey Sampling, 1965).

    That is the variance of the share for a stratified sample of whole groups, by linearisation of the ratio, over the
    variance for as many independent queries; at least 1. A stratum with one group counts as if its mean were 0.

    Args:
      correct: ``[n]``, the most certain query first.
      groups: ``[n]``, from 0: the group of each query, best its class.
      strata: ``[n]``, the stratum of each query, the same within a group: kinds of groups whose shares are fixed;
        ``None``: one.
      sizes: numbers of queries, each from 1 to n.
    """
    count = int(groups.max()) + 1
    stratum = np.zeros(count, int)
    if strata is not None:
        stratum[groups] = strata
    present = np.isin(np.arange(count), groups)
    effects = []
    for size in sizes:
        asked = np.bincount(groups[:size], minlength=count)
        right = np.bincount(groups[:size], weights=correct[:size], minlength=count)
        residual = right - right.sum() / size * asked
        variance = sum(_spread(residual[present & (stratum == one)]) for one in np.unique(stratum[present]))
        # Away from 0 and 1, where the variance of independent queries would be 0.
        share = (right.sum() + 0.5) / (size + 1)
        effects.append(max(1.0, float(variance) / (size * share * (1 - share))))
    return np.asarray(effects)


def _spread(residual: Float[np.ndarray, "groups"]) -> float:
    """Estimated variance of the sum of as many groups."""
    count = len(residual)
    if count == 1:
        return float(residual[0] ** 2)
    return float(count / (count - 1) * np.sum((residual - residual.mean()) ** 2))
