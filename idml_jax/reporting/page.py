"""The report of a run as one self-contained HTML file."""

from pathlib import Path

import numpy as np
from markupsafe import Markup

from idml_jax.data.sources import Source
from idml_jax.errors import UserError
from idml_jax.inference.embed import embed_all
from idml_jax.inference.model import load
from idml_jax.metrics import calibration, confidence, retrieval
from idml_jax.metrics.names import compared
from idml_jax.metrics.summary import Embedded, retrieval_report, scores_of
from idml_jax.metrics.vote import Vote
from idml_jax.reporting import html as pages
from idml_jax.reporting import plots
from idml_jax.reporting import sections as parts
from idml_jax.reporting.record import read_record
from idml_jax.reporting.sections import SECTIONS, Seen, Thumbnails
from idml_jax.runtime import trackers
from idml_jax.runtime.files import check_target, user_path, write_text
from idml_jax.training import workdir as workdir_lib
from idml_jax.training.build import data_of
from idml_jax.training.tasks import Evaluation
from idml_jax.training.tasks.retrieval_summary import held_out_queries

NEIGHBOURS = 9


def look(workdir: str | Path, threads: int = 4) -> Seen:
    """Embeds the test images of a run and searches them.

    Raises:
      UserError: if there is no run or checkpoint, or its data are missing or damaged.
    """
    model = load(workdir).using(threads=threads)
    evaluation = Evaluation(model.config, model.embedder, data_of(model.config))
    queries, separate = evaluation.source, evaluation.gallery

    def embedded_of(source: Source) -> Embedded:
        embedded, kept = embed_all(model, source)
        if len(kept) < len(source):
            raise UserError(f"{len(source) - len(kept)} of the run's {len(source)} images cannot be read")
        return embedded

    embedded = embedded_of(queries)
    searched = embedded if separate is None else embedded_of(separate)
    own = np.arange(len(queries)) if separate is None else None
    k = min(NEIGHBOURS, len(searched.labels) - (own is not None))
    found = retrieval.neighbours(embedded.semantic, searched.semantic, k, own=own)
    held_out = held_out_queries(evaluation)
    known = None if held_out is None else calibration.answer(held_out, model.metric)
    setting = Vote() if known is None else known.setting
    scores = scores_of(embedded, searched, model.metric, own, setting=setting)
    if known is not None:
        fitted = calibration.fit_model(known, scores)
        scores["confidence"] = 1.0 - confidence.confidence(fitted, scores)
    correct = searched.labels[found.index[:, 0]] == embedded.labels
    figures = retrieval_report(embedded, model.config.eval.ks, None if separate is None else searched)
    history, result = read_record(model.workdir)
    return Seen(
        model,
        queries,
        queries if separate is None else separate,
        embedded,
        searched,
        found.index,
        found.distance,
        correct,
        scores,
        history,
        result,
        figures,
    )


def comparison(seen: Seen, other: Path) -> Markup:
    """Compares another run's metrics with this run's."""
    config = workdir_lib.read(other)
    rows, result = read_record(other)
    if not result:
        raise UserError(f"{other}: holds no result.json: the run is not finished")
    name = lambda path, introspective: f"{'introspective' if introspective else 'plain'} ({path.name})"
    names = name(seen.model.workdir, seen.model.introspective), name(other, config.ism.enabled)
    if names[0] == names[1]:
        names = names[0], str(other)
    first, shown = next(iter(seen.task.headline.items()))
    curves = {
        n: c
        for n, r in zip(names, (seen.history, rows), strict=True)
        for c in [parts.curves(r, {f"eval/{first}": n}, 100).get(n)]
        if c
    }
    ours, theirs = seen.result.get("best", seen.figures), result.get("best", {})
    value_of = lambda value: "-" if value is None else float(value)
    table = [(n, value_of(ours.get(n)), value_of(theirs.get(n))) for n in compared() if n in ours or n in theirs]
    body = pages.html("<h2>Beside {}</h2>{}", other, pages.table(("metric", *names), table))
    if curves:
        body += pages.plot(plots.lines([(f"{shown} on test images, %", "", curves)], "step"), f"{shown} of both runs")
    return body


def make(workdir: str | Path, out: str | Path = "", compare: str = "", threads: int = 4) -> Path:
    """Writes the page of a run.

    Args:
      workdir: folder of the run.
      out: HTML file to write; by default ``report.html`` in that folder.
      compare: folder of another run to compare with; empty: none.
      threads: number of reader and decoder threads.

    Returns:
      The file.

    Raises:
      UserError: see ``look``.
    """
    out = user_path(out) if out else user_path(workdir) / "report.html"
    check_target(out)  # fails before the work starts
    seen = look(workdir, threads)
    beside = comparison(seen, user_path(compare)) if compare else Markup()
    images = Thumbnails(seen)
    sections = [SECTIONS[name](seen, images) for name in seen.task.sections]
    page = pages.page(f"idml_jax: {seen.model.workdir.name}", [parts.head(seen, images), beside, *sections])
    write_text(out, page)
    trackers.send_page(seen.model.workdir, out, pages.plots_of(page))
    return out
