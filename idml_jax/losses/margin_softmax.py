"""Softmax over the classes, with margins and with several proxies of a class; import from ``idml_jax.losses``.

All of them are the cross-entropy of an image's similarities to the proxies; they differ in what happens to the
similarity of the image's own class. An image with several classes has a target that is spread evenly over them
(Mahajan et al., ECCV 2018); the margin applies to each.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from idml_jax.losses.pairs import AxisName, Pairs
from idml_jax.losses.reductions import (
    Reduction,
    check_positive,
    check_whole,
    max_over_last,
    prepare,
    softmax_mean,
    softmax_of_positives,
)

__all__ = ["arcface", "cosface", "normalized_softmax", "soft_triple", "subcenter_arcface"]


def normalized_softmax(
    similarity: Float[Array, "n m"],
    pairs: Pairs,
    *,
    temperature: float = 0.05,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    stands_for: Float[Array, "m"] | None = None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """Normalised softmax, Zhai and Wu, BMVC 2019, eq. 3; also NormFace (Wang et al., ACM MM 2017).

        mean over images with a positive of  -log( exp(S_p / T) / sum_(pos and neg) exp(S / T) )

    Args:
      similarity: ``[n, m]`` similarity of images and proxies, plain (cosine) or introspective.
      pairs: relation of images and proxies; images without a positive are left out.
      temperature: T.
      weights: ``[n]`` at least 0, of the images, in the mean.
      reduction: ``'none'`` returns for each image its term times its weight, 0 without a positive.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the images are split over.
      stands_for: ``[m]`` number of classes that each proxy stands for as a negative, if only some are compared; see
        ``losses.class_sampling``.

    Returns:
      The loss, a scalar, 0 for an empty relation; or ``[n]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, the reduction is unknown, or the temperature or an entry of ``stands_for``
        is not a finite number above 0.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> similarity = jnp.array([[0.8, 0.1], [0.3, 0.6]])
    >>> round(float(losses.normalized_softmax(similarity, pairs, temperature=1.0)), 3)
    0.479
    """
    check_positive(temperature=temperature)
    similarity, weights = prepare(similarity, pairs, weights, reduction)
    return softmax_of_positives(similarity / temperature, pairs, weights, reduction, axis_name, stands_for)


def cosface(
    similarity: Float[Array, "n m"],
    pairs: Pairs,
    *,
    margin: float = 0.35,
    scale: float = 64.0,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    stands_for: Float[Array, "m"] | None = None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """CosFace, Wang et al., CVPR 2018, eq. 4: softmax in which the similarity to the own class is less by a margin.

        mean over images with a positive of  -log( exp(s (S_p - m)) / (exp(s (S_p - m)) + sum_neg exp(s S_n)) )

    Args:
      similarity: ``[n, m]`` similarity of images and proxies, plain (cosine) or introspective.
      pairs: relation of images and proxies; images without a positive are left out.
      margin: m, subtracted from the similarity to the own class.
      scale: s, inverse temperature.
      weights: ``[n]`` at least 0, of the images, in the mean.
      reduction: ``'none'`` returns for each image its term times its weight, 0 without a positive.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the images are split over.
      stands_for: as for ``normalized_softmax``.

    Returns:
      The loss, a scalar, 0 for an empty relation; or ``[n]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, the reduction is unknown, or the scale or an entry of ``stands_for`` is not
        a finite number above 0.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> similarity = jnp.array([[0.8, 0.1], [0.3, 0.6]])
    >>> round(float(losses.cosface(similarity, pairs, margin=0.2, scale=1.0)), 3)
    0.559
    """
    check_positive(scale=scale)
    similarity, weights = prepare(similarity, pairs, weights, reduction)
    logits = scale * jnp.where(pairs.positive, similarity - margin, similarity)
    return softmax_of_positives(logits, pairs, weights, reduction, axis_name, stands_for)


def arcface(
    similarity: Float[Array, "n m"],
    pairs: Pairs,
    *,
    margin: float = 28.6,
    scale: float = 64.0,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    stands_for: Float[Array, "m"] | None = None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """ArcFace, Deng et al., CVPR 2019, eq. 3: softmax in which the angle to the own class is larger by a margin.

        mean over images with a positive of  -log( exp(s S'_p) / (exp(s S'_p) + sum_neg exp(s S_n)) ),
        S'_p = cos(arccos(S_p) + m),  beyond an angle of pi - m:  S_p - max(m sin(m), 1 - cos(m))

    The angle is that of the similarity clipped to [-1, 1], plain or introspective. Beyond ``pi - m`` the cosine would
    rise again, so the published code continues it by a line. The gradient is finite at similarities of 1 and -1, where
    that of the arc cosine (and of pytorch-metric-learning) is not.

    Args:
      similarity: ``[n, m]`` similarity of images and proxies, plain (cosine) or introspective.
      pairs: relation of images and proxies; images without a positive are left out.
      margin: m, added to the angle to the own class, in degrees.
      scale: s, inverse temperature.
      weights: ``[n]`` at least 0, of the images, in the mean.
      reduction: ``'none'`` returns for each image its term times its weight, 0 without a positive.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the images are split over.
      stands_for: as for ``normalized_softmax``.

    Returns:
      The loss, a scalar, 0 for an empty relation; or ``[n]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, the reduction is unknown, or the scale or an entry of ``stands_for`` is not
        a finite number above 0.

    >>> pairs = losses.pairs_from_labels(jnp.arange(2), jnp.arange(2))  # two images, a reference of each class
    >>> similarity = jnp.array([[0.8, 0.1], [0.3, 0.6]])
    >>> round(float(losses.arcface(similarity, pairs, scale=1.0)), 3)
    0.661
    """
    check_positive(scale=scale)
    similarity, weights = prepare(similarity, pairs, weights, reduction)
    logits = scale * jnp.where(pairs.positive, _with_angle(similarity, margin), similarity)
    return softmax_of_positives(logits, pairs, weights, reduction, axis_name, stands_for)


def subcenter_arcface(
    similarity: Float[Array, "n m"],
    pairs: Pairs,
    *,
    margin: float = 28.6,
    scale: float = 64.0,
    centres: int = 3,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    stands_for: Float[Array, "m"] | None = None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """Sub-centre ArcFace, Deng et al., ECCV 2020, eq. 3: ``arcface`` with the nearest of several proxies of a class.

        S of image and class = max over the class's proxies of S

    Noisy images of a class can gather at a proxy of their own, so they do not pull the others.

    Args:
      similarity: ``[n, m]`` similarity of images and proxies, plain (cosine) or introspective; ``centres`` adjacent
        columns are the proxies of one class.
      pairs: relation of images and proxies; images without a positive are left out.
      margin: m, added to the angle to the own class, in degrees.
      scale: s, inverse temperature.
      centres: number of proxies per class.
      weights: ``[n]`` at least 0, of the images, in the mean.
      reduction: ``'none'`` returns for each image its term times its weight, 0 without a positive.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the images are split over.
      stands_for: as for ``normalized_softmax``, for each class.

    Returns:
      The loss, a scalar, 0 for an empty relation; or ``[n]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, the reduction is unknown, ``centres`` does not divide the columns, or the
        scale or an entry of ``stands_for`` is not a finite number above 0.

    >>> pairs = losses.pairs_from_labels(jnp.array([0]), jnp.array([0, 0, 1, 1]))  # two proxies of each class
    >>> similarity = jnp.array([[0.8, 0.1, 0.3, 0.6]])
    >>> round(float(losses.subcenter_arcface(similarity, pairs, centres=2, scale=1.0)), 3)
    0.79
    """
    check_positive(scale=scale)
    similarity, weights = prepare(similarity, pairs, weights, reduction)
    grouped, known, classes = _of_classes(similarity, pairs, centres)
    nearest = max_over_last(jnp.where(known, grouped, -jnp.inf))
    nearest = jnp.where(classes.positive | classes.negative, nearest, 0.0)
    logits = scale * jnp.where(classes.positive, _with_angle(nearest, margin), nearest)
    return softmax_of_positives(logits, classes, weights, reduction, axis_name, stands_for)


def soft_triple(
    similarity: Float[Array, "n m"],
    pairs: Pairs,
    *,
    scale: float = 20.0,
    gamma: float = 0.1,
    margin: float = 0.01,
    centres: int = 10,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
    stands_for: Float[Array, "m"] | None = None,
) -> Float[Array, ""] | Float[Array, "n"]:
    """SoftTriple, Qian et al., ICCV 2019, eqs. 4 and 5: softmax over classes that have several proxies each.

        S of image and class = sum over the class's proxies of softmax(S / gamma) S
        mean over images with a positive of  -log( exp(s (S_p - m)) / (exp(s (S_p - m)) + sum_neg exp(s S_n)) )

    The paper's regulariser, which merges proxies of a class that are not needed, is ``auxiliary.centre_spread``
    (``config.loss.centre_spread``).

    Args:
      similarity: ``[n, m]`` similarity of images and proxies, plain (cosine) or introspective; ``centres`` adjacent
        columns are the proxies of one class.
      pairs: relation of images and proxies; images without a positive are left out.
      scale: s, the paper's lambda.
      gamma: temperature of the softmax over a class's proxies.
      margin: m, the paper's delta.
      centres: number of proxies per class.
      weights: ``[n]`` at least 0, of the images, in the mean.
      reduction: ``'none'`` returns for each image its term times its weight, 0 without a positive.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the images are split over.
      stands_for: as for ``normalized_softmax``, for each class.

    Returns:
      The loss, a scalar, 0 for an empty relation; or ``[n]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, the reduction is unknown, ``centres`` does not divide the columns, or scale,
        gamma or an entry of ``stands_for`` is not a finite number above 0.

    >>> pairs = losses.pairs_from_labels(jnp.array([0]), jnp.array([0, 0, 1, 1]))  # two proxies of each class
    >>> similarity = jnp.array([[0.8, 0.1, 0.3, 0.6]])
    >>> round(float(losses.soft_triple(similarity, pairs, centres=2, scale=1.0)), 3)
    0.597
    """
    check_positive(scale=scale, gamma=gamma)
    similarity, weights = prepare(similarity, pairs, weights, reduction)
    grouped, known, classes = _of_classes(similarity, pairs, centres)
    of_class = gamma * softmax_mean(grouped / gamma, known)
    logits = scale * jnp.where(classes.positive, of_class - margin, of_class)
    return softmax_of_positives(logits, classes, weights, reduction, axis_name, stands_for)


def _with_angle(similarity: Float[Array, "n m"], margin: float) -> Float[Array, "n m"]:
    """``cos(arccos(S) + margin)``, continued by a line where the angle would pass pi; the margin is in degrees."""
    # Rounding can leave a similarity just beyond 1; there the value is clipped and the gradient that of the line.
    cosine = similarity + jax.lax.stop_gradient(jnp.clip(similarity, -1.0, 1.0) - similarity)
    square = (1.0 - cosine) * (1.0 + cosine)
    edge = square <= 0
    sine = jnp.where(edge, 0.0, jnp.sqrt(jnp.where(edge, 1.0, square)))
    radians = jnp.deg2rad(jnp.asarray(margin, similarity.dtype))
    within = cosine >= -jnp.cos(radians)
    # Beyond a margin of 133.6 degrees the line would begin above -1, where the curve ends.
    lower = jnp.minimum(-radians * jnp.sin(radians), jnp.cos(radians) - 1.0)
    return jnp.where(within, cosine * jnp.cos(radians) - sine * jnp.sin(radians), cosine + lower)


def _of_classes(
    similarity: Float[Array, "n m"], pairs: Pairs, centres: int
) -> tuple[Float[Array, "n classes k"], Bool[Array, "n classes k"], Pairs]:
    """Similarities by class and proxy, which of them are known, and the relation of images and classes."""
    n, m = similarity.shape
    check_whole(centres=centres)
    if m % centres:
        raise ValueError(f"{m} columns are not {centres} proxies for each class")
    by_class = lambda x: x.reshape(n, m // centres, centres)
    positive, negative = by_class(pairs.positive), by_class(pairs.negative)
    classes = Pairs(jnp.any(positive, axis=2), jnp.any(negative, axis=2) & ~jnp.any(positive, axis=2))
    return by_class(similarity), positive | negative, classes
