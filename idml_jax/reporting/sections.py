"""The sections of a run's report; each is a function from the evaluated run to HTML."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from markupsafe import Markup

from idml_jax.data.glyphs.draw import KINDS
from idml_jax.data.sources import Source, box_of
from idml_jax.inference.model import Trained
from idml_jax.metrics import uncertainty
from idml_jax.metrics.summary import Embedded
from idml_jax.reporting import html as pages
from idml_jax.reporting import open_set, pairs, plots
from idml_jax.reporting.thumbnails import thumbnail
from idml_jax.training.tasks import Task, task_of

ON_MAP = 1500
Rows = Sequence[Mapping[str, float]]  # rows of metrics.jsonl
Reader = Callable[[int], bytes | None]  # the encoded image of a row
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
}  # fmt: skip
DRAWN = ("confidence", "vote_share", "uncertainty", "ratio_20", "margin_20", "nearest_distance", "norm")


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
      correct: ``[n]`` whether the nearest image has the query's class.
      scores: ``[n]`` uncertainty scores by name, larger = less certain.
      history: rows of ``metrics.jsonl``.
      result: content of ``result.json``; empty if the run is not finished.
      figures: retrieval metrics of this checkpoint.
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
        """Name of a query's class."""
        return self.queries.class_names[self.embedded.labels[row]]

    def answer_class(self, row: int) -> str:
        """Name of the class of a gallery row."""
        return self.gallery.class_names[self.searched.labels[row]]


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


Section = Callable[[Seen, Thumbnails], Markup]


def _curve(rows: Rows, name: str) -> plots.Curve | None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    return ([x for x, _ in points], [y for _, y in points]) if points else None


def curves(rows: Rows, names: Mapping[str, str], factor: float = 1.0) -> dict[str, plots.Curve]:
    """Curves over the steps by displayed name; ``names`` maps names in the rows to displayed names."""
    found = {shown: _curve(rows, name) for name, shown in names.items()}
    return {shown: (x, np.asarray(y) * factor) for shown, curve in found.items() if curve for x, y in [curve]}


def head(seen: Seen, images: Thumbnails) -> Markup:
    """Title, settings and main metrics."""
    config, untrained = seen.model.config, seen.result.get("untrained")
    best = seen.result.get("best", {})
    headline, measured = seen.task.headline, {**best, **seen.figures}
    values = [(shown, f"{100 * measured[n]:.1f} %") for n, shown in headline.items() if measured.get(n) is not None]
    if "R@1" not in headline:
        values.append(("R@1 of the feature", f"{100 * seen.figures['R@1']:.1f} %"))
    first = next(iter(headline))
    if untrained and untrained.get(first) is not None:
        values.insert(0, (f"{values[0][0]} untrained", f"{100 * untrained[first]:.1f} %"))
    if best.get("NMI") is not None:
        values.append(("NMI", f"{best['NMI']:.2f}"))
    if "uncertainty" in seen.scores and uncertainty.r_auroc_undefined(seen.correct) is None:
        auroc = uncertainty.r_auroc(seen.scores["uncertainty"], seen.correct)
        values.append(("R-AUROC of |u|", f"{auroc:.2f}"))
    if best.get("spearman(u,ambiguity)") is not None:
        values.append(("|u| with true ambiguity", f"{best['spearman(u,ambiguity)']:.2f}"))
    kind = "introspective" if seen.model.introspective else "plain"
    name = config.data.name if config.data.name != "folder" else Path(config.data.root or config.data.variant).name
    searched = "each other" if seen.gallery is seen.queries else f"{len(seen.gallery):,} others"
    return pages.html("<h1>{}: {} {}</h1>", name, kind, seen.task.loss_text(config)) + pages.html(
        '<p class="muted">{}, {} pixels; step {} of <code>{}</code>; {:,} images of {:,} classes search {}.</p>{}',
        config.model.name,
        config.data.image_size,
        seen.model.step,
        seen.model.workdir,
        len(seen.queries),
        len(seen.queries.class_names),
        searched,
        pages.cards(values),
    )


