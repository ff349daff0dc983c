"""Tells for pairs of images whether they are of one class, with the probability and a threshold by its FMR."""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from idml_jax.data import files, folders
from idml_jax.data.sources import FolderSource
from idml_jax.data.tables import MAX_BYTES, separated_rows
from idml_jax.errors import UserError, warn
from idml_jax.inference.embed import embed_all, index_of
from idml_jax.inference.index import Index
from idml_jax.inference.model import Trained
from idml_jax.inference.search import open_index
from idml_jax.inference.trained_on import warn_of_training_images
from idml_jax.metrics.same_class import Judge, fit_judge
from idml_jax.metrics.verification import Rates
from idml_jax.training.build import data_of
from idml_jax.training.workdir import finding_images

FMRS = (0.001, 0.01, 0.1)
TABLES = {".csv": ",", ".tsv": "\t"}
ADDED = ("same", "probability", "score", "problem")


class Table(NamedTuple):
    """Pairs of images of a file.

    Attributes:
      header: names of its columns; the first two hold the images.
      rows: its lines, one cell for each column.
      paths: the two images of each line.
    """

    header: list[str]
    rows: list[list[str]]
    paths: list[tuple[str, str]]


class Compared(NamedTuple):
    """A pair of images: an answer, or the reason why there is none.

    Attributes:
      same: whether they are of one class, by the threshold.
      probability: that they are of one class, for the given share of such pairs.
      score: their similarity.
      problem: why one of the images cannot be read; empty if both can.
    """

    same: bool
    probability: float
    score: float
    problem: str = ""


class Decision(NamedTuple):
    """How pairs are decided.

    Attributes:
      judge: score and probability.
      rates: the threshold, and its FMR and FNMR on the held-out images.
      about: the held-out images in words.
      width: width of their embeddings.
    """

    judge: Judge
    rates: Rates
    about: str
    width: int


def read_table(where: str) -> Table:
    """Reads a ``.csv`` or ``.tsv`` file with a header line; paths are relative to the file.

    Raises:
      UserError: naming the file and the line.
    """
    path = files.expand(where)
    shown = files.shown(path)
    if path.suffix.lower() not in TABLES:
        raise UserError(f"--pairs={shown}: the name must end in {' or '.join(TABLES)}")
    if not os.path.isfile(path):
        raise UserError(f"{shown}: {'is not a file' if os.path.exists(path) else 'no such file'} (--pairs)")
    text = files.read_text(path, MAX_BYTES, f"{shown}: is not UTF-8 text (--pairs)")
    text, separator = separated_rows(text, TABLES[path.suffix.lower()])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        rows.extend((reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row))
    except csv.Error as error:
        raise UserError(f"{shown}, line {reader.line_num}: {error} (--pairs)") from error
    if not rows or len(rows[0][1]) < 2 or any(folders.is_image(cell) for cell in rows[0][1][:2]):
        raise UserError(f"{shown}: the first line must name at least two columns, e.g. one,other (--pairs)")
    header, rows = rows[0][1], rows[1:]
    if not rows:
        raise UserError(f"{shown}: lists no pairs (--pairs)")
    if taken := [name for name in header if name in ADDED]:
        raise UserError(f"{shown}: has a column {taken[0]!r}, which the result adds; rename it (--pairs)")
    for line, row in rows:
        if len(row) != len(header) or not (row[0] and row[1]):
            raise UserError(f"{shown}, line {line}: expected {len(header)} values, the first two paths (--pairs)")
    place = lambda cell: str(path.parent / os.path.expanduser(cell))
    return Table(header, [row for _, row in rows], [(place(row[0]), place(row[1])) for _, row in rows])


