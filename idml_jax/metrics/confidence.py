"""Combines scores into one confidence: the probability that an answer is right, fitted on held-out queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from idml_jax.metrics.checks import Array, score_column


class Confidence(NamedTuple):
    """A fitted logistic model over k named scores, and of their products if it has more than k weights."""

    names: tuple[str, ...]
    low: Float[np.ndarray, "k"]  # range of the scores in the fit; others are clipped to it
    high: Float[np.ndarray, "k"]
    mean: Float[np.ndarray, "k"]
    scale: Float[np.ndarray, "k"]
    weights: Float[np.ndarray, "k"]  # of the standardised scores, then of their products
    bias: float


def fit_confidence(
    scores: Mapping[str, Float[Array, "n"]],
    correct: Bool[Array, "n"],
    ridge: float = 1.0,
    *,
    weights: Float[Array, "n"] | None = None,
    products: bool = False,
) -> Confidence:
    """Logistic regression of correct [n] on the scores, each [n], standardised; L2 penalty ridge / 2 |weights|^2.

    `weights` [n], at least 0, weight the queries; with `products` the model also has the squares and the products
    of every two scores. Targets are shrunk from 0 and 1 as by Platt (1999), so that held-out data without any error
    do not give certainty. Fit on classes that the model was not trained on, and not on those it is reported on. Raises
    ValueError for empty, mismatched or non-finite input.
    """
    names = tuple(scores)
    right = score_column(correct, "correct").astype(bool)
    table = _table(scores, names, len(right))
    counts = np.ones(len(right)) if weights is None else score_column(weights, "weights", len(right)).astype(float)
    if not (counts >= 0).all() or not counts.sum() > 0:
        raise ValueError("weights: must be at least 0, and some above")
    mean, scale = np.average(table, axis=0, weights=counts), table.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    model = Confidence(names, table.min(axis=0), table.max(axis=0), mean, scale, np.zeros(len(names)), 0.0)
    x = np.column_stack([_features(model, table, products), np.ones(len(right))])
    rights, wrongs = counts[right].sum(), counts[~right].sum()
    target = np.where(right, (rights + 1) / (rights + 2), 1 / (wrongs + 2))
    penalty = np.diag([ridge] * (x.shape[1] - 1) + [1e-9])
    fitted = np.zeros(x.shape[1])

    def loss(fitted: Float[np.ndarray, "f"]) -> np.floating:
        z = x @ fitted
        return np.sum(counts * (np.logaddexp(0, z) - target * z)) + 0.5 * fitted @ penalty @ fitted

    for _ in range(100):  # Newton's method, halving steps that overshoot
        p = _sigmoid(x @ fitted)
        curvature = x.T @ (x * (counts * p * (1 - p))[:, None]) + penalty
        step = np.linalg.solve(curvature, x.T @ (counts * (target - p)) - penalty @ fitted)
        while loss(fitted + step) > loss(fitted) and np.abs(step).max() > 1e-12:
            step = step / 2
        fitted = fitted + step
        if np.abs(step).max() < 1e-9:
            break
    return model._replace(weights=fitted[:-1], bias=float(fitted[-1]))


def confidence(model: Confidence, scores: Mapping[str, Float[Array, "n"]]) -> Float[np.ndarray, "n"]:
    """Probability in (0, 1) that each answer is right; 1 minus it is an uncertainty. Raises as `fit_confidence`."""
    table = _table(scores, model.names, None)
    return _sigmoid(_features(model, table, len(model.weights) > len(model.names)) @ model.weights + model.bias)


def _features(model: Confidence, table: Float[np.ndarray, "n k"], products: bool) -> Float[np.ndarray, "n f"]:
    x = (np.clip(table, model.low, model.high) - model.mean) / model.scale
    if not products:
        return x
    one, other = np.triu_indices(x.shape[1])
    return np.column_stack([x, x[:, one] * x[:, other]])


def _table(
    scores: Mapping[str, Float[Array, "n"]], names: tuple[str, ...], rows: int | None
) -> Float[np.ndarray, "n k"]:
    """The named scores side by side; ValueError unless all are there, finite and of `rows` entries (None: any)."""
    if not names:
        raise ValueError("scores: none given")
    if missing := [name for name in names if name not in scores]:
        raise ValueError(f"scores: {', '.join(missing)} missing")
    rows = len(np.asarray(scores[names[0]])) if rows is None else rows
    table = np.column_stack([score_column(scores[name], f"scores[{name!r}]", rows) for name in names])
    if not np.isfinite(table).all():
        raise ValueError("scores: infinite")
    return table


def _sigmoid(z: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """1 / (1 + exp(-z)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * z))
