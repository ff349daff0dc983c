"""The page of a run: what it has learnt, in one self-contained HTML file."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from idml_jax.data.sources import Source
from idml_jax.errors import UserError
from idml_jax.inference.embed import embed_all
from idml_jax.inference.model import load
from idml_jax.metrics import calibration, confidence, retrieval
from idml_jax.metrics.names import compared
from idml_jax.metrics.summary import Embedded, retrieval_report, scores_of
from idml_jax.reporting import html as pages
from idml_jax.reporting import plots
from idml_jax.reporting import sections as parts
from idml_jax.reporting.sections import SECTIONS, Seen, Thumbnails
from idml_jax.training import workdir as workdir_lib
from idml_jax.training.build import data_of
from idml_jax.training.tasks import Evaluation
from idml_jax.training.tasks.retrieval_summary import held_out_queries

NEIGHBOURS = 9


def look(workdir: str | Path, threads: int = 4) -> Seen:
    """Embeds the test pictures of a run and searches them.

    Raises:
      UserError: if there is no run or checkpoint, or its data is gone or damaged.
    """
    model = load(workdir).using(threads=threads)
    evaluation = Evaluation(model.config, model.embedder, data_of(model.config))
    queries, separate = evaluation.source, evaluation.gallery

    def embedded_of(source: Source) -> Embedded:
        embedded, kept = embed_all(model, source)
        if len(kept) < len(source):
            raise UserError(f"{len(source) - len(kept)} of the run's {len(source)} pictures cannot be read")
        return embedded

    embedded = embedded_of(queries)
    searched = embedded if separate is None else embedded_of(separate)
    own = np.arange(len(queries)) if separate is None else None
    k = min(NEIGHBOURS, len(searched.labels) - (own is not None))
    found = retrieval.neighbours(embedded.semantic, searched.semantic, k, own=own)
    scores = scores_of(embedded, searched, model.metric, own)
    held_out = held_out_queries(evaluation)
    if held_out is not None:
        fitted = calibration.calibrate(held_out, model.metric, scores).model
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


def read_record(workdir: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of ``metrics.jsonl`` and ``result.json`` of a run; empty where they are missing or cut short."""
    rows, result = [], {}
    path = workdir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:  # a line cut short by a kill
            continue
    if (workdir / "result.json").exists():
        result = json.loads((workdir / "result.json").read_text())
    return rows, result


def comparison(seen: Seen, other: Path) -> str:
    """Another run's figures beside this one's."""
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
    ours, theirs = seen.result.get("best", seen.figures), result["best"]
    table = [
        (n, *(float(side[n]) if side.get(n) is not None else "-" for side in (ours, theirs)))
        for n in compared()
        if n in ours or n in theirs
    ]
    body = f"<h2>Beside {pages.text(other)}</h2>" + pages.table(("figure", *names), table)
    if curves:
        body += pages.plot(plots.lines([(f"{shown} on test pictures, %", "", curves)], "step"), f"{shown} of both runs")
    return body


def make(workdir: str | Path, out: str | Path = "", compare: str = "", threads: int = 4) -> Path:
    """Writes the page of a run.

    Args:
      workdir: folder of the run.
      out: file; by default ``report.html`` in that folder.
      compare: folder of another run.
      threads: that read and decode.

    Returns:
      The file.

    Raises:
      UserError: see ``look``.
    """
    out = Path(out).expanduser() if out else Path(workdir).expanduser() / "report.html"
    seen = look(workdir, threads)
    beside = comparison(seen, Path(compare).expanduser().absolute()) if compare else ""
    images = Thumbnails(seen)
    sections = [SECTIONS[name](seen, images) for name in seen.task.sections]
    body = [parts.head(seen, images), beside, *sections]
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(pages.page(f"idml_jax: {seen.model.workdir.name}", "\n".join(body)), encoding="utf-8")
    temporary.replace(out)
    return out.absolute()
