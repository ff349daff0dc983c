"""Samples of von Mises-Fisher distributions, as differentiable functions of mean direction and concentration.

The angle between a sample and the mean has the density ``exp(kappa cos t) sin(t)^(d - 2)`` on [0, pi], and the
direction around the mean is uniform. The angle is found by inverting its distribution function on a grid around the
mode, so nothing is rejected and the shapes are fixed; its derivative is implicit (Figurnov et al., NeurIPS 2018):
``dt / dkappa = -(dF / dkappa) / f``.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from idml_jax.ism import l2_normalize

__all__ = ["angle", "sample_vmf"]

# Number of points of the grid, and its half width in standard deviations around the mode.
_POINTS, _REACH = 257, 8.0


def sample_vmf(
    keys: PRNGKeyArray, mean: Float[Array, "n d"], kappa: Float[Array, "n"], samples: int
) -> Float[Array, "k n d"]:
    """Draws ``samples`` directions for each mean.

    Args:
      keys: ``[n]`` keys, one per row.
      mean: ``[n, d]`` of length 1, ``d`` at least 2.
      kappa: ``[n]`` concentrations, above 0.
      samples: number of samples.

    Returns:
      ``[samples, n, d]`` of length 1.

    >>> mean = jnp.array([[1.0, 0.0, 0.0]])
    >>> draw = jax.jit(lambda keys: sample_vmf(keys, mean, jnp.array([50.0]), 1000))
    >>> drawn = draw(jax.random.split(jax.random.key(0), 1))
    >>> drawn.shape, round(float(drawn[:, 0, 0].mean()), 2)  # coth(50) - 1 / 50
    ((1000, 1, 3), 0.98)
    """
    d = mean.shape[1]

    def of_row(key: PRNGKeyArray, mu: Array, concentration: Array) -> Array:
        around, along = jax.random.split(key)
        uniform = jax.random.uniform(along, (samples,), mean.dtype)
        theta = angle(uniform, jnp.full_like(uniform, 1.0) * concentration, d)
        noise = jax.random.normal(around, (samples, d), mean.dtype)
        tangent = l2_normalize(noise - jnp.sum(noise * mu[None, :], axis=1, keepdims=True) * mu[None, :])
        return jnp.cos(theta)[:, None] * mu[None, :] + jnp.sin(theta)[:, None] * tangent

    return jnp.moveaxis(jax.vmap(of_row)(keys, mean, kappa), 1, 0)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def angle(uniform: Float[Array, "k"], kappa: Float[Array, "k"], dimension: int) -> Float[Array, "k"]:
    """The angle at which the distribution function of the angle has a value: a sample, if the value is uniform.

    Args:
      uniform: ``[k]`` in [0, 1].
      kappa: ``[k]`` concentrations, above 0; the angle is differentiated with respect to it alone.
      dimension: d, at least 2.

    Returns:
      ``[k]`` angles in [0, pi].

    >>> draw = jax.jit(angle, static_argnums=2)
    >>> draw(jnp.array([0.5]), jnp.array([1e-3]), 3).round(2).tolist()  # the equator halves the sphere
    [1.57]
    """
    return _angle_and_slope(uniform, kappa, dimension)[0]


@angle.defjvp
def _angle_jvp(dimension: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    theta, slope = _angle_and_slope(*primals, dimension)
    return theta, slope * tangents[1]


def _angle_and_slope(uniform: Array, kappa: Array, dimension: int) -> tuple[Array, Array]:
    """The angle and its derivative by the concentration."""
    power = dimension - 2.0
    # Mode of kappa cos t + power log sin t, written without cancellation, and its curvature.
    root = jnp.sqrt(power * power + 4.0 * kappa * kappa) if power else 2.0 * kappa
    cosine = 2.0 * kappa / (power + root)
    square = power / kappa * cosine  # sin^2 at the mode
    # Half an angle's sine keeps small angles exact.
    mode = 2.0 * jnp.arcsin(jnp.sqrt(jnp.clip(square / (2.0 * (1.0 + cosine)), 0.0, 1.0)))
    curvature = kappa * cosine + jnp.where(power > 0, power / jnp.maximum(square, 1e-30), 0.0)
    reach = _REACH / jnp.sqrt(curvature)
    low, high = jnp.maximum(mode - reach, 0.0), jnp.minimum(mode + reach, jnp.pi)
    steps = jnp.linspace(0.0, 1.0, _POINTS, dtype=kappa.dtype)[None, :]
    grid = low[:, None] + (high - low)[:, None] * steps
    # 1 - cos t as 2 sin^2(t / 2), relative to the mode, so that a large concentration cancels nothing.
    versine = lambda t: 2.0 * jnp.square(jnp.sin(0.5 * t))
    log_density = -kappa[:, None] * (versine(grid) - versine(mode)[:, None])
    if power:
        log_density += power * (jnp.log(jnp.maximum(jnp.sin(grid), 1e-30)) - jnp.log(jnp.sin(mode))[:, None])
    density = jnp.exp(log_density)

    def integral(values: Array) -> Array:
        """Up to each point, by the trapezoidal rule in units of a step."""
        return jnp.cumsum(jnp.pad(0.5 * (values[:, 1:] + values[:, :-1]), ((0, 0), (1, 0))), axis=1)

    mass = integral(density)
    # The derivative of F by kappa: the integral of (cos t - its mean) f.
    height = -versine(grid)
    mean = integral(height * density)[:, -1:] / mass[:, -1:]
    pulled = integral((height - mean) * density)
    wanted = uniform * mass[:, -1]
    cell = jnp.clip(jnp.sum(mass <= wanted[:, None], axis=1) - 1, 0, _POINTS - 2)
    at = lambda x, index: jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]
    left, right = at(density, cell), at(density, cell + 1)
    # The density is taken as a line within a cell: the mass left + (right - left) x / 2 per x, solved for x.
    rest = wanted - at(mass, cell)
    root = jnp.sqrt(jnp.maximum(left * left + 2.0 * (right - left) * rest, 0.0))
    share = jnp.clip(2.0 * rest / jnp.maximum(left + root, 1e-30), 0.0, 1.0)
    step = (high - low) / (_POINTS - 1)
    theta = at(grid, cell) + share * step
    here = left + share * (right - left)
    up_to = at(pulled, cell) + share * (at(pulled, cell + 1) - at(pulled, cell))
    slope = jnp.where(here > 1e-12, -up_to / jnp.maximum(here, 1e-12), 0.0) * step
    return theta, slope
