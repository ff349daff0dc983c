"""Vision transformers (Dosovitskiy et al., ICLR 2021), laid out and named as in timm and DINO."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

_truncated = nn.initializers.truncated_normal(0.02)


class Block(nn.Module):
    """Attention and a two-layer network, each behind a LayerNorm and beside a shortcut."""

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
    """Patches to tokens: a convolution whose stride is its size, which is a linear layer on patches."""

    width: int
    patch: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Float[Array, "n h w c"]) -> Float[Array, "n t d"]:
        side = (self.patch, self.patch)
        project = partial(nn.Conv, padding="VALID", dtype=self.dtype, kernel_init=_truncated)
        x = project(self.width, side, side, name="proj")(images)
        return x.reshape(x.shape[0], -1, self.width)


class VisionTransformer(nn.Module):
    """A vision transformer without its classifier. It has no BatchNorm.

    Attributes:
      depth: blocks.
      width: of a token.
      heads: of the attention.
      patch: side of a patch in pixels.
      class_token: give the class token alone, not the map of the patches.
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

    @nn.compact
    def __call__(self, images: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n ..."]:
        """The last tokens, normalised: the map of the patches ``[n, h2, w2, width]`` or the class token ``[n, width]``.

        Raises:
          ValueError: if a picture is not a whole number of patches.
        """
        n, height, width = images.shape[:3]
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"a vision transformer with patches of {self.patch} pixels needs pictures of a multiple of it; "
                f"got {height} x {width}"
            )
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
