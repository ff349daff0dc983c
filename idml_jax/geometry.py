"""Distances, cosines and weakening factors of all pairs of rows: the numerics beneath the metric (``idml_jax.ism``).

Values and gradients are finite even where the textbook formula has ``sqrt(0)`` or ``x / 0``; there the gradient is 0.
Everything is computed in float32 (float64 stays float64; lower precisions are promoted).

Range in float32: gradients are finite for any mixture of rows whose lengths are 0 or between 1e-12 and 1e12. Rows that
are all much longer or shorter are scaled by one common factor. For a mixture of lengths 1e-20 and 1e20 the values are
finite, but some gradients of the uncertainty are not.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["cosine_similarity", "l2_normalize", "pair_uncertainty", "relative_weakening", "semantic_distance"]


def promote(*arrays: Array) -> tuple[Array, ...]:
    """Promotes all arrays to one floating type, at least float32."""
    dtype = jnp.result_type(jnp.float32, *arrays)
    return tuple(jnp.asarray(a).astype(dtype) for a in arrays)


def embedding_pair(a: Any, b: Any) -> tuple[Any, Any]:
    """Two sets of embeddings to compare; ``b`` is ``a`` where it is ``None``.

    Raises:
      ValueError: for an array, of which it is unknown what it holds, and as ``check_rows``.
    """
    for value in (a, b):
        if value is None:
            continue
        if not hasattr(value, "semantic"):
            raise ValueError(
                f"the metric compares embeddings and got {type(value).__name__}; Embedding(semantic, uncertainty) "
                "makes one of arrays [n, d] and [n, k]"
            )
        check_rows(value)
    return a, a if b is None else b


def check_rows(embedding: Any) -> None:
    """Raises ValueError for an uncertainty with other rows than its semantic embeddings: one row would be broadcast."""
    if embedding.uncertainty is None:
        return
    semantic, uncertainty = np.shape(embedding.semantic), np.shape(embedding.uncertainty)
    if semantic[:1] != uncertainty[:1]:
        raise ValueError(f"an embedding needs the shapes [n, d] and [n, k]; got {semantic} and {uncertainty}")


def numbers_of(value: Any) -> np.ndarray:
    """A concrete option as numbers in float64; NaN for what is not a number."""
    try:
        return np.asarray(np.nan if isinstance(value, str | bool) else value, np.float64)
    except (TypeError, ValueError):
        return np.asarray(np.nan)


def _check_matrices(a: Array, b: Array, name: str) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"{name} need the shapes [n, d] and [m, d]; got {a.shape} and {b.shape}")


def _promote_pair(a: Array, b: Array | None, name: str) -> tuple[Array, Array | None]:
    """Checks both sides and promotes them to one floating type; a missing side stays ``None``."""
    if b is None:
        (a,) = promote(a)
        _check_matrices(a, a, name)
        return a, None
    a, b = promote(a, b)
    _check_matrices(a, b, name)
    return a, b


@jax.custom_jvp
def safe_sqrt(x: Array, rounding: Array | float = 0.0) -> Array:
    """Square root that is 0 with gradient 0 for ``x <= rounding``; NaN is passed on.

    The derivative is a function of the root, so that a matrix of distances is all that a gradient keeps.
    """
    return jnp.sqrt(jnp.where(x <= rounding, 0.0, x))


@safe_sqrt.defjvp
def _safe_sqrt_jvp(primals: tuple[Array, Array | float], tangents: tuple[Array, Array | float]) -> tuple[Array, Array]:
    root = safe_sqrt(*primals)
    zero = root == 0.0
    return root, jnp.where(zero, 0.0, 0.5 / jnp.where(zero, 1.0, root)) * tangents[0]


def _common_scale(*arrays: Array) -> Array:
    """A common divisor for values whose squares would overflow or underflow; 1 for ordinary values.

    It is the same for all rows: next to rows of length 1e20 the distances between rows of length 1 vanish.
    """
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(a), initial=0.0) for a in arrays]))
    largest = jax.lax.stop_gradient(largest)
    extreme = (largest > 1e15) | ((largest < 1e-15) & (largest > 0))
    return jnp.where(extreme, largest, 1.0)


def _products(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Inner products of all pairs."""
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _gram(a: Float[Array, "n d"], factor: float = 1.0) -> Float[Array, "n n"]:
    """``factor a a^T``, with its tangent written as ``M + M^T`` so that its gradient needs one matrix product, not two.

    In the gradient the factor multiplies the narrow ``a``, which saves a matrix. The halves are exact, and there for
    XLA on a CPU: it adds ``M / 2`` and its transpose up to five times as fast as ``M`` and its transpose.
    """
    return factor * _products(a, a)


