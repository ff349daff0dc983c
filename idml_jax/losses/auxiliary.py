"""Auxiliary losses, which are added to a loss on a matrix.

The introspective metric only trains ``u`` to slow the learning of some pairs. ``ranking_loss`` orders pairs of images
in a batch by how likely they are to be confused; ``length_prior`` keeps lengths above 0. ``centre_spread`` merges
proxies of a class that are not needed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from idml_jax.ism import l2_normalize
from idml_jax.losses.pairs import Pairs
from idml_jax.losses.reductions import mean_of_rows, ratio

__all__ = ["centre_spread", "confusion", "length_prior", "order_loss", "ranking_loss"]

# Slope of the comparison in the logarithm of the length: a factor of two is a clear order.
SHARPNESS = 5.0


def confusion(similarity: Float[Array, "n m"], pairs: Pairs) -> Float[Array, "n"]:
    """How close each image is to a wrong answer: similarity of its nearest negative minus that of its nearest positive.

    Args:
      similarity: ``[n, m]`` plain similarities of images and references (proxies, or the batch); not differentiated.
      pairs: relation of the two.

    Returns:
      ``[n]``, above 0 if the nearest reference has another class; NaN (undefined) for an image without a positive or
      without a negative.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> similarity = jnp.array([[0.5, 0.6], [0.3, 0.6]])
    >>> confusion(similarity, pairs).round(3).tolist()
    [0.1, -0.3]
    """
    similarity = jax.lax.stop_gradient(similarity)

    def most(where: Array) -> Array:
        return jnp.max(jnp.where(where, similarity, -jnp.inf), axis=1, initial=-jnp.inf)

    positive, negative = most(pairs.positive), most(pairs.negative)
    known = jnp.isfinite(positive) & jnp.isfinite(negative)
    return jnp.where(known, jnp.where(known, negative, 0.0) - jnp.where(known, positive, 0.0), jnp.nan)


def ranking_loss(uncertainty: Float[Array, "n k"], confusions: Float[Array, "n"]) -> Float[Array, ""]:
    """Logistic loss over pairs of images: the more confused image should have the longer uncertainty embedding.

        mean over i, j with c_i > c_j of  (c_i - c_j) log(1 + (|u_j| / |u_i|)^5),  weights normalised to a mean of 1

    The ranking form of loss prediction (Yoo and Kweon, "Learning Loss for Active Learning", CVPR 2019), applied to the
    length that the metric uses. It depends only on ratios of lengths, so the metric determines the scale of ``u``.

    Args:
      uncertainty: ``[n, k]``.
      confusions: ``[n]``, see ``confusion``; not differentiated; images with NaN are left out.

    Returns:
      The loss, a scalar; log 2 if all lengths are equal, 0 without two images to compare.

    >>> u = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> round(float(ranking_loss(u, jnp.array([0.1, 0.3]))), 3), round(float(ranking_loss(u, jnp.array([0.3, 0.1]))), 3)
    (0.031, 3.497)
    """
    known = jnp.isfinite(confusions)
    confusions = jax.lax.stop_gradient(jnp.where(known, confusions, 0.0))
    length = _log_length(uncertainty)
    harder = jnp.maximum(confusions[:, None] - confusions[None, :], 0.0)
    harder = jnp.where(known[:, None] & known[None, :], harder, 0.0)
    losses = jax.nn.softplus(-SHARPNESS * (length[:, None] - length[None, :]))
    return ratio(jnp.sum(harder * losses), jnp.sum(harder))


def length_prior(
    uncertainty: Float[Array, "n k"],
    confusions: Float[Array, "n"] | None = None,
    mask: Bool[Array, "n"] | None = None,
) -> Float[Array, ""]:
    """Distance of the lengths of the uncertainty embeddings from 1 on a log scale: the mean of ``log(|u|)^2``.

    With some losses on pairs (multi-similarity, margin, FastAP) ``u`` was observed to shrink to 0, which makes the
    metric plain. A small weight of this prior prevents that.

    Args:
      uncertainty: ``[n, k]``; a length below 1e-6 counts as 1e-6.
      confusions: ``[n]``, see ``confusion``; not differentiated. If given, the length that is aimed at doubles with
        every standard deviation of the confusion above the batch's mean, and halves below it; images with NaN aim at 1.
      mask: ``[n]``, false for images to leave out.

    Returns:
      The mean, a scalar; 0 if all are left out.

    >>> round(float(length_prior(jnp.array([[1.0, 0.0], [0.0, 2.0]]))), 3)  # (log(1)^2 + log(2)^2) / 2
    0.24
    >>> round(float(length_prior(jnp.array([[0.5, 0.0], [0.0, 2.0]]), jnp.array([0.1, 0.3]))), 3)
    0.0
    """
    length = _log_length(uncertainty)
    if confusions is None:
        return mean_of(jnp.square(length), mask)
    known = jnp.isfinite(confusions)
    values = jax.lax.stop_gradient(jnp.where(known, confusions, 0.0))
    centred = jnp.where(known, values - ratio(jnp.sum(values), jnp.sum(known)), 0.0)
    deviation = jnp.sqrt(ratio(jnp.sum(jnp.square(centred)), jnp.sum(known)))
    return mean_of(jnp.square(length - jnp.log(2.0) * ratio(centred, deviation)), mask)


def mean_of(values: Float[Array, "n"], mask: Bool[Array, "n"] | None) -> Float[Array, ""]:
    """The mean of the values whose mask is true, 0 without any; of all without a mask."""
    if mask is None:
        return jnp.mean(values)
    return mean_of_rows(values, mask, jnp.ones_like(values), "mean", None)


def order_loss(risks: Float[Array, "n"], losses: Float[Array, "n"], gap: float = 0.1) -> Float[Array, ""]:
    """Hinge on the order of neighbours in the batch: the larger loss should have the larger risk, by at least the gap.

        mean over i with l_i != l_(i+1) of  max(0, gap - sign(l_i - l_(i+1)) (r_i - r_(i+1)))

    Kirchhof et al., arXiv 2402.16569, after Yoo and Kweon, CVPR 2019. The last row's neighbour is the first one.

    Args:
      risks: ``[n]``, differentiated.
      losses: ``[n]``, not differentiated.
      gap: least difference of the risks.

    Returns:
      The mean, a scalar; 0 if all losses are equal.

    >>> round(float(order_loss(jnp.array([0.5, 0.3]), jnp.array([2.0, 1.0]))), 3)
    0.0
    >>> round(float(order_loss(jnp.array([0.3, 0.5]), jnp.array([2.0, 1.0]))), 3)  # 0.1 + 0.2
    0.3
    """
    order = jnp.sign(jax.lax.stop_gradient(losses - jnp.roll(losses, -1)))
    short = jax.nn.relu(gap - order * (risks - jnp.roll(risks, -1)))
    return ratio(jnp.sum(jnp.where(order != 0, short, 0.0)), jnp.sum(order != 0))


def centre_spread(proxies: Float[Array, "classes k d"], real: Bool[Array, "classes"] | None = None) -> Float[Array, ""]:
    """Mean distance between proxies of one class: SoftTriple's regulariser, Qian et al., ICCV 2019, eq. 9.

        sum over classes, and over pairs s < t of their K proxies, of  || w_s - w_t || / (C K (K - 1))

    The distance is not squared, as in a group lasso: some proxies become equal instead of all a little closer.

    Args:
      proxies: ``[classes, k, d]``; their directions are compared.
      real: ``[classes]``, false for rows that are padding.

    Returns:
      The mean, a scalar; 0 for one proxy per class.

    >>> proxies = jnp.array([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [2.0, 0.0]]])
    >>> round(float(centre_spread(proxies)), 3)  # (1.414 + 0) / (2 * 2 * 1)
    0.354
    """
    classes, k = proxies.shape[:2]
    real = jnp.ones(classes, bool) if real is None else real
    unit = l2_normalize(proxies)
    cosines = jnp.einsum("csd,ctd->cst", unit, unit, precision=jax.lax.Precision.HIGHEST)
    square = 2.0 - 2.0 * cosines
    # Equal proxies are at rest; rounding is no distance.
    apart = (square > 8.0 * jnp.finfo(square.dtype).eps) & ~jnp.eye(k, dtype=bool)[None] & real[:, None, None]
    distances = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)
    return 0.5 * ratio(jnp.sum(distances), jnp.sum(real) * k * (k - 1))


def _log_length(uncertainty: Float[Array, "n k"]) -> Float[Array, "n"]:
    squares = jnp.sum(jnp.square(uncertainty.astype(jnp.promote_types(uncertainty.dtype, jnp.float32))), axis=1)
    # The gradient of a logarithm at 0 is infinite.
    return 0.5 * jnp.log(jnp.maximum(squares, 1e-12))
