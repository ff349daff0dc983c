"""Embeddings of a set of images on the host, and the scores of their answers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from idml_jax import ism
from idml_jax.metrics import class_means, introspective, uncertainty, vote
from idml_jax.metrics.density import density_score
from idml_jax.metrics.retrieval import Neighbours
from idml_jax.metrics.vote import Vote

# Scores of an answer that need the classes of the gallery.
LABELLED = (*vote.SCORES, *class_means.SCORES)


class Embedded(NamedTuple):
    """Embeddings of a set of images, on the host.

    Attributes:
      semantic: ``[n, d]``.
      labels: ``[n]``.
      uncertainty: ``[n, k]``, ``None`` where there is none.
      semantic_norm: ``[n]``, length of the semantic embedding before normalising, if known.
      sets: ``[n, l]`` all labels of each image, filled up with -1, if there are images with several.
      groups: ``[n]`` groups, such as cameras: a query does not find images of its class and group.
      ids: ``[n]`` numbers or names of the images, by which a query does not find itself in a gallery.
      risk: ``[n]``, output of the run's risk head, if it has one.
    """

    semantic: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, "n"]
    uncertainty: Float[np.ndarray, "n k"] | None = None
    semantic_norm: Float[np.ndarray, "n"] | None = None
    sets: Int[np.ndarray, "n l"] | None = None
    groups: Shaped[np.ndarray, "n"] | None = None
    ids: Shaped[np.ndarray, "n"] | None = None
    risk: Float[np.ndarray, "n"] | None = None

    @property
    def embedding(self) -> ism.Embedding:
        """The embeddings as an ``ism.Embedding``."""
        return ism.Embedding(self.semantic, self.uncertainty)  # type: ignore[arg-type]  # of numpy

    @property
    def every_label(self) -> Int[np.ndarray, "n l"]:
        """``[n, l]`` all labels of each image, filled up with -1; l is 1 where each has one."""
        return self.labels[:, None] if self.sets is None else self.sets

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
    *,
    setting: Vote | None = Vote(),  # noqa: B008 (immutable)
    absent: Int[np.ndarray, "n"] | None = None,
) -> dict[str, Float[np.ndarray, "n"]]:
    """All scores of the nearest image as the answer, larger = less certain.

    ``introspective.answer_scores``, with ``own`` and ``found`` as there, ``risk`` of the query where it
    is known, ``density.density_score``, ``vote.label_scores`` and ``class_means.mean_scores``.

    Args:
      embedded: the queries; without a gallery every image queries all the others.
      gallery: images that are searched.
      metric: introspective metric.
      own: gallery row of each query, which it leaves out.
      found: the nearest images, if known.
      setting: settings of the vote; ``None`` if the labels of the gallery are unknown: then only label-free scores.
      absent: as in ``vote.label_scores``.
    """
    found = (
        uncertainty.nearest_twenty(embedded.semantic, None if gallery is None else gallery.semantic, own=own)
        if found is None
        else found
    )
    scores = introspective.answer_scores(
        embedded.embedding,
        None if gallery is None else gallery.embedding,
        norms=embedded.semantic_norm,
        own=own,
        found=found,
        metric=metric,
    )
    if embedded.risk is not None:
        scores["risk"] = np.asarray(embedded.risk, np.float64)
    searched, own = (embedded, np.arange(len(embedded.labels))) if gallery is None else (gallery, own)
    scores |= density_score(embedded.semantic, searched.semantic, searched.labels, found, own, absent=absent)
    if setting is None:
        return scores
    sides = embedded.semantic, searched.semantic, searched.labels, found
    scores |= vote.label_scores(*sides, setting, own, absent=absent)
    if embedded.groups is not None:  # a query does not see some images of its class, which the means would count
        return scores
    return scores | class_means.mean_scores(*sides, own, absent=absent)


def joined(sets: Sequence[Embedded]) -> Embedded:
    """Concatenates several sets; an attribute that one of them lacks is dropped."""
    columns = {name: [getattr(one, name) for one in sets] for name in Embedded._fields}
    whole: dict[str, Any] = {k: None if any(x is None for x in c) else np.concatenate(c) for k, c in columns.items()}
    return Embedded(**whole)


def rows_of(embedded: Embedded, chosen: Int[np.ndarray, "k"] | Bool[np.ndarray, "n"]) -> Embedded:
    """Some rows of a set."""
    return Embedded(*(None if column is None else column[chosen] for column in embedded))  # type: ignore[arg-type]