@_gram.defjvp
def _gram_jvp(
    factor: float, primals: tuple[Float[Array, "n d"]], tangents: tuple[Float[Array, "n d"]]
) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
    (a,), (d_a,) = primals, tangents
    half = 0.5 * _products(d_a, 2.0 * factor * a)
    return _gram(a, factor), half + half.T


@jax.custom_jvp
def _cosines(a: Float[Array, "n d"]) -> Float[Array, "n n"]:
    """``_gram`` for losses on similarities.

    Its gradient adds 0 times the row sums of the incoming ``M``. That second use of ``M`` makes XLA on a CPU store it;
    otherwise it is computed twice within ``M + M^T``, once across the rows, which takes longer than a matrix product.
    (Distances have such a use: their norms.)
    """
    return _products(a, a)


@_cosines.defjvp
def _cosines_jvp(
    primals: tuple[Float[Array, "n d"]], tangents: tuple[Float[Array, "n d"]]
) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
    (d_a,) = tangents
    product, tangent = _gram_jvp(1.0, primals, tangents)
    return product, tangent + 0.0 * jnp.sum(d_a, axis=1)[:, None]


def _norm_of_sums(a: Float[Array, "n d"], b: Float[Array, "m d"] | None, sign: float) -> Float[Array, "n m"]:
    """``|| a_i + sign * b_j ||`` for all pairs through one matrix product; ``b=None`` stands for ``a``.

    The expanded square suffers from cancellation: where only rounding error remains, the result is exactly 0, so that
    duplicates have distance 0 and a gradient of 0 instead of noise.
    """
    scale = _common_scale(a, *([] if b is None else [b]))
    a, b = a / scale, None if b is None else b / scale
    product = _gram(a, 2.0 * sign) if b is None else (2.0 * sign) * _products(a, b)
    of_rows = jnp.sum(a * a, axis=1)
    squares = of_rows[:, None] + (of_rows if b is None else jnp.sum(b * b, axis=1))[None, :]
    total = squares + product
    rounding = 4.0 * jnp.finfo(total.dtype).eps * squares
    return scale * safe_sqrt(total, rounding)


def l2_normalize(x: Float[Array, "*batch d"], epsilon: float = 1e-12) -> Float[Array, "*batch d"]:
    """Scales rows to length 1; a zero row stays zero, with gradient zero instead of NaN.

    Args:
      x: ``[..., d]``.
      epsilon: rows shorter than this count as zero.

    Returns:
      ``[..., d]`` in at least float32.

    >>> l2_normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]])).round(3).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    """
    (x,) = promote(x)
    # In two steps, so that squares of huge or tiny rows neither overflow nor underflow.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    zero = largest <= epsilon  # false for NaN, which must be passed on to show a broken network
    scaled = jnp.where(zero, 0.0, x) / jnp.where(zero, 1.0, largest)
    square = jnp.sum(scaled * scaled, axis=-1, keepdims=True)
    return scaled * jnp.where(zero, 0.0, jax.lax.rsqrt(jnp.where(zero, 1.0, square)))


def semantic_distance(a: Float[Array, "n d"], b: Float[Array, "m d"] | None = None) -> Float[Array, "n m"]:
    """Semantic discrepancy ``alpha = || a_i - b_j ||_2`` of all pairs (paper, eq. 4).

    Args:
      a: ``[n, d]`` semantic embeddings.
      b: ``[m, d]``; ``None`` compares ``a`` with itself.

    Returns:
      ``[n, m]``, 0 for exact duplicates. Distances below about 1e-3 of the vectors' length lose digits, as in every
      implementation that uses one matrix product.

    Raises:
      ValueError: if the shapes do not fit.

    >>> semantic_distance(jnp.array([[0.0, 0.0], [3.0, 4.0]])).round(3).tolist()
    [[0.0, 5.0], [5.0, 0.0]]
    """
    a, b = _promote_pair(a, b, "semantic embeddings")
    return _norm_of_sums(a, b, -1.0)


def pair_uncertainty(ua: Float[Array, "n k"], ub: Float[Array, "m k"] | None) -> Float[Array, "n m"]:
    """Uncertainty of the pair ``beta = || ua_i + ub_j ||_2`` (paper, eq. 5).

    The vectors are added before the norm is taken, so it depends on both images jointly. Unlike in
    ``semantic_distance``, ``ub=None`` means that the second side is certain (``u = 0``: proxies, prototypes).

    Args:
      ua: ``[n, k]`` uncertainty embeddings.
      ub: ``[m, k]``, or ``None`` for certain references.

    Returns:
      ``[n, m]``, or ``[n, 1]`` for ``ub=None`` (it broadcasts over the references).

    Raises:
      ValueError: if the shapes do not fit.

    >>> u = jnp.array([[3.0, 0.0], [0.0, 4.0]])
    >>> pair_uncertainty(u, u).round(3).tolist()  # each with itself: twice its length
    [[6.0, 5.0], [5.0, 8.0]]
    >>> pair_uncertainty(u, None).round(3).tolist()
    [[3.0], [4.0]]
    """
    if ub is None:
        (ua,) = promote(ua)
        _check_matrices(ua, ua, "uncertainty embeddings")
        scale = _common_scale(ua)
        return scale * safe_sqrt(jnp.sum((ua / scale) ** 2, axis=1, keepdims=True))
    ua, ub = _promote_pair(ua, None if ub is ua else ub, "uncertainty embeddings")
    return _norm_of_sums(ua, ub, 1.0)


