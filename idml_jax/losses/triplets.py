"""Triplet losses without a list of triplets: the hardest, and all at once; import from ``idml_jax.losses``."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from idml_jax.losses.pairs import AxisName, Pairs
from idml_jax.losses.reductions import Reduction, log_sum_exp, max_over_last, mean_of_rows, prepare

__all__ = ["lifted_structure", "triplet_hard"]


def triplet_hard(
    distance: Float[Array, "n m"],
    pairs: Pairs,
    *,
    margin: float = 0.1,
    soft: bool = False,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """Batch-hard triplet loss, Hermans et al., 2017 (arXiv 1703.07737), eq. 5.

        mean over anchors with both kinds of  max(0, max_pos d - min_neg d + margin)
        soft:                                 log(1 + exp(max_pos d - min_neg d + margin))

    The mean is over all those anchors, also where the hinge is 0, as in the paper. (pytorch-metric-learning's default
    averages over the non-zero terms.) The paper's soft margin is ``soft=True, margin=0``.

    Args:
      distance: ``[n, m]``, plain or introspective.
      pairs: relation of anchors and references; an anchor without a positive, or without a negative, has no loss.
      margin: required difference between the distances of the nearest negative and the farthest positive.
      soft: soft-plus instead of the hinge: satisfied triplets keep pulling.
      weights: ``[n]`` at least 0, of the anchors, in the mean.
      reduction: ``'none'`` returns for each anchor its term times its weight.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the anchors are split over.

    Returns:
      The loss, a scalar, 0 if no anchor counts; or ``[n]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit or the reduction is unknown.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> distance = jnp.array([[0.5, 0.55], [0.9, 0.5]])
    >>> round(float(losses.triplet_hard(distance, pairs)), 3)  # (0.5 - 0.55 + 0.1 and 0) / 2
    0.025
    """
    distance, weights = prepare(distance, pairs, weights, reduction)
    farthest = max_over_last(jnp.where(pairs.positive, distance, -jnp.inf))
    nearest = -max_over_last(jnp.where(pairs.negative, -distance, -jnp.inf))
    counted = jnp.any(pairs.positive, axis=1) & jnp.any(pairs.negative, axis=1)
    violation = jnp.where(counted, farthest, 0.0) - jnp.where(counted, nearest, 0.0) + margin
    values = jax.nn.softplus(violation) if soft else jax.nn.relu(violation)
    return mean_of_rows(values, counted, weights, reduction, axis_name)


def lifted_structure(
    distance: Float[Array, "n m"],
    pairs: Pairs,
    *,
    positive_margin: float = 0.0,
    negative_margin: float = 1.0,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """Generalised lifted structure loss, Hermans et al., 2017 (arXiv 1703.07737), eq. 7, after Song et al., CVPR 2016.

        mean over anchors with both kinds of
          max(0, log sum_pos exp(d - positive_margin) + log sum_neg exp(negative_margin - d))

    A sum over no pair is 0 and its logarithm minus infinity, so an anchor without a positive, or without a negative,
    has no loss. (pytorch-metric-learning takes such a logarithm as 0, and pushes the negatives of an image that is
    alone in its class against nothing.)

    Args:
      distance: ``[n, m]``, plain or introspective.
      pairs: relation of anchors and references.
      positive_margin: subtracted from the distances of positives.
      negative_margin: the distances of negatives are subtracted from it.
      weights: ``[n]`` at least 0, of the anchors, in the mean.
      reduction: ``'none'`` returns for each anchor its term times its weight.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the anchors are split over.

    Returns:
      The loss, a scalar, 0 if no anchor counts; or ``[n]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit or the reduction is unknown.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> distance = jnp.array([[0.2, 0.4], [0.9, 0.3]])
    >>> round(float(losses.lifted_structure(distance, pairs)), 3)  # (0.2 + 1 - 0.4 and 0.3 + 1 - 0.9) / 2
    0.6
    """
    distance, weights = prepare(distance, pairs, weights, reduction)
    counted = jnp.any(pairs.positive, axis=1) & jnp.any(pairs.negative, axis=1)
    both = log_sum_exp(distance - positive_margin, pairs.positive)
    both += log_sum_exp(negative_margin - distance, pairs.negative)
    return mean_of_rows(jax.nn.relu(jnp.where(counted, both, 0.0)), counted, weights, reduction, axis_name)
