"""Blocks of vision transformers: patches, attention, the network inside a block, attention pooling."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from idml_jax.models import positions

truncated = nn.initializers.truncated_normal(0.02)
zeros = nn.initializers.zeros
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_tanh": partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class Family:
    """What tells a family of vision transformers from the others.

    Attributes:
      activation: between the two layers of a block's network: ``gelu`` (exact), ``gelu_tanh`` or ``quick_gelu``.
      epsilon: added to the variance by every LayerNorm.
      layer_scale: initial value of the learned factors on what a block adds; 0: no such factors.
      class_token: whether there is one.
      registers: number of tokens that only the network itself reads (Darcet et al., ICLR 2024).
      learned: position embeddings of ``all`` tokens (class token and patches), of the ``patches``, or ``none``.
      rotary: positions by rotating queries and keys in every block, with this base; 0: not so.
      antialias: how learned positions are resized to another image size; see ``positions``.
      patch_bias: whether the projection of the patches has a bias.
      first_norm: whether a LayerNorm comes before the first block.
      attention_pool: whether the vector of an image is read from the patches by attention (SigLIP).
      key_bias: whether the keys have a bias; without, queries and values have theirs under timm's names for DINOv3.
    """

    activation: str = "gelu"
    epsilon: float = 1e-6
    layer_scale: float = 0.0
    class_token: bool = True
    registers: int = 0
    learned: str = "all"
    rotary: float = 0.0
    antialias: bool = True
    patch_bias: bool = True
    first_norm: bool = False
    attention_pool: bool = False
    key_bias: bool = True

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches."""
        return int(self.class_token) + self.registers

    def norm(self, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
        """A LayerNorm of this family."""
        return nn.LayerNorm(epsilon=self.epsilon, dtype=dtype, use_fast_variance=False, name=name)


class Block(nn.Module):
    """Attention and a two-layer network, each after a LayerNorm and with a shortcut."""

    heads: int
    hidden: int
    family: Family
    grid: positions.Grid
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        family, dtype = self.family, self.dtype
        y = Attention(self.heads, family, self.grid, dtype, name="attn")(family.norm(dtype, "norm1")(x))
        x = x + self.scaled(y, 1)
        y = Mlp(self.hidden, family.activation, dtype, name="mlp")(family.norm(dtype, "norm2")(x))
        return x + self.scaled(y, 2)

    def scaled(self, y: Float[Array, "n t d"], part: int) -> Float[Array, "n t d"]:
        """With the learned factors of the first or second part of the block, if the family has them."""
        if not self.family.layer_scale:
            return y
        start = nn.initializers.constant(self.family.layer_scale)
        if self.family.key_bias:
            return _Scale(start, self.dtype, name=f"ls{part}")(y)
        return y * self.param(f"gamma_{part}", start, (y.shape[-1],), jnp.float32).astype(self.dtype)[None, None]


class _Scale(nn.Module):
    """A learned factor for each channel."""

    start: nn.initializers.Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        return x * self.param("gamma", self.start, (x.shape[-1],), jnp.float32).astype(self.dtype)[None, None]


class Attention(nn.Module):
    """Multi-head self-attention; the softmax is float32."""

    heads: int
    family: Family
    grid: positions.Grid
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        n, tokens, width = x.shape
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=truncated)
        parts = dense(3 * width, use_bias=self.family.key_bias, name="qkv")(x).reshape(n, tokens, 3, width)
        query, key, value = parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]
        if not self.family.key_bias:
            query = query + self.param("q_bias", zeros, (width,), jnp.float32).astype(self.dtype)[None, None]
            value = value + self.param("v_bias", zeros, (width,), jnp.float32).astype(self.dtype)[None, None]
        query, key, value = (part.reshape(n, tokens, self.heads, -1) for part in (query, key, value))
        if self.family.rotary:
            angles = positions.rotary_angles(self.grid, width // self.heads, self.family.rotary)
            query, key = positions.rotate(query, angles), positions.rotate(key, angles)
        out = jax.nn.dot_product_attention(query, key, value)
        return dense(width, name="proj")(out.reshape(n, tokens, width))


class AttentionPool(nn.Module):
    """One vector per image: a learned query attends to all tokens, and a two-layer network follows (SigLIP)."""

    heads: int
    hidden: int
    family: Family
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n d"]:
        n, tokens, width = x.shape
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=truncated)
        latent = self.param("latent", nn.initializers.normal(width**-0.5), (1, 1, width), jnp.float32)
        query = dense(width, name="q")(latent.astype(self.dtype)).reshape(1, 1, self.heads, -1)
        pair = dense(2 * width, name="kv")(x).reshape(n, tokens, 2, self.heads, -1)
        query = jnp.broadcast_to(query, (n, *query.shape[1:]))
        y = jax.nn.dot_product_attention(query, pair[:, :, 0], pair[:, :, 1]).reshape(n, width)
        y = dense(width, name="proj")(y)
        normed = self.family.norm(self.dtype, "norm")(y)
        return y + Mlp(self.hidden, self.family.activation, self.dtype, name="mlp")(normed)


class Mlp(nn.Module):
    """Two layers with an activation between them."""

    hidden: int
    activation: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=truncated)
        y = ACTIVATIONS[self.activation](dense(self.hidden, name="fc1")(x))
        return dense(x.shape[-1], name="fc2")(y)


class PatchEmbed(nn.Module):
    """Patches to tokens: a convolution with stride equal to its size, computed as a matrix product.

    XLA's CPU compiler takes twice as long for the gradient of the convolution, and a hundred times inside a loop.
    """

    width: int
    patch: int
    bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Float[Array, "n h w c"]) -> Float[Array, "n t d"]:
        n, height, width, channels = images.shape
        side = self.patch
        x = images.reshape(n, height // side, side, width // side, side, channels).swapaxes(2, 3)
        x = x.reshape(n, -1, side * side * channels)
        return _PatchProjection(self.width, side, self.bias, self.dtype, name="proj")(x)


class _PatchProjection(nn.Module):
    """A linear layer whose kernel has the shape of the convolution's, ``[side, side, channels, width]``."""

    width: int
    side: int
    bias: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, patches: Float[Array, "n t p"]) -> Float[Array, "n t d"]:
        shape = (self.side, self.side, patches.shape[-1] // self.side**2, self.width)
        kernel = self.param("kernel", truncated, shape, jnp.float32).astype(self.dtype)
        tokens = patches.astype(self.dtype) @ kernel.reshape(-1, self.width)
        if not self.bias:
            return tokens
        return tokens + self.param("bias", zeros, (self.width,), jnp.float32).astype(self.dtype)[None, None]
