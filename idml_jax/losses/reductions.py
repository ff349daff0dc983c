"""Shared parts of the losses: input checks, sums of exponentials, weighted means, over one or all devices."""

import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from idml_jax.ism import numbers_of
from idml_jax.losses.pairs import AxisName, Pairs

__all__ = [
    "Reduction",
    "check_positive",
    "check_whole",
    "log_one_plus_sum_exp",
    "log_stands_for",
    "log_sum_exp",
    "max_over_last",
    "mean_of_rows",
    "prepare",
    "ratio",
    "softmax_mean",
    "softmax_of_positives",
    "sums_and_counts",
    "total",
]

Reduction = Literal["mean", "none"]
# Beyond these a number is 0 or infinite in float32.
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def check_positive(**options: Any) -> None:
    """Checks options that divide or that scale, by name: numbers, or arrays of them; traced ones are not checked.

    Raises:
      ValueError: naming the option, unless it is a finite number above 0 in the normal range of float32.
    """
    for name, value in options.items():
        if isinstance(value, jax.core.Tracer):
            continue
        number = numbers_of(value)
        if not ((number >= _LEAST) & (number <= _MOST)).all():
            raise ValueError(f"{name} must be a finite number above 0, from 1.2e-38 to 3.4e38; got {value!r}")


def check_whole(least: int = 1, **options: Any) -> None:
    """Checks options that count something, by name.

    Raises:
      ValueError: naming the option, unless it is a whole number of at least ``least``.
    """
    for name, value in options.items():
        try:
            fits = least <= operator.index(value) < 2**31 and not isinstance(value, bool)
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(f"{name} must be at least {least}, a whole number below 2**31; got {value!r}")


def prepare(
    matrix: Float[Array, "n m"], pairs: Pairs, weights: Float[Array, "n"] | None, reduction: Reduction
) -> tuple[Float[Array, "n m"], Float[Array, "n"]]:
    """The matrix in at least float32, with 0 wherever the relation ignores it, and the rows' weights.

    Ignored entries may hold anything, NaN included: they reach neither the value nor the gradient.

    Raises:
      ValueError: if the shapes do not fit, the reduction is unknown, or a weight is negative, infinite or NaN (traced
        weights are not checked).
    """
    if not isinstance(pairs, Pairs):
        raise ValueError(f"a loss needs Pairs, as pairs_from_labels(labels) gives them; got {type(pairs).__name__}")
    if odd := [str(part.dtype) for part in map(jnp.asarray, pairs) if part.dtype != bool]:
        raise ValueError(f"the parts of Pairs must be bool; got {odd[0]}")
    matrix = jnp.asarray(matrix)
    matrix = matrix.astype(jnp.result_type(jnp.float32, matrix))
    if matrix.ndim != 2 or pairs.positive.shape != matrix.shape or pairs.negative.shape != matrix.shape:
        raise ValueError(
            "a loss needs a matrix and pairs of the same shape [n, m]; got "
            f"{matrix.shape}, {pairs.positive.shape} and {pairs.negative.shape}"
        )
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none'; got {reduction!r}")
    matrix = jnp.where(pairs.positive | pairs.negative, matrix, 0.0)
    if weights is None:
        return matrix, jnp.ones(matrix.shape[:1], matrix.dtype)
    weights = jnp.asarray(weights).astype(matrix.dtype)
    if weights.shape != matrix.shape[:1]:
        raise ValueError(f"weights need the rows' shape {matrix.shape[:1]}; got {weights.shape}")
    if not isinstance(weights, jax.core.Tracer):
        given = np.asarray(weights)
        if bad := given[~np.isfinite(given)].tolist():
            raise ValueError(f"weights must be finite; one is {bad[0]}")
        if (given < 0).any():
            raise ValueError(f"weights must not be negative; the least is {given.min():g}")
    return matrix, weights


