"""Scores joined into one confidence: the probability that an answer is right, fitted on held-out queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from idml_jax.metrics.checks import Array, score_column


class Confidence(NamedTuple):
    """A fitted logistic model over k named scores."""

    names: tuple[str, ...]
    mean: Float[np.ndarray, "k"]
    scale: Float[np.ndarray, "k"]
    weights: Float[np.ndarray, "k"]  # of the standardised scores
    bias: float


def fit_confidence(
    scores: Mapping[str, Float[Array, "n"]], correct: Bool[Array, "n"], ridge: float = 1.0
) -> Confidence:
    """Logistic regression of correct [n] on the scores, each [n], standardised; L2 penalty ridge / 2 |weights|^2.

    Targets are drawn in from 0 and 1 as by Platt (1999), so that held-out data without any error gives no certainty.
    Fit on classes that the model was not trained on, and not on those it is reported on. Raises ValueError for empty,
    mismatched or non-finite input.
    """
    names = tuple(scores)
    right = score_column(correct, "correct").astype(bool)
    x = _table(scores, names, len(right))
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    x = np.column_stack([(x - mean) / scale, np.ones(len(x))])
    rights = right.sum()
    target = np.where(right, (rights + 1) / (rights + 2), 1 / (len(right) - rights + 2))
    penalty = np.diag([ridge] * len(names) + [1e-9])
    weights = np.zeros(len(names) + 1)

    def loss(weights):
        z = x @ weights
        return np.sum(np.logaddexp(0, z) - target * z) + 0.5 * weights @ penalty @ weights

    for _ in range(100):  # Newton's method, halving steps that overshoot
        p = _sigmoid(x @ weights)
        step = np.linalg.solve(x.T @ (x * (p * (1 - p))[:, None]) + penalty, x.T @ (target - p) - penalty @ weights)
        while loss(weights + step) > loss(weights) and np.abs(step).max() > 1e-12:
            step = step / 2
        weights = weights + step
        if np.abs(step).max() < 1e-9:
            break
    return Confidence(names, mean, scale, weights[:-1], float(weights[-1]))


def confidence(model: Confidence, scores: Mapping[str, Float[Array, "n"]]) -> Float[np.ndarray, "n"]:
    """Probability in (0, 1) that each answer is right; 1 minus it is an uncertainty. Raises as `fit_confidence`."""
    x = _table(scores, model.names, None)
    return _sigmoid((x - model.mean) / model.scale @ model.weights + model.bias)


def _table(scores, names, rows) -> Float[np.ndarray, "n k"]:
    if not names:
        raise ValueError("scores: none given")
    if missing := [name for name in names if name not in scores]:
        raise ValueError(f"scores: {', '.join(missing)} missing")
    rows = len(np.asarray(scores[names[0]])) if rows is None else rows
    table = np.column_stack([score_column(scores[name], f"scores[{name!r}]", rows) for name in names])
    if not np.isfinite(table).all():
        raise ValueError("scores: infinite")
    return table


def _sigmoid(z):
    return 0.5 * (1 + np.tanh(0.5 * z))
