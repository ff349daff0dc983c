"""The introspective similarity metric (ISM) of IDML, Wang et al., arXiv 2309.09982, section 3.

An image is a semantic embedding ``s`` and an uncertainty embedding ``u``. For a pair,

    alpha = || s1 - s2 ||             semantic discrepancy
    beta  = || u1 + u2 ||             uncertainty of the pair (vectors are added before the norm)
    D     = alpha * exp(-beta~ / tau) introspective distance

with ``beta~ = beta / alpha`` (relative, the default) or ``beta~ = beta`` (absolute). The same factor weakens the
discrepancy ``1 - c`` of losses written on the cosine similarity ``c``: ``S = 1 - (1 - c) exp(-beta~ / tau)``.

All functions are pure, work on whole matrices of pairs, compute in float32 (float64 stays float64; lower precisions
are promoted) and have finite values and gradients everywhere, also where the textbook formula has ``sqrt(0)`` or
``x / 0``. There the gradient is the limit along the plain metric: 0 for a distance, and for ``S`` that of ``c``
where the pair is certain.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = [
    "Embedding",
    "cosine_similarity",
    "gradient_factor",
    "introspective_distance",
    "introspective_similarity",
    "l2_normalize",
    "pair_uncertainty",
    "relative_weakening",
    "released_similarity",
    "semantic_distance",
]

DEFAULT_TEMPERATURE = 5.0


class Embedding(NamedTuple):
    """Embeddings of ``n`` images.

    Attributes:
      semantic: ``[n, d]``, what the image shows; l2-normalised by the models of this package.
      uncertainty: ``[n, k]``, how ambiguous it is; not normalised, since its length carries the information.
        ``None`` stands for certain (``u = 0``): proxies, class prototypes.
    """

    semantic: Float[Array, "n d"]
    uncertainty: Float[Array, "n k"] | None = None


def _promote(*arrays: Array) -> tuple[Array, ...]:
    """Everything to one floating type, float32 at least."""
    dtype = jnp.result_type(jnp.float32, *arrays)
    return tuple(jnp.asarray(a).astype(dtype) for a in arrays)


def _check_matrices(a: Array, b: Array, name: str) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"{name} need the shapes [n, d] and [m, d]; got {a.shape} and {b.shape}")


def _promote_pair(a: Array, b: Array | None, name: str) -> tuple[Array, Array | None]:
    """Both sides checked and of one floating type; a side that is missing stays missing."""
    if b is None:
        (a,) = _promote(a)
        _check_matrices(a, a, name)
        return a, None
    a, b = _promote(a, b)
    _check_matrices(a, b, name)
    return a, b


def _safe_sqrt(x: Array, rounding: Array | float = 0.0) -> Array:
    """sqrt, 0 with gradient 0 up to ``rounding`` (two ``where``: an infinity times 0 would be NaN); NaN stays."""
    zero = x <= rounding
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, x)))


def _common_scale(*arrays: Array) -> Array:
    """A divisor for magnitudes whose squares would leave the float range; 1 for ordinary ones.

    One for all rows: beside rows of length 1e20 the distances between rows of length 1 vanish.
    """
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(a), initial=0.0) for a in arrays]))
    largest = jax.lax.stop_gradient(largest)
    extreme = (largest > 1e15) | ((largest < 1e-15) & (largest > 0))
    return jnp.where(extreme, largest, 1.0)


def _products(a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """Inner products of all pairs."""
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def _gram(a: Float[Array, "n d"]) -> Float[Array, "n n"]:
    """``a a^T``; with its tangent written as ``M + M^T`` the gradient takes one matrix product instead of two.

    For distances alone: after the similarities' losses XLA computes ``M`` twice on a CPU, once across the rows, which
    takes longer than a product.
    """
    return _products(a, a)


@_gram.defjvp
def _gram_jvp(primals, tangents):
    (a,), (d_a,) = primals, tangents
    half = _products(d_a, a)
    return _gram(a), half + half.T


def _norm_of_sums(a: Float[Array, "n d"], b: Float[Array, "m d"] | None, sign: float) -> Float[Array, "n m"]:
    """``|| a_i + sign * b_j ||`` for all pairs through one matrix product; ``b=None`` stands for ``a``.

    The expanded square cancels: where nothing but rounding is left of it the result is exactly 0, so that duplicates
    are at distance 0 and receive no noise for a gradient.
    """
    scale = _common_scale(a, *([] if b is None else [b]))
    a, b = a / scale, None if b is None else b / scale
    product = _gram(a) if b is None else _products(a, b)
    of_rows = jnp.sum(a * a, axis=1)
    squares = of_rows[:, None] + (of_rows if b is None else jnp.sum(b * b, axis=1))[None, :]
    total = squares + (2.0 * sign) * product
    rounding = 4.0 * jnp.finfo(total.dtype).eps * squares
    return scale * _safe_sqrt(total, rounding)


def l2_normalize(x: Float[Array, "*batch d"], epsilon: float = 1e-12) -> Float[Array, "*batch d"]:
    """Rows of length 1; a zero row stays zero with a zero gradient instead of NaN.

    Args:
      x: ``[..., d]``.
      epsilon: rows shorter than this count as zero.

    Returns:
      ``[..., d]`` in at least float32.
    """
    (x,) = _promote(x)
    # Two steps, so that neither huge nor tiny rows overflow or vanish when squared.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1, keepdims=True))
    zero = largest <= epsilon  # false for NaN, which is passed on: a broken network must not look like a black picture
    scaled = jnp.where(zero, 0.0, x) / jnp.where(zero, 1.0, largest)
    square = jnp.sum(scaled * scaled, axis=-1, keepdims=True)
    return scaled * jnp.where(zero, 0.0, jax.lax.rsqrt(jnp.where(zero, 1.0, square)))


def semantic_distance(a: Float[Array, "n d"], b: Float[Array, "m d"] | None = None) -> Float[Array, "n m"]:
    """Semantic discrepancy ``alpha = || a_i - b_j ||_2`` of all pairs (paper, eq. 4).

    Args:
      a: ``[n, d]`` semantic embeddings.
      b: ``[m, d]``; ``None`` compares ``a`` with itself.

    Returns:
      ``[n, m]``, 0 at exact duplicates. Distances below some 1e-3 of the vectors' length lose digits, as in every
      implementation by one matrix product.

    Raises:
      ValueError: if the shapes do not fit.
    """
    a, b = _promote_pair(a, b, "semantic embeddings")
    return _norm_of_sums(a, b, -1.0)


def pair_uncertainty(ua: Float[Array, "n k"], ub: Float[Array, "m k"] | None) -> Float[Array, "n m"]:
    """Uncertainty of the pair ``beta = || ua_i + ub_j ||_2`` (paper, eq. 5).

    The vectors are added before the norm, so it depends on both images together. Unlike in ``semantic_distance``,
    ``ub=None`` means that the second side is certain (``u = 0``: proxies, prototypes).

    Args:
      ua: ``[n, k]`` uncertainty embeddings.
      ub: ``[m, k]``, or ``None`` for certain references.

    Returns:
      ``[n, m]``, or ``[n, 1]`` for ``ub=None`` (it broadcasts over the references).

    Raises:
      ValueError: if the shapes do not fit.
    """
    if ub is None:
        (ua,) = _promote(ua)
        _check_matrices(ua, ua, "uncertainty embeddings")
        scale = _common_scale(ua)
        return scale * _safe_sqrt(jnp.sum((ua / scale) ** 2, axis=1, keepdims=True))
    ua, ub = _promote_pair(ua, None if ub is ua else ub, "uncertainty embeddings")
    return _norm_of_sums(ua, ub, 1.0)


def _beta(a: Embedding, b: Embedding) -> Float[Array, "n #m"]:
    """Of pairs with an uncertainty on at least one side."""
    if a.uncertainty is None:
        assert b.uncertainty is not None
        return pair_uncertainty(b.uncertainty, None).T
    return pair_uncertainty(a.uncertainty, b.uncertainty)


@jax.custom_jvp
def relative_weakening(alpha: Array, beta: Array, temperature: Array) -> Array:
    """``exp(-beta / (temperature alpha))`` for ``alpha, beta >= 0`` of one shape; 1 where beta is 0, finite slopes."""
    return _relative_weakening_parts(alpha, beta, temperature)[0]


def _relative_weakening_parts(alpha: Array, beta: Array, temperature: Array) -> tuple[Array, Array, Array]:
    # Beyond the limit the factor is 0 in this float type, and so are its derivatives.
    limit = 80.0 if alpha.dtype == jnp.float32 else 700.0
    regular = (alpha > 0) & (beta <= limit * temperature * alpha)
    divisor = jnp.where(regular, temperature * alpha, 1.0)
    exponent = jnp.where(regular, beta / divisor, 0.0)
    edge = jnp.where(beta > 0, 0.0, jnp.where(beta == 0, 1.0, jnp.nan))
    factor = jnp.where(regular, jnp.exp(-exponent), edge)
    return factor, exponent, jnp.where(regular, factor, 0.0)


@relative_weakening.defjvp
def _relative_weakening_jvp(primals, tangents):
    # In closed form, because the automatic derivative of a quotient squares its denominator, which can vanish.
    alpha, beta, temperature = primals
    d_alpha, d_beta, d_temperature = tangents
    factor, exponent, live = _relative_weakening_parts(alpha, beta, temperature)
    safe = jnp.where(alpha > 0, alpha, 1.0)
    towards_alpha = live * exponent / safe
    towards_beta = -live / temperature / safe
    towards_temperature = live * exponent / temperature
    return factor, towards_alpha * d_alpha + towards_beta * d_beta + towards_temperature * d_temperature


def _weakening(alpha: Array, beta: Array, temperature: Array | float, relative: bool) -> Array:
    """``exp(-beta~ / tau)`` in [0, 1], 1 where beta is 0."""
    temperature = jnp.asarray(temperature, alpha.dtype)
    if not relative:
        return jnp.exp(-beta / temperature)
    alpha, beta = jnp.broadcast_arrays(alpha, beta)
    return relative_weakening(alpha, beta, jnp.broadcast_to(temperature, alpha.shape))


def introspective_distance(
    a: Embedding,
    b: Embedding | None = None,
    *,
    temperature: float | Float[Array, ""] = DEFAULT_TEMPERATURE,
    relative: bool = True,
) -> Float[Array, "n m"]:
    """Introspective distance ``D = alpha * exp(-beta~ / tau)`` of all pairs (paper, eq. 6).

    ``D <= alpha``, symmetric, ``D(x, x) = 0``, and ``D = alpha`` with the plain gradient for certain pairs.

    Args:
      a: ``n`` embeddings.
      b: ``m`` embeddings; ``None`` compares ``a`` with itself. ``uncertainty=None`` on either side is certain.
      temperature: tau > 0; the larger, the weaker the effect of uncertainty.
      relative: ``beta~ = beta / alpha`` if true, ``beta`` if false.

    Returns:
      ``[n, m]``.

    Raises:
      ValueError: if the shapes do not fit.
    """
    b = a if b is None else b
    alpha = semantic_distance(a.semantic, None if b.semantic is a.semantic else b.semantic)
    if a.uncertainty is None and b.uncertainty is None:
        return alpha
    beta = _beta(a, b).astype(alpha.dtype)
    return alpha * _weakening(alpha, beta, temperature, relative)


def cosine_similarity(a: Float[Array, "n d"], b: Float[Array, "m d"] | None = None) -> Float[Array, "n m"]:
    """Cosine of all pairs; the rows need not be normalised.

    Args:
      a: ``[n, d]``.
      b: ``[m, d]``; ``None`` compares ``a`` with itself.

    Returns:
      ``[n, m]``; 0 for a zero row.

    Raises:
      ValueError: if the shapes do not fit.
    """
    a, b = _promote_pair(a, b, "semantic embeddings")
    a = l2_normalize(a)
    return _products(a, a if b is None else l2_normalize(b))


def introspective_similarity(
    a: Embedding,
    b: Embedding | None = None,
    *,
    temperature: float | Float[Array, ""] = DEFAULT_TEMPERATURE,
    relative: bool = True,
) -> Float[Array, "n m"]:
    """Introspective similarity ``S = 1 - (1 - c) exp(-beta~ / tau)`` with ``alpha = sqrt(2 - 2c)``.

    The form of ISM for losses that are written on the cosine similarity ``c``.

    Args:
      a: ``n`` embeddings; semantic rows are compared by their direction.
      b: ``m`` embeddings; ``None`` compares ``a`` with itself. ``uncertainty=None`` on either side is certain.
      temperature: tau > 0.
      relative: ``beta~ = beta / alpha`` if true, ``beta`` if false.

    Returns:
      ``[n, m]``, at least ``c`` and, to rounding, at most 1.

    Raises:
      ValueError: if the shapes do not fit.
    """
    b = a if b is None else b
    cosine = cosine_similarity(a.semantic, None if b.semantic is a.semantic else b.semantic)
    if a.uncertainty is None and b.uncertainty is None:
        return cosine
    discrepancy = jnp.maximum(1.0 - cosine, 0.0)  # rounding can leave a cosine just above 1
    beta = _beta(a, b).astype(cosine.dtype)
    rounding = 4.0 * float(jnp.finfo(cosine.dtype).eps)
    alpha = _safe_sqrt(2.0 * discrepancy, 2.0 * rounding)
    # 1 - (1 - c) w, written so that w = 1 gives c to the bit.
    return cosine + discrepancy * (1.0 - _weakening(alpha, beta, temperature, relative))


def gradient_factor(
    alpha: Float[Array, "..."],
    beta: Float[Array, "..."],
    *,
    temperature: float = DEFAULT_TEMPERATURE,
    relative: bool = True,
) -> Float[Array, "..."]:
    """``H = dD / d alpha``, the factor by which uncertainty slows the learning of a pair (paper, section 3.3).

    ``(1 + beta~ / tau) exp(-beta~ / tau)`` (relative) or ``exp(-beta~ / tau)`` (absolute): in [0, 1], 1 for certain
    pairs, falling as uncertainty grows. For analysis and plots; training differentiates the distance itself.

    Args:
      alpha: semantic discrepancies, any shape.
      beta: pair uncertainties, broadcastable to ``alpha``.
      temperature: tau > 0.
      relative: which reading of beta~.

    Returns:
      The factor, of the broadcast shape.
    """
    alpha, beta = _promote(alpha, beta)
    if not relative:
        return jnp.exp(-beta / temperature) * jnp.ones_like(alpha)
    positive = alpha > 0
    exponent = beta / jnp.where(positive, alpha, 1.0) / temperature
    exponent = jnp.minimum(exponent, 80.0 if alpha.dtype == jnp.float32 else 700.0)
    return jnp.where(positive, (1.0 + exponent) * jnp.exp(-exponent), jnp.where(beta > 0, 0.0, 1.0))


def released_similarity(a: Embedding, proxies: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """The similarity that the published IDML code computes for ProxyAnchor; for reproduction only.

        S = 1 - (1 - c) * exp(-(||u||^2 + 4) / (5 ||s - p||^2))

    with ``u`` l2-normalised, ``p`` not normalised and squared distances. Since ``||u|| = 1`` for every image, the
    uncertainty head receives no gradient and carries no information here: use ``introspective_similarity``.

    Args:
      a: ``n`` embeddings with an uncertainty.
      proxies: ``[m, d]``, as stored (not normalised).

    Returns:
      ``[n, m]``.

    Raises:
      ValueError: if the shapes do not fit or the uncertainty is missing.
    """
    if a.uncertainty is None:
        raise ValueError("released_similarity needs embeddings with an uncertainty")
    cosine = cosine_similarity(a.semantic, proxies)
    semantic, proxies = _promote(a.semantic, proxies)
    square = semantic_distance(semantic, proxies) ** 2
    length = jnp.sum(l2_normalize(a.uncertainty) ** 2, axis=1, keepdims=True)
    # Where the exponent is beyond the float type's range, the factor and its derivatives are 0.
    limit = 80.0 if square.dtype == jnp.float32 else 700.0
    regular = 5.0 * limit * square >= length + 4.0
    exponent = (length + 4.0) / jnp.where(regular, 5.0 * square, 1.0)
    weight = jnp.where(regular, jnp.exp(-jnp.where(regular, exponent, 0.0)), 0.0)
    return cosine + (1.0 - cosine) * (1.0 - weight)
