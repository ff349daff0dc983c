"""The sections of a run's report; each is a function from the evaluated run to HTML."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from idml_jax.data.glyphs.draw import KINDS
from idml_jax.metrics import uncertainty
from idml_jax.reporting import html as pages
from idml_jax.reporting import maps, notes, open_set, pairs, plots
from idml_jax.reporting.html import Share
from idml_jax.reporting.seen import SCORE_NAMES, Seen, Thumbnails

Rows = Sequence[Mapping[str, float]]  # rows of metrics.jsonl
DRAWN = ("confidence", "vote_share", "uncertainty", "ratio_20", "margin_20", "nearest_distance", "norm")


Section = Callable[[Seen, Thumbnails], Markup]


def _curve(rows: Rows, name: str) -> plots.Curve | None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    return ([x for x, _ in points], [y for _, y in points]) if points else None


def curves(rows: Rows, names: Mapping[str, str], factor: float = 1.0) -> dict[str, plots.Curve]:
    """Curves over the steps by displayed name; ``names`` maps names in the rows to displayed names."""
    found = {shown: _curve(rows, name) for name, shown in names.items()}
    return {shown: (x, np.asarray(y) * factor) for shown, curve in found.items() if curve for x, y in [curve]}


def head(seen: Seen, images: Thumbnails) -> Markup:
    """Title, settings, main metrics with their meaning, and warnings."""
    config, untrained = seen.model.config, seen.result.get("untrained")
    best = seen.result.get("best", {})
    headline, measured = seen.task.headline, {**best, **seen.figures}
    values = [notes.card(n, shown, measured[n]) for n, shown in headline.items() if measured.get(n) is not None]
    if "R@1" not in headline:
        values.append(notes.card("R@1", "R@1 of the feature", seen.figures["R@1"]))
    first = next(iter(headline))
    if untrained and untrained.get(first) is not None:
        before = notes.card(first, f"{headline[first]} untrained", untrained[first])
        values.insert(0, (*before[:2], "The same before training."))
    if best.get("NMI") is not None:
        values.append(notes.card("NMI", "NMI", best["NMI"]))
    if "uncertainty" in seen.scores and uncertainty.r_auroc_undefined(seen.correct) is None:
        auroc = float(uncertainty.r_auroc(seen.scores["uncertainty"], seen.correct))
        words = "Probability that |u| is larger for a query with a wrong answer; 50 % is chance."
        values.append(("R-AUROC of |u|", f"{100 * auroc:.1f} %", words))
    if best.get("spearman(u,ambiguity)") is not None:
        values.append(notes.card("spearman(u,ambiguity)", "|u| with true ambiguity", best["spearman(u,ambiguity)"]))
    kind = "introspective" if seen.model.introspective else "plain"
    name = config.data.name if config.data.name != "folder" else Path(config.data.root or config.data.variant).name
    noise = config.data.label_noise.share
    wrong = f" Of the training labels {100 * noise:g} % are wrong on purpose." if noise else ""
    searched = "each other" if seen.gallery is seen.queries else f"{len(seen.gallery):,} others"
    return pages.html("<h1>{}: {} {}</h1>", name, kind, seen.task.loss_text(config)) + pages.html(
        '<p class="muted">{}, {} pixels; step {} of <code>{}</code>; {:,} images of {:,} classes search {}.{}</p>{}{}',
        config.model.name,
        config.data.image_size,
        seen.model.step,
        seen.model.workdir,
        len(seen.queries),
        len(seen.queries.class_names),
        searched,
        wrong,
        pages.cards(values),
        pages.join(map(pages.warning, notes.warnings(seen))),
    )


def training(seen: Seen, images: Thumbnails) -> Markup:
    """Loss, recall and length of the uncertainty over the steps."""
    rows, panels = seen.history, []
    losses = {"train/loss": "sum", "train/loss_original": "original images", "train/loss_mixed": "mixed images"}
    loss = curves(rows, losses)
    followed = seen.task.followed(seen.model.config)
    recall = curves(rows, {f"eval/{name}": shown for name, shown in followed.items()}, 100)
    length = curves(rows, {"train/uncertainty": "original images", "train/uncertainty_mixed": "mixed images"})
    said = []
    if loss:
        panels.append(("Loss", "", loss))
        said.append("The loss is what training lowers; its value says little across losses.")
    if recall:
        panels.append((f"{seen.task.curve} on test images, %", "", recall))
        said += [f"{shown}: {notes.meaning(name)}" for name, shown in followed.items()][:1]
    if length and seen.model.introspective:
        panels.append(("Mean |u| in training", "", length))
        said.append("|u| is the length of the uncertainty embedding; it should be larger for mixed images.")
    if not panels:
        return Markup()
    drawn = [pages.plot(plots.lines(panel, "step"), f"{panel[0]} over the steps") for panel in panels]
    return pages.html("<h2>Training</h2><p>{}</p>{}", " ".join(said), pages.plots(drawn))


def predictions(seen: Seen, images: Thumbnails) -> Markup:
    """How well each score detects the classifier's wrong predictions; empty for an embedding."""
    best = seen.result.get("best", {})
    names = {"u": "|u|, learned", "max_softmax": "1 minus the largest probability", "entropy": "entropy"}
    rows = [
        (shown, Share(auroc), Share(aurc))
        for name, shown in names.items()
        for auroc, aurc in [(best.get(f"AUROC_error({name})"), best.get(f"AURC({name})"))]
        if auroc is not None and aurc is not None
    ]
    if not rows:
        return Markup()
    head = ("score", "AUROC (50 %: chance)", "AURC (0 %: perfect)")
    return pages.html(
        "<h2>Does it know which predictions are wrong?</h2><p>AUROC: probability that the score is larger for a wrong "
        "prediction than for a right one. AURC: mean share of wrong predictions as the least sure are dropped.</p>{}<p>"
        "Below, each test image searches the others by the classifier's feature: the answer is the nearest other image."
        "</p>",
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
        (
            SCORE_NAMES.get(n, n),
            Share(uncertainty.r_auroc(seen.scores[n], seen.correct)),
            Share(c.aurc),
            Share(c.excess_aurc),
        )
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
    spread = plots.histogram(f"{SCORE_NAMES[name]}, by answer", "larger = less sure", groups)
    drawn = (
        pages.plot(plot, "risk over coverage by score"),
        pages.plot(spread, "distribution of the uncertainty of right and wrong answers"),
    )
    return pages.html(
        "<h2>Does it know when it is wrong?</h2><p>Each score sorts the queries from sure to unsure. The least certain "
        "queries are dropped first; the others should be wrong less often. {}</p>{}<p>R-AUROC: probability that the "
        "score is larger for a wrong answer than for a right one. AURC: mean share of wrong answers as the least sure "
        "are dropped, the area under the curve above. The last column is AURC less that of the best possible order.</p>"
        "{}",
        said,
        pages.plots(drawn),
        pages.table(("score", "R-AUROC (50 %: chance)", "AURC (0 %: perfect)", "above the best possible"), rows),
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
        drawn = plots.against_truth(truth, score, seen.correct, uncertainty.spearman(score, truth))
        names = ("uncertainty over the true ambiguity", "right answers over the true ambiguity")
        said = (
            "The true ambiguity of these images is known. If |u| sees it, the median rises from left to right; "
            "the rank "
            "correlation is 1 for the same order and 0 for none."
        )
        parts.append(pages.html("<p>{}</p>{}", said, pages.plots(map(pages.plot, drawn, names))))
        kinds = seen.queries.fields.get("kind")
        if kinds is not None:
            glyphs = seen.model.config.data.name == "glyphs"
            kind = np.asarray([KINDS[k] if glyphs else str(k) for k in kinds.tolist()])
            rows = [
                (k, int((kind == k).sum()), float(score[kind == k].mean()), Share(seen.correct[kind == k].mean()))
                for k in sorted(set(kind.tolist()))
            ]
            parts.append(pages.table(("kind of image", "images", "mean |u|", "R@1"), rows))
    rows = [(n[4:-3], Share(v)) for n, v in best.items() if n.startswith("P(u_") and v is not None]
    if rows:
        parts.append(
            Markup(
                "<h3>How often |u| rises when an image is changed</h3><p>Share of images whose |u| is larger once they "
                "are mixed, blurred or damaged; 50 % is chance, 100 % is always.</p>"
            )
        )
        parts.append(pages.table(("change", "|u| rises"), rows))
    return Markup("<h2>Does the uncertainty see ambiguity?</h2>") + pages.join(parts) if parts else Markup()


def answers(seen: Seen, images: Thumbnails, rows: int = 5) -> Markup:
    """Right and wrong answers, the most and the least certain ones."""
    name, score = seen.doubt
    parts = [
        pages.html(
            "<h2>Answers</h2><p>Each query (blue frame, round corners) and its nearest images, nearest first: "
            "{} if the "
            "class is the same, {} and a dashed frame otherwise. Sorted by {}. A click enlarges an image.</p>",
            pages.key("right"),
            pages.key("wrong"),
            SCORE_NAMES[name],
        )
    ]
    if seen.embedded.sets is not None:
        parts.append(Markup("<p>Images have several classes here: an answer is right if it shares one.</p>"))
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
                kind = "right" if seen.agree(query, row) else "wrong"
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
        pages.html(
            "<h2>The most and the least uncertain images</h2><p>{} if the nearest image has the same class, {} "
            "otherwise.</p>",
            pages.key("right"),
            pages.key("wrong"),
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
    "map": maps.plane,
    "confusion": maps.confusion,
}
