"""Losses on the ranks of an anchor's positives; import them from ``idml_jax.losses``.

The rank of a positive is the number of references that are more similar to the anchor, with the comparison replaced by
a sigmoid. The textbook form compares all references with all, ``[n, m, m]``. Here one positive of every row is ranked
at a time: ``O(n m)`` memory, and ``O(n m p)`` time for at most ``p`` positives per row.
"""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from idml_jax.losses.pairs import AxisName, Pairs
from idml_jax.losses.reductions import Reduction, check_positive, check_whole, mean_of_rows, prepare, ratio

__all__ = ["recall_at_k", "smooth_ap"]


def smooth_ap(
    similarity: Float[Array, "n m"],
    pairs: Pairs,
    *,
    temperature: float = 0.01,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """Smooth-AP, Brown et al., ECCV 2020, eq. 7: average precision with sigmoids instead of comparisons.

        mean over anchors with a positive of  1 - mean over positives p of  R+(p) / R(p)
        R+(p) = 1 + sum over the other positives j of  sigmoid((S_j - S_p) / T);  R(p): the same over all pairs

    An anchor is not its own positive. (The published code and pytorch-metric-learning count it as one, which always
    ranks first, and need as many images of every class.)

    Args:
      similarity: ``[n, m]``, plain (cosine) or introspective.
      pairs: relation of anchors and references; anchors without a positive are left out.
      temperature: T of the sigmoid.
      weights: ``[n]`` at least 0, of the anchors, in the mean.
      reduction: ``'none'`` returns for each anchor its term times its weight, 0 without a positive.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the anchors are split over.

    Returns:
      The loss, a scalar, 0 without a positive; or ``[n]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, the reduction is unknown, or the temperature is not a finite number above 0.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> similarity = jnp.array([[0.5, 0.6], [0.3, 0.6]])
    >>> round(float(losses.smooth_ap(similarity, pairs)), 3)  # the first image's positive is second
    0.25
    """
    check_positive(temperature=temperature)
    similarity, weights = prepare(similarity, pairs, weights, reduction)
    ahead, negatives_ahead = _ahead(similarity / temperature, pairs.positive, pairs.negative)
    precision = jnp.where(pairs.positive, (1.0 + ahead) / (1.0 + ahead + negatives_ahead), 0.0)
    positives = jnp.sum(pairs.positive, axis=1).astype(similarity.dtype)
    values = 1.0 - ratio(jnp.sum(precision, axis=1), positives)
    return mean_of_rows(values, positives > 0, weights, reduction, axis_name)


def recall_at_k(
    similarity: Float[Array, "n m"],
    pairs: Pairs,
    *,
    ks: tuple[int, ...] = (1, 2, 4, 8, 16),
    temperature: float = 0.01,
    rank_temperature: float = 1.0,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """Recall@k surrogate, Patel et al., CVPR 2022, eqs. 4 to 6, with the settings of the published code.

        mean over anchors with a positive of
          1 - mean over k of  min(k, sum over p of sigmoid((k - R(p)) / T_k)) / min(k, N+)
        R(p) = 1 + sum over the other pairs j of  sigmoid((S_j - S_p) / T),  T_k = k rank_temperature

    An anchor is not ranked among its own answers. (The published code counts it, so that all ranks are one too many.)

    Args:
      similarity: ``[n, m]``, plain (cosine) or introspective.
      pairs: relation of anchors and references; anchors without a positive are left out.
      ks: numbers of answers, each at least 1.
      temperature: T of the sigmoid of similarities.
      rank_temperature: temperature of the sigmoid of ranks for k = 1; for others it is k times as large.
      weights: ``[n]`` at least 0, of the anchors, in the mean.
      reduction: ``'none'`` returns for each anchor its term times its weight, 0 without a positive.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the anchors are split over.

    Returns:
      The loss, a scalar, 0 without a positive; or ``[n]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, the reduction is unknown, ``ks`` is empty or holds anything but whole
        numbers of at least 1, or a temperature is not a finite number above 0.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> similarity = jnp.array([[0.5, 0.6], [0.3, 0.6]])
    >>> round(float(losses.recall_at_k(similarity, pairs, ks=(1, 2))), 3)  # ranks 2 and 1
    0.527
    """
    if not isinstance(ks, Iterable) or not (ks := tuple(ks)):
        raise ValueError(f"ks must be some whole numbers of at least 1; got {ks!r}")
    for k in ks:
        check_whole(ks=k)
    check_positive(temperature=temperature, rank_temperature=rank_temperature)
    similarity, weights = prepare(similarity, pairs, weights, reduction)
    ranks = 1.0 + sum(_ahead(similarity / temperature, pairs.positive, pairs.negative))
    positives = jnp.sum(pairs.positive, axis=1).astype(similarity.dtype)
    recall = jnp.zeros_like(positives)
    for k in ks:
        found = jax.nn.sigmoid((k - ranks) / (k * rank_temperature))
        found = jnp.sum(jnp.where(pairs.positive, found, 0.0), axis=1)
        recall += ratio(jnp.minimum(found, k), jnp.minimum(positives, k)) / len(ks)
    return mean_of_rows(1.0 - recall, positives > 0, weights, reduction, axis_name)


@jax.custom_vjp
def _ahead(
    logits: Float[Array, "n m"], positive: Bool[Array, "n m"], negative: Bool[Array, "n m"]
) -> tuple[Float[Array, "n m"], Float[Array, "n m"]]:
    """Soft number of positives, and of negatives, that are ahead of each positive of their row; 0 for the others.

    ``sum_j sigmoid(x_j - x_p)`` over the other entries. Its gradient is a loop over the positives too, which automatic
    differentiation cannot derive from a loop of unknown length.
    """
    n, m = logits.shape
    # Zeros made from the data keep its sharding and its axes under shard_map.
    zeros = jnp.where(positive, 0.0, 0.0).astype(logits.dtype)
    if not logits.size:
        return zeros, zeros

    def rank(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        column, of_positives, of_negatives = state
        share, others = _compared(logits, positive, column)

        def put(to: Array, where: Array) -> Array:
            return to.at[jnp.arange(n), column].set(jnp.sum(jnp.where(where, share, 0.0), axis=1), mode="drop")

        return _next(positive, column), put(of_positives, others), put(of_negatives, negative)

    return jax.lax.while_loop(partial(_unfinished, m), rank, (_first(positive), zeros, zeros))[1:]


def _ahead_forward(
    logits: Array, positive: Array, negative: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    return _ahead(logits, positive, negative), (logits, positive, negative)


def _ahead_backward(residuals: tuple[Array, Array, Array], cotangents: tuple[Array, Array]) -> tuple[Array, None, None]:
    logits, positive, negative = residuals
    n, m = logits.shape
    zeros = jnp.where(positive, 0.0, 0.0).astype(logits.dtype)
    if not logits.size:
        return zeros, None, None

    def pull(state: tuple[Array, Array]) -> tuple[Array, Array]:
        column, gradient = state
        share, others = _compared(logits, positive, column)
        to_positives, to_negatives = (_entry(x, column)[:, None] for x in cotangents)
        slope = share * (1.0 - share) * (jnp.where(others, to_positives, 0.0) + jnp.where(negative, to_negatives, 0.0))
        of_own = -jnp.sum(slope, axis=1)
        return _next(positive, column), (gradient + slope).at[jnp.arange(n), column].add(of_own, mode="drop")

    return jax.lax.while_loop(partial(_unfinished, m), pull, (_first(positive), zeros))[1], None, None


_ahead.defvjp(_ahead_forward, _ahead_backward)


def _unfinished(columns: int, state: tuple[Array, ...]) -> Bool[Array, ""]:
    return jnp.any(state[0] < columns)


def _first(positive: Array) -> Array:
    """The first positive of each row; the number of columns if there is none."""
    return _next(positive, jnp.sum(jnp.where(positive, 0, 0), axis=1).astype(jnp.int32) - 1)


def _next(positive: Array, column: Array) -> Array:
    """The next positive of each row after a column; the number of columns if there is none."""
    m = positive.shape[1]
    columns = jnp.arange(m, dtype=jnp.int32)[None, :]
    return jnp.min(jnp.where(positive & (columns > column[:, None]), columns, m), axis=1, initial=m)


def _entry(matrix: Array, column: Array) -> Array:
    """One entry of each row."""
    return jnp.take_along_axis(matrix, jnp.minimum(column, matrix.shape[1] - 1)[:, None], axis=1)[:, 0]


def _compared(logits: Array, positive: Array, column: Array) -> tuple[Array, Array]:
    """How far each entry is ahead of one positive of its row, in [0, 1], 0 for a finished row; the other positives."""
    m = logits.shape[1]
    own = jnp.arange(m, dtype=jnp.int32)[None, :] == column[:, None]
    share = jax.nn.sigmoid(logits - _entry(logits, column)[:, None])
    return jnp.where((column < m)[:, None], share, 0.0), positive & ~own
