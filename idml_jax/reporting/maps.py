"""The sections of a report about classes: the map of the embeddings and the confused classes."""

import numpy as np
from jaxtyping import Int
from markupsafe import Markup

from idml_jax.metrics import relevance
from idml_jax.reporting import html as pages
from idml_jax.reporting import plots
from idml_jax.reporting.seen import Seen, Thumbnails

ON_MAP = 1500  # images


def plane(seen: Seen, images: Thumbnails) -> Markup:
    """The embeddings in two dimensions."""
    some = np.unique(np.linspace(0, len(seen.queries) - 1, ON_MAP).astype(int))
    places, how = plots.flatten_to_plane(seen.embedded.semantic[some], seen.model.config.seed)
    learned = seen.scores.get("uncertainty")
    note = f"{len(some):,} of {len(seen.queries):,} test images by {how}; each point is an image."
    note += " Points close together are similar; distances between far groups mean little."
    if seen.embedded.sets is not None:
        note += " An image of several classes has the colour of its first."
    if how != "t-SNE":
        note += " With scikit-learn (pip install scikit-learn) the map is made by t-SNE, which shows clusters better."
    drawn = [
        pages.plot(
            plots.plane_by_class(places, seen.embedded.labels[some], seen.queries.class_names),
            "map of the embeddings by class",
        )
    ]
    if learned is not None:
        drawn.append(
            pages.plot(plots.plane_by_score(places, learned[some], "|u|"), "map of the embeddings by uncertainty")
        )
    return pages.html("<h2>Map of the embeddings</h2><p>{}</p>{}", note, pages.plots(drawn))


def confusion(seen: Seen, images: Thumbnails, pairs: int = 10, classes: int = 14) -> Markup:
    """Pairs of classes that are confused."""
    asked, said = seen.embedded.every_label, seen.searched.every_label[seen.index[:, 0]]
    wrong = np.flatnonzero(~relevance.shared(asked, said))
    if not len(wrong):
        return Markup("<h2>Confused classes</h2><p>None: every nearest image has the query's class.</p>")
    both, of_query = _confused(asked, said, wrong)
    kinds, first, counts = np.unique(both, axis=0, return_index=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    parts = [
        Markup(
            "<h2>Confused classes</h2><p>Pairs of classes most often taken for each other, each with one such query "
            "and its answer. The matrix below has the most confused classes: a row shows where the nearest "
            "images of the "
            "queries of a class come from, in percent.</p>"
        )
    ]
    shown = []
    for pair in order[:pairs].tolist():
        query = int(of_query[first[pair]])
        row = int(seen.index[query, 0])
        tiles = pages.tile(images.query(query), [seen.class_of(query)], "query", seen.queries.name(query))
        lines = [f"{counts[pair]} times", seen.answer_class(row)]
        tiles += pages.tile(images.found(row), lines, "wrong", seen.gallery.name(row))
        shown.append(pages.html('<div class="pair">{}</div>', tiles))
    parts.append(pages.tiles(shown))
    chosen = list(dict.fromkeys(kinds[order].reshape(-1).tolist()))[:classes]
    counted = np.zeros((len(chosen), len(chosen)))
    for i, label in enumerate(chosen):
        of_class = said[(asked == label).any(axis=1)]
        counted[i] = [np.mean((of_class == other).any(axis=1)) if len(of_class) else 0.0 for other in chosen]
    names = [seen.queries.class_names[label] for label in chosen]
    parts.append(pages.plot(plots.matrix(counted, names), "shares of answers between the most confused classes"))
    return pages.join(parts)


def _confused(
    asked: Int[np.ndarray, "n l"], said: Int[np.ndarray, "n k"], wrong: Int[np.ndarray, "w"]
) -> tuple[Int[np.ndarray, "p 2"], Int[np.ndarray, "p"]]:
    """The classes taken for each other and the query of each pair: of several classes each for each of the answer's."""
    mine = np.repeat(asked[wrong], said.shape[1], axis=1).reshape(-1)
    theirs = np.tile(said[wrong], asked.shape[1]).reshape(-1)
    there = (mine >= 0) & (theirs >= 0)
    queries = np.repeat(wrong, asked.shape[1] * said.shape[1])
    return np.sort(np.stack([mine, theirs], axis=1)[there], axis=1), queries[there]