def log_stands_for(stands_for: Float[Array, "m"], pairs: Pairs, dtype: jnp.dtype) -> Float[Array, "n m"]:
    """The logarithm of the number of classes that each negative stands for, 0 for the other entries.

    Raises:
      ValueError: if there is not one number per column, or one is not a finite number above 0 (traced ones are not
        checked).
    """
    stands_for = jnp.asarray(stands_for).astype(dtype)
    if stands_for.shape != pairs.negative.shape[1:]:
        raise ValueError(f"stands_for needs the columns' shape {pairs.negative.shape[1:]}; got {stands_for.shape}")
    if not isinstance(stands_for, jax.core.Tracer):
        given = np.asarray(stands_for)
        if bad := given[~((given > 0) & np.isfinite(given))].tolist():
            raise ValueError(f"stands_for must hold finite numbers above 0; one is {bad[0]:g}")
    return jnp.where(pairs.negative, jnp.log(stands_for)[None, :], 0.0)


def total(x: Num[Array, "..."], axis_name: AxisName | None = None, axis: int | None = None) -> Num[Array, "..."]:
    """Sum over an axis (``None``: everything), and over the devices of a mapped axis."""
    summed = jnp.sum(x, axis=axis)
    return summed if axis_name is None else jax.lax.psum(summed, axis_name)


@jax.custom_jvp
def sums_and_counts(terms: Float[Array, "n m"]) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    """The sum of each row, and how many of its terms are above 0.

    One reduction of both reads the matrix once and stores nothing; of two, XLA on a CPU stores both inputs.
    """
    zero = jnp.zeros((), terms.dtype)
    add = lambda one, other: (one[0] + other[0], one[1] + other[1])
    sums, counts = jax.lax.reduce((terms, (terms > 0).astype(terms.dtype)), (zero, zero), add, (1,))
    return sums, counts


@sums_and_counts.defjvp
def _sums_and_counts_jvp(
    primals: tuple[Float[Array, "n m"]], tangents: tuple[Float[Array, "n m"]]
) -> tuple[tuple[Float[Array, "n"], Float[Array, "n"]], tuple[Float[Array, "n"], Float[Array, "n"]]]:
    sums, counts = sums_and_counts(*primals)
    return (sums, counts), (jnp.sum(tangents[0], axis=1), jnp.zeros_like(counts))


