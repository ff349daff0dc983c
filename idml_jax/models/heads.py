"""Heads on the pooled feature, and proxies."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from idml_jax.ism import l2_normalize
from idml_jax.models.layers import kaiming_normal

UNCERTAINTY_HEADS = ("mlp", "linear", "none")


class Heads(nn.Module):
    """Semantic and uncertainty embedding of a pooled feature; float32 whatever the trunk computes in.

    The default uncertainty head sees the l2-NORMALISED feature through a hidden layer. One that sees the raw feature
    mostly follows the feature's norm, which is smaller for ambiguous pictures: measured on Omniglot it learns nothing
    or costs recall. The uncertainty embedding is not normalised, since its length is the information.

    Attributes:
      embedding_dim: d, width of the semantic embedding.
      uncertainty_dim: k, width of the uncertainty embedding.
      uncertainty_head: ``mlp`` (normalised feature, one hidden ReLU layer), ``linear`` (raw feature, one layer: the
        paper's) or ``none`` (no uncertainty: u = 0).
      uncertainty_hidden: width of the hidden layer.
      uncertainty_scale: factor on the initial weights of the last uncertainty layer.
      normalize: l2-normalise the semantic embedding.
    """

    embedding_dim: int = 512
    uncertainty_dim: int = 512
    uncertainty_head: str = "mlp"
    uncertainty_hidden: int = 128
    uncertainty_scale: float = 1.0
    normalize: bool = True

    @nn.compact
    def __call__(self, features: Float[Array, "n f"]) -> dict[str, Float[Array, "n ..."]]:
        """``semantic`` [n, d], ``uncertainty`` [n, k] and ``semantic_norm`` [n], the length before normalising."""
        features = features.astype(jnp.float32)
        dense = lambda width, name, init=kaiming_normal: nn.Dense(
            width, kernel_init=init, precision=jax.lax.Precision.HIGHEST, name=name
        )
        semantic = dense(self.embedding_dim, "semantic")(features)
        # The squares are clipped before the root: the gradient of a norm at 0 is NaN.
        norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(semantic), axis=-1), 1e-24))

        def scaled(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
            return self.uncertainty_scale * kaiming_normal(key, shape, dtype)

        if self.uncertainty_head == "mlp":
            hidden = nn.relu(dense(self.uncertainty_hidden, "uncertainty_hidden")(l2_normalize(features)))
            uncertainty = dense(self.uncertainty_dim, "uncertainty", scaled)(hidden)
        elif self.uncertainty_head == "linear":
            uncertainty = dense(self.uncertainty_dim, "uncertainty", scaled)(features)
        elif self.uncertainty_head == "none":
            uncertainty = jnp.zeros((features.shape[0], self.uncertainty_dim), jnp.float32)
        else:
            raise ValueError(
                f"unknown uncertainty head {self.uncertainty_head!r}; known: {', '.join(UNCERTAINTY_HEADS)}"
            )
        return {
            "semantic": l2_normalize(semantic) if self.normalize else semantic,
            "uncertainty": uncertainty,
            "semantic_norm": norm,
        }


def init_proxies(key: Array, num_classes: int, dim: int) -> Float[Array, "classes dim"]:
    """Proxies drawn kaiming-normal with fan-out, as ProxyAnchor's: normal with variance 2 / classes.

    Args:
      key: PRNG key.
      num_classes: number of training classes.
      dim: width of the semantic embedding.

    Returns:
      ``[num_classes, dim]`` float32, one proxy per class; losses compare their directions.
    """
    return jax.random.normal(key, (num_classes, dim), jnp.float32) * jnp.sqrt(2.0 / num_classes)
