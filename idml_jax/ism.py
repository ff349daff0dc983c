"""The introspective similarity metric (ISM) of IDML, Wang et al., arXiv 2309.09982, section 3.

An image is represented by a semantic embedding ``s`` and an uncertainty embedding ``u``. For a pair,

    alpha = || s1 - s2 ||             semantic discrepancy
    beta  = || u1 + u2 ||             uncertainty of the pair (norm of the sum)
    D     = alpha * exp(-beta~ / tau) introspective distance

with ``beta~ = beta / alpha`` (relative, the default) or ``beta~ = beta`` (absolute). The same factor weakens the
discrepancy ``1 - c`` of losses that use the cosine similarity ``c``: ``S = 1 - (1 - c) exp(-beta~ / tau)``.

``Metric`` holds form and temperature and is passed to losses, retrieval and search; the functions of this module do the
same without the object. To add a form, subclass ``Form`` and add it to ``FORMS``.

Everything is pure, works on whole matrices of pairs in float32 (float64 for float64 inputs), and has finite values and
gradients (see ``idml_jax.geometry``), even where the textbook formula has ``sqrt(0)`` or ``x / 0``. There the gradient
is that of the plain metric in the limit: 0 for a distance, and for ``S`` that of ``c`` where the pair is certain.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from idml_jax.geometry import (
    cosine_similarity,
    embedding_pair,
    l2_normalize,
    numbers_of,
    pair_uncertainty,
    promote,
    relative_weakening,
    released_weakening,
    safe_sqrt,
    semantic_distance,
)

__all__ = [
    "FORMS",
    "Embedding",
    "Form",
    "Metric",
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
Temperature = float | Float[Array, ""]


class Embedding(NamedTuple):
    """Embeddings of ``n`` images.

    Attributes:
      semantic: ``[n, d]``, what the image shows; l2-normalised by the models of this package.
      uncertainty: ``[n, k]``, how ambiguous it is; not normalised, since its length carries the information.
        ``None`` stands for certain (``u = 0``): proxies, class prototypes.
    """

    semantic: Float[Array, "n d"]
    uncertainty: Float[Array, "n k"] | None = None


def _beta(a: Embedding, b: Embedding) -> Float[Array, "n #m"]:
    """Uncertainty of all pairs; at least one side must have an uncertainty."""
    if a.uncertainty is None:
        assert b.uncertainty is not None
        return pair_uncertainty(b.uncertainty, None).T
    return pair_uncertainty(a.uncertainty, b.uncertainty)


class Form:
    """How the uncertainty of a pair weakens its discrepancy; subclasses define ``weakening`` and ``slope``.

    Attributes:
      introspective: whether it reads the uncertainty.
      raw_proxies: whether it is only a similarity to proxies as stored, not normalised.
      ranks_as: name of the form that ranks embeddings trained with this one; empty: this form.
    """

    introspective = True
    raw_proxies = False
    ranks_as = ""
    _LACKS = "the released form of the metric is a similarity to raw proxies alone; the form that ranks is 'relative'"

    def weakening(self, alpha: Array, beta: Array, temperature: Array) -> Array:
        """``exp(-beta~ / tau)`` in [0, 1], 1 where beta is 0; all arguments have one floating type."""
        raise ValueError(self._LACKS)

    def slope(self, alpha: Array, beta: Array, temperature: Temperature) -> Array:
        """``dD / d alpha`` for ``D = alpha * weakening``."""
        raise ValueError(self._LACKS)

    def distance(self, a: Embedding, b: Embedding, temperature: Temperature) -> Float[Array, "n m"]:
        """``D`` of all pairs, from differences of ``s``; ``b is a`` compares a set with itself."""
        alpha = semantic_distance(a.semantic, None if b.semantic is a.semantic else b.semantic)
        if not self.introspective or (a.uncertainty is None and b.uncertainty is None):
            return alpha
        beta = _beta(a, b).astype(alpha.dtype)
        return alpha * self.weakening(alpha, beta, jnp.asarray(temperature, alpha.dtype))

    def similarity(self, a: Embedding, b: Embedding, temperature: Temperature) -> Float[Array, "n m"]:
        """``S`` of all pairs; ``b is a`` compares a set with itself."""
        cosine = cosine_similarity(a.semantic, None if b.semantic is a.semantic else b.semantic)
        if not self.introspective or (a.uncertainty is None and b.uncertainty is None):
            return cosine
        discrepancy = jnp.maximum(1.0 - cosine, 0.0)  # rounding can leave a cosine just above 1
        beta = _beta(a, b).astype(cosine.dtype)
        rounding = 4.0 * float(jnp.finfo(cosine.dtype).eps)
        alpha = safe_sqrt(2.0 * discrepancy, 2.0 * rounding)
        # 1 - (1 - c) w, written so that w = 1 gives exactly c.
        return cosine + discrepancy * (1.0 - self.weakening(alpha, beta, jnp.asarray(temperature, cosine.dtype)))


class _Relative(Form):
    """``beta~ = beta / alpha`` (paper, eq. 6)."""

    def weakening(self, alpha: Array, beta: Array, temperature: Array) -> Array:
        alpha, beta = jnp.broadcast_arrays(alpha, beta)
        return relative_weakening(alpha, beta, jnp.broadcast_to(temperature, alpha.shape))

    def slope(self, alpha: Array, beta: Array, temperature: Temperature) -> Array:
        positive = alpha > 0
        exponent = beta / jnp.where(positive, alpha, 1.0) / temperature
        exponent = jnp.minimum(exponent, 80.0 if alpha.dtype == jnp.float32 else 700.0)
        return jnp.where(positive, (1.0 + exponent) * jnp.exp(-exponent), jnp.where(beta > 0, 0.0, 1.0))


class _Absolute(Form):
    """``beta~ = beta``."""

    def weakening(self, alpha: Array, beta: Array, temperature: Array) -> Array:
        return jnp.exp(-beta / temperature)

    def slope(self, alpha: Array, beta: Array, temperature: Temperature) -> Array:
        return jnp.exp(-beta / temperature) * jnp.ones_like(alpha)


class _Plain(Form):
    """No uncertainty: semantic distance and cosine similarity."""

    introspective = False

    def weakening(self, alpha: Array, beta: Array, temperature: Array) -> Array:
        return jnp.ones(jnp.broadcast_shapes(alpha.shape, beta.shape), alpha.dtype)

    def slope(self, alpha: Array, beta: Array, temperature: Temperature) -> Array:
        return jnp.ones(jnp.broadcast_shapes(alpha.shape, beta.shape), alpha.dtype)


class _Released(Form):
    """The published code's similarity to raw proxies, see ``released_similarity``; its temperature is fixed."""

    raw_proxies = True
    ranks_as = "relative"

    def distance(self, a: Embedding, b: Embedding, temperature: Temperature) -> Float[Array, "n m"]:
        raise ValueError(self._LACKS)

    def similarity(self, a: Embedding, b: Embedding, temperature: Temperature) -> Float[Array, "n m"]:
        if b is a or b.uncertainty is not None:
            raise ValueError(self._LACKS)
        return released_similarity(a, b.semantic)


