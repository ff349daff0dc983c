"""Vision transformers (Dosovitskiy et al., ICLR 2021), laid out and named as in timm and DINO."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

_truncated = nn.initializers.truncated_normal(0.02)


class Block(nn.Module):
    """Attention and a two-layer network, each after a LayerNorm and with a shortcut."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        norm = partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype, use_fast_variance=False)
        x = x + Attention(self.heads, self.dtype, name="attn")(norm(name="norm1")(x))
        return x + Mlp(4 * x.shape[-1], self.dtype, name="mlp")(norm(name="norm2")(x))


class Attention(nn.Module):
    """Multi-head self-attention; the softmax is float32."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        n, tokens, width = x.shape
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=_truncated)
        parts = dense(3 * width, name="qkv")(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        out = jax.nn.dot_product_attention(parts[:, :, 0], parts[:, :, 1], parts[:, :, 2])
        return dense(width, name="proj")(out.reshape(n, tokens, width))


class Mlp(nn.Module):
    """Two layers with the exact GELU between them."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n t d"]) -> Float[Array, "n t d"]:
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=_truncated)
        y = nn.gelu(dense(self.hidden, name="fc1")(x), approximate=False)
        return dense(x.shape[-1], name="fc2")(y)


class PatchEmbed(nn.Module):
    """Patches to tokens: a convolution with stride equal to its size, computed as a matrix product.

    XLA's CPU compiler takes twice as long for the gradient of the convolution, and a hundred times inside a loop.
    """

    width: int
    patch: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Float[Array, "n h w c"]) -> Float[Array, "n t d"]:
        n, height, width, channels = images.shape
        side = self.patch
        x = images.reshape(n, height // side, side, width // side, side, channels).swapaxes(2, 3)
        return _PatchProjection(self.width, side, self.dtype, name="proj")(x.reshape(n, -1, side * side * channels))


class _PatchProjection(nn.Module):
    """A linear layer whose kernel has the shape of the convolution's, ``[side, side, channels, width]``."""

    width: int
    side: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, patches: Float[Array, "n t p"]) -> Float[Array, "n t d"]:
        shape = (self.side, self.side, patches.shape[-1] // self.side**2, self.width)
        kernel = self.param("kernel", _truncated, shape, jnp.float32).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32).astype(self.dtype)
        return patches.astype(self.dtype) @ kernel.reshape(-1, self.width) + bias[None, None]


class VisionTransformer(nn.Module):
    """A vision transformer without its classifier. It has no BatchNorm.

    Attributes:
      depth: blocks.
      width: width of a token.
      heads: number of attention heads.
      patch: side of a patch in pixels.
      class_token: return only the class token, not the map of patches.
      frozen_statistics: without effect; there are no statistics.
      remat: keep only the input of every block for the gradient and compute the rest again.
      dtype: of layers and activations; parameters and softmax stay float32.
    """

    depth: int
    width: int
    heads: int
    patch: int = 16
    class_token: bool = False
    frozen_statistics: bool = False
    remat: bool = False
    dtype: jnp.dtype = jnp.float32
    has_statistics = False
    signed_maps = True

    def check_images(self, height: int, width: int) -> None:
        """Raises ``ValueError`` if an image of this size is not a whole number of patches."""
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"a vision transformer with patches of {self.patch} pixels needs images of a multiple of it; "
                f"got {height} x {width}"
            )

    @nn.compact
    def __call__(self, images: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n ..."]:
        """The last tokens, normalised: the map of the patches ``[n, h2, w2, width]`` or the class token ``[n, width]``.

        Raises:
          ValueError: if an image is not a whole number of patches.
        """
        n, height, width = images.shape[:3]
        self.check_images(height, width)
        x = PatchEmbed(self.width, self.patch, self.dtype, name="patch_embed")(images.astype(self.dtype))
        token = self.param("cls_token", nn.initializers.normal(1e-6), (1, 1, self.width), jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(token, (n, 1, self.width)).astype(self.dtype), x], axis=1)
        x = x + self.param("pos_embed", _truncated, (1, x.shape[1], self.width), jnp.float32).astype(self.dtype)
        block = nn.remat(Block) if self.remat else Block
        for index in range(self.depth):
            x = block(self.heads, self.dtype, name=f"blocks_{index}")(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, use_fast_variance=False, name="norm")(x)
        if self.class_token:
            return x[:, 0]
        return x[:, 1:].reshape(n, height // self.patch, width // self.patch, self.width)


ViTS16 = partial(VisionTransformer, depth=12, width=384, heads=6)
ViTB16 = partial(VisionTransformer, depth=12, width=768, heads=12)
# For tests.
_ViTTiny = partial(VisionTransformer, depth=2, width=24, heads=3, patch=8)
