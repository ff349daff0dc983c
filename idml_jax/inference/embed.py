"""Pictures to vectors: which pictures a path stands for, and their embeddings in memory or in a file."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from idml_jax.data.sources import EXTENSIONS, FolderSource, Source
from idml_jax.errors import UserError, printable
from idml_jax.inference import model as trained
from idml_jax.inference import store as embeddings
from idml_jax.inference.model import Trained
from idml_jax.inference.store import Index
from idml_jax.metrics.summary import Embedded
from idml_jax.runtime.files import write_text
from idml_jax.runtime.writers import format_seconds
from idml_jax.training import build as run

SPLITS = ("train", "test", "validation", "gallery")
LISTS = (".txt", ".tsv", ".csv", ".lst")


def list_images(where: str | Path, option: str = "--images") -> tuple[FolderSource, bool]:
    """The pictures that a path stands for.

    Args:
      where: picture, folder or list, see the module's docstring.
      option: its name in messages.

    Returns:
      The pictures in the order of their names (of a list: its own), and whether their classes are known.

    Raises:
      UserError: if there is none.
    """
    where = Path(where).expanduser().absolute()
    if where.is_dir():
        found = sorted(
            p
            for p in where.rglob("*")
            if p.suffix.lower() in EXTENSIONS
            and p.is_file()
            and not any(part.startswith(".") for part in p.relative_to(where).parts)
        )
        if not found:
            raise UserError(f"{where}: holds no pictures ({option}; {', '.join(e[1:] for e in EXTENSIONS)})")
        names = [p.relative_to(where).parts[0] if p.parent != where else "" for p in found]
        return _labelled(found, names)
    if not where.is_file():
        raise UserError(f"{where}: no such file or folder ({option})")
    if where.suffix.lower() in EXTENSIONS:
        return _labelled([where], [""])
    if where.suffix.lower() not in LISTS:
        raise UserError(f"{where}: neither a picture nor a folder nor a list ({', '.join(LISTS)}) ({option})")
    try:
        lines = [line for line in where.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: cannot be read as a list of paths ({option})") from error
    if not lines:
        raise UserError(f"{where}: lists no pictures ({option})")
    rows = [line.split("," if where.suffix.lower() == ".csv" else "\t") for line in lines]
    paths = [where.parent / row[0].strip() for row in rows]
    return _labelled(paths, [row[1].strip() if len(row) > 1 else "" for row in rows])


def _labelled(paths: list[Path], names: list[str]) -> tuple[FolderSource, bool]:
    known = all(names)
    classes, labels = np.unique(names if known else [""] * len(names), return_inverse=True)
    return FolderSource([str(path) for path in paths], labels, [str(name) for name in classes]), known


def embed_all(
    model: Trained,
    source: Source,
    *,
    threads: int = 4,
    batch_size: int = 0,
    warn: Callable[[str], None] = lambda line: print(printable(line), file=sys.stderr),
) -> tuple[Embedded, np.ndarray]:
    """Embeds a source in memory.

    Args:
      model: trained embedding.
      source: images.
      threads: that read and decode.
      batch_size: 0: the run's.
      warn: receives a line per image that cannot be read.

    Returns:
      The embeddings of the readable images, and their records.

    Raises:
      UserError: if none can be read; the first is named.
    """
    size = trained.batch_size_of(model, batch_size)
    parts, records, skipped = [], [], []
    for batch in trained.read_batches(model, source, range(len(source)), size, threads):
        skipped += batch.skipped
        if len(batch.records):
            parts.append(trained.embed_pictures(model, batch.images, size))
            embeddings.check_finite(parts[-1], [source.name(r) for r in batch.records.tolist()], str(model.workdir))
            records.append(batch.records)
    if not parts:
        raise UserError(f"{source.name(skipped[0][0])}: {skipped[0][1]}")
    for record, reason in skipped:
        warn(f"left out: {source.name(record)}: {reason}")
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    read = np.concatenate(records)
    return Embedded(labels=source.labels[read], **whole), read


def embed_to_file(
    model: Trained,
    source: Source,
    out: str | Path,
    *,
    labelled: bool,
    origin: str,
    threads: int = 4,
    batch_size: int = 0,
    part_batches: int = 64,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Embeds a source into a file, or goes on doing so.

    Args:
      model: trained embedding.
      source: images.
      out: ``.npz`` or ``.parquet``.
      labelled: whether the source's labels mean anything.
      origin: where the images come from, for the file's ``about``.
      threads: that read and decode.
      batch_size: 0: the run's.
      part_batches: batches between two saves; what a stopped command loses.
      overwrite: replace a file that is there.
      say: receives lines about the progress.

    Returns:
      The file.

    Raises:
      UserError: if no image can be read, the file is there already, or it cannot be written.
    """
    out = Path(out).expanduser().absolute()
    embeddings.check_suffix(out, "--out")
    if out.exists() and not overwrite:
        raise UserError(f"{out} is already there; --overwrite replaces it")
    size = trained.batch_size_of(model, batch_size)
    per_part = size * part_batches
    total = len(source)
    names = [source.name(record) for record in range(total)]
    about = {
        "workdir": str(model.workdir),
        "step": model.step,
        "weights": embeddings.weights_digest(model.variables),
        "images": origin,
        "temperature": model.settings.temperature,
        "relative": model.settings.relative,
    }
    identity = {
        **about,
        "names": embeddings.digest(names),
        "per_part": per_part,
        "labelled": labelled,
        "labels": embeddings.digest([str(label) for label in source.labels]),
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        parts = embeddings.Parts(out, identity)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    if parts.started_over:
        say("pictures, run or settings are not those of the stopped command; starting over")
    count = -(-total // per_part)
    known = [number for number in range(count) if parts.has(number)]
    if known:
        say(f"going on: {min(len(known) * per_part, total):,} of {total:,} pictures are done")
    progress = _Progress(total, min(len(known) * per_part, total), say)
    for number in range(count):
        if number not in known:
            records = range(number * per_part, min((number + 1) * per_part, total))
            parts.write(number, _part(model, source, records, size, threads, progress))
    skipped = [
        (int(record), str(reason))
        for number in range(count)
        for part in [parts.read(number)]
        for record, reason in zip(part["skipped"], part["reasons"], strict=True)
    ]
    _list_skipped(out, [(names[record], reason) for record, reason in skipped], total, say)
    if len(skipped) == total:
        parts.remove()
        raise UserError(f"none of {total} pictures can be read; the first: {names[0]}: {skipped[0][1]}")

    def columns() -> Iterator[dict[str, np.ndarray]]:
        for number in range(count):
            part = parts.read(number)
            records = part.pop("records")
            del part["skipped"], part["reasons"]
            if not len(records):
                continue
            part["files"] = np.asarray([names[record] for record in records])
            if labelled:
                part["labels"] = source.labels[records].astype(np.int32)
            if "uncertainty" in part:
                part["uncertainty_norm"] = np.linalg.norm(part["uncertainty"], axis=1)
            yield part

    embeddings.join(out, columns, source.class_names if labelled else None, about)
    parts.remove()
    say(f"{total - len(skipped):,} pictures embedded in {out}")
    return out


def _part(
    model: Trained, source: Source, records: range, size: int, threads: int, progress: "_Progress"
) -> dict[str, np.ndarray]:
    rows: list[dict[str, np.ndarray]] = []
    kept, skipped = [np.zeros(0, np.int64)], []
    for batch in trained.read_batches(model, source, records, size, threads):
        kept.append(batch.records)
        skipped += batch.skipped
        if len(batch.records):
            rows.append(trained.embed_pictures(model, batch.images, size))
            embeddings.check_finite(rows[-1], [source.name(r) for r in batch.records.tolist()], str(model.workdir))
        progress.add(len(batch.records) + len(batch.skipped))
    arrays = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]} if rows else {}
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
    say(f"{len(skipped):,} of {total:,} pictures cannot be read and are left out, the first {name}: {reason}")
    say(f"all of them are listed in {listing}")