def training(seen: Seen, images: Thumbnails) -> Markup:
    """Loss, recall and length of the uncertainty over the steps."""
    rows, panels = seen.history, []
    losses = {"train/loss": "sum", "train/loss_original": "original images", "train/loss_mixed": "mixed images"}
    loss = curves(rows, losses)
    shown = seen.task.followed(seen.model.config)
    recall = curves(rows, {f"eval/{name}": shown for name, shown in shown.items()}, 100)
    length = curves(rows, {"train/uncertainty": "original images", "train/uncertainty_mixed": "mixed images"})
    if loss:
        panels.append(("Loss", "", loss))
    if recall:
        panels.append((f"{seen.task.curve} on test images, %", "", recall))
    if length and seen.model.introspective:
        panels.append(("Mean |u| in training", "", length))
    if not panels:
        return Markup()
    return Markup("<h2>Training</h2>") + pages.plot(
        plots.lines(panels, "step"), "loss, recall and uncertainty over the steps"
    )


def predictions(seen: Seen, images: Thumbnails) -> Markup:
    """How well each score detects the classifier's wrong predictions; empty for an embedding."""
    best = seen.result.get("best", {})
    names = {"u": "|u|, learned", "max_softmax": "1 minus the largest probability", "entropy": "entropy"}
    rows = [
        (shown, float(auroc), float(aurc))
        for name, shown in names.items()
        for auroc, aurc in [(best.get(f"AUROC_error({name})"), best.get(f"AURC({name})"))]
        if auroc is not None and aurc is not None
    ]
    if not rows:
        return Markup()
    head = ("score", "AUROC (0.5: chance)", "AURC (0: perfect)")
    return pages.html(
        "<h2>Does it know which predictions are wrong?</h2>{}<p>Below, each test image searches the others by the "
        "classifier's feature: the answer is the nearest other image.</p>",
        pages.table(head, rows),
    )


