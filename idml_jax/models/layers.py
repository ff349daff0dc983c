"""Layers with PyTorch's conventions, so that published weights and settings keep their meaning."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

# Collection of the running statistics of frozen layers; see ``BatchNorm``.
FROZEN_STATS = "frozen_stats"
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _convolve(x: Array, kernel: Array, strides: tuple[int, int], padding: int) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, strides, [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve_looped(x: Array, kernel: Array, strides: tuple[int, int], padding: int) -> Array:
    """The same convolution; its kernel gradient is a matrix product with all patches of ``x``.

    Inside a loop, XLA's CPU compiler does not use its fast routine for that gradient, which makes it about 40 times
    slower (jax 0.10).
    """
    return _convolve(x, kernel, strides, padding)


def _convolve_forward(
    x: Float[Array, "n h w c"], kernel: Float[Array, "kh kw c f"], strides: tuple[int, int], padding: int
) -> tuple[Float[Array, "n oh ow f"], tuple[Float[Array, "n h w c"], Float[Array, "kh kw c f"]]]:
    """The convolution, and what its gradient needs."""
    return _convolve(x, kernel, strides, padding), (x, kernel)


def _convolve_backward(
    strides: tuple[int, int],
    padding: int,
    saved: tuple[Float[Array, "n h w c"], Float[Array, "kh kw c f"]],
    cotangent: Float[Array, "n oh ow f"],
) -> tuple[Float[Array, "n h w c"], Float[Array, "kh kw c f"]]:
    """Gradients with respect to the input and the kernel."""
    x, kernel = saved
    (towards_x,) = jax.vjp(lambda x: _convolve(x, kernel, strides, padding), x)[1](cotangent)
    padded = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    _, height, width, features = cotangent.shape
    cotangent = cotangent.reshape(-1, features)

    def at(row: int, column: int) -> Array:
        rows = slice(row, row + (height - 1) * strides[0] + 1, strides[0])
        columns = slice(column, column + (width - 1) * strides[1] + 1, strides[1])
        return padded[:, rows, columns]

    places = [at(row, column) for row in range(kernel.shape[0]) for column in range(kernel.shape[1])]
    patches = jnp.concatenate(places, axis=-1)
    return towards_x, (patches.reshape(-1, patches.shape[-1]).T @ cotangent).reshape(kernel.shape)


_convolve_looped.defvjp(_convolve_forward, _convolve_backward)


class Conv(nn.Module):
    """Convolution without a bias over ``[n, h, w, c]``, padded explicitly and alike on all sides.

    A 1 x 1 convolution is a matrix product and is computed as such on a CPU, where the kernel gradient of XLA's general
    convolution takes up to eight times as long. On other devices the compiler chooses.

    Attributes:
      features: output channels.
      kernel_size: height and width.
      strides: vertical and horizontal.
      padding: zeros on every side.
      dtype: of the computation; the kernel stays float32.
      looped: whether it is used inside a compiled loop, which needs another implementation on a CPU.
      kernel_init: initialiser of the kernel ``[h, w, in, out]``.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: int = 0
    dtype: jnp.dtype = jnp.float32
    looped: bool = False
    kernel_init: nn.initializers.Initializer = kaiming_normal

    @nn.compact
    def __call__(
        self, x: Float[Array, "n h w c"], factor: Float[Array, "f"] | None = None
    ) -> Float[Array, "n h2 w2 f"]:
        """The convolution, of its kernel or of that times a factor per output channel."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        kernel = (kernel if factor is None else kernel * _along_channels(factor, kernel)).astype(self.dtype)
        x = x.astype(self.dtype)
        on_cpu = jax.default_backend() == "cpu"
        if on_cpu and self.kernel_size == (1, 1) and self.padding == 0:
            x = x[:, :: self.strides[0], :: self.strides[1]]
            # With two axes the kernel gradient is two to three times as fast as with four.
            return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], self.features)
        convolve = _convolve_looped if on_cpu and self.looped else _convolve
        return convolve(x, kernel, self.strides, self.padding)


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, with PyTorch's running statistics.

    Flax's own layer keeps the biased variance as running statistics; PyTorch (and so every published weight file and
    schedule) the unbiased one. Statistics are float32 for every ``dtype``. Under jit the batch is global, so the
    statistics are those of the whole batch over all devices. A layer that has an entry in the collection
    ``frozen_stats`` is frozen: it uses its running statistics in training too.

    On a GPU a frozen layer after a convolution is folded into it: the kernel is multiplied by its factor, and cuDNN
    adds its shift in the same pass. As a layer of its own it would read and write the maps once more.

    Attributes:
      use_running_average: normalise with the running statistics and do not update them.
      momentum: share of the old running value that stays (0.9 is PyTorch's momentum 0.1).
      epsilon: added to the variance.
      dtype: of the result.
      scale_init: initialiser of the scale.
    """

    use_running_average: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: Float[Array, "n *size c"], after: Conv | None = None) -> Float[Array, "n *size2 f"]:
        """Normalises ``x``, or ``after(x)``, the result of a convolution."""
        frozen = self.use_running_average or self.has_variable(FROZEN_STATS, "mean")
        folded = after if frozen and jax.default_backend() == "gpu" else None
        if after is not None and folded is None:
            x = after(x)
        channels = x.shape[-1] if folded is None else folded.features
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        scale = self.param("scale", self.scale_init, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        if frozen:
            center, spread = mean.value, variance.value
        else:
            axes = tuple(range(x.ndim - 1))
            wide = x.astype(jnp.float32)
            center = jnp.mean(wide, axes)
            spread = jnp.mean(jnp.square(wide - _along_channels(center, x)), axes)
            if not self.is_initializing():
                count = x.size // channels
                unbiased = spread * (count / max(count - 1, 1))
                mean.value = self.momentum * mean.value + (1 - self.momentum) * jax.lax.stop_gradient(center)
                variance.value = self.momentum * variance.value + (1 - self.momentum) * jax.lax.stop_gradient(unbiased)
        factor = scale * jax.lax.rsqrt(spread + self.epsilon)
        shift = bias - center * factor
        if folded is not None:
            # In the type of the result: only then does the compiler fuse the addition.
            x = folded(x, factor).astype(self.dtype)
            return x + _along_channels(shift.astype(self.dtype), x)
        x = x.astype(jnp.float32) * _along_channels(factor, x) + _along_channels(shift, x)
        return x.astype(self.dtype)


def _along_channels(vector: Float[Array, "c"], x: Array) -> Array:
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def _by_result(function: Callable[[Array], Array], passes: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A function whose gradient, 1 or 0, follows from its result: 1 where ``passes``."""
    function = jax.custom_jvp(function)

    @function.defjvp
    def jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        # Without the barrier the compiler finds that the input says the same, and keeps that.
        result = jax.lax.optimization_barrier(function(*primals))
        return result, jnp.where(passes(result), tangents[0], 0)

    return function


_relu_by_result = _by_result(lambda x: jnp.maximum(x, 0), lambda y: y > 0)
_relu6_by_result = _by_result(lambda x: jnp.clip(x, 0, 6), lambda y: (y > 0) & (y < 6))


def relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``max(x, 0)`` with gradient 0 at 0; NaN stays NaN.

    On a GPU the gradient reads the result, which the next layer needs anyway, and not the input. So one map less is
    kept for the backward pass. The compilers for TPUs and CPUs do without.
    """
    return _relu_by_result(x) if jax.default_backend() == "gpu" else nn.relu(x)


def relu6(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``min(max(x, 0), 6)`` with gradient 0 at both ends, as in PyTorch; NaN stays NaN. Computed like ``relu``."""
    if jax.default_backend() == "gpu":
        return _relu6_by_result(x)
    return jnp.where(x >= 6.0, jnp.asarray(6.0, x.dtype), nn.relu(x))


def max_pool_2x2(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """Maximum over non-overlapping 2 x 2 windows; an odd last row or column is dropped, as in PyTorch.

    As a maximum of four slices: the gradient of XLA's window reduction is many times slower on a CPU.
    """
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    x = x[:, :height, :width, :]
    top = jnp.maximum(x[:, 0::2, 0::2], x[:, 0::2, 1::2])
    bottom = jnp.maximum(x[:, 1::2, 0::2], x[:, 1::2, 1::2])
    return jnp.maximum(top, bottom)


def max_pool_3x3(x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    """Maximum over 3 x 3 windows two apart, one row and column of padding on each side: the ImageNet stem's.

    On a CPU as two maxima of three slices, for the reason given at ``max_pool_2x2``.
    """
    if jax.default_backend() != "cpu":
        return nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    for axis in (1, 2):
        size = (x.shape[axis] + 1) // 2
        padding = [(0, 0)] * 4
        padding[axis] = (1, 1)
        padded = jnp.pad(x, padding, constant_values=-jnp.inf)
        slices = [jax.lax.slice_in_dim(padded, i, i + 2 * size - 1, 2, axis) for i in range(3)]
        x = jnp.maximum(jnp.maximum(slices[0], slices[1]), slices[2])
    return x


@jax.custom_jvp
def max_global(x: Float[Array, "n h w c"]) -> Float[Array, "n c"]:
    """Maximum over the places of a map; its gradient is divided among equal maxima, as by ``jnp.max``.

    A compiler may compute the map twice, rounded in two ways, and compare one with the maximum of the other. If then no
    place equals the maximum, the gradient of ``jnp.max`` is 0 / 0; here it is 0.
    """
    return jnp.max(x, axis=(1, 2))


@max_global.defjvp
def _max_global_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    largest = max_global(x)
    reached = (x == largest[:, None, None]).astype(tangent.dtype)
    count = jnp.maximum(jnp.sum(reached, axis=(1, 2)), 1.0)
    return largest, jnp.sum(tangent * reached, axis=(1, 2)) / count


def generalized_mean(x: Float[Array, "n h w c"], power: Float[Array, "1"]) -> Float[Array, "n c"]:
    """``mean(max(x, 1e-6) ** p) ** (1 / p)`` over the places of a map, in float32 (Radenovic et al., TPAMI 2019).

    Computed with logarithms: ``1e-6 ** p`` is 0 in float32 from p = 7.5 on, and the root of 0 has no gradient.

    Args:
      x: ``[n, h, w, c]`` feature maps that are not negative.
      power: ``[1]``, p; 1 is the average, and the maximum is approached as it grows.

    Returns:
      ``[n, c]`` float32.
    """
    logarithms = jnp.log(jnp.maximum(x.astype(jnp.float32), 1e-6))
    sums = jax.nn.logsumexp(power[None, None, None] * logarithms, axis=(1, 2))
    return jnp.exp((sums - math.log(x.shape[1] * x.shape[2])) / power[None])


class GeM(nn.Module):
    """Global pooling by ``generalized_mean`` with a learned power that starts at 3."""

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n c"]:
        return generalized_mean(x, self.param("pool_p", nn.initializers.constant(3.0), (1,), jnp.float32))


def pool_global(x: Float[Array, "n h w c"], pooling: str) -> Float[Array, "n c"]:
    """Global pooling in float32: ``avg``, ``max`` or their sum ``avg_max`` (the paper's).

    Args:
      x: ``[n, h, w, c]`` feature maps.
      pooling: one of the three names; ``GeM``, which has a parameter, is a layer of its own.

    Returns:
      ``[n, c]`` float32.

    Raises:
      ValueError: for another name.
    """
    if pooling not in ("avg", "max", "avg_max"):
        raise ValueError(f"unknown pooling {pooling!r}; known: avg, max, avg_max, gem")
    x = x.astype(jnp.float32)
    pooled = jnp.zeros((), jnp.float32)
    if "avg" in pooling:
        pooled = pooled + jnp.mean(x, axis=(1, 2))
    if "max" in pooling:
        pooled = pooled + max_global(x)
    return pooled
