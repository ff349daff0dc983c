"""The expected likelihood kernel of two von Mises-Fisher distributions, by sums that neither overflow nor cancel.

With the normaliser ``C(k)`` of the distribution on the sphere in d dimensions, the kernel of the distributions around
``a`` and ``b`` is ``integral p q = C(k_a) C(k_b) / C(|| k_a a + k_b b ||)``. ``C`` holds the modified Bessel function
``I`` of order ``d / 2 - 1``. Its logarithm is taken from the expansion that is uniform in the argument (Abramowitz and
Stegun, 9.7.7) at orders of at least 14, where five terms leave an error of 1e-8; smaller orders follow from larger ones
by the recurrence, of which all terms are positive.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpy.polynomial import Polynomial

__all__ = ["log_kernel"]

# Least order at which the expansion is used, and its number of terms after the first.
_ORDER, _TERMS = 14, 5
# Of the sum of the two vectors, and of either.
Three = tuple[Array, ...]


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def log_kernel(
    cosine: Float[Array, "n m"], kappa: Float[Array, "n"], other: Float[Array, "m"], dimension: int
) -> Float[Array, "n m"]:
    """Logarithm of the kernel, less that of two uniform distributions.

    It is 0 if one of the two is uniform, above 0 for means that agree, below for means that are opposite.

    Args:
      cosine: ``[n, m]`` cosines of the angles between the means.
      kappa: ``[n]`` concentrations of the rows' distributions, at least 0.
      other: ``[m]`` concentrations of the columns' distributions.
      dimension: d, at least 2.

    Returns:
      ``[n, m]``, differentiable by all three.

    >>> kernel = jax.jit(log_kernel, static_argnums=3)(jnp.array([[1.0, -1.0]]), jnp.array([2.0]), jnp.full(2, 2.0), 3)
    >>> kernel.round(3).tolist()  # in 3 dimensions C(k) ~ k / sinh(k): log(sinh(4) / 4) - 2 log(sinh(2) / 2), and at 0
    [[0.729, -1.19]]
    """
    return _value_and_ratios(cosine, kappa, other, dimension)[0]


@log_kernel.defjvp
def _log_kernel_jvp(
    dimension: int, primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    """By ``d/dk log(1 / C(k)) = I(d / 2)(k) / I(d / 2 - 1)(k) = k F(d / 2)(k) / (d F(d / 2 - 1)(k))``."""
    cosine, kappa, other = primals
    of_cosine, of_kappa, of_other = tangents
    value, ratios = _value_and_ratios(cosine, kappa, other, dimension)
    a, b, da, db = kappa[:, None], other[None, :], of_kappa[:, None], of_other[None, :]
    half_square = (a + b * cosine) * da + (b + a * cosine) * db + a * b * of_cosine
    return value, (ratios[0] * half_square - ratios[1] * a * da - ratios[2] * b * db) / dimension


def _value_and_ratios(
    cosine: Float[Array, "n m"], kappa: Float[Array, "n"], other: Float[Array, "m"], dimension: int
) -> tuple[Float[Array, "n m"], Three]:
    """The kernel, and ``F(d / 2) / F(d / 2 - 1)`` at the length of the sum and at both concentrations."""
    order = dimension / 2 - 1
    steps = max(0, math.ceil(_ORDER - order))
    top = order + steps
    y, z = kappa[:, None] / top, other[None, :] / top
    # Of the sum of the two vectors, without cancellation where they are opposite.
    square = jnp.square(y - z) + 2.0 * y * z * jnp.maximum(1.0 + cosine, 0.0)
    squares = square, jnp.square(y), jnp.square(z)
    c, a, b = (jnp.sqrt(1.0 + x) for x in squares)
    over_c, over_a, over_b = (x / (root + 1.0) for x, root in zip(squares, (c, a, b), strict=True))  # root - 1
    # over_c - over_a - over_b: of large concentrations only the angle between them is left.
    short = lambda x, root: 1.0 - 1.0 / (root + x)  # x - (root - 1)
    inner = y * short(z, b) + over_b * short(y, a) - y * z * jnp.maximum(1.0 - cosine, 0.0)
    value = top * 2.0 * inner / (c + over_a + b)
    value -= _sum_less_parts(lambda w: top * jnp.log1p(0.5 * w) + 0.5 * jnp.log1p(w), (over_c, over_a, over_b))
    series = _series(top)
    constant = math.log1p(float(series(1.0)))
    value += _sum_less_parts(lambda root: jnp.log1p(_polynomial(series, 1.0 / root)) - constant, (c, a, b))
    ratios = _ratio(c, top, series), _ratio(a, top, series), _ratio(b, top, series)

    def down(step: Array, carry: tuple[Array, Three]) -> tuple[Array, Three]:
        """F(v - 1) = F(v) + k^2 F(v + 1) / (4 v (v + 1)), from the order v to the one below."""
        value, ratios = carry
        v = (top - step).astype(value.dtype)
        of_sum, one, other = (0.25 * top**2 / (v * (v + 1.0)) * x * r for x, r in zip(squares, ratios, strict=True))
        below = 1.0 / (1.0 + of_sum), 1.0 / (1.0 + one), 1.0 / (1.0 + other)
        return value + _sum_less_parts(jnp.log1p, (of_sum, one, other)), below

    # A loop, as the compiler takes minutes for its steps one after another.
    return jax.lax.fori_loop(0, steps, down, (value, ratios)) if steps else (value, ratios)


def _sum_less_parts(function: Callable[[Array], Array], values: Three) -> Array:
    """A function of the sum, less that of either part."""
    of_sum, of_one, of_other = map(function, values)
    return of_sum - of_one - of_other


def _ratio(root: Array, order: float, series: Polynomial) -> Array:
    """``F(order + 1) / F(order)`` with ``F(v) = I(v) / k^v`` scaled to be 1 at ``k = 0``; from the derivative of F."""
    t = 1.0 / root
    slope = _polynomial(series.deriv(), t) / (1.0 + _polynomial(series, t))
    larger = 2.0 * (order + 1.0) / order
    return larger / (1.0 + root) - 0.5 * larger / order * t * t - larger / order * t * t * t * slope


def _series(order: float) -> Polynomial:
    """The sum of ``u_k(t) / order^k`` for k from 1 (Abramowitz and Stegun, 9.3.9 and 9.3.10)."""
    t, term, found = Polynomial([0.0, 1.0]), Polynomial([1.0]), Polynomial([0.0])
    for k in range(1, _TERMS + 1):
        term = 0.5 * t**2 * (1 - t**2) * term.deriv() + ((1 - 5 * t**2) * term).integ() / 8
        found += term / order**k
    return found


def _polynomial(polynomial: Polynomial, t: Array) -> Array:
    """Its value, by Horner's scheme."""
    value = jnp.zeros_like(t)
    for coefficient in polynomial.coef[::-1]:
        value = value * t + float(coefficient)
    return value
