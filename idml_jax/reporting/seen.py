"""The evaluated run that a report shows, and its thumbnails."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.data.sources import Source, box_of
from idml_jax.inference.model import Trained
from idml_jax.metrics import relevance
from idml_jax.metrics.summary import Embedded
from idml_jax.reporting import plots
from idml_jax.reporting.thumbnails import thumbnail
from idml_jax.training.tasks import Task, task_of

SCORE_NAMES = {
    "uncertainty": "|u|, learned", "risk": "risk, learned after training",
    "confidence": "all scores joined, fitted on held-out classes",
    "pair_uncertainty": "|u + u'| of query and answer", "introspective_distance": "introspective distance",
    "nearest_distance": "distance to the nearest", "margin_2": "margin 1st to 2nd", "margin_10": "margin 1st to 10th",
    "margin_20": "margin 1st to 20th", "ratio_20": "distance to the 1st over that to the 20th",
    "norm": "norm before normalising", "vote_share": "vote of the nearest for the answer's class",
    "vote_rival": "vote for another class over that for the answer's",
    "agreement": "nearest of another class than the answer", "class_margin": "margin to the nearest of another class",
    "answer_density": "similarity to the answer, less that of its 10th neighbour",
    "mean_distance": "distance to the mean of the answer's class", "mean_margin": "margin to the mean of another class",
}  # fmt: skip


class Seen(NamedTuple):
    """The evaluated run that a report shows.

    Attributes:
      model: trained embedding.
      queries: query images.
      gallery: images that are searched; the queries if there is no gallery.
      embedded: embeddings of the ``n`` queries.
      searched: embeddings of the gallery.
      index: ``[n, k]`` nearest rows of the gallery.
      distance: ``[n, k]`` their distances.
      correct: ``[n]`` whether the nearest image has the query's class, or shares one with it.
      scores: ``[n]`` uncertainty scores by name, larger = less certain.
      history: rows of ``metrics.jsonl``.
      result: content of ``result.json``; empty if the run is not finished.
      figures: retrieval metrics of this checkpoint.
      warnings: what is wrong with the data of the run, one line each.
    """

    model: Trained
    queries: Source
    gallery: Source
    embedded: Embedded
    searched: Embedded
    index: Int[np.ndarray, "n k"]  # type: ignore[assignment]  # in place of tuple.index
    distance: Float[np.ndarray, "n k"]
    correct: Bool[np.ndarray, "n"]
    scores: dict[str, Float[np.ndarray, "n"]]
    history: list[dict[str, float]]
    result: dict[str, dict[str, float]]
    figures: dict[str, float]
    warnings: tuple[str, ...] = ()

    @property
    def task(self) -> Task:
        """The task of the run."""
        return task_of(self.model.config)

    @property
    def doubt(self) -> tuple[str, Float[np.ndarray, "n"]]:
        """Name and values of the score that sorts images: the learned uncertainty, if there is one."""
        name = next(n for n in ("uncertainty", "margin_10", "margin_2", "nearest_distance") if n in self.scores)
        return name, self.scores[name]

    def class_of(self, row: int) -> str:
        """Name of a query's class, or of all of them."""
        return _names(self.queries, self.embedded, row)

    def answer_class(self, row: int) -> str:
        """Name of the class of a gallery row, or of all of them."""
        return _names(self.gallery, self.searched, row)

    def agree(self, query: int, row: int) -> bool:
        """Whether a query and a gallery row share a class."""
        return bool(relevance.shared(self.embedded.every_label[[query]], self.searched.every_label[[row]])[0])


def _names(source: Source, embedded: Embedded, row: int) -> str:
    return ", ".join(source.class_names[label] for label in embedded.every_label[row].tolist() if label >= 0)


class _Encoded:
    """Encoded thumbnails of a source, each read once."""

    def __init__(self, source: Source):
        self._source = source
        self._known: dict[int, bytes | None] = {}

    def __call__(self, record: int) -> bytes | None:
        if record not in self._known:
            pixels = thumbnail(self._source.read(record), within=box_of(self._source, record))
            self._known[record] = None if pixels is None else plots.encode(pixels)
        return self._known[record]


class Thumbnails:
    """Thumbnails for a page: ``query(record)`` for queries and ``found(record)`` for gallery images."""

    def __init__(self, seen: Seen):
        self.query = _Encoded(seen.queries)
        self.found = self.query if seen.gallery is seen.queries else _Encoded(seen.gallery)
