"""The losses as loops over pairs and triplets, straight from their formulas, in float64: the reference of the tests.

Each takes a matrix, the two relations and the rows' weights as numpy arrays, and the settings as keywords.
"""

import math

import numpy as np


def mean_of_nonzero(terms):
    """Weighted mean of (weight, value) over the values above 0."""
    terms = [(w, v) for w, v in terms if v > 0]
    total = sum(w for w, _ in terms)
    return sum(w * v for w, v in terms) / total if total > 0 else 0.0


def mean(terms):
    total = sum(w for w, _ in terms)
    return sum(w * v for w, v in terms) / total if total > 0 else 0.0


def contrastive(d, positive, negative, weights, *, positive_margin=0.0, negative_margin=0.5):
    n, m = d.shape
    pulls, pushes = [], []
    for i in range(n):
        for j in range(m):
            if positive[i, j]:
                pulls.append((weights[i], d[i, j] - positive_margin))
            if negative[i, j]:
                pushes.append((weights[i], negative_margin - d[i, j]))
    return mean_of_nonzero(pulls) + mean_of_nonzero(pushes)


def triplet_semihard(d, positive, negative, weights, *, margin=0.1):
    n, m = d.shape
    terms = []
    for a in range(n):
        for p in range(m):
            for k in range(m):
                if positive[a, p] and negative[a, k] and d[a, p] < d[a, k] < d[a, p] + margin:
                    terms.append((weights[a], d[a, p] - d[a, k] + margin))
    return mean(terms)


def margin_given_draws(d, positive, negative, weights, drawn, *, margin=0.2, beta=1.2):
    n, m = d.shape
    beta = np.broadcast_to(beta, (n,))
    value = count = 0.0
    for i in range(n):
        for j in range(m):
            if positive[i, j] and d[i, j] - beta[i] + margin > 0:
                value += weights[i] * (d[i, j] - beta[i] + margin)
                count += weights[i]
            if negative[i, j] and beta[i] - d[i, j] + margin > 0:
                value += weights[i] * drawn[i, j] * (beta[i] - d[i, j] + margin)
                count += weights[i] * drawn[i, j]
    return value / count if count > 0 else 0.0


def sampling_probabilities(d, negative, *, dimension=512, cutoff=0.5, nonzero_cutoff=1.4):
    n, m = d.shape
    probabilities = np.zeros((n, m))
    for i in range(n):
        logs = {}
        for j in range(m):
            if negative[i, j] and d[i, j] < nonzero_cutoff:
                x = max(d[i, j], cutoff)
                logs[j] = -((dimension - 2) * math.log(x) + (dimension - 3) / 2 * math.log(1 - x * x / 4))
        if logs:
            top = max(logs.values())
            total = sum(math.exp(v - top) for v in logs.values())
            for j, v in logs.items():
                probabilities[i, j] = math.exp(v - top) / total
    return probabilities


def multi_similarity(s, positive, negative, weights, *, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1):
    n, m = s.shape
    terms = []
    for i in range(n):
        pos = [s[i, j] for j in range(m) if positive[i, j]]
        neg = [s[i, j] for j in range(m) if negative[i, j]]
        if not pos and not neg:
            continue
        near = [v for v in pos if not neg or v < max(neg) + epsilon]
        far = [v for v in neg if not pos or v > min(pos) - epsilon]
        value = math.log(1 + sum(math.exp(-alpha * (v - base)) for v in near)) / alpha
        value += math.log(1 + sum(math.exp(beta * (v - base)) for v in far)) / beta
        terms.append((weights[i], value))
    return mean(terms)


def fast_ap(d, positive, negative, weights, *, bins=10, largest_square=4.0):
    width = largest_square / bins
    points = np.arange(bins + 1)[:, None] * width
    terms = []
    for i in range(len(d)):
        if not positive[i].any():
            continue
        pulse = np.maximum(0.0, 1 - np.abs(np.minimum(d[i] ** 2, largest_square) - points) / width)
        h_pos = (pulse * positive[i]).sum(1)
        h_all = (pulse * (positive[i] | negative[i])).sum(1)
        ap = 0.0
        for b in range(bins + 1):
            if h_all[: b + 1].sum() > 0:
                ap += h_pos[b] * h_pos[: b + 1].sum() / h_all[: b + 1].sum()
        terms.append((weights[i], 1 - ap / positive[i].sum()))
    return mean(terms)


def proxy_nca(d, positive, negative, weights, *, scale=32.0):
    n, m = d.shape
    terms = []
    for i in range(n):
        if not positive[i].any():
            continue
        nearest = min(d[i, j] ** 2 for j in range(m) if positive[i, j] or negative[i, j])
        pulls = sum(math.exp(-scale * (d[i, j] ** 2 - nearest)) for j in range(m) if positive[i, j])
        everything = pulls + sum(math.exp(-scale * (d[i, j] ** 2 - nearest)) for j in range(m) if negative[i, j])
        terms.append((weights[i], -math.log(pulls / everything)))
    return mean(terms)


def proxy_anchor(s, positive, negative, weights, *, margin=0.1, alpha=32.0):
    n, m = s.shape
    pulls, pushes, with_positive = 0.0, 0.0, 0
    for j in range(m):
        near = sum(weights[i] * math.exp(-alpha * (s[i, j] - margin)) for i in range(n) if positive[i, j])
        far = sum(weights[i] * math.exp(alpha * (s[i, j] + margin)) for i in range(n) if negative[i, j])
        pulls += math.log(1 + near)
        pushes += math.log(1 + far)
        with_positive += any(positive[i, j] and weights[i] > 0 for i in range(n))
    return pulls / max(with_positive, 1) + pushes / max(m, 1)


def numerical_gradient(function, matrix, step=1e-6):
    gradient = np.zeros_like(matrix)
    for index in np.ndindex(*matrix.shape):
        shifted = matrix.copy()
        shifted[index] += step
        above = function(shifted)
        shifted[index] -= 2 * step
        gradient[index] = (above - function(shifted)) / (2 * step)
    return gradient
