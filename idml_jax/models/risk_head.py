"""A scalar head on a pooled feature: the risk that the image's answer is wrong. Learned after training, never with it.

Kirchhof et al., "Pretrained Visual Uncertainties", arXiv 2402.16569: two hidden layers of 512 with LeakyReLU, softplus,
on features that get no gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

__all__ = ["HIDDEN", "RiskHead", "init", "risk_of"]

HIDDEN = 512
Layer = tuple[Float[Array, "inputs outputs"], Float[Array, "outputs"]]


class RiskHead(NamedTuple):
    """The parameters of the head. A pytree.

    Attributes:
      mean: ``[f]`` of the features that it was fitted on.
      scale: ``[f]`` their standard deviation, above 0.
      layers: weights and biases of the three layers.
    """

    mean: Float[Array, "f"]
    scale: Float[Array, "f"]
    layers: tuple[Layer, ...]


def init(key: PRNGKeyArray, mean: Float[Array, "f"], scale: Float[Array, "f"], hidden: int = HIDDEN) -> RiskHead:
    """A head with random weights: He et al., normal; in the last layer a tenth of that.

    An order says nothing about the level, and far below 0 softplus has no gradient. With a last layer ten times as
    large, heads were seen to end there: risks below 1e-9, in a wrong order.

    Args:
      key: PRNG key.
      mean: ``[f]`` of the features.
      scale: ``[f]`` their standard deviation; 0 for a constant one, which is then ignored.
      hidden: width of both hidden layers.
    """
    widths = (mean.shape[0], hidden, hidden, 1)

    def layer(key: PRNGKeyArray, inputs: int, outputs: int) -> Layer:
        deviation = (1.0 if outputs > 1 else 0.1) * (2.0 / inputs) ** 0.5
        return deviation * jax.random.normal(key, (inputs, outputs), jnp.float32), jnp.zeros((outputs,), jnp.float32)

    layers = tuple(layer(*x) for x in zip(jax.random.split(key, 3), widths[:-1], widths[1:], strict=True))
    return RiskHead(jnp.asarray(mean, jnp.float32), jnp.where(scale > 0, scale, jnp.inf).astype(jnp.float32), layers)


def risk_of(head: RiskHead, features: Float[Array, "n f"]) -> Float[Array, "n"]:
    """The risk of each image, above 0; larger is less certain. No gradient reaches the features."""
    x = (jax.lax.stop_gradient(features).astype(jnp.float32) - head.mean[None, :]) / head.scale[None, :]
    for number, (kernel, bias) in enumerate(head.layers):
        x = jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST) + bias[None, :]
        x = jax.nn.leaky_relu(x) if number + 1 < len(head.layers) else jax.nn.softplus(x)
    return x[:, 0]