def as_text(table: Table, compared: Sequence[Compared], separator: str) -> bytes:
    """The table with the columns ``ADDED``, empty where there is no answer."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=separator, lineterminator="\n")
    writer.writerow([*table.header, *ADDED])
    for row, found in zip(table.rows, compared, strict=True):
        if found.problem:
            answer = ["", "", "", found.problem]
        else:
            answer = ["yes" if found.same else "no", f"{found.probability:.6f}", f"{found.score:.6f}", ""]
        writer.writerow([*row, *answer])
    return out.getvalue().encode("utf-8", "surrogateescape")


def decide(model: Trained, held_out: str, fmr: float | None = None) -> Decision:
    """Chooses score and threshold on held-out classes.

    Args:
      model: the network.
      held_out: a file of embeddings or images in class folders; empty: the run's validation classes or its test images.
      fmr: share of pairs of different classes that may be taken for the same; ``None``: the first of ``FMRS`` that the
        held-out images are enough for.

    Raises:
      UserError: if there are too few held-out images, or they were embedded by another network.
    """
    index, about = _held_out(model, held_out)
    if index.embedded.sets is not None:
        warn(f"{about}: images with several labels count as the class of their first")
    wanted = FMRS if fmr is None else (fmr,)
    try:
        judge = fit_judge(index.embedded.semantic, index.embedded.labels, fmrs=wanted)
    except ValueError as error:
        raise UserError(f"{about}: {error}") from error
    shown = [rate for rate in wanted if not math.isnan(judge.at_fmr[rate].threshold)]
    if not shown:
        raise UserError(
            f"--fmr={wanted[-1]:g}: {about} make {judge.pairs[1]:,} pairs of different classes, too few for so small a "
            f"rate; at least {math.ceil(1 / wanted[-1]):,} are needed"
        )
    return Decision(judge, judge.at_fmr[shown[0]], about, index.embedded.semantic.shape[1])


def _held_out(model: Trained, where: str) -> tuple[Index, str]:
    if where:
        index = open_index(where, "--held_out", lambda: model)
        if index.class_names is None:
            raise UserError(f"{where}: its classes are unknown (--held_out)")
        known, own = index.about.get("weights"), model.embedder.digest
        if known is not None and known != own:
            raise UserError(f"{where} was embedded with the weights {known}, {model.workdir} has {own}; embed it again")
        warn_of_training_images(index, where)
        return index, f"the {len(index.files):,} images of {where}"
    try:
        with finding_images(model.config, model.workdir):
            splits = data_of(model.config)
    except UserError as error:
        raise UserError(f"{error}; or give --held_out, a file of embeddings or a folder of class folders") from error
    name = "test" if splits.validation is None else "validation"
    source = splits.test if splits.validation is None else splits.validation
    index = index_of(model, source, True, f"split:{name}")
    about = f"the {len(index.files):,} {name} images of the run"
    warn_of_training_images(index, about)
    return index, about


def compare(
    model: Trained,
    decision: Decision,
    paths: Sequence[tuple[str, str]],
    share: float = 0.5,
) -> list[Compared]:
    """Compares pairs of image files; each file is embedded once.

    Args:
      model: the network.
      decision: from ``decide``.
      paths: the two files of each pair.
      share: share of pairs of one class among those that are compared, for the probability.

    Returns:
      The answers, in the order of the pairs.

    Raises:
      UserError: if no image can be read, or for a share outside of (0, 1).
    """
    if not 0 < share < 1:
        raise UserError(f"--share={share}: a share above 0 and below 1")
    every = list(dict.fromkeys(path for pair in paths for path in pair))
    problems = {path: "no such file" for path in every if not Path(path).is_file()}
    readable = [path for path in every if path not in problems]
    if not readable:
        raise UserError(f"{every[0]}: no such file")
    source = FolderSource(readable, np.zeros(len(readable), np.int32), [""])
    told: list[str] = []
    embedded, records = embed_all(model, source, warn=told.append)
    if embedded.semantic.shape[1] != decision.width:
        raise UserError(
            f"the run has embeddings of {embedded.semantic.shape[1]} dimensions, {decision.about} have {decision.width}"
        )
    row_of: Mapping[str, int] = {readable[record]: row for row, record in enumerate(records.tolist())}
    for path in readable:
        if path not in row_of:
            start = f"left out: {path}: "
            reasons = [line.removeprefix(start) for line in told if line.startswith(start)]
            problems[path] = reasons[0] if reasons else "cannot be read as an image"
    good = [pair for pair in paths if not (pair[0] in problems or pair[1] in problems)]
    one, other = (embedded.semantic[[row_of[pair[side]] for pair in good]] for side in (0, 1))
    scores = decision.judge.scores(one, other) if good else np.zeros(0)
    found = zip(scores, decision.judge.probability(scores, share) if good else scores, strict=True)
    answers = []
    for pair in paths:
        bad = next((path for path in pair if path in problems), None)
        if bad is not None:
            answers.append(Compared(False, math.nan, math.nan, f"{bad}: {problems[bad]}"))
            continue
        score, probability = (float(value) for value in next(found))
        if _equal_files(*pair):
            answers.append(Compared(True, 1.0, score))
        else:
            answers.append(Compared(bool(np.float32(score) >= decision.rates.threshold), probability, score))
    return answers


def _equal_files(one: str, other: str) -> bool:
    """Whether two files have the same content; a PLDA may score an unremarkable image low even beside itself."""
    if os.path.samefile(one, other):
        return True
    return os.path.getsize(one) == os.path.getsize(other) and Path(one).read_bytes() == Path(other).read_bytes()
