"""Exact binomial tests: the tail, and the bound of one share."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def upper_tail(total: int, share: float) -> Float[np.ndarray, "total+1"]:
    """Probability of at least 0, 1, ..., ``total`` successes in as many trials."""
    if share == 1:
        return np.ones(total + 1)
    hits = np.arange(total + 1)
    chances = np.exp(_log_ways(total) + hits * np.log(share) + (total - hits) * np.log1p(-share))
    return np.minimum(np.cumsum(chances[::-1])[::-1], 1.0)


def _log_ways(total: int) -> Float[np.ndarray, "total+1"]:
    """Logarithms of the binomial coefficients."""
    factorials = np.r_[0.0, np.cumsum(np.log(np.arange(1, total + 1)))]
    return factorials[-1] - factorials - factorials[::-1]


def lower_bound(right: int, total: int, risk: float) -> float:
    """Lower confidence bound of a share, exact (Clopper and Pearson, Biometrika 1934).

    Args:
      right: successes, at most ``total``.
      total: independent trials, at least 1.
      risk: probability, above 0 and below 0.5, that the true share is below the bound.

    Returns:
      The share at which ``right`` or more successes have the probability ``risk``; 0 for no success.
    """
    if right == 0:
        return 0.0
    hits, ways = np.arange(right, total + 1), _log_ways(total)[right:]
    low, high = 0.0, right / total
    for _ in range(40):
        middle = (low + high) / 2
        tail = np.exp(ways + hits * np.log(middle) + (total - hits) * np.log1p(-middle)).sum()
        low, high = (low, middle) if tail > risk else (middle, high)
    return low
