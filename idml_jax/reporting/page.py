"""The report of a run as one self-contained HTML file."""

from pathlib import Path

import numpy as np
from markupsafe import Markup

from idml_jax.data.datasets import Splits
from idml_jax.data.sources import Source
from idml_jax.errors import UserError
from idml_jax.inference.embed import embed_all
from idml_jax.inference.model import load
from idml_jax.metrics import calibration, confidence, relevance
from idml_jax.metrics.summary import Embedded, retrieval_report, scores_of
from idml_jax.metrics.vote import Vote
from idml_jax.reporting import html as pages
from idml_jax.reporting import sections as parts
from idml_jax.reporting.comparison import comparison
from idml_jax.reporting.record import read_record
from idml_jax.reporting.sections import SECTIONS
from idml_jax.reporting.seen import Seen, Thumbnails
from idml_jax.runtime import trackers
from idml_jax.runtime.files import check_result, user_path, write_text
from idml_jax.training import data_record
from idml_jax.training.build import data_of
from idml_jax.training.tasks import Evaluation
from idml_jax.training.tasks.retrieval_summary import held_out_queries
from idml_jax.training.workdir import finding_images

NEIGHBOURS = 9
__all__ = ["comparison", "look", "make", "read_record"]


def _changed(splits: Splits, workdir: Path) -> tuple[str, ...]:
    """What of the run's data has changed since it was started."""
    advice = "The numbers below are of the images as they are now; restore the data to get those of the run."
    try:
        return tuple(f"{line}. {advice}" for line in data_record.check(splits, workdir))
    except UserError as error:
        return (f"{error}",)


def look(workdir: str | Path, threads: int = 4) -> Seen:
    """Embeds the test images of a run and searches them.

    Raises:
      UserError: if there is no run or checkpoint, or its data are missing or damaged.
    """
    model = load(workdir).using(threads=threads)
    with finding_images(model.config, model.workdir):
        splits = data_of(model.config)
    evaluation = Evaluation(model.config, model.embedder, splits)
    queries, separate = evaluation.source, evaluation.gallery

    def embedded_of(source: Source) -> Embedded:
        embedded, kept = embed_all(model, source)
        if len(kept) < len(source):
            raise UserError(f"{len(source) - len(kept)} of the run's {len(source)} images cannot be read")
        return embedded

    embedded = embedded_of(queries)
    searched = embedded if separate is None else embedded_of(separate)
    own = np.arange(len(queries)) if separate is None else relevance.own_rows(embedded, searched)
    k = min(NEIGHBOURS, len(searched.labels) - (own is not None))
    found = relevance.nearest_found(embedded, searched, k, own)
    special = relevance.is_special(embedded, None if separate is None else searched)
    held_out = None if special else held_out_queries(evaluation)
    known = None if held_out is None else calibration.answer(held_out, model.metric)
    setting = None if special else Vote() if known is None else known.setting
    twenty = min(20, len(searched.labels) - (own is not None))
    near = relevance.nearest_found(embedded, searched, twenty, own) if special else None
    scores = scores_of(embedded, searched, model.metric, own, near, setting=setting)
    if known is not None:
        fitted = calibration.fit_model(known, scores)
        scores["confidence"] = 1.0 - confidence.confidence(fitted, scores)
    correct = relevance.relevant(embedded, searched, found.index[:, 0])
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
        _changed(splits, model.workdir),
    )


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
    check_result(out, suffixes=(".html",))
    seen = look(workdir, threads)
    beside = comparison(seen, user_path(compare)) if compare else Markup()
    images = Thumbnails(seen)
    sections = [SECTIONS[name](seen, images) for name in seen.task.sections]
    page = pages.page(f"idml_jax: {seen.model.workdir.name}", [parts.head(seen, images), beside, *sections])
    write_text(out, page)
    trackers.send_page(seen.model.workdir, out, pages.plots_of(page))
    return out
