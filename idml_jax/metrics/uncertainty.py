"""What an uncertainty score knows (placeholder of the three functions that evaluate.py calls; rewrite freely, keep the names)."""

import numpy as np


def _ranks(x):
    x = np.asarray(x, np.float64)
    values, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def r_auroc(uncertainty, nearest_correct):
    wrong = ~np.asarray(nearest_correct, bool)
    if wrong.all() or not wrong.any():
        return float("nan")
    ranks = _ranks(uncertainty)
    w, c = wrong.sum(), (~wrong).sum()
    return float((ranks[wrong].sum() - w * (w + 1) / 2) / (w * c))


def spearman(a, b):
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def probability_greater(changed, original):
    changed, original = np.asarray(changed), np.asarray(original)
    return float(np.mean(changed > original) + 0.5 * np.mean(changed == original))
