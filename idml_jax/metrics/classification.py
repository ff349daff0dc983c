"""Classification metrics that keep the tail: padded rows are masked, and sums divide by the real rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

ECE_BINS = 15


def batch_sums(
    logits: Float[Array, "n classes"], labels: Int[Array, "n"], mask: Bool[Array, "n"] | None = None
) -> dict[str, Array]:
    """Sums over one batch, to be added up over batches and passed to `finish`; may be jitted and vmapped.

    logits [n, classes] of any float type, labels [n] in [0, classes), mask [n] true for rows that count (None: all).
    The content of masked-out rows, even NaN, has no effect. Ties count against the prediction: a label is in the
    top k if fewer than k other classes have a logit at least as large; so a constant output is not right.

    Returns 'count', 'top1', 'top5', 'nll' (nats) as scalars and, for the expected calibration error, 'bin_count',
    'bin_correct', 'bin_confidence' [15]; all float32.
    """
    mask = jnp.ones(labels.shape, bool) if mask is None else mask.astype(bool)
    labels = jnp.where(mask, labels, 0)
    logits = jnp.where(mask[:, None], logits.astype(jnp.float32), 0.0)
    weight = mask.astype(jnp.float32)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    # Written as "not smaller", so that a row of NaN counts as wrong.
    ahead = jnp.sum(~(logits < own), axis=1) - 1
    log_probability = jax.nn.log_softmax(logits, axis=1)
    confidence = jnp.exp(jnp.max(log_probability, axis=1))
    right = (ahead < 1).astype(jnp.float32)
    # Bins are (lower, upper]: a confidence on an edge belongs to the bin below, and 1 to the last.
    edges = jnp.arange(1, ECE_BINS, dtype=jnp.float32) / ECE_BINS
    place = jnp.sum(confidence[:, None] > edges[None, :], axis=1)
    member = (place[:, None] == jnp.arange(ECE_BINS)[None, :]) * weight[:, None]
    return {
        "count": jnp.sum(weight),
        "top1": jnp.sum(weight * right),
        "top5": jnp.sum(weight * (ahead < 5)),
        "nll": -jnp.sum(jnp.where(mask, jnp.take_along_axis(log_probability, labels[:, None], axis=1)[:, 0], 0.0)),
        "bin_count": jnp.sum(member, axis=0),
        "bin_correct": jnp.sum(member * right[:, None], axis=0),
        "bin_confidence": jnp.sum(jnp.where(member > 0, confidence[:, None], 0.0), axis=0),
    }


def finish(sums: dict[str, Array]) -> dict[str, float]:
    """'top1', 'top5', 'nll' (nats), 'ece' and 'count' from sums over all batches; raises ValueError if none counted.

    ece: expected calibration error, 15 equal bins of the largest probability, |accuracy - confidence| weighted by the
    bins' sizes (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017).
    """
    sums = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    count = float(sums["count"])
    if not count:
        raise ValueError("mask: no row counts")
    gap = np.sum(np.abs(sums["bin_correct"] - sums["bin_confidence"])) / count
    means = {name: float(sums[name]) / count for name in ("top1", "top5", "nll")}
    return {**means, "ece": float(gap), "count": int(count)}


def calibration_error(confidence: Float[np.ndarray, "n"], right: Bool[np.ndarray, "n"]) -> float:
    """The expected calibration error of `finish`, of confidences [n] in [0, 1] in answers that are right or wrong.

    It is never 0 with few answers: see `calibration_error_by_chance`.
    """
    gap = np.bincount(_bins(confidence), weights=right - confidence, minlength=ECE_BINS)
    return float(np.abs(gap).sum() / len(right))


def calibration_error_by_chance(confidence: Float[np.ndarray, "n"]) -> float:
    """The calibration error that is expected of these confidences [n] in [0, 1] if they are perfectly calibrated.

    In a bin the right answers then vary around the sum of their confidences p with the variance sum(p (1 - p)); the
    mean absolute value of a normal variable is sqrt(2 / pi) times its deviation. For bins of a few answers or more this
    is close: with 500 answers it can be 0.05.
    """
    variance = np.bincount(_bins(confidence), weights=confidence * (1 - confidence), minlength=ECE_BINS)
    return float(np.sqrt(2 / np.pi * variance).sum() / len(confidence))


def _bins(confidence: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    return np.clip(np.ceil(confidence * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)


def classification_metrics(
    logits: Float[Array, "n classes"], labels: Int[Array, "n"], mask: Bool[Array, "n"] | None = None
) -> dict[str, float]:
    """`finish(batch_sums(...))` on checked input; ValueError for empty or mismatched shapes and labels out of range."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits: expected shape [rows, classes], got {logits.shape}")
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels: expected shape ({len(logits)},), one per row of logits, got {labels.shape}")
    mask = np.ones(len(logits), bool) if mask is None else np.asarray(mask, bool)
    if mask.shape != labels.shape:
        raise ValueError(f"mask: expected shape ({len(logits)},), one per row of logits, got {mask.shape}")
    seen = labels[mask]
    if len(seen) and (seen.min() < 0 or seen.max() >= logits.shape[1]):
        raise ValueError(f"labels: expected 0 to {logits.shape[1] - 1}, got {seen.min()} to {seen.max()}")
    return finish(jax.device_get(jax.jit(batch_sums)(logits, labels.astype(np.int32), mask)))
