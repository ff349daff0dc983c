"""Embeds images, in memory or into a file."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from idml_jax.data.lists import LISTS, list_images
from idml_jax.data.sources import Source
from idml_jax.data.wrong_labels import wrong_labels_of
from idml_jax.errors import UserError, printable
from idml_jax.inference import store
from idml_jax.inference.choices import SPLITS
from idml_jax.inference.model import Trained
from idml_jax.inference.store import Index, check_finite
from idml_jax.metrics.embedded import Embedded
from idml_jax.runtime.files import user_path, write_text
from idml_jax.runtime.progress import Progress, Ticker, erase
from idml_jax.training import data_record
from idml_jax.training.build import data_of
from idml_jax.training.digests import images_digest
from idml_jax.training.embedder import Rows, embedded_rows, progress_of
from idml_jax.training.risk import digest
from idml_jax.training.workdir import finding_images

__all__ = [
    "LISTS",
    "SPLITS",
    "about_of",
    "check_finite",
    "embed_all",
    "embed_to_file",
    "index_of",
    "list_images",
    "split_source",
]


def embed_all(
    model: Trained,
    source: Source,
    *,
    warn: Callable[[str], None] = lambda line: print(printable(line), file=sys.stderr),
) -> tuple[Embedded, np.ndarray]:
    """Embeds a source in memory; a long work shows its progress after ``show_progress``.

    Args:
      model: trained embedding.
      source: images.
      warn: receives one line per unreadable image.

    Returns:
      The embeddings of the readable images, and their records.

    Raises:
      UserError: if no image is readable; names the first.
    """
    parts, records, skipped = [], [], []
    shown = progress_of("embedding", len(source))
    for rows in model.embedder.rows(source):
        shown.add(len(rows.records) + len(rows.skipped))
        skipped += rows.skipped
        if rows.values:
            _check_finite(model, source, rows)
            parts.append(rows.values)
            records.append(rows.records)
    erase()
    if not parts:
        raise UserError(f"{source.name(skipped[0][0])}: {skipped[0][1]}")
    for record, reason in skipped:
        warn(f"left out: {source.name(record)}: {reason}")
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    read = np.concatenate(records)
    return embedded_rows(source, read, whole), read


def embed_to_file(
    model: Trained,
    source: Source,
    out: str | Path,
    *,
    labelled: bool,
    origin: str,
    part_batches: int = 64,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Embeds a source into a file, or resumes doing so.

    Args:
      model: trained embedding; ``model.using`` sets threads and batch size.
      source: images.
      out: ``.npz`` or ``.parquet``.
      labelled: whether the source's labels are valid.
      origin: origin of the images, for the file's ``about``.
      part_batches: number of batches between two saves; a stopped command loses at most these.
      overwrite: replace an existing file.
      say: receives progress lines.

    Returns:
      The file.

    Raises:
      UserError: if no image is readable, the file already exists, or it cannot be written.
    """
    out = user_path(out)
    store.check_suffix(out, "--out")
    if out.exists() and not overwrite:
        raise UserError(f"{out} already exists; --overwrite replaces it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    with store.writing(out):
        job = _Job(model, source, out, labelled, origin, model.embedder.batch_size * part_batches, say)
        job.embed_missing_parts()
        skipped = job.skipped()
        _list_skipped(out, skipped, len(source), say)
        if len(skipped) == len(source):
            job.parts.remove()
            raise UserError(f"none of {len(source)} images can be read; the first: {skipped[0][0]}: {skipped[0][1]}")
        store.join(out, job.columns, source.class_names if labelled else None, job.about)
        job.parts.remove()
    if wrong := job.about.get("wrong_labels"):
        say(f"{wrong:,} of the labels are wrong on purpose (config.data.label_noise), as in training")
    say(f"{len(source) - len(skipped):,} images embedded in {out}")
    return out


class _Job:
    """Creates a file of embeddings part by part.

    Attributes:
      about: origin of the embeddings, for the file.
      parts: finished parts.
    """

    def __init__(
        self,
        model: Trained,
        source: Source,
        out: Path,
        labelled: bool,
        origin: str,
        per_part: int,
        say: Callable[[str], None],
    ):
        self._model, self._source, self._labelled, self._per_part, self._say = model, source, labelled, per_part, say
        self._names = [source.name(record) for record in range(len(source))]
        self.about = about_of(model, origin, source if labelled else None)
        identity = {
            **self.about,
            "names": store.digest(self._names),
            "files": images_digest(source),  # other pictures may have the same names
            "per_part": per_part,
            "labelled": labelled,
            "labels": store.digest([str(label) for label in source.labels]),
        }
        self._columns = of_table(source, labelled)
        if self._columns:
            identity["table"] = store.digest([f"{name} {value.tolist()}" for name, value in self._columns.items()])
        try:
            self.parts = store.Parts(out, identity)
        except OSError as error:
            raise UserError(f"{out}: cannot be written ({error.strerror})") from error
        if self.parts.started_over:
            say("images, run or settings are not those of the stopped command; starting over")
        self._count = -(-len(source) // per_part)

    def embed_missing_parts(self) -> None:
        """Embeds the parts that earlier commands did not finish."""
        total = len(self._source)
        known = [number for number in range(self._count) if self.parts.has(number)]
        done = min(len(known) * self._per_part, total)
        if known:
            self._say(f"resuming: {done:,} of {total:,} images are done")
        with contextlib.closing(Progress(total, done, Ticker(self._say))) as progress:
            for number in range(self._count):
                if number not in known:
                    records = np.arange(number * self._per_part, min((number + 1) * self._per_part, total))
                    self.parts.write(number, embed_records(self._model, self._source, records, progress.add))

    def skipped(self) -> list[tuple[str, str]]:
        """Name and reason of every unreadable image."""
        return [
            (self._names[int(record)], str(reason))
            for number in range(self._count)
            for part in [self.parts.read(number)]
            for record, reason in zip(part["skipped"], part["reasons"], strict=True)
        ]

    def columns(self) -> Iterator[dict[str, np.ndarray]]:
        """The columns of the file, part by part."""
        for number in range(self._count):
            part = self.parts.read(number)
            records = part.pop("records")
            del part["skipped"], part["reasons"]
            if not len(records):
                continue
            part["files"] = np.asarray([self._names[record] for record in records])
            if self._labelled:
                part["labels"] = self._source.labels[records].astype(np.int32)
            part |= {name: value[records] for name, value in self._columns.items()}
            if "uncertainty" in part:
                part["uncertainty_norm"] = np.linalg.norm(part["uncertainty"], axis=1)
            yield part


def of_table(source: Source, labelled: bool = True) -> dict[str, np.ndarray]:
    """What a table says about its images, by the names of ``inference.told.OF_TABLES``."""
    fields = getattr(source, "fields", {})
    known = {"label_sets": "labels"} if labelled else {}
    known |= {name: name for name in ("group", "box", "is_query", "is_gallery")}
    return {name: fields[field] for name, field in known.items() if field in fields}


def embed_records(
    model: Trained, source: Source, records: np.ndarray, done: Callable[[int], None] = lambda count: None
) -> dict[str, np.ndarray]:
    """Embeds some records of a source.

    Args:
      model: trained embedding.
      source: images.
      records: records to embed.
      done: receives the number of images of every finished batch.

    Returns:
      The columns of the embeddings; ``records`` [m], the readable ones; and of the others ``skipped`` and ``reasons``.

    Raises:
      UserError: if the network gives NaN or infinity.
    """
    values: list[dict[str, np.ndarray]] = []
    kept, skipped = [np.zeros(0, np.int64)], []
    for rows in model.embedder.rows(source, records):
        kept.append(rows.records)
        skipped += rows.skipped
        if rows.values:
            _check_finite(model, source, rows)
            values.append(rows.values)
        done(len(rows.records) + len(rows.skipped))
    arrays = {name: np.concatenate([part[name] for part in values]) for name in values[0]} if values else {}
    return arrays | {
        "records": np.concatenate(kept).astype(np.int64),
        "skipped": np.asarray([record for record, _ in skipped], np.int64),
        "reasons": np.asarray([reason for _, reason in skipped], "U"),
    }


def _list_skipped(out: Path, skipped: list[tuple[str, str]], total: int, say: Callable[[str], None]) -> None:
    listing = out.with_name(out.name + ".skipped.txt")
    if not skipped:
        listing.unlink(missing_ok=True)
        return
    write_text(listing, "".join(f"{printable(name)}\t{printable(reason)}\n" for name, reason in skipped))
    name, reason = skipped[0]
    which = "is left out," if len(skipped) == 1 else "are left out, the first"
    say(f"{len(skipped):,} of {total:,} images cannot be read and {which} {name}: {reason}")
    say(f"all of them are listed in {listing}")


def _check_finite(model: Trained, source: Source, rows: Rows) -> None:
    check_finite(rows.values, [source.name(record) for record in rows.records.tolist()], str(model.workdir))


def split_source(
    model: Trained,
    split: str,
    *,
    checked: bool = True,
    warn: Callable[[str], None] = lambda line: print(f"warning: {printable(line)}", file=sys.stderr),
) -> Source:
    """Images of the run's own data.

    Args:
      model: the run.
      split: name of the part.
      checked: whether to compare them with those that the run was started with; not where only pictures are wanted.
      warn: receives a line if these are not the images that the run was started with.

    Raises:
      UserError: if the run has no such split, or its data is missing, or if wrong labels on purpose
        (``data.label_noise``) are no longer those of the run.
    """
    with finding_images(model.config, model.workdir):
        splits = data_of(model.config) if checked else data_of(model.config, lambda line: None)
    source: Source | None = getattr(splits, split)
    if source is None:
        raise UserError(f"--split={split}: the run's data has none")
    if not checked:
        return source
    try:
        for line in data_record.check(splits, model.workdir, (split,)):
            warn(line)
    except UserError as error:
        if wrong_labels_of(source) is not None:
            raise
        warn(str(error).partition(", so its labels")[0])
    return source


def about_of(model: Trained, origin: str, labelled: Source | None = None) -> dict[str, Any]:
    """The origin of embeddings, as an index and its file hold it.

    Args:
      model: the run.
      origin: where the images are from.
      labelled: images whose labels are stored too; ``wrong_labels`` says how many are wrong on purpose.
    """
    weights = model.embedder.digest
    where = {"workdir": str(model.workdir), "step": model.step, "weights": weights, "images": origin}
    risk = {} if model.embedder.risk is None else {"risk": digest(model.embedder.risk)}
    wrong = None if labelled is None else wrong_labels_of(labelled)
    noise = {} if wrong is None else {"wrong_labels": int(wrong.sum())}
    return {**where, **risk, **noise, **model.metric.about()}


def index_columns(source: Source, records: np.ndarray) -> dict[str, Any]:
    """The arguments of an ``Index`` that come from a table."""
    columns = of_table(source)
    flags = [columns[name][records] for name in ("is_query", "is_gallery") if name in columns]
    return {
        "boxes": columns["box"][records] if "box" in columns else None,
        "marked": np.stack(flags, axis=1) if len(flags) == 2 else None,
    }


def index_of(model: Trained, source: Source, labelled: bool, origin: str) -> Index:
    """Embeds a source in memory, as an index."""
    embedded, records = embed_all(model, source)
    files = np.asarray([source.name(int(record)) for record in records])
    classes = list(source.class_names) if labelled else None
    about = about_of(model, origin, source if labelled else None)
    return Index(embedded, files, classes, about, **index_columns(source, records))
