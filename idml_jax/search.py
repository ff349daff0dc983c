"""Finds the pictures most like a query, and says how sure the answer is.

    python -m idml_jax.search --index=photos.npz --query=bird.jpg -k 10
    python -m idml_jax.search --index=photos.npz --query=FOLDER --abstain=0.95 --held_out=other.npz --out=answers.html

The index is what ``python -m idml_jax.embed`` wrote; queries are a picture, a folder, a list, or another such file. The
search is exact, by the semantic distance; a picture does not find itself. ``--out`` ends in ``.jsonl``, ``.html`` or
``.png``; without it a table is printed.

How sure: the probability that the nearest picture is of the query's class, from the uncertainty and the free scores
(nearest distance, margins, norm), by a logistic model fitted on pictures of known classes that the network was not
trained on: ``--held_out`` (a file or a folder of class folders), else the index itself, each picture searching the
others. ``--abstain=0.95`` leaves out answers below the threshold at which 95% of those pictures' answers are right.
"""

import argparse
import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax import embed, embeddings, pages, plots, trained
from idml_jax.config import without_nan
from idml_jax.data.decode import DecodeError, decode
from idml_jax.data.resample import resize
from idml_jax.embeddings import Index
from idml_jax.errors import UserError, run_command
from idml_jax.ism import Embedding
from idml_jax.metrics import calibration, introspective, retrieval, uncertainty
from idml_jax.metrics.calibration import Calibration, HeldOut
from idml_jax.metrics.confidence import confidence
from idml_jax.metrics.report import Embedded, Ism, scores_of
from idml_jax.metrics.uncertainty import Threshold

FORMATS = (".jsonl", ".html", ".png")
SIDE = 96  # of the small pictures, in pixels
SHEET_ROWS = 40


class Answers(NamedTuple):
    """The k nearest rows of an index to each of n queries.

    Attributes:
      index: ``[n, k]`` rows, nearest first.
      distance: ``[n, k]`` semantic distance.
      introspective: ``[n, k]`` introspective distance; ``None`` without an uncertainty.
      uncertainty: ``[n]`` length of the query's uncertainty embedding; ``None`` without one.
      margin: ``[n]`` similarity of the nearest less that of the 10th, or of the 2nd in an index of fewer pictures.
      sure: ``[n]`` probability that the nearest picture is of the query's class; ``None`` where nothing tells.
      answered: ``[n]`` whether that is enough.
    """

    index: Int[np.ndarray, "n k"]  # type: ignore[assignment]  # in place of tuple.index
    distance: Float[np.ndarray, "n k"]
    introspective: Float[np.ndarray, "n k"] | None
    uncertainty: Float[np.ndarray, "n"] | None
    margin: Float[np.ndarray, "n"] | None
    sure: Float[np.ndarray, "n"] | None
    answered: Bool[np.ndarray, "n"]


def calibrate(
    held_out: Embedded,
    settings: Ism = Ism(),  # noqa: B008 (immutable)
    names: Collection[str] | None = None,
) -> Calibration:
    """Fits how sure answers are, each held-out picture searching all the others.

    Args:
      held_out: embeddings with labels, of classes that the network was not trained on.
      settings: of the introspective metric.
      names: of the scores that queries will have; a small index has fewer margins. All by default.

    Returns:
      The fitted model with what it says of these queries.

    Raises:
      UserError: for fewer than two classes or pictures.
    """
    if len(np.unique(held_out.labels)) < 2:
        raise UserError("the held-out pictures are of one class; at least 2 are needed to tell right from wrong")
    return calibration.calibrate(HeldOut(held_out), settings, names)


