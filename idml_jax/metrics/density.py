"""How close a query is to its answer, compared with how close the answer's own neighbours are to it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from idml_jax.metrics import visible
from idml_jax.metrics.retrieval import Neighbours
from idml_jax.metrics.vote import cosines

# The neighbour of the answer whose similarity stands for the density there.
PLACE = 10


def density_score(
    queries: Float[np.ndarray, "n d"],
    gallery: Float[np.ndarray, "m d"],
    labels: Int[np.ndarray, "m"],
    found: Neighbours,
    own: Int[np.ndarray, "n"] | None = None,
    *,
    absent: Int[np.ndarray, "n"] | None = None,
) -> dict[str, Float[np.ndarray, "n"]]:
    """The score ``answer_density``; larger = less certain.

    The cosine similarity of the answer to its 10th nearest gallery row, less that of query and answer: a query farther
    from its answer than other images of that region is suspicious (a local scale, as of Breunig et al., LOF, 2000). The
    query's own row does not count. Left out if some answer has fewer than 10 neighbours.

    Args:
      queries: rows.
      gallery: rows.
      labels: class of each gallery row; only used with ``absent``.
      found: nearest gallery rows of each query.
      own: gallery row of each query; -1: none.
      absent: class of which each query sees no image.
    """
    answer = found.index[:, 0]
    mine = np.full(len(answer), -1) if own is None else np.asarray(own)
    if absent is None and len(gallery) == len(mine) and found.index.shape[1] > PLACE and _same(queries, gallery, mine):
        lists = found.index[answer]  # every row of the gallery has searched it already
    else:
        hidden = np.zeros((len(answer), 0), int) if absent is None else np.asarray(absent)[:, None]
        depth = min(PLACE + 1, int(visible.visible_rows(hidden, labels, answer).min(initial=len(labels))))
        if depth < PLACE + 1:
            return {}
        lists = visible.nearest_of_other_classes(gallery[answer], hidden, gallery, labels, PLACE + 1, own=answer).index
    # The place of the 10th row that is not the query's own.
    place = PLACE - 1 + (lists[:, :PLACE] == mine[:, None]).any(axis=1)
    reach = cosines(gallery[answer], gallery, lists[np.arange(len(answer)), place][:, None])[:, 0]
    return {"answer_density": reach - cosines(queries, gallery, found.index[:, :1])[:, 0]}


def _same(queries: Float[np.ndarray, "n d"], gallery: Float[np.ndarray, "m d"], own: Int[np.ndarray, "n"]) -> bool:
    """Whether the queries are the gallery, row for row."""
    return queries is gallery and bool((own == np.arange(len(own))).all())
