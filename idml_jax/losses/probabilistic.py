"""Losses of other schools of uncertainty, on the same two heads; import them from ``idml_jax.losses``.

An image is a distribution around its semantic embedding ``s``, and the length of ``u`` is its spread: the typical
distance of a sample from ``s``. These losses read the embeddings themselves, not a matrix of the introspective metric.
Without an uncertainty (``None``) or with ``u = 0`` every image is equally certain, which gives the plain form of each
loss: every sample is ``s``, or in ``elk`` all distributions have the same spread.

Samples depend on the key and on the index of the row alone, so they are the same on one device and on several; those
of anchors and of other images as references are independent. They are functions of the parameters (reparameterised), so
the gradient of the loss is unbiased.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from idml_jax.ism import Embedding, embedding_pair, l2_normalize, semantic_distance
from idml_jax.losses.batch_softmax import info_nce
from idml_jax.losses.pairs import AxisName, Pairs, row_offset
from idml_jax.losses.reductions import (
    Reduction,
    check_positive,
    check_whole,
    log_sum_exp,
    prepare,
    ratio,
    total,
)
from idml_jax.losses.vmf import sample_vmf
from idml_jax.losses.vmf_kernel import log_kernel

__all__ = ["elk", "hedged_instance", "mc_info_nce"]

# Samples [k, n, d] of n images: embeddings, key, index of each row, k.
Draw = Callable[[Embedding, PRNGKeyArray, Int[Array, "n"], int], Float[Array, "k n d"]]
# Images with a shorter u are certain: their spread is below float32's resolution. A longer one than _MOST, whose square
# might overflow, counts as _MOST.
_CERTAIN, _MOST = 1e-6, 1e15


def mc_info_nce(
    embeddings: Embedding,
    pairs: Pairs,
    key: PRNGKeyArray,
    *,
    references: Embedding | None = None,
    anchors_first: bool | None = None,
    kappa: float = 14.0,
    samples: int = 8,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, ""] | Float[Array, "n m"]:
    """MC-InfoNCE, Kirchhof et al., ICML 2023 (arXiv 2302.02865), eq. 4, with any number of positives.

        mean over positive pairs of  -log mean over samples z of  exp(k z.z_p) / (exp(k z.z_p) + sum_neg exp(k z.z_n))

    ``z`` is drawn from the von Mises-Fisher distribution around ``s`` with the concentration ``(d - 1) / ||u||^2``, at
    which a sample is about ``||u||`` away from ``s`` where that is short. ``u = 0`` gives ``info_nce`` with the
    temperature ``1 / kappa``.

    Args:
      embeddings: ``n`` anchors.
      pairs: relation of anchors and references.
      key: random key of the samples.
      references: ``m`` embeddings; ``None``: the anchors.
      anchors_first: whether the references begin with the anchors (of all devices), as ``gather`` and
        ``memory.with_batch`` give them: an image that is both has the same samples. All others have their own.
        ``None``: with ``axis_name``, where they are the gathered batch.
      kappa: k, the concentration of positives around each other: the inverse of a temperature.
      samples: number of samples of each image; memory grows with ``samples n m``.
      weights: ``[n]`` at least 0, of the anchors, in the mean over pairs.
      reduction: ``'none'`` returns each pair's term times its anchor's weight, 0 for negatives.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the anchors are split over; the references are
        then those of all devices, and the key is the same on every device.

    Returns:
      The loss, a scalar, 0 without a positive; or ``[n, m]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, there are fewer than 2 dimensions, the reduction is unknown, ``samples`` is
        not a whole number of at least 1, or kappa is not a finite number above 0.

    >>> batch = Embedding(jnp.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), jnp.zeros((3, 2)))
    >>> pairs = losses.pairs_from_labels(jnp.array([0, 0, 1]))
    >>> loss = jax.jit(lambda batch: losses.mc_info_nce(batch, pairs, jax.random.key(0), kappa=2.0))
    >>> round(float(loss(batch)), 3)  # u = 0: (log(1 + exp(-1.6)) + log(1 + exp(-0.4))) / 2
    0.349
    """
    check_positive(kappa=kappa)
    _check(embeddings, references, 2)
    anchors, others = _drawn(embeddings, references, anchors_first, key, samples, axis_name, _on_sphere)
    product = jax.lax.dot_general(anchors, others, (((2,), (2,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST)
    _, weights = prepare(product[0], pairs, weights, reduction)
    logits = kappa * jnp.where((pairs.positive | pairs.negative)[None], product, 0.0)
    against = pairs.positive & jnp.any(pairs.negative, axis=1)[:, None]
    of_negatives = jax.vmap(log_sum_exp, (0, None))(logits, pairs.negative)
    log_shares = -jax.nn.softplus(jnp.where(against[None], of_negatives[:, :, None] - logits, 0.0))
    log_mean = jax.nn.logsumexp(log_shares, axis=0) - jnp.log(samples)
    terms = weights[:, None] * jnp.where(against, -log_mean, 0.0)
    if reduction == "none":
        return terms
    return ratio(total(terms, axis_name), total(weights * jnp.sum(pairs.positive, axis=1), axis_name))


def hedged_instance(
    embeddings: Embedding,
    pairs: Pairs,
    key: PRNGKeyArray,
    *,
    references: Embedding | None = None,
    anchors_first: bool | None = None,
    slope: float | Float[Array, ""] | Float[Array, "n"] = 8.0,
    offset: float | Float[Array, ""] | Float[Array, "n"] = 8.0,
    prior: float = 1e-4,
    samples: int = 4,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, ""] | Float[Array, "n m"]:
    """Hedged instance embeddings (HIB), Oh et al., ICLR 2019, eqs. 2 to 5: a soft contrastive loss on samples.

        ( mean over positives of -log p + mean over negatives of -log(1 - p) ) / 2 + prior * mean over images of KL
        p = mean over the samples of both images of  sigmoid(offset - slope || z_1 - z_2 ||)

    ``z`` is drawn from the normal distribution around ``s`` with the variance ``||u||^2 / d`` in every direction, so a
    sample is about ``||u||`` away from ``s``. ``KL`` is the divergence of that distribution from the normal one around
    0 of total variance 1 (the paper's prior, for embeddings of length 1): ``d (||u||^2 + ||s||^2 - 1 - log ||u||^2) /
    2``; it is left out where ``u`` is missing or 0. The paper learns slope and offset:
    ``config.loss.learned = 'shared'``.

    Args:
      embeddings: ``n`` anchors.
      pairs: relation of anchors and references.
      key: random key of the samples.
      references: ``m`` embeddings; ``None``: the anchors.
      anchors_first: as for ``mc_info_nce``.
      slope: how sharply the probability of a match falls with the distance; a number, a learned scalar or ``[n]``.
      offset: divided by the slope it is the distance at which a match is as likely as not; as the slope.
      prior: weight of the divergence.
      samples: number of samples of each image; memory grows with ``samples^2 n m``.
      weights: ``[n]`` at least 0, of the anchors, in all means.
      reduction: ``'none'`` returns each pair's term times its anchor's weight, without the divergence.
      axis_name: as for ``mc_info_nce``.

    Returns:
      The loss, a scalar, 0 for an empty relation; or ``[n, m]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, the reduction is unknown, or ``samples`` is not a whole number of at least
        1.

    >>> batch = Embedding(jnp.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), jnp.zeros((3, 2)))
    >>> pairs = losses.pairs_from_labels(jnp.array([0, 0, 1]))
    >>> loss = jax.jit(lambda batch: losses.hedged_instance(batch, pairs, jax.random.key(0), slope=2.0, offset=2.0))
    >>> round(float(loss(batch)), 3)
    0.488
    """
    _check(embeddings, references, 1)
    anchors, others = _drawn(embeddings, references, anchors_first, key, samples, axis_name, _in_space)
    between = jax.vmap(jax.vmap(semantic_distance, (None, 0)), (0, None))(anchors, others)
    between = between.reshape(samples * samples, *between.shape[2:])
    _, weights = prepare(between[0], pairs, weights, reduction)
    scalar = lambda x: jnp.broadcast_to(jnp.asarray(x, between.dtype), between.shape[1:2])[None, :, None]
    score = jnp.where((pairs.positive | pairs.negative)[None], scalar(offset) - scalar(slope) * between, 0.0)
    log_mean = lambda x: jax.nn.logsumexp(jax.nn.log_sigmoid(x), axis=0) - jnp.log(float(samples * samples))
    terms = -jnp.where(pairs.positive, log_mean(score), jnp.where(pairs.negative, log_mean(-score), 0.0))
    terms = weights[:, None] * terms
    if reduction == "none":
        return terms

    def mean_of(where: Array) -> Array:
        count = total(weights * jnp.sum(where, axis=1), axis_name)
        return ratio(total(jnp.where(where, terms, 0.0), axis_name), count)

    counted = jnp.where(jnp.any(pairs.positive | pairs.negative, axis=1), weights, 0.0)
    divergence = jnp.where(counted > 0, counted * _divergence(embeddings), 0.0)
    divergence = ratio(total(divergence, axis_name), total(counted, axis_name))
    return 0.5 * (mean_of(pairs.positive) + mean_of(pairs.negative)) + prior * divergence


def elk(
    embeddings: Embedding,
    pairs: Pairs,
    *,
    references: Embedding | None = None,
    spread: float = 1.0,
    temperature: float = 0.03,
    weights: Float[Array, "n"] | None = None,
    reduction: Reduction = "mean",
    axis_name: AxisName | None = None,
) -> Float[Array, ""] | Float[Array, "n m"]:
    """Expected likelihood kernel (ELK) of von Mises-Fisher distributions, Kirchhof et al., ECCV 2022, arXiv 2207.03784.

        mean over positive pairs of  -log( exp(E_p / T) / (exp(E_p / T) + sum_neg exp(E_n / T)) )
        E_ij = log( integral of p_i p_j ) / (d - 1)
             = ( log C(k_i) + log C(k_j) - log C(|| k_i s_i + k_j s_j ||) ) / (d - 1)
        k = (d - 1) / (||u||^2 + spread^2)

    ``p_i`` is the von Mises-Fisher distribution around ``s_i`` with the concentration ``k_i``, ``C`` its normaliser
    (``losses.vmf_kernel``). The integral has a closed form, so nothing is sampled. The paper compares images with class
    proxies, whose concentrations it learns; here they are compared with each other, as in the other losses of this
    module. Divided by ``d - 1`` the kernel is of the size of a cosine in any number of dimensions; the temperature of
    the paper is ``(d - 1) T``. The bounded concentration keeps a certain image from being infinitely sharp. ``u = 0``
    gives a softmax over a function of the cosine that is close to linear, with a slope of about 1/2 for ``spread = 1``.

    Args:
      embeddings: ``n`` anchors, of at least 2 dimensions.
      pairs: relation of anchors and references.
      references: ``m`` embeddings; ``None``: the anchors.
      spread: typical distance of an image without uncertainty from its ``s``.
      temperature: T.
      weights: ``[n]`` at least 0, of the anchors, in the mean over pairs.
      reduction: ``'none'`` returns each pair's term times its anchor's weight, 0 for negatives.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis that the anchors are split over; the references are
        then those of all devices.

    Returns:
      The loss, a scalar, 0 without a positive; or ``[n, m]`` unreduced.

    Raises:
      ValueError: if the shapes do not fit, there are fewer than 2 dimensions, the reduction is unknown, the temperature
        is not a finite number above 0, or the spread is below 0, infinite or NaN.

    >>> batch = Embedding(jnp.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 1.0, 0.0]]), jnp.zeros((3, 2)))
    >>> pairs = losses.pairs_from_labels(jnp.array([0, 0, 1]))
    >>> loss = jax.jit(lambda batch: losses.elk(batch, pairs, temperature=0.5))
    >>> round(float(loss(batch)), 3)
    0.514
    """
    _check(embeddings, references, 2)
    if not isinstance(spread, jax.core.Tracer) and spread != 0:
        check_positive(spread=spread)
    (mean, kappa), d = _direction(embeddings, spread), embeddings.semantic.shape[1]
    others, their_kappa = (mean, kappa) if references is None else _direction(references, spread)
    cosine = jax.lax.dot_general(mean, others, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
    similarity = log_kernel(cosine, kappa, their_kappa, d) / (d - 1.0)
    return info_nce(
        similarity, pairs, temperature=temperature, weights=weights, reduction=reduction, axis_name=axis_name
    )


def _check(embeddings: Embedding, references: Embedding | None, least: int) -> None:
    """Checks the shapes of anchors and references, of at least so many dimensions.

    Raises:
      ValueError: if one is not an ``Embedding``, or the shapes do not fit.
    """
    for each in embedding_pair(embeddings, references):
        for part in (each.semantic, each.uncertainty):
            if part is not None and part.ndim != 2:
                raise ValueError(f"an embedding needs the shapes [n, d] and [n, k]; got {part.shape}")
    d = embeddings.semantic.shape[1]
    if d < least:
        raise ValueError(f"the loss needs embeddings of at least {least} dimensions; got {d}")
    if references is not None and references.semantic.shape[1] != d:
        raise ValueError(f"anchors and references need the same width; got {d} and {references.semantic.shape[1]}")


def _direction(embedding: Embedding, spread: float) -> tuple[Float[Array, "n d"], Float[Array, "n"]]:
    """Mean directions and concentrations of the von Mises-Fisher distributions."""
    mean = l2_normalize(embedding.semantic)
    n, d = mean.shape
    square = jnp.zeros(n, mean.dtype) if embedding.uncertainty is None else _square_length(embedding).astype(mean.dtype)
    # A number is squared in Python's precision, a traced one in its own.
    spread = jnp.maximum(spread, _CERTAIN) if isinstance(spread, jax.core.Tracer) else max(spread, _CERTAIN)
    return mean, (d - 1.0) / (square + spread**2)


def _drawn(
    embeddings: Embedding,
    references: Embedding | None,
    anchors_first: bool | None,
    key: PRNGKeyArray,
    samples: int,
    axis_name: AxisName | None,
    draw: Draw,
) -> tuple[Float[Array, "k n d"], Float[Array, "k m d"]]:
    """Samples of anchors and references; an image that is both has the same ones, others are independent."""
    check_whole(samples=samples)
    n = embeddings.semantic.shape[0]
    anchors = draw(embeddings, key, row_offset(n, axis_name) + jnp.arange(n), samples)
    if references is None:
        return anchors, anchors
    same = axis_name is not None if anchors_first is None else anchors_first
    their_key = key if same else jax.random.split(key)[1]
    return anchors, draw(references, their_key, jnp.arange(references.semantic.shape[0]), samples)


def _keys(key: PRNGKeyArray, rows: Int[Array, "n"]) -> PRNGKeyArray:
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def _square_length(embedding: Embedding) -> Float[Array, "n"]:
    assert embedding.uncertainty is not None
    u = embedding.uncertainty.astype(jnp.result_type(jnp.float32, embedding.uncertainty))
    return jnp.minimum(jnp.sum(u * u, axis=1), _MOST**2)


def _on_sphere(embedding: Embedding, key: PRNGKeyArray, rows: Int[Array, "n"], samples: int) -> Float[Array, "k n d"]:
    """Samples of the von Mises-Fisher distributions."""
    mean = l2_normalize(embedding.semantic)
    n, d = mean.shape
    if embedding.uncertainty is None:
        return jnp.broadcast_to(mean[None], (samples, n, d))
    square = _square_length(embedding).astype(mean.dtype)
    certain = square <= _CERTAIN**2
    kappa = (d - 1.0) / jnp.where(certain, 1.0, square)
    drawn = sample_vmf(_keys(key, rows), mean, kappa, samples)
    return jnp.where(certain[None, :, None], mean[None], drawn)


def _in_space(embedding: Embedding, key: PRNGKeyArray, rows: Int[Array, "n"], samples: int) -> Float[Array, "k n d"]:
    """Samples of the normal distributions."""
    mean = embedding.semantic.astype(jnp.result_type(jnp.float32, embedding.semantic))
    n, d = mean.shape
    if embedding.uncertainty is None:
        return jnp.broadcast_to(mean[None], (samples, n, d))
    noise = jax.vmap(lambda k: jax.random.normal(k, (samples, d), mean.dtype))(_keys(key, rows))
    square = _square_length(embedding).astype(mean.dtype)
    certain = square <= _CERTAIN**2
    deviation = jnp.where(certain, 0.0, jnp.sqrt(jnp.where(certain, 1.0, square / d)))
    return jnp.moveaxis(mean[:, None, :] + deviation[:, None, None] * noise, 1, 0)


def _divergence(embedding: Embedding) -> Float[Array, "n"]:
    """Divergence of each image's normal distribution from the one around 0 with a total variance of 1; 0 if certain."""
    mean = embedding.semantic.astype(jnp.result_type(jnp.float32, embedding.semantic))
    if embedding.uncertainty is None:
        return jnp.zeros(mean.shape[0], mean.dtype)
    square = _square_length(embedding).astype(mean.dtype)
    certain = square <= _CERTAIN**2
    spread = jnp.where(certain, 1.0, square)
    excess = spread - 1.0 - jnp.log(spread) + jnp.sum(mean * mean, axis=1)
    return jnp.where(certain, 0.0, 0.5 * mean.shape[1] * excess)
