"""Softmax classification with the introspective metric (IDML, Wang et al., arXiv 2309.09982, for classification).

The prototype ``p_k`` of class ``k`` is the k-th row of the classifier's weights and is certain; an image has the
feature ``x`` and the uncertainty ``u``. In training the logit ``z_k = p_k . x + b_k`` is weakened,

    z'_k = 1 - (1 - z_k) exp(-||u||^2 / (tau ||x - p_k||^2)),

so that the logits of an uncertain image differ less between classes; at test time the plain logits are used.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from idml_jax.ism import relative_weakening
from idml_jax.losses.reductions import check_positive

__all__ = ["Logits", "cross_entropy", "introspective_logits", "mixed_targets"]


class Logits(NamedTuple):
    """Logits of ``n`` images.

    Attributes:
      plain: ``[n, classes]``, for testing.
      weakened: ``[n, classes]``, for training; equal to the plain logits without an uncertainty.
    """

    plain: Float[Array, "n classes"]
    weakened: Float[Array, "n classes"]


def introspective_logits(
    features: Float[Array, "n f"],
    uncertainty: Float[Array, "n k"] | None,
    weights: Float[Array, "classes f"],
    bias: Float[Array, "classes"] | None = None,
    temperature: float = 5.0,
) -> Logits:
    """Plain and weakened logits, for the features of any network.

    Values and gradients are finite everywhere. If a feature equals a prototype (within rounding), the weakened logit is
    the limit: 1, with gradient 0, for an uncertain image; the plain logit for a certain one.

    Args:
      features: ``[n, f]``, not normalised.
      uncertainty: ``[n, k]``; ``None``: certain (u = 0).
      weights: ``[classes, f]``, a prototype per row.
      bias: ``[classes]``; ``None``: 0.
      temperature: tau, > 0.

    Returns:
      Both logits, in at least float32.

    Raises:
      ValueError: if the shapes do not fit, or if the temperature is not above 0 and finite.

    >>> x, u = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0], [2.0]])
    >>> introspective_logits(x, u, jnp.eye(2)).weakened.round(3).tolist()
    [[1.0, 0.095], [0.148, 1.449]]
    """
    check_positive(temperature=temperature)
    if features.ndim != 2 or weights.ndim != 2 or features.shape[1] != weights.shape[1]:
        raise ValueError(f"features [n, f] and weights [classes, f] do not fit: {features.shape}, {weights.shape}")
    if uncertainty is not None and (uncertainty.ndim != 2 or uncertainty.shape[0] != features.shape[0]):
        raise ValueError(f"uncertainty needs the shape [{features.shape[0]}, k]: {uncertainty.shape}")
    if bias is not None and bias.shape != weights.shape[:1]:
        raise ValueError(f"bias needs the shape {weights.shape[:1]}: {bias.shape}")
    dtype = jnp.result_type(jnp.float32, features, weights)
    features, weights = features.astype(dtype), weights.astype(dtype)
    product = jnp.matmul(features, weights.T, precision=jax.lax.Precision.HIGHEST)
    plain = product if bias is None else product + bias.astype(dtype)[None, :]
    if uncertainty is None:
        return Logits(plain, plain)
    squares = jnp.sum(features * features, axis=1)[:, None] + jnp.sum(weights * weights, axis=1)[None, :]
    distance = squares - 2.0 * product
    # Rounding error is not a distance: its gradient would be noise.
    distance = jnp.where(distance <= 4.0 * jnp.finfo(dtype).eps * squares, 0.0, distance)
    doubt = jnp.sum(jnp.square(uncertainty.astype(dtype)), axis=1)[:, None]
    distance, doubt = jnp.broadcast_arrays(distance, doubt)
    factor = relative_weakening(distance, doubt, jnp.full_like(distance, temperature))
    # Written so that a certain image has exactly its plain logits.
    return Logits(plain, plain + (1.0 - plain) * (1.0 - factor))


def mixed_targets(
    labels: Int[Array, "n"],
    others: Int[Array, "n"],
    lam: Float[Array, "n"],
    num_classes: int,
    smoothing: float = 0.0,
) -> Float[Array, "n classes"]:
    """Targets of mixed images: ``lam`` for the first class, ``1 - lam`` for the second.

    Args:
      labels: ``[n]`` labels of the first images.
      others: ``[n]`` labels of the second images.
      lam: ``[n]`` share of the first image.
      num_classes: number of classes.
      smoothing: share of the target that is spread over all classes (Szegedy et al., CVPR 2016).

    Returns:
      ``[n, num_classes]``, rows that add up to 1.

    >>> mixed_targets(jnp.array([0, 1]), jnp.array([1, 1]), jnp.array([0.75, 0.5]), 2).tolist()
    [[0.75, 0.25], [0.0, 1.0]]
    """
    one_hot = lambda which: jax.nn.one_hot(which, num_classes, dtype=lam.dtype)
    targets = lam[:, None] * one_hot(labels) + (1.0 - lam)[:, None] * one_hot(others)
    return (1.0 - smoothing) * targets + smoothing / num_classes


def cross_entropy(logits: Float[Array, "n classes"], targets: Float[Array, "n classes"]) -> Float[Array, ""]:
    """Mean cross-entropy in nats of softmax against soft targets.

    Args:
      logits: ``[n, classes]``.
      targets: ``[n, classes]``, rows that add up to 1.

    Returns:
      A scalar.

    >>> round(float(cross_entropy(jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.eye(2))), 3)
    0.22
    """
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits, axis=1), axis=1))
