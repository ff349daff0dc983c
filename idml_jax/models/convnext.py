"""ConvNeXt (Liu et al., "A ConvNet for the 2020s", CVPR 2022), laid out and named as in timm."""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from idml_jax.models.depthwise import DepthwiseConv

_truncated = nn.initializers.truncated_normal(0.02)
_LayerNorm = partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


class PatchConv(nn.Module):
    """Convolution with a bias whose stride equals its size, computed as a matrix product (see ``vit.PatchEmbed``).

    Rows and columns that do not fill a patch are dropped, as by a convolution without padding.
    """

    features: int
    side: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 f"]:
        n, height, width, channels = x.shape
        side, rows, columns = self.side, height // self.side, width // self.side
        shape = (side, side, channels, self.features)
        kernel = self.param("kernel", _truncated, shape, jnp.float32).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        x = x[:, : rows * side, : columns * side].astype(self.dtype)
        patches = x.reshape(n, rows, side, columns, side, channels).swapaxes(2, 3)
        out = patches.reshape(n * rows * columns, -1) @ kernel.reshape(-1, self.features) + bias[None]
        return out.reshape(n, rows, columns, self.features)


class Mlp(nn.Module):
    """Two layers with the exact GELU between them, at every place of the map."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=_truncated)
        y = nn.gelu(dense(4 * x.shape[-1], name="fc1")(x), approximate=False)
        return dense(x.shape[-1], name="fc2")(y)


class Block(nn.Module):
    """Depthwise 7 x 7 convolution, LayerNorm over channels and a two-layer network; LayerScale and a shortcut."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        y = jnp.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
        y = DepthwiseConv(7, use_bias=True, dtype=self.dtype, kernel_init=_truncated, name="conv_dw")(y)
        y = Mlp(self.dtype, name="mlp")(_LayerNorm(dtype=self.dtype, name="norm")(y))
        scale = self.param("gamma", nn.initializers.constant(1e-6), (x.shape[-1],), jnp.float32)
        return x + y * scale[None, None, None].astype(self.dtype)


class Stage(nn.Module):
    """Blocks of one width, after a LayerNorm and a 2 x 2 convolution that halves the map (not in the first stage)."""

    features: int
    depth: int
    halve: bool
    remat: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 f"]:
        if self.halve:
            x = _LayerNorm(dtype=self.dtype, name="downsample_0")(x)
            x = PatchConv(self.features, 2, self.dtype, name="downsample_1")(x)
        block = nn.remat(Block) if self.remat else Block
        for index in range(self.depth):
            x = block(self.dtype, name=f"blocks_{index}")(x)
        return x


class ConvNeXt(nn.Module):
    """A ConvNeXt without its classifier. It has no BatchNorm; its last LayerNorm follows the pooling.

    Attributes:
      depths: blocks per stage.
      widths: channels per stage.
      frozen_statistics: without effect; there are no statistics.
      remat: keep only the input of every block for the gradient and compute the rest again.
      dtype: of layers and activations; parameters and the last LayerNorm stay float32.
    """

    depths: Sequence[int]
    widths: Sequence[int]
    frozen_statistics: bool = False
    remat: bool = False
    dtype: jnp.dtype = jnp.float32
    has_statistics = False
    signed_maps = True

    def setup(self) -> None:
        self.head_norm = _LayerNorm(dtype=jnp.float32)

    def check_images(self, height: int, width: int) -> None:
        """Raises ``ValueError`` if the stages would reduce an image of this size to nothing."""
        least = 4 * 2 ** (len(self.depths) - 1)
        if min(height, width) < least:
            raise ValueError(
                f"a ConvNeXt of {len(self.depths)} stages needs images of at least {least} pixels; "
                f"got {height} x {width}"
            )

    @nn.compact
    def __call__(self, images: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h2 w2 f"]:
        """Feature maps of the last stage for normalised images."""
        self.check_images(*images.shape[1:3])
        x = PatchConv(self.widths[0], 4, self.dtype, name="stem_0")(images)
        x = _LayerNorm(dtype=self.dtype, name="stem_1")(x)
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            x = Stage(width, depth, stage > 0, self.remat, self.dtype, name=f"stages_{stage}")(x)
        return x

    def finish(self, pooled: Float[Array, "n f"]) -> Float[Array, "n f"]:
        """The network's features: its last LayerNorm, on the pooled maps."""
        return self.head_norm(pooled)


ConvNeXtTiny = partial(ConvNeXt, depths=(3, 3, 9, 3), widths=(96, 192, 384, 768))
ConvNeXtSmall = partial(ConvNeXt, depths=(3, 3, 27, 3), widths=(96, 192, 384, 768))
ConvNeXtBase = partial(ConvNeXt, depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024))
# For tests.
_ConvNeXtToy = partial(ConvNeXt, depths=(1, 1), widths=(8, 12))
