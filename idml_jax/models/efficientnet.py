"""EfficientNet-Lite (Tan and Le, ICML 2019; TensorFlow's Lite variants), named as in timm.

An EfficientNet without squeeze-and-excitation and with ReLU6. Convolutions are padded as TensorFlow's ``SAME``, which
at stride 2 is another function than equal padding, and BatchNorm has TensorFlow's constants.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from idml_jax.models.depthwise import DepthwiseConv, pad_same
from idml_jax.models.layers import BatchNorm, Conv, relu6
from idml_jax.models.resnet import ModuleDef


class StageSize(NamedTuple):
    """Size of one stage.

    Attributes:
      depth: number of blocks.
      kernel: side of the depthwise kernels.
      stride: of the first block.
      features: output channels.
    """

    depth: int
    kernel: int
    stride: int
    features: int


class SeparableBlock(nn.Module):
    """Depthwise and 1 x 1 convolution: the block of the first stage, which does not expand."""

    size: StageSize
    stride: int
    conv: ModuleDef
    depthwise: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = self.depthwise(self.size.kernel, self.stride, name="conv_dw")(pad_same(x, self.size.kernel, self.stride))
        y = relu6(self.norm(name="bn1")(y))
        y = self.norm(name="bn2")(y, after=self.conv(self.size.features, (1, 1), name="conv_pw"))
        return x + y if self.stride == 1 and x.shape[-1] == y.shape[-1] else y


class InvertedBlock(nn.Module):
    """1 x 1 convolution to six times the width, depthwise and 1 x 1 convolution; a shortcut where the shape stays."""

    size: StageSize
    stride: int
    conv: ModuleDef
    depthwise: ModuleDef
    norm: ModuleDef

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = relu6(self.norm(name="bn1")(x, after=self.conv(6 * x.shape[-1], (1, 1), name="conv_pw")))
        y = self.depthwise(self.size.kernel, self.stride, name="conv_dw")(pad_same(y, self.size.kernel, self.stride))
        y = relu6(self.norm(name="bn2")(y))
        y = self.norm(name="bn3")(y, after=self.conv(self.size.features, (1, 1), name="conv_pwl"))
        return x + y if self.stride == 1 and x.shape[-1] == y.shape[-1] else y


class EfficientNetLite(nn.Module):
    """An EfficientNet-Lite without its classifier.

    Attributes:
      stages: sizes of the stages.
      stem: channels of the first convolution.
      head: channels of the last convolution, the width of the features.
      frozen_statistics: normalise by the running statistics in training too.
      remat: keep only the input of every block for the gradient and compute the rest again.
      looped: see ``layers.Conv``.
      dtype: of convolutions and activations; parameters and statistics stay float32.
    """

    stages: Sequence[StageSize]
    stem: int = 32
    head: int = 1280
    frozen_statistics: bool = False
    remat: bool = False
    looped: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h2 w2 f"]:
        """Feature maps for normalised images."""
        fixed = not train or self.frozen_statistics
        conv = partial(Conv, dtype=self.dtype, looped=self.looped)
        depthwise = partial(DepthwiseConv, dtype=self.dtype)
        norm = partial(BatchNorm, use_running_average=fixed, momentum=0.99, epsilon=1e-3, dtype=self.dtype)
        stem = conv(self.stem, (3, 3), (2, 2), name="conv_stem")
        x = relu6(norm(name="bn1")(pad_same(images.astype(self.dtype), 3, 2), after=stem))
        for stage, size in enumerate(self.stages):
            kind = InvertedBlock if stage else SeparableBlock
            block = nn.remat(kind) if self.remat else kind
            for index in range(size.depth):
                stride = 1 if index else size.stride
                x = block(size, stride, conv, depthwise, norm, name=f"blocks_{stage}_{index}")(x)
        return relu6(norm(name="bn2")(x, after=conv(self.head, (1, 1), name="conv_head")))


LITE0 = (
    StageSize(1, 3, 1, 16),
    StageSize(2, 3, 2, 24),
    StageSize(2, 5, 2, 40),
    StageSize(3, 3, 2, 80),
    StageSize(3, 5, 1, 112),
    StageSize(4, 5, 2, 192),
    StageSize(1, 3, 1, 320),
)
EfficientNetLite0 = partial(EfficientNetLite, stages=LITE0)
# For tests.
_EfficientNetToy = partial(EfficientNetLite, stages=(StageSize(1, 3, 1, 8), StageSize(1, 5, 2, 12)), stem=8, head=16)
