"""Retrieval with uncertainty: ranking by the introspective distance, and uncertainty scores of answers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from idml_jax import ism
from idml_jax.metrics import nearest
from idml_jax.metrics.checks import Array, embedding_rows
from idml_jax.metrics.retrieval import Neighbours, Ranks, ranks_by_distance, retrieval_ranks, summarise
from idml_jax.metrics.uncertainty import free_scores, nearest_twenty

# Scores of an answer that need a trained uncertainty; the others are baseline scores.
LEARNED = ("uncertainty", "pair_uncertainty", "introspective_distance")


class Comparison(NamedTuple):
    """Per-query results of the same queries under both distances."""

    semantic: Ranks
    introspective: Ranks


def compare(
    embedding: ism.Embedding,
    labels: Int[Array, "n"],
    gallery: ism.Embedding | None = None,
    gallery_labels: Int[Array, "m"] | None = None,
    *,
    metric: ism.Metric = ism.Metric(),  # noqa: B008 (immutable)
    devices: Sequence[jax.Device] | None = None,
) -> Comparison:
    """Retrieval by semantic distance and by introspective distance (IDML, arXiv 2309.09982), side by side.

    Same protocol and errors as `retrieval.retrieval_ranks`; `retrieval.summarise` turns each side into metrics.
    """
    semantic = None if gallery is None else gallery.semantic
    return Comparison(
        retrieval_ranks(embedding.semantic, labels, semantic, gallery_labels, devices=devices),
        ranks_by_metric(metric, embedding, labels, gallery, gallery_labels, devices=devices),
    )


def ranks_by_metric(
    metric: ism.Metric,
    embedding: ism.Embedding,
    labels: Int[Array, "n"],
    gallery: ism.Embedding | None = None,
    gallery_labels: Int[Array, "m"] | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Ranks:
    """`retrieval.ranks_by_distance` under the metric; s is centred first, since the distance depends on differences.

    Same protocol and errors.
    """
    sides = [embedding] if gallery is None else [embedding, gallery]
    rows = [
        embedding_rows(x.semantic, f"{name}.semantic")[0]
        for name, x in zip(("embedding", "gallery"), sides, strict=False)
    ]
    if len({x.shape[1] for x in rows}) == 1:
        moved = [near for near, _ in nearest.moved(*rows)]
        sides = [ism.Embedding(near, x.uncertainty) for x, near in zip(sides, moved, strict=True)]  # type: ignore[arg-type]
    searched = None if gallery is None else sides[1]
    return ranks_by_distance(metric, sides[0], labels, searched, gallery_labels, devices=devices)


def compare_metrics(comparison: Comparison, ks: Sequence[int] = (1, 2, 4, 8)) -> dict[str, float]:
    """One flat dictionary: 'semantic/R@1', ..., 'introspective/R@1', ..., as `retrieval.summarise` names them."""
    sides = comparison._asdict().items()
    return {f"{side}/{name}": value for side, ranks in sides for name, value in summarise(ranks, ks).items()}


def answer_scores(
    embedding: ism.Embedding,
    gallery: ism.Embedding | None = None,
    *,
    norms: Float[Array, "n"] | None = None,
    own: Int[Array, "n"] | None = None,
    found: Neighbours | None = None,
    metric: ism.Metric = ism.Metric(),  # noqa: B008 (immutable)
) -> dict[str, Float[np.ndarray, "n"]]:
    """Uncertainty scores of the semantic nearest neighbour of each query as its answer; larger = less certain.

    The baseline scores of `uncertainty.free_scores` and, where the embedding has an uncertainty: 'uncertainty' |u| of
    the query, 'pair_uncertainty' |u + u'| of query and answer, 'introspective_distance' between the two. `own` and
    `found` as in `uncertainty.free_scores`.
    """
    others = embedding if gallery is None else gallery
    searched = None if gallery is None else gallery.semantic
    found = nearest_twenty(embedding.semantic, searched, own=own) if found is None else found
    scores = free_scores(embedding.semantic, searched, norms=norms, own=own, found=found)
    if embedding.uncertainty is None or others.uncertainty is None:
        return scores
    answer = jax.tree.map(lambda x: np.asarray(x)[found.index[:, 0]], others)
    u = np.asarray(embedding.uncertainty, np.float64)
    scores["uncertainty"] = np.linalg.norm(u, axis=1)
    scores["pair_uncertainty"] = np.linalg.norm(u + np.asarray(answer.uncertainty, np.float64), axis=1)
    scores["introspective_distance"] = np.asarray(_row_by_row(metric, embedding, answer), np.float64)
    return scores


@functools.partial(jax.jit, static_argnums=0)
def _row_by_row(metric: ism.Metric, a: ism.Embedding, b: ism.Embedding) -> Float[jax.Array, "n"]:
    """Distance of each row of one side to the same row of the other; compiled once per metric and shape."""
    one = lambda a, b: metric(*(jax.tree.map(lambda x: x[None], side) for side in (a, b)))[0, 0]
    return jax.vmap(one)(a, b)