def search(
    queries: Embedded,
    gallery: Embedded,
    k: int,
    *,
    own: Int[np.ndarray, "n"] | None = None,
    settings: Ism = Ism(),  # noqa: B008 (immutable)
    calibrated: Calibration | None = None,
    threshold: Threshold | None = None,
    scores: Mapping[str, Float[np.ndarray, "n"]] | None = None,
) -> Answers:
    """The k nearest rows of a gallery, exactly, in tiles.

    Args:
      queries: embeddings.
      gallery: what is searched.
      k: how many.
      own: ``[n]`` row that each query leaves out; -1: none.
      settings: of the introspective metric.
      calibrated: by ``calibrate``; without it nothing is said about how sure answers are.
      threshold: of the doubt, beyond which there is no answer.
      scores: of ``metrics.report.scores_of``, if they are known.

    Returns:
      The answers.

    Raises:
      ValueError: for mismatched widths or a k that the gallery cannot serve.
    """
    found = retrieval.neighbours(queries.semantic, gallery.semantic, k, own=own)
    scores = scores_of(queries, gallery, settings, own) if scores is None else scores
    both = queries.uncertainty is not None and gallery.uncertainty is not None
    sure, answered = None, np.ones(len(queries.semantic), bool)
    if calibrated is not None:
        sure = confidence(calibrated.model, scores)
        if threshold is not None:
            answered = 1.0 - sure <= threshold.value
    margin = next((-scores[name] for name in ("margin_10", "margin_2") if name in scores), None)
    return Answers(
        found.index, found.distance, _introspective(queries, gallery, found.index, settings) if both else None,
        queries.uncertainty_norm if both else None, margin, sure, answered,
    )  # fmt: skip