FORMS = {"relative": _Relative(), "absolute": _Absolute(), "released": _Released(), "plain": _Plain()}


@dataclass(frozen=True)
class Metric:
    """The metric with its settings; calling it computes ``distance``. Equal metrics share one compiled program.

    Attributes:
      form: key of ``FORMS``: ``relative`` (``beta~ = beta / alpha``), ``absolute`` (``beta~ = beta``), ``plain``
        (the uncertainty is ignored), or ``released`` (the published code's similarity to raw proxies).
      temperature: tau, finite and above 0; the larger, the weaker the effect of the uncertainty. A traced scalar is
        not checked.

    Raises:
      ValueError: for an unknown form, or a temperature that is not a finite number above 0.

    >>> a = Embedding(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0], [4.0]]))
    >>> Metric().distance(a).round(3).tolist()  # || s1 - s2 || = 1.414 and || u1 + u2 || = 5
    [[0.0, 0.697], [0.697, 0.0]]
    >>> Metric("absolute")(a).round(3).tolist()
    [[0.0, 0.52], [0.52, 0.0]]
    >>> Metric("plain").similarity(a).round(3).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    form: str = "relative"
    temperature: Temperature = DEFAULT_TEMPERATURE

    def __post_init__(self) -> None:
        if not isinstance(self.form, str) or self.form not in FORMS:
            raise ValueError(f"the metric's form is {self.form!r}; known: {', '.join(FORMS)}")
        if isinstance(self.temperature, jax.core.Tracer):
            return
        value = numbers_of(self.temperature)
        if not ((value > 0) & np.isfinite(value)).all():
            raise ValueError(f"the metric's temperature is {self.temperature!r}; it must be a finite number above 0")

    @property
    def introspective(self) -> bool:
        """Whether it reads the uncertainty."""
        return FORMS[self.form].introspective

    @property
    def raw_proxies(self) -> bool:
        """Whether it is only a similarity to proxies as stored, not normalised."""
        return FORMS[self.form].raw_proxies

    def for_ranking(self) -> "Metric":
        """The metric that ranks embeddings trained with this one: itself, but ``relative`` for ``released``."""
        return Metric(FORMS[self.form].ranks_as or self.form, self.temperature)

    def distance(self, a: Embedding, b: Embedding | None = None) -> Float[Array, "n m"]:
        """``D`` of all pairs, ``[n, m]``, see ``introspective_distance``; ``b=None`` compares ``a`` with itself.

        Raises:
          ValueError: if the shapes do not fit, or the form has no distance.
        """
        return FORMS[self.form].distance(*embedding_pair(a, b), self.temperature)

    __call__ = distance

    def similarity(self, a: Embedding, b: Embedding | None = None) -> Float[Array, "n m"]:
        """Similarity ``S`` of all pairs, ``[n, m]``, as ``distance``; see ``introspective_similarity``.

        Raises:
          ValueError: if the shapes do not fit, or the form cannot compare these.
        """
        return FORMS[self.form].similarity(*embedding_pair(a, b), self.temperature)

    def weakening(self, alpha: Float[Array, "..."], beta: Float[Array, "..."]) -> Float[Array, "..."]:
        """The factor ``exp(-beta~ / tau)`` by which uncertainty shortens a discrepancy.

        In [0, 1], 1 for certain pairs; the shapes of ``alpha`` and ``beta`` must broadcast. Raises ValueError for the
        released form, which has no such factor.

        >>> Metric().weakening(jnp.array([1.0, 2.0]), jnp.array([5.0, 5.0])).round(3).tolist()
        [0.368, 0.607]
        """
        alpha, beta = jnp.broadcast_arrays(*promote(alpha, beta))
        return FORMS[self.form].weakening(alpha, beta, jnp.asarray(self.temperature, alpha.dtype))

    def about(self) -> dict[str, object]:
        """The metric as files store it: ``temperature``, ``relative`` and, where that does not determine it, ``form``.

        >>> Metric("absolute", 2.0).about()
        {'temperature': 2.0, 'relative': False}
        """
        about: dict[str, object] = {"temperature": self.temperature, "relative": self.form == "relative"}
        return about if self.form in ("relative", "absolute") else {**about, "form": self.form}

    @classmethod
    def from_about(cls, about: Mapping[str, object]) -> "Metric":
        """The metric stored in a file; missing entries take their defaults. Raises ValueError as the constructor."""
        form: Any = about.get("form", "relative" if about.get("relative", True) else "absolute")
        temperature: Any = about.get("temperature", DEFAULT_TEMPERATURE)
        return cls(form, temperature)


def _metric(temperature: Temperature, relative: bool) -> Metric:
    return Metric("relative" if relative else "absolute", temperature)


def introspective_distance(
    a: Embedding,
    b: Embedding | None = None,
    *,
    temperature: Temperature = DEFAULT_TEMPERATURE,
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
      ValueError: if the shapes do not fit, or the temperature is not a finite number above 0.

    >>> a = Embedding(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0], [4.0]]))
    >>> introspective_distance(a).round(3).tolist()
    [[0.0, 0.697], [0.697, 0.0]]
    """
    return _metric(temperature, relative).distance(a, b)


