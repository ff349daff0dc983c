"""Losses of images with images that are a softmax over the row of an anchor; import from ``idml_jax.losses``."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from idml_jax.losses.pairs import AxisName, Pairs
from idml_jax.losses.reductions import (
    Reduction,
    check_positive,
    log_sum_exp,
    mean_of_rows,
    prepare,
    ratio,
    softmax_of_positives,
    total,
)

__all__ = ["circle", "info_nce", "n_pair", "sup_con"]


def info_nce(
    similarity: Float[Array, "n m"],
    pairs: Pairs,
    *,
    temperature: float = 0.07,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, ""] | Float[Array, "n m"]:
    """InfoNCE, van den Oord et al., 2018, eq. 4, with any number of positives; NT-Xent of Chen et al., ICML 2020.

        mean over positive pairs of  -log( exp(S_p / T) / (exp(S_p / T) + sum_neg exp(S_n / T)) )

    Each positive competes with the anchor's negatives alone, not with its other positives (compare ``sup_con``).

    Args:
      similarity: ``[n, m]``, plain (cosine) or introspective.
      pairs: relation of anchors and references.
      temperature: T.
      weights: ``[n]`` at least 0, of the anchors, in the mean over pairs.
      reduction: ``'none'`` returns each pair's term times its anchor's weight, 0 for negatives.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the anchors are split over.

    Returns:
      The loss, a scalar, 0 without a positive; or ``[n, m]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, the reduction is unknown, or the temperature is not a finite number above 0.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> similarity = jnp.array([[0.5, 0.6], [0.3, 0.6]])
    >>> round(float(losses.info_nce(similarity, pairs, temperature=0.5)), 3)
    0.618
    """
    check_positive(temperature=temperature)
    similarity, weights = prepare(similarity, pairs, weights, reduction)
    logits = similarity / temperature
    # Without a negative the softmax has one term, and its logarithm is 0.
    against = pairs.positive & jnp.any(pairs.negative, axis=1)[:, None]
    margin = jnp.where(against, log_sum_exp(logits, pairs.negative)[:, None] - logits, 0.0)
    terms = weights[:, None] * jnp.where(against, jax.nn.softplus(margin), 0.0)
    if reduction == "none":
        return terms
    return ratio(total(terms, axis_name), total(weights * jnp.sum(pairs.positive, axis=1), axis_name))


def sup_con(
    similarity: Float[Array, "n m"],
    pairs: Pairs,
    *,
    temperature: float = 0.1,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """Supervised contrastive loss, Khosla et al., NeurIPS 2020, eq. 2 (L_out).

        mean over anchors with a positive of
          mean over their positives of  -log( exp(S_p / T) / sum_(pos and neg) exp(S / T) )

    Args:
      similarity: ``[n, m]``, plain (cosine) or introspective.
      pairs: relation of anchors and references.
      temperature: T.
      weights: ``[n]`` at least 0, of the anchors, in the mean.
      reduction: ``'none'`` returns for each anchor its term times its weight, 0 without a positive.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the anchors are split over.

    Returns:
      The loss, a scalar, 0 without a positive; or ``[n]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, the reduction is unknown, or the temperature is not a finite number above 0.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> similarity = jnp.array([[0.5, 0.6], [0.3, 0.6]])
    >>> round(float(losses.sup_con(similarity, pairs, temperature=0.5)), 3)
    0.618
    """
    check_positive(temperature=temperature)
    similarity, weights = prepare(similarity, pairs, weights, reduction)
    return softmax_of_positives(similarity / temperature, pairs, weights, reduction, axis_name)


def circle(
    similarity: Float[Array, "n m"],
    pairs: Pairs,
    *,
    margin: float = 0.4,
    gamma: float = 80.0,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """Circle loss, Sun et al., CVPR 2020, eqs. 5 and 6, with the margins of eq. 8.

        mean over anchors with both kinds of
          log(1 + sum_neg exp(gamma a_n (S_n - m)) sum_pos exp(-gamma a_p (S_p - 1 + m)))
        a_p = max(0, 1 + m - S_p),  a_n = max(0, S_n + m),  not differentiated

    Args:
      similarity: ``[n, m]``, plain (cosine) or introspective.
      pairs: relation of anchors and references; an anchor without a positive, or without a negative, has no loss.
      margin: m.
      gamma: scale.
      weights: ``[n]`` at least 0, of the anchors, in the mean.
      reduction: ``'none'`` returns for each anchor its term times its weight.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the anchors are split over.

    Returns:
      The loss, a scalar, 0 if no anchor counts; or ``[n]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, the reduction is unknown, or gamma is not a finite number above 0.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> similarity = jnp.array([[0.5, 0.6], [0.3, 0.6]])
    >>> round(float(losses.circle(similarity, pairs, gamma=2.0)), 3)
    0.825
    """
    check_positive(gamma=gamma)
    similarity, weights = prepare(similarity, pairs, weights, reduction)
    fixed = jax.lax.stop_gradient(similarity)
    pull = -gamma * jax.nn.relu(1.0 + margin - fixed) * (similarity - (1.0 - margin))
    push = gamma * jax.nn.relu(fixed + margin) * (similarity - margin)
    counted = jnp.any(pairs.positive, axis=1) & jnp.any(pairs.negative, axis=1)
    both = log_sum_exp(pull, pairs.positive) + log_sum_exp(push, pairs.negative)
    values = jax.nn.softplus(jnp.where(counted, both, 0.0))
    return mean_of_rows(values, counted, weights, reduction, axis_name)


def n_pair(
    similarity: Float[Array, "n m"],
    pairs: Pairs,
    *,
    scale: float = 1.0,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """N-pair loss (multi-class), Sohn, NIPS 2016, eq. 7: softmax of an anchor's one positive and one of other classes.

        mean over anchors with a positive of  log(1 + sum_n exp(s (S_n - S_p)))

    The positive is the anchor's first one in the order of the columns; its negatives are the positives of the other
    anchors. With two images per class that is the paper's loss in both directions; with more images, an image that is
    nobody's first positive is only an anchor. (pytorch-metric-learning takes one anchor per class: weights that
    are 0 for the other images give its value.) Between normalised vectors the inner product is the similarity, and a
    ``scale`` of 1 is a very soft softmax.

    Args:
      similarity: ``[n, m]`` inner products (cosines of normalised vectors), or introspective similarities.
      pairs: relation of anchors and references.
      scale: s, inverse temperature; 1 in the paper.
      weights: ``[n]`` at least 0, of the anchors, in the mean; the positive of an anchor of weight 0 is no negative.
      reduction: ``'none'`` returns for each anchor its term times its weight, 0 without a positive.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the anchors are split over.

    Returns:
      The loss, a scalar, 0 without a positive; or ``[n]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, the reduction is unknown, or the scale is not a finite number above 0.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> similarity = jnp.array([[0.5, 0.6], [0.3, 0.6]])
    >>> round(float(losses.n_pair(similarity, pairs)), 3)
    0.649
    """
    check_positive(scale=scale)
    similarity, weights = prepare(similarity, pairs, weights, reduction)
    column = jnp.arange(similarity.shape[1])[None, :]
    first = pairs.positive & (
        column == jnp.min(jnp.where(pairs.positive, column, column.size), axis=1, initial=column.size)[:, None]
    )
    chosen = total((first & (weights > 0)[:, None]).astype(jnp.int32), axis_name, axis=0) > 0
    one = Pairs(first, pairs.negative & chosen[None, :])
    return softmax_of_positives(scale * similarity, one, weights, reduction, axis_name)
