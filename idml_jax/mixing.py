"""Mixup for retrieval: (key, batch) to batch, inside the jitted step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["Mixed", "blend", "mixup"]


class Mixed(NamedTuple):
    """A mixed batch and what it was mixed from.

    Attributes:
      images: ``[n, h, w, c]``, ``lam * images + (1 - lam) * images[partner]``.
      partner: ``[n]`` the other picture of each.
      lam: share of the first picture, scalar.
    """

    images: Float[Array, "n h w c"]
    partner: Int[Array, "n"]
    lam: Float[Array, ""]


def blend(
    images: Float[Array, "n h w c"], others: Float[Array, "n h w c"], lam: Float[Array, ""] | float
) -> Float[Array, "n h w c"]:
    """``lam * images + (1 - lam) * others``."""
    return lam * images + (1.0 - lam) * others


def mixup(key: Array, images: Float[Array, "n h w c"], alpha: float = 1.0) -> Mixed:
    """Mixup (Zhang et al., ICLR 2018) with one ``lam ~ Beta(alpha, alpha)`` and one permutation per batch.

    The loss of metric learning is then ``L(x', y) lam + L(x', y[partner]) (1 - lam)``, beside ``L(x, y)``.

    Args:
      key: PRNG key.
      images: ``[n, h, w, c]``, normalised or not (mixing is linear).
      alpha: parameter of the Beta distribution, > 0.

    Returns:
      The mixed batch.
    """
    lam_key, partner_key = jax.random.split(key)
    lam = jax.random.beta(lam_key, alpha, alpha)
    partner = jax.random.permutation(partner_key, images.shape[0])
    return Mixed(blend(images, jnp.take(images, partner, axis=0), lam), partner, lam)