class _Progress:
    """Pictures done, speed and time to go, every few seconds."""

    def __init__(self, total: int, done: int, say: Callable[[str], None], seconds: float = 5.0):
        self._total, self._done, self._say, self._seconds = total, done, say, seconds
        self._first, self._start = done, time.monotonic()
        self._last = self._start

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last < self._seconds:
            return
        self._last = now
        rate = (self._done - self._first) / (now - self._start)
        filled = 20 * self._done // self._total
        bar = "#" * filled + "." * (20 - filled)
        left = format_seconds((self._total - self._done) / max(rate, 1e-9))
        self._say(f"[{bar}] {self._done:,} of {self._total:,} pictures, {rate:,.0f}/s, {left} to go")


def split_source(model: Trained, split: str) -> Source:
    """Pictures of the run's own data.

    Raises:
      UserError: if the run has no such split, or its data is gone.
    """
    source = getattr(run.build(model.config).splits, split)
    if source is None:
        raise UserError(f"--split={split}: the run's data has none")
    return source


def index_of(model: Trained, source: Source, labelled: bool, origin: str, threads: int = 4) -> Index:
    """Embeds a source in memory, as an index."""
    embedded, records = embed_all(model, source, threads=threads)
    files = np.asarray([source.name(int(record)) for record in records])
    return Index(embedded, files, list(source.class_names) if labelled else None, {"images": origin})