def _introspective(
    queries: Embedded, gallery: Embedded, index: Int[np.ndarray, "n k"], settings: Ism
) -> Float[np.ndarray, "n k"]:
    distance = introspective.IntrospectiveDistance(*settings)
    per_query = jax.jit(jax.vmap(lambda a, b: distance(jax.tree.map(lambda x: x[None], a), b)[0]))
    assert queries.uncertainty is not None and gallery.uncertainty is not None
    rows = []
    step = max(1, 2**24 // max(1, index.shape[1] * gallery.semantic.shape[1]))
    for start in range(0, len(index), step):
        cut = slice(start, start + step)
        one: Any = queries.semantic[cut], queries.uncertainty[cut]
        others: Any = gallery.semantic[index[cut]], gallery.uncertainty[index[cut]]
        rows.append(np.asarray(per_query(Embedding(*one), Embedding(*others))))
    return np.concatenate(rows)


def records(
    queries: Index, index: Index, answers: Answers, own: Int[np.ndarray, "n"] | None = None
) -> list[dict[str, Any]]:
    """A JSON-able dictionary per query; neighbours are left out where there is no answer.

    The class of a query is its own or, where that is unknown, that of its row ``own`` of the index.
    """

    def known_class(i: int) -> str | None:
        if own is not None and own[i] >= 0 and queries.class_names is None:
            return index.class_of(int(own[i]))
        return queries.class_of(i)

    optional = lambda column, i: None if column is None else float(column[i])
    rows = []
    for i, file in enumerate(queries.files):
        near = [
            {
                "file": str(index.files[row]), "class": index.class_of(row), "distance": float(answers.distance[i, j]),
                "introspective_distance": optional(answers.introspective, (i, j)),
            }
            for j, row in enumerate(answers.index[i].tolist())
        ]  # fmt: skip
        rows.append({
            "query": str(file), "class": known_class(i), "sure": optional(answers.sure, i),
            "uncertainty": optional(answers.uncertainty, i), "margin": optional(answers.margin, i),
            "answered": bool(answers.answered[i]), "neighbours": near if answers.answered[i] else [],
        })  # fmt: skip
    return without_nan(rows)


def as_table(rows: list[dict[str, Any]]) -> str:
    """For a terminal."""
    lines = []
    for row in rows:
        lines.append(f"{row['query']}   {'   '.join(_facts(row))}")
        for place, near in enumerate(row["neighbours"], 1):
            inner = near["introspective_distance"]
            shown = "" if inner is None else f"  D {inner:.3f}"
            lines.append(f"  {place:3d}  distance {near['distance']:.3f}{shown}  {near['class'] or ''}  {near['file']}")
    return "\n".join(lines)


def _facts(row: dict[str, Any]) -> list[str]:
    facts = [] if row["answered"] else ["no answer"]
    for name, form in (("sure", "sure {:.0%}"), ("uncertainty", "|u| {:.2f}"), ("margin", "margin {:.3f}")):
        if row[name] is not None:
            facts.append(form.format(row[name]))
    return facts


def thumbnail(data: bytes, side: int = SIDE) -> np.ndarray | None:
    """A picture of at most ``side`` pixels, ``[h, w, 3]``; ``None`` where it cannot be read."""
    try:
        pixels = decode(data, 3)
    except DecodeError:
        return None
    scale = min(1.0, side / max(pixels.shape[:2]))
    height, width = (max(1, round(scale * n)) for n in pixels.shape[:2])
    return pixels if scale == 1.0 else np.ascontiguousarray(resize(pixels, height, width))


def picture_reader(index: Index, workdir: str) -> Callable[[str], np.ndarray | None]:
    """From the name of a row to its small picture; a run's own pictures are read from its data."""
    origin = str(index.about.get("images", ""))
    if not origin.startswith("split:"):
        return lambda file: thumbnail(Path(file).read_bytes()) if os.path.isfile(file) else None
    source = embed.split_source(trained.load(workdir), origin.removeprefix("split:"))
    known = {source.name(record): record for record in range(len(source))}
    return lambda file: thumbnail(source.read(known[file])) if file in known else None


def as_html(rows: list[dict[str, Any]], read_query: Callable, read: Callable, note: str) -> str:
    """A page of pictures."""
    encode = lambda pixels: None if pixels is None else plots.encode(pixels)
    body = [f"<h1>{len(rows):,} queries</h1><p class='muted'>{pages.text(note)}</p>"]
    for row in rows:
        head = pages.badge("answered" if row["answered"] else "no answer", row["answered"])
        caption = [head, *(f for f in _facts(row) if f != "no answer"), row["class"] or Path(row["query"]).name]
        cells = [pages.tile(encode(read_query(row["query"])), caption, "query", row["query"])]
        for near in row["neighbours"]:
            cells.append(pages.tile(encode(read(near["file"])), _near(near), _kind(row, near), near["file"]))
        body.append(pages.row(cells))
    return pages.page("Search", "\n".join(body))


def _near(near: dict[str, Any]) -> list[str]:
    inner = near["introspective_distance"]
    lines = [f"distance {near['distance']:.3f}"] + ([] if inner is None else [f"D {inner:.3f}"])
    return [*lines, near["class"] or Path(near["file"]).name]


def _kind(row: dict[str, Any], near: dict[str, Any]) -> str:
    if row["class"] is None or near["class"] is None:
        return ""
    return "right" if row["class"] == near["class"] else "wrong"


def as_png(rows: list[dict[str, Any]], read_query: Callable, read: Callable) -> bytes:
    """A sheet of pictures, of the first ``SHEET_ROWS`` queries."""
    colours = {"": "#ccd2d8", "right": "#2f8f5b", "wrong": "#c8423b"}
    short = lambda lines: "\n".join(line if len(line) <= 22 else line[:21] + "…" for line in lines)
    cells = []
    for row in rows[:SHEET_ROWS]:
        caption = short([*_facts(row), row["class"] or Path(row["query"]).name])
        cells.append([(read_query(row["query"]), caption, "#33658a")] + [
            (read(near["file"]), short(_near(near)), colours[_kind(row, near)]) for near in row["neighbours"]
        ])  # fmt: skip
    return plots.sheet(cells)


def _own_rows(queries: Index, index: Index) -> Int[np.ndarray, "n"] | None:
    """Rows of the index that are the query's own file."""
    known = {os.path.realpath(file): row for row, file in enumerate(index.files.tolist())}
    own = np.asarray([known.get(os.path.realpath(file), -1) for file in queries.files.tolist()])
    return own if (own >= 0).any() else None


def _model(index: Index, workdir: str) -> trained.Trained:
    where = workdir or index.about.get("workdir")
    if not where:
        raise UserError("--workdir is missing: the index does not say which run it was made with")
    model = trained.load(where)
    remembered = index.about.get("step")
    if remembered is not None and (str(model.workdir), model.step) != (index.about.get("workdir"), remembered):
        raise UserError(
            f"the index was made with step {remembered} of {index.about.get('workdir')}, and {model.workdir} has step "
            f"{model.step} now: the vectors cannot be compared; embed the index again"
        )
    return model


def _open(where: str, option: str, model: Callable[[], trained.Trained]) -> Index:
    """Embeddings from a file, or made of pictures."""
    if Path(where).suffix in embeddings.SUFFIXES:
        return embeddings.read(where, option)
    source, labelled = embed.list_images(where, option)
    return embed.index_of(model(), source, labelled, where)


def _calibration(given: dict[str, Any], index: Index, model: Callable, settings: Ism, names: Collection[str]) -> tuple:
    wanted = given["abstain"]
    if wanted is not None and not 0 < wanted < 1:
        raise UserError(f"--abstain={wanted}: a share of right answers, above 0 and below 1")
    held_out, what = index, "the index itself, each picture searching the others"
    if given["held_out"]:
        held_out, what = _open(given["held_out"], "--held_out", model), given["held_out"]
    if held_out.class_names is None:
        if wanted is not None or given["held_out"]:
            raise UserError(
                f"{given['held_out'] or given['index']}: its classes are unknown, so nothing tells how sure an answer "
                "is; give --held_out, a file or a folder of class folders"
            )
        return None, None, "how sure answers are is unknown: neither --held_out nor an index with classes"
    calibrated = calibrate(held_out.embedded, settings, names)
    note = f"how sure: from {len(calibrated.correct):,} queries of {what}"
    if wanted is None:
        return calibrated, None, note
    threshold = uncertainty.threshold_for_precision(calibrated.doubt, calibrated.correct, wanted)
    if not threshold.reached:
        return calibrated, threshold, f"{note}; {wanted:.0%} right answers cannot be had there: nothing is answered"
    share = f"{threshold.coverage:.0%} of them are answered, {threshold.precision:.1%} rightly"
    return calibrated, threshold, f"{note}; {share}"


def _search(given: dict[str, Any]) -> None:
    out = Path(given["out"]).expanduser() if given["out"] else None
    if out is not None and out.suffix not in FORMATS:
        raise UserError(f"--out={out}: the name must end in {', '.join(FORMATS)}")
    if given["k"] < 1:
        raise UserError(f"-k {given['k']} must be at least 1")
    index = embeddings.read(given["index"])
    loaded: list[trained.Trained] = []

    def model() -> trained.Trained:
        loaded.extend([] if loaded else [_model(index, given["workdir"])])
        return loaded[0]

    settings = Ism(index.about.get("temperature", Ism().temperature), index.about.get("relative", True))
    queries = _open(given["query"], "--query", model)
    own = None if given["keep_same"] else _own_rows(queries, index)
    k = min(given["k"], len(index.files) - (own is not None))
    if k < 1:
        raise UserError(f"{given['index']}: holds nothing but the query")
    scores = scores_of(queries.embedded, index.embedded, settings, own)
    calibrated, threshold, note = _calibration(given, index, model, settings, scores)
    answers = search(
        queries.embedded, index.embedded, k, own=own, settings=settings, calibrated=calibrated, threshold=threshold,
        scores=scores,
    )  # fmt: skip
    rows = records(queries, index, answers, own)
    note = f"{len(index.files):,} pictures searched for {len(rows):,}; {note}"
    if out is None:
        print(as_table(rows))
        print(note)
        return
    workdir = given["workdir"] or str(index.about.get("workdir", ""))
    if out.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        readers = picture_reader(queries, workdir), picture_reader(index, workdir)
        content = as_html(rows, *readers, note).encode() if out.suffix == ".html" else as_png(rows, *readers)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(out)
    print(note)
    left = f" (the first {SHEET_ROWS})" if out.suffix == ".png" and len(rows) > SHEET_ROWS else ""
    print(f"{int(answers.answered.sum()):,} of {len(rows):,} answered{left}: {out}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True, help=".npz or .parquet of idml_jax.embed")
    parser.add_argument("--query", required=True, help="picture, folder, list, or embeddings")
    parser.add_argument("-k", type=int, default=10, help="neighbours of each query")
    parser.add_argument("--workdir", default="", help="run that embeds queries; default: the one the index names")
    parser.add_argument("--held_out", default="", help="embeddings or class folders that tell how sure answers are")
    parser.add_argument("--abstain", type=float, help="wanted share of right answers, e.g. 0.95")
    parser.add_argument("--keep_same", action="store_true", help="let a picture find itself")
    parser.add_argument("--out", default="", help=".jsonl, .html or .png; default: a table")
    given = vars(parser.parse_args(argv))
    run_command(lambda: _search(given))


if __name__ == "__main__":
    main()
