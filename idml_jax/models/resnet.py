"""ResNet v1.5 trunks (He et al., CVPR 2016), laid out as in torchvision.

The stride of a bottleneck sits in its 3 x 3 convolution (in v1, the authors' Caffe files and Keras, in the 1 x 1 before
it), padding is explicit (SAME differs at stride 2) and the last BatchNorm of a block can start at zero.
``stem='small'`` replaces the 7 x 7 stride-2 convolution and the max-pooling by one 3 x 3 convolution, for images of 32
to 64 pixels. ``shortcut='pad'`` replaces the convolution of a shortcut by every second pixel and zeros for the new
channels: the CIFAR networks of the paper's section 4.2.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from idml_jax.models.layers import BatchNorm, Conv, max_pool_3x3, relu

ModuleDef = Callable[..., nn.Module]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and the shortcut."""

    features: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef
    shortcut: str = "conv"
    expansion = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv1 = self.conv(self.features, (3, 3), (self.stride, self.stride), padding=1, name="conv1")
        y = relu(self.norm(name="bn1")(x, after=conv1))
        y = self.norm(name="bn2")(y, after=self.conv(self.features, (3, 3), padding=1, name="conv2"))
        return relu(y + _shortcut(self, x, y.shape[-1]))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (with the stride) and 1 x 1 convolutions, four times as wide at the end, and the shortcut."""

    features: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef
    shortcut: str = "conv"
    expansion = 4
    stride_first = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        first, second = (self.stride, 1) if self.stride_first else (1, self.stride)
        conv1 = self.conv(self.features, (1, 1), (first, first), name="conv1")
        conv2 = self.conv(self.features, (3, 3), (second, second), padding=1, name="conv2")
        conv3 = self.conv(self.features * self.expansion, (1, 1), name="conv3")
        y = relu(self.norm(name="bn1")(x, after=conv1))
        y = relu(self.norm(name="bn2")(y, after=conv2))
        y = self.norm(name="bn3")(y, after=conv3)
        return relu(y + _shortcut(self, x, y.shape[-1]))


class BottleneckV1(Bottleneck):
    """With the stride in the first 1 x 1 convolution."""

    stride_first = True


def _shortcut(block: BasicBlock | Bottleneck, x: Array, features: int) -> Array:
    if x.shape[-1] == features and block.stride == 1:
        return x
    if block.shortcut == "pad":
        x = x[:, :: block.stride, :: block.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))
    conv = block.conv(features, (1, 1), (block.stride, block.stride), name="downsample_conv")
    return block.norm(name="downsample_bn")(x, after=conv)


class ResNet(nn.Module):
    """A ResNet without its classifier.

    Attributes:
      stage_sizes: blocks per stage.
      block: ``BasicBlock``, ``Bottleneck`` or ``BottleneckV1``.
      width: channels of the first stage; doubles with every stage.
      stem: ``imagenet`` or ``small``.
      shortcut: where width or size change: ``conv`` (1 x 1) or ``pad``.
      frozen_statistics: normalise by the running statistics in training too.
      remat: keep only the input of every block for the gradient and compute the rest again.
      looped: see ``Conv``.
      dtype: of convolutions and activations; parameters and statistics stay float32.
    """

    stage_sizes: Sequence[int]
    block: type[BasicBlock] | type[Bottleneck]
    width: int = 64
    stem: str = "imagenet"
    shortcut: str = "conv"
    frozen_statistics: bool = False
    remat: bool = False
    looped: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h2 w2 f"]:
        """Feature maps of the last stage for normalised images."""
        conv = partial(Conv, dtype=self.dtype, looped=self.looped)
        norm = partial(BatchNorm, use_running_average=not train or self.frozen_statistics, dtype=self.dtype)
        x = images.astype(self.dtype)
        if self.stem == "imagenet":
            x = relu(norm(name="bn1")(x, after=conv(self.width, (7, 7), (2, 2), padding=3, name="conv1")))
            x = max_pool_3x3(x)
        elif self.stem == "small":
            x = relu(norm(name="bn1")(x, after=conv(self.width, (3, 3), padding=1, name="conv1")))
        else:
            raise ValueError(f"unknown stem {self.stem!r}; known: imagenet, small")
        block = nn.remat(self.block) if self.remat else self.block
        for stage, blocks in enumerate(self.stage_sizes):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                features = self.width * 2**stage
                x = block(features, stride, conv, norm, self.shortcut, name=f"layer{stage + 1}_{index}")(x)
        return x


ResNet18 = partial(ResNet, stage_sizes=(2, 2, 2, 2), block=BasicBlock)
ResNet34 = partial(ResNet, stage_sizes=(3, 4, 6, 3), block=BasicBlock)
ResNet50 = partial(ResNet, stage_sizes=(3, 4, 6, 3), block=Bottleneck)
ResNet101 = partial(ResNet, stage_sizes=(3, 4, 23, 3), block=Bottleneck)
ResNet152 = partial(ResNet, stage_sizes=(3, 8, 36, 3), block=Bottleneck)
ResNet50V1 = partial(ResNet50, block=BottleneckV1)
ResNet101V1 = partial(ResNet101, block=BottleneckV1)
ResNet152V1 = partial(ResNet152, block=BottleneckV1)
# For CIFAR, of 6 k + 2 layers.
CifarResNet = partial(ResNet, block=BasicBlock, width=16, stem="small", shortcut="pad")
CifarResNet20 = partial(CifarResNet, stage_sizes=(3, 3, 3))
CifarResNet32 = partial(CifarResNet, stage_sizes=(5, 5, 5))
CifarResNet56 = partial(CifarResNet, stage_sizes=(9, 9, 9))
CifarResNet110 = partial(CifarResNet, stage_sizes=(18, 18, 18))
# For images of 32 to 64 pixels on a laptop: half the width of a ResNet-18, half its depth.
ResNet10Small = partial(ResNet, stage_sizes=(1, 1, 1, 1), block=BasicBlock, width=32, stem="small")
# For tests.
_ResNetTiny = partial(ResNet, stage_sizes=(1, 1), block=BasicBlock, width=8, stem="small")
