"""Re-ranking by a text such as ``reciprocal:k1=20`` or ``augment+expand:k=5,alpha=3``."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.errors import UserError
from idml_jax.inference.choices import EXAMPLES
from idml_jax.metrics import reranking
from idml_jax.metrics.embedded import Embedded
from idml_jax.metrics.retrieval import Neighbours, neighbours

# The settings of each step, with their defaults; whole numbers are ints.
STEPS: dict[str, dict[str, int | float]] = {
    "augment": {"k": 10},
    "expand": {"k": 10, "alpha": 3.0},
    "reciprocal": {"k1": 20, "k2": 6, "weight": 0.3},
}


class Step(NamedTuple):
    """A step of re-ranking, and its settings."""

    name: str
    settings: dict[str, int | float]


def parse(given: str) -> tuple[Step, ...]:
    """Steps from a text; empty: none.

    Raises:
      UserError: naming what is unknown or out of range.
    """
    steps = tuple(_step(given, part) for part in given.split("+")) if given else ()
    names = [step.name for step in steps]
    if len(set(names)) < len(names):
        raise UserError(f"--rerank={given}: a step is there twice")
    if "reciprocal" in names and len(names) > 1:
        raise UserError(f"--rerank={given}: reciprocal stands alone")
    return tuple(sorted(steps))  # the gallery first


def _step(given: str, part: str) -> Step:
    name, _, listed = part.partition(":")
    if name not in STEPS:
        raise UserError(f"--rerank={given}: unknown {name!r}; e.g. {EXAMPLES}")
    settings = dict(STEPS[name])
    for setting in filter(None, listed.split(",")):
        key, _, text = setting.partition("=")
        if key not in settings:
            raise UserError(f"--rerank={given}: {name} has {', '.join(settings)}, not {key!r}")
        try:
            value = type(settings[key])(text)
        except ValueError as error:
            kind = "a whole number" if isinstance(settings[key], int) else "a number"
            raise UserError(f"--rerank={given}: {key} is {kind}, not {text!r}") from error
        least, most = (0, 1) if key == "weight" else (0, math.inf) if key == "alpha" else (1, math.inf)
        if not (least <= value <= most and math.isfinite(value)):
            raise UserError(f"--rerank={given}: {key}={text} is not from {least} to {most}")
        settings[key] = value
    if settings.get("k2", 0) > settings.get("k1", 0) + 1:
        raise UserError(f"--rerank={given}: k2 is at most k1 + 1")
    return Step(name, settings)


def reranked(
    steps: Sequence[Step],
    queries: Float[np.ndarray, "n d"],
    gallery: Float[np.ndarray, "m d"] | None,
    depth: int,
    own: Int[np.ndarray, "n"] | None = None,
) -> Neighbours:
    """The nearest rows after re-ranking; the distance is that of the last step.

    Args:
      steps: from ``parse``.
      queries: semantic embeddings.
      gallery: those to search; without it each query searches all the others.
      depth: number of answers for each query.
      own: gallery row that each query leaves out, -1: none.
    """
    chosen = {step.name: step.settings for step in steps}
    if "reciprocal" in chosen:
        setting = reranking.Reciprocal(**chosen["reciprocal"])  # type: ignore[arg-type]  # ints where ints belong
        return reranking.reciprocal(queries, gallery, depth, own=own, setting=setting)
    if gallery is None:
        gallery, own = queries, np.arange(len(queries))
    if "augment" in chosen:
        gallery = reranking.augmented(gallery, **chosen["augment"])  # type: ignore[arg-type]
    if "expand" in chosen:
        queries = reranking.expanded(queries, gallery, **chosen["expand"], own=own)  # type: ignore[arg-type]
    unit = reranking.unit_float32
    return neighbours(unit(queries, "queries"), unit(gallery, "gallery"), depth, own=own)


def rerank(
    steps: Sequence[Step], queries: Embedded, gallery: Embedded, depth: int, own: Int[np.ndarray, "n"] | None
) -> Neighbours:
    """The rows of ``reranked`` in their order, with the semantic distances of the embeddings as they are."""
    found = reranked(steps, queries.semantic, gallery.semantic, depth, own)
    distance = np.empty(found.index.shape, np.float32)
    for row, index in enumerate(found.index):
        distance[row] = np.linalg.norm(gallery.semantic[index] - queries.semantic[row], axis=1)
    return Neighbours(distance, found.index)


def report(steps: Sequence[Step], embedded: Embedded, gallery: Embedded | None, ks: Sequence[int]) -> dict[str, float]:
    """``reranked/R@K``, ``reranked/P@K`` and ``reranked/MAP@R``, with lone queries as in ``metrics.retrieval``."""
    labels = embedded.labels if gallery is None else gallery.labels
    others = len(labels) - (gallery is None)
    classes, counts = np.unique(labels, return_counts=True)
    size_of = dict(zip(classes.tolist(), counts.tolist(), strict=True))
    positives = np.asarray([size_of.get(label, 0) for label in embedded.labels.tolist()]) - (gallery is None)
    depth = min(others, max(*ks, int(positives.max()), 1))
    found = reranked(steps, embedded.semantic, None if gallery is None else gallery.semantic, depth)
    hits: Bool[np.ndarray, "n k"] = labels[found.index] == embedded.labels[:, None]
    rates = {f"R@{k}": hits[:, :k].any(axis=1).mean() for k in ks} | {f"P@{k}": hits[:, :k].mean() for k in ks}
    precision = np.cumsum(hits, axis=1) / np.arange(1, depth + 1)
    inside = hits & (np.arange(depth) < positives[:, None])
    some = positives > 0
    average = (precision * inside).sum(axis=1)[some] / positives[some]
    rates["MAP@R"] = average.mean() if some.any() else np.nan
    return {f"reranked/{name}": float(value) for name, value in rates.items()}