def knowing(seen: Seen, images: Thumbnails) -> Markup:
    """Risk over coverage, and a table of how well each score detects wrong answers."""
    undefined = uncertainty.r_auroc_undefined(seen.correct)
    if undefined:
        return pages.html("<h2>Does it know when it is wrong?</h2><p>Undefined here: {}.</p>", undefined)
    curves = {n: uncertainty.risk_coverage(score, seen.correct) for n, score in seen.scores.items()}
    wrong = ~seen.correct
    oracle = uncertainty.risk_coverage(wrong.astype(float), seen.correct)
    thin = np.unique(np.linspace(0, len(wrong) - 1, 400).astype(int))
    # The first few answers are too noisy for a curve.
    thin = thin[thin >= min(20, len(wrong) // 4)]
    drawn = {SCORE_NAMES[n]: (curves[n].coverage[thin], curves[n].risk[thin]) for n in DRAWN if n in curves}
    plot = plots.risk_coverage(drawn, (oracle.coverage, oracle.risk), float(wrong.mean()))
    rows = [
        (SCORE_NAMES.get(n, n), float(uncertainty.r_auroc(seen.scores[n], seen.correct)), c.aurc, c.excess_aurc)
        for n, c in curves.items()
    ]
    rows.sort(key=lambda row: -row[1])
    best, learned = rows[0][0], "uncertainty" in seen.scores
    said = pages.html("The best score here: <b>{}</b>.", best) + (
        " The learned uncertainty alone does not beat the baseline scores."
        if learned
        and max(
            float(uncertainty.r_auroc(seen.scores[n], seen.correct))
            for n in seen.scores
            if n in ("nearest_distance", "margin_2", "margin_10", "margin_20", "ratio_20", "norm")
        )
        >= uncertainty.r_auroc(seen.scores["uncertainty"], seen.correct)
        else ""
    )
    name, score = seen.doubt
    groups = {"right": score[seen.correct], "wrong": score[wrong]}
    spread = plots.histograms([(f"{SCORE_NAMES[name]}, by answer", "larger = less sure", groups)])
    return pages.html(
        "<h2>Does it know when it is wrong?</h2><p>The least certain queries are dropped first; the others should be "
        "wrong less often. {}</p>{}{}{}",
        said,
        pages.plot(plot, "risk over coverage by score"),
        pages.table(("score", "R-AUROC (0.5: chance)", "AURC (0: perfect)", "above the best possible"), rows),
        pages.plot(spread, "distribution of the uncertainty of right and wrong answers"),
    )


def strangers(seen: Seen, images: Thumbnails) -> Markup:
    """Queries whose class is not among the images searched."""
    return open_set.table(seen.result.get("best", {}), SCORE_NAMES)


def ambiguity(seen: Seen, images: Thumbnails) -> Markup:
    """Uncertainty against the known ambiguity, and on changed images."""
    parts, best = [], seen.result.get("best", {})
    truth = seen.queries.fields.get("ambiguity")
    if truth is not None and "uncertainty" in seen.scores:
        score = seen.scores["uncertainty"]
        plot = plots.against_truth(truth, score, seen.correct, uncertainty.spearman(score, truth))
        parts.append(pages.plot(plot, "uncertainty and recall over the true ambiguity"))
        kinds = seen.queries.fields.get("kind")
        if kinds is not None:
            glyphs = seen.model.config.data.name == "glyphs"
            names = np.asarray([KINDS[k] if glyphs else str(k) for k in kinds.tolist()])
            rows = [
                (k, int((names == k).sum()), float(score[names == k].mean()), float(seen.correct[names == k].mean()))
                for k in sorted(set(names.tolist()))
            ]
            parts.append(pages.table(("kind of image", "images", "mean |u|", "R@1"), rows))
    rows = [(n[4:-3], float(v)) for n, v in best.items() if n.startswith("P(u_") and v is not None]
    if rows:
        parts.append(Markup("<h3>How often |u| rises when an image is changed</h3>"))
        parts.append(pages.table(("change", "P(|u| changed > |u| original); 0.5: chance"), rows))
    return Markup("<h2>Does the uncertainty see ambiguity?</h2>") + pages.join(parts) if parts else Markup()


def answers(seen: Seen, images: Thumbnails, rows: int = 5) -> Markup:
    """Right and wrong answers, the most and the least certain ones."""
    name, score = seen.doubt
    parts = [
        pages.html(
            "<h2>Answers</h2><p>Each query (blue frame) and its nearest images, nearest first: green frame if the "
            "class is the same, red otherwise. Sorted by {}.</p>",
            SCORE_NAMES[name],
        )
    ]
    short = "|u|" if name == "uncertainty" else name
    order = np.argsort(score, kind="stable")
    for title, those in (
        ("Right, and sure", order[seen.correct[order]][:rows]),
        ("Right, and unsure", order[seen.correct[order]][::-1][:rows]),
        ("Wrong, and sure: confusable classes, or wrong labels", order[~seen.correct[order]][:rows]),
        ("Wrong, and unsure", order[~seen.correct[order]][::-1][:rows]),
    ):
        if not len(those):
            continue
        parts.append(pages.html("<h3>{}</h3>", title))
        for query in those.tolist():
            cells = [
                pages.tile(
                    images.query(query),
                    [f"{short} {score[query]:.3f}", seen.class_of(query)],
                    "query",
                    seen.queries.name(query),
                )
            ]
            for row, distance in zip(seen.index[query].tolist(), seen.distance[query].tolist(), strict=True):
                kind = "right" if seen.searched.labels[row] == seen.embedded.labels[query] else "wrong"
                lines = [f"distance {distance:.3f}", seen.answer_class(row)]
                cells.append(pages.tile(images.found(row), lines, kind, seen.gallery.name(row)))
            parts.append(pages.row(cells))
    return pages.join(parts)


def extremes(seen: Seen, images: Thumbnails, count: int = 20) -> Markup:
    """The most and the least uncertain images."""
    if "uncertainty" not in seen.scores:
        return Markup()
    score, truth = seen.scores["uncertainty"], seen.queries.fields.get("ambiguity")
    order = np.argsort(score, kind="stable")
    parts = [
        Markup(
            "<h2>The most and the least uncertain images</h2><p>Green frame if the nearest image has the same class, "
            "red otherwise.</p>"
        )
    ]
    for title, those in (("Most uncertain", order[::-1][:count]), ("Least uncertain", order[:count])):
        shown = []
        for row in those.tolist():
            lines = [f"|u| {score[row]:.2f}"] + ([] if truth is None else [f"ambiguity {float(truth[row]):.2f}"])
            kind = "right" if seen.correct[row] else "wrong"
            shown.append(pages.tile(images.query(row), [*lines, seen.class_of(row)], kind, seen.queries.name(row)))
        parts.append(pages.html("<h3>{}</h3>{}", title, pages.tiles(shown)))
    return pages.join(parts)


def plane(seen: Seen, images: Thumbnails) -> Markup:
    """The embeddings in two dimensions."""
    some = np.unique(np.linspace(0, len(seen.queries) - 1, ON_MAP).astype(int))
    places, how = plots.flatten_to_plane(seen.embedded.semantic[some], seen.model.config.seed)
    learned = seen.scores.get("uncertainty")
    drawn = plots.plane(places, seen.embedded.labels[some], None if learned is None else learned[some], "|u|")
    note = f"{len(some):,} of {len(seen.queries):,} test images by {how}."
    if how != "t-SNE":
        note += " With scikit-learn (pip install scikit-learn) the map is made by t-SNE, which shows clusters better."
    plot = pages.plot(drawn, "embeddings in a plane")
    return pages.html("<h2>Map of the embeddings</h2><p>{}</p>{}", note, plot)


def confusion(seen: Seen, images: Thumbnails, pairs: int = 10, classes: int = 20) -> Markup:
    """Pairs of classes that are confused."""
    asked, said = seen.embedded.labels, seen.searched.labels[seen.index[:, 0]]
    wrong = np.flatnonzero(asked != said)
    if not len(wrong):
        return Markup("<h2>Confused classes</h2><p>None: every nearest image has the query's class.</p>")
    both = np.sort(np.column_stack([asked[wrong], said[wrong]]), axis=1)
    kinds, first, counts = np.unique(both, axis=0, return_index=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    parts = [
        Markup(
            "<h2>Confused classes</h2><p>Pairs of classes most often taken for each other, each with one such query "
            "and its answer.</p>"
        )
    ]
    shown = []
    for pair in order[:pairs].tolist():
        query = int(wrong[first[pair]])
        row = int(seen.index[query, 0])
        tiles = pages.tile(images.query(query), [seen.class_of(query)], "query", seen.queries.name(query))
        lines = [f"{counts[pair]} times", seen.answer_class(row)]
        tiles += pages.tile(images.found(row), lines, "wrong", seen.gallery.name(row))
        shown.append(pages.html('<div class="pair">{}</div>', tiles))
    parts.append(pages.tiles(shown))
    chosen = list(dict.fromkeys(kinds[order].reshape(-1).tolist()))[:classes]
    counted = np.zeros((len(chosen), len(chosen)))
    for i, label in enumerate(chosen):
        of_class = said[asked == label]
        counted[i] = [np.mean(of_class == other) if len(of_class) else 0.0 for other in chosen]
    names = [seen.queries.class_names[label] for label in chosen]
    parts.append(pages.plot(plots.matrix(counted, names), "shares of answers between the most confused classes"))
    return pages.join(parts)


# Sections of the page by name; a task selects its sections and their order.
SECTIONS: dict[str, Section] = {
    "training": training,
    "predictions": predictions,
    "knowing": knowing,
    "strangers": strangers,
    "verification": pairs.verification,
    "ambiguity": ambiguity,
    "answers": answers,
    "extremes": extremes,
    "map": plane,
    "confusion": confusion,
}
