"""Embeddings of a set of images on the host, and the scores of their answers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from idml_jax import ism
from idml_jax.metrics import introspective
from idml_jax.metrics.retrieval import Neighbours


class Embedded(NamedTuple):
    """Embeddings of a set of images, on the host.

    Attributes:
      semantic: ``[n, d]``.
      labels: ``[n]``.
      uncertainty: ``[n, k]``, ``None`` where there is none.
      semantic_norm: ``[n]``, length of the semantic embedding before normalising, if known.
    """

    semantic: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, "n"]
    uncertainty: Float[np.ndarray, "n k"] | None = None
    semantic_norm: Float[np.ndarray, "n"] | None = None

    @property
    def embedding(self) -> ism.Embedding:
        """The embeddings as an ``ism.Embedding``."""
        return ism.Embedding(self.semantic, self.uncertainty)  # type: ignore[arg-type]  # of numpy

    @property
    def uncertainty_norm(self) -> Float[np.ndarray, "n"]:
        """Length of the uncertainty embedding, the score of a single image."""
        assert self.uncertainty is not None
        return np.linalg.norm(self.uncertainty, axis=1)


def scores_of(
    embedded: Embedded,
    gallery: Embedded | None = None,
    metric: ism.Metric = ism.Metric(),  # noqa: B008 (immutable)
    own: Int[np.ndarray, "n"] | None = None,
    found: Neighbours | None = None,
) -> dict[str, Float[np.ndarray, "n"]]:
    """``introspective.answer_scores`` of embedded images; ``own`` and ``found`` as there."""
    return introspective.answer_scores(
        embedded.embedding,
        None if gallery is None else gallery.embedding,
        norms=embedded.semantic_norm,
        own=own,
        found=found,
        metric=metric,
    )


def joined(sets: Sequence[Embedded]) -> Embedded:
    """Concatenates several sets; an attribute that one of them lacks is dropped."""
    columns = {name: [getattr(one, name) for one in sets] for name in Embedded._fields}
    whole: dict[str, Any] = {k: None if any(x is None for x in c) else np.concatenate(c) for k, c in columns.items()}
    return Embedded(**whole)