def introspective_similarity(
    a: Embedding,
    b: Embedding | None = None,
    *,
    temperature: Temperature = DEFAULT_TEMPERATURE,
    relative: bool = True,
) -> Float[Array, "n m"]:
    """Introspective similarity ``S = 1 - (1 - c) exp(-beta~ / tau)`` with ``alpha = sqrt(2 - 2c)``.

    The form of ISM for losses that use the cosine similarity ``c``.

    Args:
      a: ``n`` embeddings; semantic rows are compared by their direction.
      b: ``m`` embeddings; ``None`` compares ``a`` with itself. ``uncertainty=None`` on either side is certain.
      temperature: tau > 0.
      relative: ``beta~ = beta / alpha`` if true, ``beta`` if false.

    Returns:
      ``[n, m]``, at least ``c`` and, to rounding, at most 1.

    Raises:
      ValueError: if the shapes do not fit, or the temperature is not a finite number above 0.

    >>> a = Embedding(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0], [4.0]]))
    >>> introspective_similarity(a, relative=False).round(3).tolist()
    [[1.0, 0.632], [0.632, 1.0]]
    """
    return _metric(temperature, relative).similarity(a, b)


def gradient_factor(
    alpha: Float[Array, "..."],
    beta: Float[Array, "..."],
    *,
    temperature: Temperature = DEFAULT_TEMPERATURE,
    relative: bool = True,
) -> Float[Array, "..."]:
    """``H = dD / d alpha``, the factor by which uncertainty slows the learning of a pair (paper, section 3.3).

    ``(1 + beta~ / tau) exp(-beta~ / tau)`` (relative) or ``exp(-beta~ / tau)`` (absolute): in [0, 1], 1 for certain
    pairs, falling as uncertainty grows. For analysis and plots; training differentiates the distance itself.

    Args:
      alpha: semantic discrepancies, any shape.
      beta: pair uncertainties, broadcastable to ``alpha``.
      temperature: tau > 0.
      relative: ``beta~ = beta / alpha`` if true, ``beta`` if false.

    Returns:
      The factor, of the broadcast shape.

    Raises:
      ValueError: if the temperature is not a finite number above 0.

    >>> gradient_factor(jnp.array([1.0, 1.0, 2.0, 0.0]), jnp.array([0.0, 5.0, 5.0, 1.0])).round(3).tolist()
    [1.0, 0.736, 0.91, 0.0]
    """
    alpha, beta = promote(alpha, beta)
    return FORMS[_metric(temperature, relative).form].slope(alpha, beta, temperature)


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

    >>> a = Embedding(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0], [4.0]]))
    >>> released_similarity(a, jnp.array([[2.0, 0.0], [0.0, 0.5]])).round(3).tolist()
    [[1.0, 0.551], [0.181, 1.0]]
    """
    embedding_pair(a, None)
    if a.uncertainty is None:
        raise ValueError("released_similarity needs embeddings with an uncertainty")
    cosine = cosine_similarity(a.semantic, proxies)
    square = semantic_distance(*promote(a.semantic, proxies)) ** 2
    length = jnp.sum(l2_normalize(a.uncertainty) ** 2, axis=1, keepdims=True)
    return cosine + (1.0 - cosine) * (1.0 - released_weakening(square, length))
