"""Losses that compare images with learned proxies of classes; import them from ``idml_jax.losses``."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from idml_jax.losses.pairs import AxisName, Pairs
from idml_jax.losses.reductions import (
    Reduction,
    check_positive,
    check_whole,
    log_one_plus_sum_exp,
    log_stands_for,
    prepare,
    ratio,
    total,
)

__all__ = ["proxy_anchor", "proxy_nca"]


def proxy_anchor(
    similarity: Float[Array, "n m"],
    pairs: Pairs,
    *,
    margin: float = 0.1,
    alpha: float = 32.0,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    num_proxies: int | None = None,
) -> Float[Array, ""] | Float[Array, "m"]:
    """ProxyAnchor loss, Kim et al., CVPR 2020, eq. 4.

        mean over proxies with a positive of  log(1 + sum_pos exp(-alpha (S - margin)))
      + mean over all proxies of              log(1 + sum_neg exp( alpha (S + margin)))

    Each column is a proxy that acts as an anchor for the whole batch. Written as log-sum-exp, so it is safe in
    float32 at any ``alpha``. Works for any number of proxies (the published code's label binarisation breaks for two).

    Args:
      similarity: ``[n, m]`` similarity of ``n`` images and ``m`` proxies, plain (cosine) or introspective.
      pairs: relation of images and proxies; a proxy without any entry counts in the second mean with the value 0.
      margin: the paper's delta.
      alpha: the paper's scale.
      weights: ``[n]`` at least 0, of the images, within the two sums: an image with
        weight 2 counts twice, with weight 0 not at all.
      reduction: ``'none'`` returns for each proxy the sum of its two logarithms.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the images are split over; the proxies are the
        same on every device.
      num_proxies: number of columns that are proxies, if the others are padding that the relation ignores; by default
        all.

    Returns:
      The loss, a scalar, 0 for an empty relation; or ``[m]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, the reduction is unknown, ``num_proxies`` is not from 1 to the number of
        columns, or alpha is not a finite number above 0.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> similarity = jnp.array([[0.8, 0.1], [0.3, 0.6]])
    >>> round(float(losses.proxy_anchor(similarity, pairs, alpha=2.0)), 3)
    1.309
    """
    check_positive(alpha=alpha)
    similarity, weights = prepare(similarity, pairs, weights, reduction)
    columns = similarity.shape[1]
    num_proxies = columns if num_proxies is None else num_proxies
    check_whole(min(columns, 1), num_proxies=num_proxies)
    if num_proxies > columns:
        raise ValueError(f"num_proxies must be at most the number of columns, {columns}; got {num_proxies}")
    chosen = weights[:, None] > 0
    is_positive, is_negative = pairs.positive & chosen, pairs.negative & chosen
    positive = log_one_plus_sum_exp(-alpha * (similarity - margin), is_positive, 0, weights, axis_name)
    negative = log_one_plus_sum_exp(alpha * (similarity + margin), is_negative, 0, weights, axis_name)
    if reduction == "none":
        return positive + negative
    with_positive = jnp.sum(total(is_positive.astype(similarity.dtype), axis_name, axis=0) > 0)
    return jnp.sum(positive) / jnp.maximum(with_positive, 1) + jnp.sum(negative) / max(num_proxies, 1)


def proxy_nca(
    distance: Float[Array, "n m"],
    pairs: Pairs,
    *,
    scale: float = 32.0,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    stands_for: Float[Array, "m"] | None = None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """ProxyNCA loss, Movshovitz-Attias et al., ICCV 2017, eq. 4, with a temperature (Teh et al., ECCV 2020).

        mean over images with a positive of  -log( sum_pos exp(-scale d^2) / sum_(pos and neg) exp(-scale d^2) )

    The denominator contains the image's own proxy, as in the later paper and in pytorch-metric-learning, so that the
    value is at least 0; the first paper leaves it out. Computed in the log domain: an image far from its proxy keeps
    its full loss and gradient. (If the softmax is computed first, as in pytorch-metric-learning, it underflows in
    float32 and the hardest images silently drop out of the batch.)

    With the batch or a memory as the references this is the loss of neighbourhood component analysis.

    Args:
      distance: ``[n, m]`` distances of images and proxies, not squared; plain or introspective. Distances above
        about 5e13 (in float32, at the default scale) count as equal and have no gradient.
      pairs: relation of images and proxies; images without a positive are left out.
      scale: factor of the squared distances, 1 in the original.
      weights: ``[n]`` at least 0, of the images, in the mean.
      reduction: ``'none'`` returns for each image its term times its weight, 0 without a positive.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the rows are split over.
      stands_for: ``[m]`` number of classes that each proxy stands for as a negative, if only some are compared; see
        ``losses.class_sampling``.

    Returns:
      The loss, a scalar, 0 for an empty relation; or ``[n]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, the reduction is unknown, or the scale or an entry of ``stands_for`` is not
        a finite number above 0.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> distance = jnp.array([[0.2, 0.4], [0.9, 0.3]])
    >>> round(float(losses.proxy_nca(distance, pairs, scale=1.0)), 3)
    0.516
    """
    check_positive(scale=scale)
    distance, weights = prepare(distance, pairs, weights, reduction)
    # Squares, and sums of so many of them, stay in the float range.
    largest = jnp.sqrt(float(jnp.finfo(distance.dtype).max) / jnp.maximum(scale, 1.0)) * 2.0**-16
    distance = jnp.minimum(distance, largest.astype(distance.dtype))
    logits = -scale * distance * distance
    counted = jnp.any(pairs.positive, axis=1)

    everything = logits
    if stands_for is not None:
        everything = logits + log_stands_for(stands_for, pairs, logits.dtype)

    def log_sum_exp(logits: Array, where: Array) -> Array:
        # An empty sum is replaced before the logarithm, which keeps the gradient finite.
        largest = jnp.max(jnp.where(where, logits, -jnp.inf), axis=1, initial=-jnp.inf)
        largest = jax.lax.stop_gradient(jnp.where(counted, largest, 0.0))
        terms = jnp.where(where, jnp.exp(jnp.where(where, logits - largest[:, None], 0.0)), 0.0)
        return largest + jnp.log(jnp.where(counted, jnp.sum(terms, axis=1), 1.0))

    values = weights * (log_sum_exp(everything, pairs.positive | pairs.negative) - log_sum_exp(logits, pairs.positive))
    if reduction == "none":
        return values
    return ratio(total(values, axis_name), total(jnp.where(counted, weights, 0.0), axis_name))
