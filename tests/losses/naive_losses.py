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


def cross_entropy(logits, positive, negative, weights):
    """Softmax over each row's pairs; the target is spread evenly over its positives."""
    n, m = logits.shape
    terms = []
    for i in range(n):
        known = [logits[i, j] for j in range(m) if positive[i, j] or negative[i, j]]
        own = [logits[i, j] for j in range(m) if positive[i, j]]
        if own:
            top = max(known)
            log_total = top + math.log(sum(math.exp(x - top) for x in known))
            terms.append((weights[i], sum(log_total - x for x in own) / len(own)))
    return mean(terms)


def normalized_softmax(s, positive, negative, weights, *, temperature=0.05):
    return cross_entropy(s / temperature, positive, negative, weights)


def sup_con(s, positive, negative, weights, *, temperature=0.1):
    return cross_entropy(s / temperature, positive, negative, weights)


def cosface(s, positive, negative, weights, *, margin=0.35, scale=64.0):
    return cross_entropy(scale * (s - margin * positive), positive, negative, weights)


def arcface(s, positive, negative, weights, *, margin=28.6, scale=64.0):
    m, logits = math.radians(margin), s.copy()
    for i, j in np.argwhere(positive):
        theta = math.acos(min(max(s[i, j], -1.0), 1.0))
        logits[i, j] = math.cos(theta + m) if theta <= math.pi - m else math.cos(theta) - m * math.sin(m)
    return cross_entropy(scale * logits, positive, negative, weights)


def by_class(s, positive, negative, centres, joined):
    """The matrix of images and classes, of the columns of each class that are known, and its relation."""
    n, m = s.shape
    classes = m // centres
    found, pos, neg = np.zeros((n, classes)), np.zeros((n, classes), bool), np.zeros((n, classes), bool)
    for i, c in np.ndindex(n, classes):
        columns = range(c * centres, (c + 1) * centres)
        known = [s[i, j] for j in columns if positive[i, j] or negative[i, j]]
        pos[i, c] = any(positive[i, j] for j in columns)
        neg[i, c] = bool(known) and not pos[i, c]
        found[i, c] = joined(known) if known else 0.0
    return found, pos, neg


def subcenter_arcface(s, positive, negative, weights, *, centres=1, **options):
    return arcface(*by_class(s, positive, negative, centres, max), weights, **options)


def soft_triple(s, positive, negative, weights, *, scale=20.0, gamma=0.1, margin=0.01, centres=1):
    def joined(known):
        shares = [math.exp((x - max(known)) / gamma) for x in known]
        return sum(share * x for share, x in zip(shares, known, strict=True)) / sum(shares)

    found, pos, neg = by_class(s, positive, negative, centres, joined)
    return cross_entropy(scale * (found - margin * pos), pos, neg, weights)


def info_nce(s, positive, negative, weights, *, temperature=0.07):
    terms = []
    for i, p in np.argwhere(positive):
        others = sum(math.exp((s[i, j] - s[i, p]) / temperature) for j in np.flatnonzero(negative[i]))
        terms.append((weights[i], math.log(1 + others)))
    return mean(terms)


def circle(s, positive, negative, weights, *, margin=0.4, gamma=80.0, fixed=None):
    """``fixed``: the matrix that the weights of the pairs are taken from, as they are not differentiated."""
    fixed = s if fixed is None else fixed
    terms = []
    for i in range(len(s)):
        pos, neg = np.flatnonzero(positive[i]), np.flatnonzero(negative[i])
        if len(pos) and len(neg):
            pull = sum(math.exp(-gamma * max(0, 1 + margin - fixed[i, j]) * (s[i, j] - 1 + margin)) for j in pos)
            push = sum(math.exp(gamma * max(0, fixed[i, j] + margin) * (s[i, j] - margin)) for j in neg)
            terms.append((weights[i], math.log(1 + pull * push)))
    return mean(terms)


def n_pair(s, positive, negative, weights, *, scale=1.0):
    first = {i: np.flatnonzero(positive[i])[0] for i in range(len(s)) if positive[i].any()}
    chosen = {p for i, p in first.items() if weights[i] > 0}
    terms = []
    for i, p in first.items():
        others = [j for j in chosen if negative[i, j]]
        terms.append((weights[i], math.log(1 + sum(math.exp(scale * (s[i, j] - s[i, p])) for j in others))))
    return mean(terms)


def triplet_hard(d, positive, negative, weights, *, margin=0.1, soft=False):
    terms = []
    for i in range(len(d)):
        if positive[i].any() and negative[i].any():
            violation = max(d[i][positive[i]]) - min(d[i][negative[i]]) + margin
            terms.append((weights[i], math.log(1 + math.exp(violation)) if soft else max(0.0, violation)))
    return mean(terms)


def lifted_structure(d, positive, negative, weights, *, positive_margin=0.0, negative_margin=1.0):
    terms = []
    for i in range(len(d)):
        pos, neg = d[i][positive[i]], d[i][negative[i]]
        if len(pos) and len(neg):
            value = math.log(sum(np.exp(pos - positive_margin))) + math.log(sum(np.exp(negative_margin - neg)))
            terms.append((weights[i], max(0.0, value)))
    return mean(terms)


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def soft_rank(row, p, others, temperature):
    return 1 + sum(sigmoid((row[j] - row[p]) / temperature) for j in others if j != p)


def smooth_ap(s, positive, negative, weights, *, temperature=0.01):
    terms = []
    for i in range(len(s)):
        pos, known = np.flatnonzero(positive[i]), np.flatnonzero(positive[i] | negative[i])
        if len(pos):
            ranks = [(soft_rank(s[i], p, pos, temperature), soft_rank(s[i], p, known, temperature)) for p in pos]
            terms.append((weights[i], 1 - sum(own / rank for own, rank in ranks) / len(pos)))
    return mean(terms)


def recall_at_k(s, positive, negative, weights, *, ks=(1, 2, 4, 8, 16), temperature=0.01, rank_temperature=1.0):
    terms = []
    for i in range(len(s)):
        pos, known = np.flatnonzero(positive[i]), np.flatnonzero(positive[i] | negative[i])
        if len(pos):
            ranks = [soft_rank(s[i], p, known, temperature) for p in pos]
            found = [sum(sigmoid((k - rank) / (k * rank_temperature)) for rank in ranks) for k in ks]
            recalls = [min(f, k) / min(k, len(pos)) for f, k in zip(found, ks, strict=True)]
            terms.append((weights[i], 1 - sum(recalls) / len(ks)))
    return mean(terms)


def numerical_gradient(function, matrix, step=1e-6):
    gradient = np.zeros_like(matrix)
    for index in np.ndindex(*matrix.shape):
        shifted = matrix.copy()
        shifted[index] += step
        above = function(shifted)
        shifted[index] -= 2 * step
        gradient[index] = (above - function(shifted)) / (2 * step)
    return gradient