def cosine_similarity(a: Float[Array, "n d"], b: Float[Array, "m d"] | None = None) -> Float[Array, "n m"]:
    """Cosine of all pairs; the rows need not be normalised.

    Args:
      a: ``[n, d]``.
      b: ``[m, d]``; ``None`` compares ``a`` with itself.

    Returns:
      ``[n, m]``; 0 for a zero row.

    Raises:
      ValueError: if the shapes do not fit.

    >>> cosine_similarity(jnp.array([[2.0, 0.0], [3.0, 4.0]])).round(3).tolist()
    [[1.0, 0.6], [0.6, 1.0]]
    """
    a, b = _promote_pair(a, b, "semantic embeddings")
    a = l2_normalize(a)
    return _cosines(a) if b is None else _products(a, l2_normalize(b))


@jax.custom_jvp
def relative_weakening(
    alpha: Float[Array, "*shape"], beta: Float[Array, "*shape"], temperature: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """``exp(-beta / (temperature alpha))`` for ``alpha, beta >= 0``, with finite derivatives; 1 where beta is 0.

    Args:
      alpha: discrepancies, at least 0.
      beta: uncertainties, at least 0, of the same shape and type.
      temperature: tau > 0, of the same shape and type.

    Returns:
      The factor, in [0, 1]; 0 where alpha is 0 and beta is not.

    >>> alpha, beta = jnp.array([1.0, 1.0, 2.0, 0.0]), jnp.array([0.0, 5.0, 5.0, 1.0])
    >>> relative_weakening(alpha, beta, jnp.full(4, 5.0)).round(3).tolist()
    [1.0, 0.368, 0.607, 0.0]
    """
    return _relative_weakening_parts(alpha, beta, temperature)[0]


def _relative_weakening_parts(alpha: Array, beta: Array, temperature: Array) -> tuple[Array, Array, Array]:
    # Beyond the limit the factor and its derivatives underflow to 0 in this float type.
    limit = 80.0 if alpha.dtype == jnp.float32 else 700.0
    regular = (alpha > 0) & (beta <= limit * temperature * alpha)
    divisor = jnp.where(regular, temperature * alpha, 1.0)
    exponent = jnp.where(regular, beta / divisor, 0.0)
    edge = jnp.where(beta > 0, 0.0, jnp.where(beta == 0, 1.0, jnp.nan))
    factor = jnp.where(regular, jnp.exp(-exponent), edge)
    return factor, exponent, jnp.where(regular, factor, 0.0)


@relative_weakening.defjvp
def _relative_weakening_jvp(
    primals: tuple[Float[Array, "*shape"], Float[Array, "*shape"], Float[Array, "*shape"]],
    tangents: tuple[Float[Array, "*shape"], Float[Array, "*shape"], Float[Array, "*shape"]],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    # In closed form, because the automatic derivative of a quotient squares its denominator, which can vanish.
    alpha, beta, temperature = primals
    d_alpha, d_beta, d_temperature = tangents
    factor, exponent, live = _relative_weakening_parts(alpha, beta, temperature)
    safe = jnp.where(alpha > 0, alpha, 1.0)
    towards_alpha = live * exponent / safe
    towards_beta = -live / temperature / safe
    towards_temperature = live * exponent / temperature
    return factor, towards_alpha * d_alpha + towards_beta * d_beta + towards_temperature * d_temperature


def released_weakening(square: Float[Array, "n m"], length: Float[Array, "n 1"]) -> Float[Array, "n m"]:
    """``exp(-(length + 4) / (5 square))`` for ``ism.released_similarity``; 0 with gradient 0 where ``square`` is 0."""
    # Where the exponent is beyond the float type's range, the factor and its derivatives are 0.
    limit = 80.0 if square.dtype == jnp.float32 else 700.0
    regular = 5.0 * limit * square >= length + 4.0
    exponent = (length + 4.0) / jnp.where(regular, 5.0 * square, 1.0)
    return jnp.where(regular, jnp.exp(-jnp.where(regular, exponent, 0.0)), 0.0)
