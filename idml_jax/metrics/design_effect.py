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
    variance for as many independent queries; at least 1. Nothing tells the spread over groups of a stratum with one
    group, so its queries count as independent.

    Args:
      correct: ``[n]``, the most certain query first.
      groups: ``[n]``, from 0: the group of each query, best its class.
      strata: ``[n]``, the stratum of each query, the same within a group: kinds of groups whose shares are fixed;
        ``None``: one.
      sizes: numbers of queries, each from 1 to n.
    """
    groups, stratum = _strata_of(groups, strata)
    count = len(stratum)
    effects = []
    for size in sizes:
        asked = np.bincount(groups[:size], minlength=count)
        right = np.bincount(groups[:size], weights=correct[:size], minlength=count)
        residual = right - right.sum() / size * asked
        variance = sum(_spread(residual[stratum == one]) for one in np.unique(stratum))
        # Away from 0 and 1, where the variance of independent queries would be 0.
        share = (right.sum() + 0.5) / (size + 1)
        effects.append(max(1.0, float(variance) / (size * share * (1 - share))))
    return np.asarray(effects)


def effects_of_first(groups: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n+1"]:
    """Design effects of the share of the first 0, 1, ..., n of n queries, at least 1; otherwise as `design_effects`.

    Args:
      groups: ``[n]``, from 0: the group of each query, in order.
    """
    total, sizes = len(groups), np.bincount(groups)
    sizes, count = sizes[groups], max(2, int((sizes > 0).sum()))
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(groups[order]) != 0])
    before = np.empty(total, int)  # queries of its group among the earlier ones
    before[order] = np.arange(total) - np.repeat(starts, np.diff(np.r_[starts, total]))
    # Sums over the groups of squares and products of the first queries' number and the size, query by query.
    squares, products = np.r_[0, np.cumsum(2 * before + 1)], np.r_[0, np.cumsum(sizes)]
    first = np.arange(total + 1)
    share, smooth = first / total, (first + 0.5) / (total + 1)
    variance = count / (count - 1) * (squares - 2 * share * products + share**2 * sizes.sum())
    return np.maximum(1.0, variance / (total * smooth * (1 - smooth)))


def _strata_of(
    groups: Int[np.ndarray, "n"], strata: Int[np.ndarray, "n"] | None
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "groups"]]:
    """Groups, numbered from 0 without gaps, and the stratum of each; a group alone in its stratum is one per query."""
    one = np.zeros(len(groups), int) if strata is None else np.asarray(strata, int)
    alone = [kind for kind in np.unique(one) if len(np.unique(groups[one == kind])) == 1]
    apart = np.isin(one, alone)
    numbers = np.where(apart, groups.max() + 1 + np.arange(len(groups)), groups)
    _, first, codes = np.unique(numbers, return_index=True, return_inverse=True)
    return codes, one[first]


def _spread(residual: Float[np.ndarray, "groups"]) -> float:
    """Estimated variance of the sum of as many groups."""
    count = len(residual)
    if count == 1:
        return 0.0
    return float(count / (count - 1) * np.sum((residual - residual.mean()) ** 2))
