"""Miners: which pairs and triplets a loss uses, as masks and weights with the shape of the matrix.

A miner takes a matrix and its ``Pairs`` and returns arrays of the same shape ``[n, m]``: whether, or how often, a loss
uses each entry. Shapes do not depend on the data, so a miner compiles once. Miners are not differentiated.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from idml_jax.losses.pairs import Pairs

__all__ = [
    "TripletCounts",
    "distance_weighted_probabilities",
    "distance_weights",
    "draw_negatives",
    "multi_similarity_pairs",
    "semihard_counts",
]

# Number of positives up to which one pass over the matrix per positive is faster than sorting the rows.
_MOST_PASSES = 128
# Draws per row and iteration.
_DRAWS = 8
# Number of columns in a block for drawing.
_BLOCK = 32


def multi_similarity_pairs(similarity: Float[Array, "n m"], pairs: Pairs, epsilon: float = 0.1) -> Pairs:
    """The informative pairs of the multi-similarity loss, Wang et al., CVPR 2019, eqs. 11 and 12.

    A negative stays if it is more similar to the anchor than the least similar positive, less ``epsilon``; a positive
    stays if it is less similar than the most similar negative, plus ``epsilon``. An anchor without positives keeps
    all its negatives, and one without negatives all its positives: there is nothing to compare them with, and the
    loss itself weights them. (Elsewhere such anchors are dropped, so that a batch without positives teaches nothing.)

    Args:
      similarity: ``[n, m]``.
      pairs: relation of rows and columns.
      epsilon: slack of both comparisons.

    Returns:
      ``Pairs``, a subset of the given ones.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> mined = multi_similarity_pairs(jnp.array([[0.5, 0.6], [0.3, 0.6]]), pairs)
    >>> mined.positive.tolist(), mined.negative.tolist()
    ([[True, False], [False, False]], [[False, True], [False, False]])
    """
    similarity = jax.lax.stop_gradient(similarity)
    positive, negative = pairs
    least_positive = jnp.min(jnp.where(positive, similarity, jnp.inf), axis=1, keepdims=True, initial=jnp.inf)
    most_negative = jnp.max(jnp.where(negative, similarity, -jnp.inf), axis=1, keepdims=True, initial=-jnp.inf)
    # Written so that NaN, which compares as false, stays.
    hard_positive = ~(similarity - epsilon >= most_negative) | (most_negative == -jnp.inf)
    hard_negative = ~(similarity + epsilon <= least_positive) | (least_positive == jnp.inf)
    return Pairs(positive & hard_positive, negative & hard_negative)


class TripletCounts(NamedTuple):
    """Number of triplets of its row's anchor that each entry is part of; both sum to the same number in every row.

    Attributes:
      positive: ``[n, m]`` int32, as the positive.
      negative: ``[n, m]`` int32, as the negative.
    """

    positive: Int[Array, "n m"]
    negative: Int[Array, "n m"]


def semihard_counts(distance: Float[Array, "n m"], pairs: Pairs, margin: float) -> TripletCounts:
    """All semi-hard triplets ``d_ap < d_an < d_ap + margin`` (Schroff et al., CVPR 2015), counted, not listed.

    With the counts, the sum of a linear function over all the triplets, and its gradient, are sums over the matrix:
    exact, in ``O(n m)`` memory and at most ``O(n m log m)`` time, where a list of triplets takes ``O(n m^2)``.

    Args:
      distance: ``[n, m]`` from anchors to references.
      pairs: relation of anchors and references.
      margin: largest distance by which a negative may be farther than the positive.

    Returns:
      The counts.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> semihard_counts(jnp.array([[0.5, 0.55], [0.9, 0.5]]), pairs, 0.1).negative.tolist()
    [[0, 1], [0, 0]]
    """
    distance = jax.lax.stop_gradient(distance)
    if distance.size == 0:
        return TripletCounts(jnp.zeros(distance.shape, jnp.int32), jnp.zeros(distance.shape, jnp.int32))
    few = jnp.max(jnp.sum(pairs.positive, axis=1)) <= _MOST_PASSES
    return jax.lax.cond(few, _count_in_passes, _count_by_sorting, distance, pairs, margin)


def _count_in_passes(distance: Array, pairs: Pairs, margin: Array | float) -> TripletCounts:
    """One pass over the matrix for the first positive of every row, one for the second, and so on."""
    n, m = distance.shape
    columns = jnp.arange(m, dtype=jnp.int32)[None, :]

    def next_positive(column: Array) -> Array:
        later = pairs.positive & (columns > column[:, None])
        return jnp.min(jnp.where(later, columns, m), axis=1)

    def count(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        column, positive, negative = state
        nearest = jnp.take_along_axis(distance, jnp.minimum(column, m - 1)[:, None], axis=1)
        semihard = (distance > nearest) & (distance < nearest + margin) & pairs.negative & (column < m)[:, None]
        found = jnp.sum(semihard, axis=1, dtype=jnp.int32)
        # A row without further positives writes to column m, which is dropped.
        positive = positive.at[jnp.arange(n), column].set(found, mode="drop")
        return next_positive(column), positive, negative + semihard

    # Zeros made from the data keep its sharding and its axes under shard_map.
    zeros = jnp.where(pairs.positive, 0, 0).astype(jnp.int32)
    first = next_positive(zeros[:, 0] - 1)
    _, positive, negative = jax.lax.while_loop(lambda state: jnp.any(state[0] < m), count, (first, zeros, zeros))
    return TripletCounts(positive, negative)


def _count_by_sorting(distance: Array, pairs: Pairs, margin: Array | float) -> TripletCounts:
    """Ranks among the sorted negatives and among the sorted positives."""

    def ranks(entries: Array, queries: Array, side: str) -> Array:
        return jax.vmap(lambda a, v: jnp.searchsorted(a, v, side=side))(entries, queries).astype(jnp.int32)

    negatives = jnp.sort(jnp.where(pairs.negative, distance, jnp.inf), axis=1)
    nearer = ranks(negatives, distance, "right")
    within = ranks(negatives, distance + margin, "left")
    positive = jnp.where(pairs.positive, jnp.maximum(within - nearer, 0), 0)
    # The same two comparisons from the negative's side, on the same rounded sums.
    positives = jnp.sort(jnp.where(pairs.positive, distance, jnp.inf), axis=1)
    closer = ranks(positives, distance, "left")
    out_of_reach = ranks(positives + margin, distance, "right")
    negative = jnp.where(pairs.negative, jnp.maximum(closer - out_of_reach, 0), 0)
    return TripletCounts(positive, negative)


def distance_weights(
    distance: Float[Array, "n m"],
    pairs: Pairs,
    *,
    dimension: int = 512,
    cutoff: float = 0.5,
    nonzero_cutoff: float = 1.4,
) -> Float[Array, "n m"]:
    """Weight of each negative in the draw, Wu et al., ICCV 2017, section 4.

    Inverse to the density ``q(d) ~ d^(dimension - 2) (1 - d^2 / 4)^((dimension - 3) / 2)`` of distances between points
    spread evenly over the unit sphere, so that all distances are equally likely. Weights are scaled row by row in the
    log domain: unscaled they span hundreds of orders of magnitude, and rows whose weights all underflow relative to the
    largest of the batch would lose their negatives.

    Args:
      distance: ``[n, m]``, of normalised vectors.
      pairs: relation of rows and columns.
      dimension: ``d`` of the vectors.
      cutoff: nearer negatives are drawn as if they were this far.
      nonzero_cutoff: negatives at or beyond this distance are not drawn.

    Returns:
      ``[n, m]``; the likeliest negative of each row has weight 1; a row without a negative within
      ``nonzero_cutoff`` is 0.

    Raises:
      ValueError: unless ``0 < cutoff < nonzero_cutoff <= 2`` (traced ones are not checked).
    """
    traced = any(isinstance(value, jax.core.Tracer) for value in (cutoff, nonzero_cutoff))
    if not traced and not 0 < cutoff < nonzero_cutoff <= 2:
        raise ValueError(f"need 0 < cutoff < nonzero_cutoff <= 2; got {cutoff} and {nonzero_cutoff}")
    distance = jax.lax.stop_gradient(distance)
    eligible = pairs.negative & (distance < nonzero_cutoff)
    # Entries that are not drawn get a harmless distance: at 2 the logarithm below is infinite.
    d = jnp.where(eligible, jnp.maximum(distance, cutoff), cutoff)
    logits = (2.0 - dimension) * jnp.log(d) - 0.5 * (dimension - 3.0) * jnp.log1p(-0.25 * d * d)
    logits = jnp.where(eligible, logits, -jnp.inf)
    largest = jnp.max(logits, axis=1, keepdims=True, initial=-jnp.inf)
    return jnp.where(eligible, jnp.exp(logits - jnp.where(jnp.isfinite(largest), largest, 0.0)), 0.0)


def distance_weighted_probabilities(
    distance: Float[Array, "n m"],
    pairs: Pairs,
    *,
    dimension: int = 512,
    cutoff: float = 0.5,
    nonzero_cutoff: float = 1.4,
) -> Float[Array, "n m"]:
    """``distance_weights`` with rows that sum to 1, or to 0 without a negative within ``nonzero_cutoff``."""
    weights = distance_weights(distance, pairs, dimension=dimension, cutoff=cutoff, nonzero_cutoff=nonzero_cutoff)
    return weights / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1.0)


def draw_negatives(
    key: PRNGKeyArray,
    weights: Float[Array, "n m"],
    draws: Int[Array, "n"],
    first_row: Int[Array, ""] | int = 0,
) -> Float[Array, "n m"]:
    """Draws negatives with replacement and counts how often each is drawn.

    The draws of a row depend only on the key and the row's index, so they are the same on one device and, given
    ``first_row``, on several.

    Args:
      key: a random key.
      weights: ``[n, m]`` at least 0; an entry is drawn with its share of the row's sum.
      draws: ``[n]``, number of draws per row; nothing is drawn from a row of zeros.
      first_row: index of the first row among the rows of all devices.

    Returns:
      ``[n, m]`` counts, in the type of the weights; a row sums to its ``draws`` or to 0.
    """
    weights = jax.lax.stop_gradient(weights)
    n, m = weights.shape
    if n == 0 or m == 0:
        return weights
    # First a block of columns is drawn, then a column in it, to avoid a cumulative sum over the whole matrix.
    blocks = jnp.pad(weights, ((0, 0), (0, -m % _BLOCK))).reshape(n, -1, _BLOCK)
    of_block = jnp.sum(blocks, axis=2)
    until = jnp.cumsum(of_block, axis=1)
    total = until[:, -1:]
    heaviest = jnp.argmax(of_block, axis=1)[:, None]
    draws = jnp.where(total[:, 0] > 0, draws, 0)
    rows = jnp.arange(n)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(first_row + rows)

    def at(x: Array, index: Array) -> Array:
        return jnp.take_along_axis(x, index, axis=1)

    def draw(state: tuple[Array, Array]) -> tuple[Array, Array]:
        done, counts = state
        uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, done), (_DRAWS,), total.dtype))(keys)
        point = uniform * total
        block = jnp.minimum(jnp.sum(until[:, None, :] <= point[:, :, None], axis=2), until.shape[1] - 1)
        # Rounding can select a weight of 0; such a draw goes to the heaviest column of the heaviest block.
        block = jnp.where(at(of_block, block) > 0, block, heaviest)
        rest = point - jnp.where(block > 0, at(until, jnp.maximum(block - 1, 0)), 0.0)
        inside = at(blocks, block[:, :, None])
        place = jnp.sum(jnp.cumsum(inside, axis=2) <= rest[:, :, None], axis=2)
        place = jnp.minimum(place, _BLOCK - 1)
        possible = jnp.take_along_axis(inside, place[:, :, None], axis=2)[:, :, 0] > 0
        place = jnp.where(possible, place, jnp.argmax(inside, axis=2))
        wanted = done + jnp.arange(_DRAWS)[None, :] < draws[:, None]
        return done + _DRAWS, counts.at[rows[:, None], block * _BLOCK + place].add(wanted.astype(counts.dtype))

    most = jnp.max(draws)
    state = (most * 0, jnp.zeros_like(weights))
    return jax.lax.while_loop(lambda s: s[0] < most, draw, state)[1]