def _max_and_ties(x: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    def larger(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
        value = jnp.maximum(one[0], other[0])
        return value, jnp.where(one[0] == value, one[1], 0.0) + jnp.where(other[0] == value, other[1], 0.0)

    start = (jnp.array(-jnp.inf, x.dtype), jnp.zeros((), x.dtype))
    value, ties = jax.lax.reduce((x, jnp.ones_like(x)), start, larger, (x.ndim - 1,))
    return value, ties


@jax.custom_jvp
def max_over_last(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The largest of the last axis, minus infinity without any; entries that share it share the gradient.

    As ``jnp.max``, whose gradient needs two more passes over the matrix.
    """
    return _max_and_ties(x)[0]


@max_over_last.defjvp
def _max_over_last_jvp(
    primals: tuple[Float[Array, "..."]], tangents: tuple[Float[Array, "..."]]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    (x,), (d_x,) = primals, tangents
    value, ties = jax.lax.stop_gradient(_max_and_ties(jax.lax.stop_gradient(x)))
    chosen = jnp.sum(jnp.where(x == value[..., None], d_x, 0.0), axis=-1)
    return max_over_last(x), chosen / jnp.maximum(ties, 1.0)


def ratio(numerator: Float[Array, "..."], denominator: Num[Array, "..."]) -> Float[Array, "..."]:
    """``numerator / denominator``, and 0 with a gradient of 0 where the denominator is 0; NaN is passed on."""
    some = ~(denominator <= 0) | (numerator != numerator)  # NaN counts in no denominator, since it compares as false
    return jnp.where(some, numerator, 0.0) / jnp.where(some, denominator, 1.0)


def log_one_plus_sum_exp(
    logits: Float[Array, "n m"],
    where: Bool[Array, "n m"],
    axis: int,
    weights: Float[Array, "n"] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, " kept"]:
    """``log(1 + sum w exp(logits))`` over the chosen entries; 0 with gradient 0 if no entry is chosen.

    ``weights`` belong to the rows; ``axis_name`` also sums over the devices.
    """
    masked = jnp.where(where, logits, -jnp.inf)
    # The 1 is exp(0), so the largest exponent is at least 0 and nothing overflows at any scale.
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(masked, axis=axis, initial=-jnp.inf), 0.0))
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    shifted = jnp.where(where, logits - jnp.expand_dims(largest, axis), 0.0)
    terms = jnp.where(where, jnp.exp(shifted), 0.0)
    if weights is not None:
        terms *= weights[:, None]
    return largest + jnp.log(jnp.exp(-largest) + total(terms, axis_name, axis))


def log_sum_exp(logits: Float[Array, "n m"], where: Bool[Array, "n m"]) -> Float[Array, "n"]:
    """``log(sum exp(logits))`` of each row's chosen entries; 0 with gradient 0 if no entry is chosen."""
    some = jnp.any(where, axis=1)
    largest = jnp.max(jnp.where(where, logits, -jnp.inf), axis=1, initial=-jnp.inf)
    largest = jax.lax.stop_gradient(jnp.where(some, largest, 0.0))
    terms = jnp.where(where, jnp.exp(jnp.where(where, logits - largest[:, None], 0.0)), 0.0)
    sums = jnp.sum(terms, axis=1)
    # The largest term is 1, except where the compiler rounds huge logits differently in its two uses.
    return largest + jnp.log(jnp.where(sums > 0, sums, 1.0))


def mean_of_rows(
    values: Float[Array, "n"],
    counted: Bool[Array, "n"],
    weights: Float[Array, "n"],
    reduction: Reduction,
    axis_name: AxisName | None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """The weighted mean of the rows that count, 0 without any; or each row's value times its weight, 0 elsewhere."""
    values = jnp.where(counted, weights * values, 0.0)
    if reduction == "none":
        return values
    return ratio(total(values, axis_name), total(jnp.where(counted, weights, 0.0), axis_name))


@jax.custom_jvp
def softmax_mean(x: Float[Array, "n classes k"], known: Bool[Array, "n classes k"]) -> Float[Array, "n classes"]:
    """``sum_k softmax(x)_k x_k`` over the known entries, 0 without any."""
    return _softmax_mean_parts(x, known)[0]


def _softmax_mean_parts(
    x: Float[Array, "n classes k"], known: Bool[Array, "n classes k"]
) -> tuple[Float[Array, "n classes"], Float[Array, "n classes k"], Float[Array, "n classes"]]:
    """The mean, the exponentials that weigh it, and their sum."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.where(known, x, -jnp.inf), axis=2))
    largest = jnp.where(largest == -jnp.inf, 0.0, largest)
    terms = jnp.where(known, jnp.exp(jnp.where(known, x - largest[:, :, None], 0.0)), 0.0)
    sums = jnp.sum(terms, axis=2)
    return ratio(jnp.sum(terms * x, axis=2), sums), terms, sums


@softmax_mean.defjvp
def _softmax_mean_jvp(
    primals: tuple[Float[Array, "n classes k"], Bool[Array, "n classes k"]],
    tangents: tuple[Float[Array, "n classes k"], Array],
) -> tuple[Float[Array, "n classes"], Float[Array, "n classes"]]:
    # In closed form: the gradient of a softmax is another pass over all proxies.
    x = primals[0]
    mean, terms, sums = _softmax_mean_parts(*primals)
    slopes = terms * (1.0 + (x - mean[:, :, None]))
    return mean, jnp.sum(slopes * tangents[0], axis=2) * ratio(jnp.ones_like(sums), sums)


def softmax_of_positives(
    logits: Float[Array, "n m"],
    pairs: Pairs,
    weights: Float[Array, "n"],
    reduction: Reduction,
    axis_name: AxisName | None,
    stands_for: Float[Array, "m"] | None = None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """Mean over rows with a positive of the mean over their positives of ``-log softmax``, over the row's pairs.

    It is the cross-entropy of a target that is spread evenly over the positives. ``stands_for`` multiplies the
    exponential of each column's negatives.
    """
    everything = logits
    if stands_for is not None:
        everything = logits + log_stands_for(stands_for, pairs, logits.dtype)
    positives = jnp.sum(pairs.positive, axis=1).astype(logits.dtype)
    of_positives = ratio(jnp.sum(jnp.where(pairs.positive, logits, 0.0), axis=1), positives)
    values = log_sum_exp(everything, pairs.positive | pairs.negative) - of_positives
    return mean_of_rows(values, positives > 0, weights, reduction, axis_name)
