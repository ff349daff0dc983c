"""Depthwise convolutions: every channel has a kernel of its own."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

# He initialisation by fan-out, as timm counts it: an output feeds h w places of one channel; of [h, w, 1, c] that is
# what JAX calls fan-in.
depthwise_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def _convolve(
    x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw 1 c"], strides: tuple[int, int]
) -> Float[Array, "n oh ow c"]:
    return jax.lax.conv_general_dilated(
        x, kernel, strides, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1]
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve_on_cpu(
    x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw 1 c"], strides: tuple[int, int]
) -> Float[Array, "n oh ow c"]:
    """The same convolution as a sum of shifted maps, each times its place of the kernel; sums are float32.

    XLA's CPU compiler has no fast routine for depthwise convolutions; this form is several times as fast, as are its
    gradients, and no slower inside of a loop (jax 0.10).
    """
    height, width = ((x.shape[i + 1] - kernel.shape[i]) // strides[i] + 1 for i in (0, 1))
    total = jnp.zeros((), jnp.float32)
    for row in range(kernel.shape[0]):
        for column in range(kernel.shape[1]):
            shifted = _shifted(x, row, column, (height, width), strides)
            total = total + shifted * kernel[None, None, None, row, column, 0].astype(jnp.float32)
    return total.astype(x.dtype)


def _shifted(
    x: Float[Array, "n h w c"], row: int, column: int, size: tuple[int, int], strides: tuple[int, int]
) -> Float[Array, "n oh ow c"]:
    """What the place ``(row, column)`` of a kernel sees at every output, in float32."""
    rows = slice(row, row + (size[0] - 1) * strides[0] + 1, strides[0])
    columns = slice(column, column + (size[1] - 1) * strides[1] + 1, strides[1])
    return x[:, rows, columns].astype(jnp.float32)


def _convolve_forward(
    x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw 1 c"], strides: tuple[int, int]
) -> tuple[Float[Array, "n oh ow c"], tuple[Float[Array, "n h w c"], Float[Array, "kh kw 1 c"]]]:
    """The convolution, and what its gradient needs."""
    return _convolve_on_cpu(x, kernel, strides), (x, kernel)


def _convolve_backward(
    strides: tuple[int, int],
    saved: tuple[Float[Array, "n h w c"], Float[Array, "kh kw 1 c"]],
    cotangent: Float[Array, "n oh ow c"],
) -> tuple[Float[Array, "n h w c"], Float[Array, "kh kw 1 c"]]:
    """Gradients with respect to the input and the kernel."""
    x, kernel = saved
    size = (cotangent.shape[1], cotangent.shape[2])
    # Towards the input: the turned kernel over the outputs, which lie a stride apart.
    borders = [(0, 0, 0)]
    for axis in (0, 1):
        side, stride = kernel.shape[axis], strides[axis]
        unread = x.shape[axis + 1] - ((size[axis] - 1) * stride + side)
        borders.append((side - 1, side - 1 + unread, stride - 1))
    spread = jax.lax.pad(cotangent, jnp.zeros((), cotangent.dtype), [*borders, (0, 0, 0)])
    towards_x = _convolve_on_cpu(spread, kernel[::-1, ::-1], (1, 1))
    wide = cotangent.astype(jnp.float32)

    def of_row(row: Array) -> Float[Array, "kw c"]:
        seen = jax.lax.dynamic_slice_in_dim(x, row, (size[0] - 1) * strides[0] + 1, axis=1)
        columns = range(kernel.shape[1])
        return jnp.stack([jnp.sum(_shifted(seen, 0, column, size, strides) * wide, (0, 1, 2)) for column in columns])

    # A loop over the rows: all sums at once take longer to compile, and to run.
    towards_kernel = jax.lax.map(of_row, jnp.arange(kernel.shape[0]))
    return towards_x, towards_kernel.reshape(kernel.shape).astype(kernel.dtype)


_convolve_on_cpu.defvjp(_convolve_forward, _convolve_backward)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's padding ``SAME`` before and after: ``ceil(size / stride)`` outputs, an odd pixel goes to the end."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def pad_same(x: Float[Array, "n h w c"], kernel: int, stride: int) -> Float[Array, "n h2 w2 c"]:
    """Maps with the zeros that ``SAME`` adds, for a convolution without padding."""
    borders = [same_padding(x.shape[axis], kernel, stride) for axis in (1, 2)]
    return jnp.pad(x, ((0, 0), *borders, (0, 0)))


class DepthwiseConv(nn.Module):
    """Depthwise convolution over ``[n, h, w, c]`` without padding; pad before, see ``pad_same``.

    Attributes:
      kernel_size: side of the square kernel.
      stride: vertical and horizontal.
      use_bias: add a learned number to every channel.
      dtype: of the computation; parameters stay float32.
      kernel_init: initialiser of the kernel ``[h, w, 1, c]``.
    """

    kernel_size: int
    stride: int = 1
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = depthwise_normal

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
        channels = x.shape[-1]
        shape = (self.kernel_size, self.kernel_size, 1, channels)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32).astype(self.dtype)
        convolve = _convolve_on_cpu if jax.default_backend() == "cpu" else _convolve
        x = convolve(x.astype(self.dtype), kernel, (self.stride, self.stride))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
            x = x + bias[None, None, None].astype(self.dtype)
        return x
