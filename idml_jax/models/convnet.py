"""The four-layer convolutional network of the few-shot literature (Vinyals et al., NeurIPS 2016)."""

from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from idml_jax.models.layers import BatchNorm, Conv, max_pool_2x2, relu


class ConvNet(nn.Module):
    """``depth`` times convolution 3 x 3, BatchNorm, ReLU, max-pooling 2 x 2; for images of 28 to 64 pixels.

    Attributes:
      depth: number of layers.
      width: channels of every layer.
      frozen_statistics: normalise by the running statistics in training too.
      looped: see ``Conv``.
      dtype: of convolutions and activations; parameters and statistics stay float32.
    """

    depth: int = 4
    width: int = 64
    frozen_statistics: bool = False
    looped: bool = False
    dtype: jnp.dtype = jnp.float32

    @property
    def block_entries(self) -> tuple[tuple[str, str], ...]:
        """The entries of every layer; see ``models.depth``."""
        return tuple((f"conv{layer + 1}", f"bn{layer + 1}") for layer in range(self.depth))

    def check_images(self, height: int, width: int) -> None:
        """Raises ``ValueError`` if pooling would reduce an image of this size to nothing."""
        if min(height, width) < 2**self.depth:
            raise ValueError(
                f"a ConvNet of depth {self.depth} needs images of at least {2**self.depth} pixels; "
                f"got {height} x {width}"
            )

    @nn.compact
    def __call__(self, images: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h2 w2 f"]:
        """Feature maps for normalised images of at least ``2 ** depth`` pixels."""
        self.check_images(*images.shape[1:3])
        x = images.astype(self.dtype)
        for layer in range(self.depth):
            conv = Conv(self.width, (3, 3), padding=1, dtype=self.dtype, looped=self.looped, name=f"conv{layer + 1}")
            norm = BatchNorm(not train or self.frozen_statistics, dtype=self.dtype, name=f"bn{layer + 1}")
            x = max_pool_2x2(relu(norm(x, after=conv)))
        return x


# For tests.
_ConvNetTiny = partial(ConvNet, depth=2, width=16)
