"""Losses that compare images with images; import them from ``idml_jax.losses``."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from idml_jax.losses import miners
from idml_jax.losses.pairs import AxisName, Pairs, row_offset
from idml_jax.losses.reductions import (
    Reduction,
    check_positive,
    check_whole,
    log_one_plus_sum_exp,
    prepare,
    ratio,
    sums_and_counts,
    total,
)

__all__ = ["contrastive", "fast_ap", "margin_distance_weighted", "multi_similarity", "triplet_semihard"]


def contrastive(
    distance: Float[Array, "n m"],
    pairs: Pairs,
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 0.5,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, ""] | Float[Array, "n m"]:
    """Contrastive loss, Hadsell et al., CVPR 2006, with unsquared hinges (Musgrave et al., ECCV 2020).

        mean over non-zero positive terms  max(0, d - positive_margin)
      + mean over non-zero negative terms  max(0, negative_margin - d)

    Args:
      distance: ``[n, m]``, plain or introspective.
      pairs: relation of anchors and references.
      positive_margin: positives nearer than this have no loss.
      negative_margin: negatives farther than this have no loss.
      weights: ``[n]`` at least 0, of the anchors, in both means (numerator and denominator).
      reduction: ``'none'`` returns each pair's term times its anchor's weight.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the anchors are split over.

    Returns:
      The loss, a scalar, 0 if all terms are 0; or ``[n, m]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit or the reduction is unknown.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> distance = jnp.array([[0.2, 0.4], [0.9, 0.3]])
    >>> round(float(losses.contrastive(distance, pairs)), 3)  # (0.2 + 0.3) / 2 + (0.5 - 0.4) / 1
    0.35
    """
    distance, weights = prepare(distance, pairs, weights, reduction)
    positive = jnp.where(pairs.positive, jax.nn.relu(distance - positive_margin), 0.0)
    negative = jnp.where(pairs.negative, jax.nn.relu(negative_margin - distance), 0.0)
    if reduction == "none":
        return weights[:, None] * (positive + negative)

    def mean_of_nonzero(terms: Array) -> Array:
        sums, nonzero = sums_and_counts(terms)
        return ratio(total(weights * sums, axis_name), total(weights * nonzero, axis_name))

    return mean_of_nonzero(positive) + mean_of_nonzero(negative)


def triplet_semihard(
    distance: Float[Array, "n m"],
    pairs: Pairs,
    *,
    margin: float = 0.1,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """Triplet loss over all semi-hard triplets, Schroff et al., CVPR 2015, eqs. 3 and 4.

        mean over triplets with d_ap < d_an < d_ap + margin of  d_ap - d_an + margin

    The sum over the triplets is linear in the distances, so it needs only how many triplets each distance takes part
    in: exact, with the exact gradient, in ``O(n m)`` memory (see ``miners.semihard_counts``).

    Args:
      distance: ``[n, m]``, plain or introspective.
      pairs: relation of anchors and references.
      margin: required difference between the distances of negative and positive.
      weights: ``[n]`` at least 0, of the anchors, in the mean (numerator and denominator).
      reduction: ``'none'`` returns for each anchor the mean over its own triplets times its weight, 0 without any.
        The mean loss weights all triplets equally, not all anchors, so it is not the mean of these.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the anchors are split over.

    Returns:
      The loss, a scalar, 0 without a semi-hard triplet; or ``[n]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit or the reduction is unknown.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> distance = jnp.array([[0.5, 0.55], [0.9, 0.5]])
    >>> round(float(losses.triplet_semihard(distance, pairs)), 3)  # 0.5 - 0.55 + 0.1, the only one that is semi-hard
    0.05
    """
    distance, weights = prepare(distance, pairs, weights, reduction)
    counts = miners.semihard_counts(distance, pairs, margin)
    as_positive, as_negative = counts.positive.astype(distance.dtype), counts.negative.astype(distance.dtype)
    # Both counts of a row have the same sum, so subtracting an offset is exact and reduces cancellation.
    origin = jnp.min(jnp.where(pairs.positive, distance, jnp.inf), axis=1, keepdims=True, initial=jnp.inf)
    origin = jax.lax.stop_gradient(jnp.where(jnp.isfinite(origin), origin, 0.0))
    centred = distance - origin
    sums = jnp.sum(as_positive * (centred + margin) - as_negative * centred, axis=1)
    triplets = jnp.sum(as_positive, axis=1)
    if reduction == "none":
        return weights * ratio(sums, triplets)
    return ratio(total(weights * sums, axis_name), total(weights * triplets, axis_name))


def margin_distance_weighted(
    distance: Float[Array, "n m"],
    pairs: Pairs,
    key: PRNGKeyArray | None = None,
    *,
    margin: float = 0.2,
    beta: float | Float[Array, ""] | Float[Array, "n"] = 1.2,
    dimension: int = 512,
    cutoff: float = 0.5,
    nonzero_cutoff: float = 1.4,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, ""] | Float[Array, "n m"]:
    """Margin loss with distance-weighted sampling, Wu et al., ICCV 2017, eqs. 4 to 6.

        ( sum_pos max(0, d - beta + margin) + sum_drawn max(0, beta - d + margin) ) / number of non-zero terms

    As in the paper, every positive pair takes part once, and for each of them its anchor draws one negative, with
    replacement, inversely to the density of distances on the sphere (``miners.distance_weights``).
    An anchor without a negative within ``nonzero_cutoff`` keeps its positives. (pytorch-metric-learning draws the
    positives at random as well, one more than there are, and drops such anchors.)

    Args:
      distance: ``[n, m]`` distances of normalised vectors, plain or introspective.
      pairs: relation of anchors and references.
      key: random key of the draw; ``None`` uses the expected number of draws instead: numerator and denominator are the
        same on average, without noise.
      margin: the paper's alpha.
      beta: the boundary between positives and negatives: a number, a learned scalar, or ``[n]``, that of each
        anchor's class (``beta_of_classes[labels]``). It is differentiated; a penalty such as the paper's
        ``nu * beta`` is the caller's to add.
      dimension: number of dimensions of the vectors, which the density depends on.
      cutoff: nearer negatives are drawn as if they were this far.
      nonzero_cutoff: negatives at or beyond this distance are not drawn.
      weights: ``[n]`` at least 0, of the anchors, in the mean (numerator and denominator).
      reduction: ``'none'`` returns each pair's term times how often it takes part times its anchor's weight.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the anchors are split over. The key has to be
        the same on every device; the draws are then those of one device.

    Returns:
      The loss, a scalar, 0 if all terms are 0; or ``[n, m]`` unreduced.

    Raises:
      ValueError: if the shapes or the cutoffs do not fit or the reduction is unknown.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> distance = jnp.array([[1.1, 1.3], [0.9, 0.8]])
    >>> round(float(losses.margin_distance_weighted(distance, pairs)), 3)  # (0.1 + 0.1 + 0.5) / 3
    0.233
    """
    distance, weights = prepare(distance, pairs, weights, reduction)
    beta = jnp.asarray(beta, distance.dtype)
    if beta.shape not in ((), (distance.shape[0],)):
        raise ValueError(f"beta needs the shape [] or {(distance.shape[0],)}; got {beta.shape}")
    beta = jnp.broadcast_to(beta, distance.shape[:1])[:, None]
    positives = jnp.sum(pairs.positive, axis=1)
    if key is None:
        drawn = positives[:, None] * miners.distance_weighted_probabilities(
            distance, pairs, dimension=dimension, cutoff=cutoff, nonzero_cutoff=nonzero_cutoff
        )
    else:
        sampling = miners.distance_weights(
            distance, pairs, dimension=dimension, cutoff=cutoff, nonzero_cutoff=nonzero_cutoff
        )
        drawn = miners.draw_negatives(key, sampling, positives, row_offset(distance.shape[0], axis_name))
    # An active hinge is linear in the distance, so one matrix of slopes gives the loss and its gradient.
    offset = distance - beta
    slopes = jax.lax.stop_gradient(
        jnp.where(
            pairs.positive,
            jnp.where(offset + margin > 0, 1.0, 0.0),
            jnp.where(pairs.negative & (margin - offset > 0), -drawn, 0.0),
        )
    )
    often = jnp.abs(slopes)
    weights = weights[:, None]
    terms = weights * (slopes * offset + often * margin)
    if reduction == "none":
        return terms
    return ratio(total(terms, axis_name), total(weights * often, axis_name))


def multi_similarity(
    similarity: Float[Array, "n m"],
    pairs: Pairs,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float | None = 0.1,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """Multi-similarity loss with its mining, Wang et al., CVPR 2019, eqs. 11 to 13.

        mean over anchors of   log(1 + sum_pos exp(-alpha (S - base))) / alpha
                             + log(1 + sum_neg exp(  beta (S - base))) / beta

    The mean is over all the anchors that have any entry in the relation, mined or not; padding rows do not count.
    An anchor without positives learns from all its negatives and one without negatives from all its positives (see
    ``miners.multi_similarity_pairs``); the paper's code and pytorch-metric-learning give such anchors no loss.

    Args:
      similarity: ``[n, m]``, plain (cosine) or introspective.
      pairs: relation of anchors and references.
      alpha: scale of the positives.
      beta: scale of the negatives.
      base: the paper's lambda, the similarity threshold of both terms.
      epsilon: slack of the mining; ``None`` uses all pairs.
      weights: ``[n]`` at least 0, of the anchors, in the mean.
      reduction: ``'none'`` returns for each anchor its two terms times its weight.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the anchors are split over.

    Returns:
      The loss, a scalar, 0 for an empty relation; or ``[n]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, the reduction is unknown, or alpha or beta is not a finite number above 0.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> similarity = jnp.array([[0.5, 0.6], [0.3, 0.6]])
    >>> round(float(losses.multi_similarity(similarity, pairs)), 3)  # the second image has no informative pair
    0.223
    """
    check_positive(alpha=alpha, beta=beta)
    similarity, weights = prepare(similarity, pairs, weights, reduction)
    mined = pairs if epsilon is None else miners.multi_similarity_pairs(similarity, pairs, epsilon)
    positive = log_one_plus_sum_exp(-alpha * (similarity - base), mined.positive, axis=1) / alpha
    negative = log_one_plus_sum_exp(beta * (similarity - base), mined.negative, axis=1) / beta
    values = weights * (positive + negative)
    if reduction == "none":
        return values
    counted = jnp.any(pairs.positive | pairs.negative, axis=1)
    return ratio(total(values, axis_name), total(jnp.where(counted, weights, 0.0), axis_name))


def fast_ap(
    distance: Float[Array, "n m"],
    pairs: Pairs,
    *,
    bins: int = 10,
    largest_square: float = 4.0,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """FastAP, Cakir et al., CVPR 2019, eqs. 8 to 10: average precision by soft histograms of squared distances.

        mean over anchors with a positive of  1 - (1 / N+) sum_b h+_b H+_b / H_b

    ``h+`` counts positives and ``H`` both kinds up to bin ``b``, at ``bins + 1`` points spread evenly over
    ``[0, largest_square]``; a distance between two points is shared between them linearly (triangular pulse).

    Args:
      distance: ``[n, m]`` distances of normalised vectors, not squared; plain or introspective. Distances beyond
        the last point are counted there, without a gradient.
      pairs: relation of anchors and references; anchors without a positive are left out.
      bins: number of intervals.
      largest_square: the last point, 4 for vectors of length 1.
      weights: ``[n]`` at least 0, of the anchors, in the mean.
      reduction: ``'none'`` returns for each anchor its term times its weight, 0 without a positive.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the anchors are split over.

    Returns:
      The loss, a scalar, 0 without a positive; or ``[n]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, the reduction is unknown, ``bins`` is not a whole number of at least 1, or
        ``largest_square`` is not a finite number above 0.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> distance = jnp.array([[1.0, 0.4], [0.9, 0.3]])
    >>> round(float(losses.fast_ap(distance, pairs)), 3)
    0.292
    """
    check_whole(bins=bins)
    check_positive(largest_square=largest_square)
    distance, weights = prepare(distance, pairs, weights, reduction)
    positions = jnp.minimum(distance * distance * (bins / largest_square), bins)
    positive = _soft_histogram(positions, pairs.positive, bins)
    negative = _soft_histogram(positions, pairs.negative, bins)
    positive_so_far = jnp.cumsum(positive, axis=1)
    all_so_far = positive_so_far + jnp.cumsum(negative, axis=1)
    positives = jnp.sum(pairs.positive, axis=1).astype(distance.dtype)
    precision = ratio(jnp.sum(ratio(positive * positive_so_far, all_so_far), axis=1), positives)
    counted = positives > 0
    values = jnp.where(counted, weights * (1.0 - precision), 0.0)
    if reduction == "none":
        return values
    return ratio(total(values, axis_name), total(jnp.where(counted, weights, 0.0), axis_name))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _soft_histogram(positions: Float[Array, "n m"], where: Bool[Array, "n m"], bins: int) -> Float[Array, "n bins+1"]:
    """Histogram of each row's chosen entries, each shared linearly between the two nearest whole numbers.

    Written as a loop over the points with a custom gradient: differentiating the sum over ``[bins + 1, n, m]`` would
    keep that whole array, although the slope depends only on the interval of an entry.
    """

    def share(point: Array) -> Array:
        return jnp.sum(jnp.where(where, jax.nn.relu(1.0 - jnp.abs(positions - point)), 0.0), axis=1)

    return jax.lax.map(share, jnp.arange(bins + 1, dtype=positions.dtype)).T


def _soft_histogram_forward(positions: Array, where: Array, bins: int) -> tuple[Array, tuple[Array, Array]]:
    return _soft_histogram(positions, where, bins), (positions, where)


def _soft_histogram_backward(bins: int, residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, None]:
    positions, where = residuals
    slopes = cotangent[:, 1:] - cotangent[:, :-1]
    interval = jnp.floor(positions)
    gradient = jnp.zeros_like(positions)
    for k in range(bins):
        gradient = jnp.where(where & (interval == k), slopes[:, k : k + 1], gradient)
    return gradient, None


_soft_histogram.defvjp(_soft_histogram_forward, _soft_histogram_backward)
