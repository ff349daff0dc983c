"""PyramidNet (Han, Kim and Kim, CVPR 2017) for images of 32 pixels: the width grows by the same amount in every block.

Pre-activation blocks without a ReLU before the first convolution and with a BatchNorm at the end. A shortcut has no
parameters: average pooling where the size falls, zeros for the channels that are new.
"""

from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from idml_jax.models.layers import BatchNorm, Conv, relu
from idml_jax.models.resnet import ModuleDef


class PyramidBasic(nn.Module):
    """Two 3 x 3 convolutions."""

    features: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef
    expansion = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        strides = (self.stride, self.stride)
        conv1 = self.conv(self.features, (3, 3), strides, padding=1, name="conv1")
        y = relu(self.norm(name="bn2")(self.norm(name="bn1")(x), after=conv1))
        y = self.norm(name="bn3")(y, after=self.conv(self.features, (3, 3), padding=1, name="conv2"))
        return y + _shortcut(x, self.stride, y.shape[-1])


class PyramidBottleneck(nn.Module):
    """1 x 1, 3 x 3 (with the stride) and 1 x 1 convolutions, four times as wide at the end."""

    features: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef
    expansion = 4

    @nn.compact
    def __call__(self, x: Array) -> Array:
        strides = (self.stride, self.stride)
        conv1 = self.conv(self.features, (1, 1), name="conv1")
        conv2 = self.conv(self.features, (3, 3), strides, padding=1, name="conv2")
        y = relu(self.norm(name="bn2")(self.norm(name="bn1")(x), after=conv1))
        y = relu(self.norm(name="bn3")(y, after=conv2))
        y = self.norm(name="bn4")(y, after=self.conv(self.features * self.expansion, (1, 1), name="conv3"))
        return y + _shortcut(x, self.stride, y.shape[-1])


def _shortcut(x: Float[Array, "n h w c"], stride: int, features: int) -> Float[Array, "n h2 w2 f"]:
    if stride == 2:
        # An odd last row or column is averaged over its existing pixels, as with PyTorch's ceil_mode.
        padding = tuple((0, size % 2) for size in x.shape[1:3])
        x = nn.avg_pool(x, (2, 2), (2, 2), padding, count_include_pad=False)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))


class PyramidNet(nn.Module):
    """An additive PyramidNet without its classifier.

    Attributes:
      depth: layers; ``9 k + 2`` with bottlenecks, ``6 k + 2`` without.
      alpha: growth of the width from the first block to the last, before the bottlenecks' factor 4.
      bottleneck: kind of block.
      frozen_statistics: normalise by the running statistics in training too.
      remat: keep only the input of every block for the gradient and compute the rest again.
      looped: see ``Conv``.
      dtype: of convolutions and activations; parameters and statistics stay float32.
    """

    depth: int
    alpha: float
    bottleneck: bool = True
    frozen_statistics: bool = False
    remat: bool = False
    looped: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h2 w2 f"]:
        """Feature maps of the last stage for normalised images.

        Raises:
          ValueError: for a depth that does not divide into three equal stages.
        """
        layers = 9 if self.bottleneck else 6
        if self.depth < layers + 2 or (self.depth - 2) % layers:
            raise ValueError(f"a PyramidNet has {layers} k + 2 layers; got {self.depth}")
        blocks = (self.depth - 2) // layers
        conv = partial(Conv, dtype=self.dtype, looped=self.looped)
        norm = partial(BatchNorm, use_running_average=not train or self.frozen_statistics, dtype=self.dtype)
        kind = PyramidBottleneck if self.bottleneck else PyramidBasic
        block = nn.remat(kind) if self.remat else kind
        width = 16.0
        x = norm(name="bn1")(images, after=conv(16, (3, 3), padding=1, name="conv1"))
        for stage in range(3):
            for index in range(blocks):
                width += self.alpha / (3 * blocks)
                stride = 2 if stage > 0 and index == 0 else 1
                x = block(round(width), stride, conv, norm, name=f"layer{stage + 1}_{index}")(x)
        return relu(norm(name="bn_final")(x))


PyramidNet200 = partial(PyramidNet, depth=200, alpha=240.0)
PyramidNet110 = partial(PyramidNet, depth=110, alpha=48.0, bottleneck=False)
# For tests.
_PyramidNetTiny = partial(PyramidNet, depth=11, alpha=12.0)
