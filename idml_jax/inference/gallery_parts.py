"""Writes a gallery: a folder of Parquet parts that many processes fill together, and that can be added to.

A part holds the embeddings of ``PART_IMAGES`` images of a source. Which images those are depends on the source alone,
so any number of processes, on any machines that share the folder, can write parts, stop and start again.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from idml_jax.data.sources import Source
from idml_jax.data.tables import arrow
from idml_jax.errors import UserError, is_utf8, printable
from idml_jax.inference import gallery as reading
from idml_jax.inference import gallery_changes as changes
from idml_jax.inference.embed import about_of, embed_records, of_table
from idml_jax.inference.gallery import Made, part_path, skipped_path, source_path, sources_of
from idml_jax.inference.gallery_checks import Asked, check_alike, check_told, checked_folder
from idml_jax.inference.gallery_unreadable import tell_unreadable
from idml_jax.inference.index import Index, texts
from idml_jax.inference.model import Trained
from idml_jax.inference.own import Key, keys_of
from idml_jax.inference.store import columns_of, digest, table_of
from idml_jax.runtime.files import atomic, user_path, without_dots, write_json
from idml_jax.runtime.progress import Progress, Ticker

PART_IMAGES = 4096
GROUP_ROWS = 1024  # rows of a row group, the least that is read of a part
_MANY_NAMES = 4096  # class names that a part repeats at most, so that it can be read alone


class Shard(NamedTuple):
    """Which parts a process writes: those whose number has the remainder ``number - 1`` by ``count``.

    Attributes:
      number: from 1.
      of: number of processes.
    """

    number: int = 1
    of: int = 1


def parse_shard(text: str) -> Shard:
    """A shard from ``i/n``.

    Raises:
      UserError: unless 1 <= i <= n.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"--shard={text}: give i/n with 1 <= i <= n, e.g. --shard=1/4 to --shard=4/4")
    return Shard(int(number), int(count))


def embed_to_gallery(
    model: Trained,
    source: Source,
    out: str | Path,
    *,
    labelled: bool,
    origin: str,
    shard: Shard = Shard(),  # noqa: B008 (immutable)
    append: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Embeds a process's share of a source into the folder of a gallery; finished parts are skipped.

    Of these, images that could not be read are tried again if their files have changed since.

    Args:
      model: trained embedding; ``model.using`` sets threads and batch size.
      source: images.
      out: the folder; new, or a gallery.
      labelled: whether the source's labels are valid.
      origin: origin of the images, for ``about``.
      shard: this process's share.
      append: add the images that the gallery lacks.
      say: receives progress lines.

    Returns:
      The folder.

    Raises:
      UserError: if the folder is no gallery, holds other images (without ``append``) or parts of another
        configuration, or cannot be written.
    """
    work = open_work(model, source, out, labelled=labelled, origin=origin, append=append, say=say)
    if work is None:
        return user_path(out)
    mine = range(shard.number - 1, work.made.parts, shard.of)
    missing = {number: count for number in mine if (count := len(work.open_records(number)))}
    if len(missing) < len(mine):
        say(f"resuming: {len(mine) - len(missing):,} of {len(mine):,} parts are done")
    if again := sum(count for number, count in missing.items() if count < len(work.records(number))):
        images = "image of finished parts is" if again == 1 else "images of finished parts are"
        say(f"{again:,} {images} embedded again, since {'its file has' if again == 1 else 'their files have'} changed")
    with contextlib.closing(Progress(max(1, sum(missing.values())), 0, Ticker(say))) as progress:
        for number in missing:
            work.write(number, progress.add)
    work.finish(say)
    return work.folder


def save(index: Index, out: str | Path, per_part: int = PART_IMAGES) -> Path:
    """Writes embeddings in memory, or read from a file, as a new gallery.

    Args:
      index: embeddings.
      out: the folder.
      per_part: images of a part.

    Returns:
      The folder.

    Raises:
      UserError: if the folder exists and is not empty, or cannot be written.
    """
    folder = checked_folder(out, append=False)
    if sources_of(folder):
        raise UserError(f"{folder}: is a gallery already; give a new folder")
    classes = None if index.class_names is None else list(index.class_names)
    columns = columns_of(index)
    made = Made(0, index.about, classes, digest([str(name) for name in index.files]), len(index), (), per_part)
    _create(source_path(folder, 0), made)
    for number in range(made.parts):
        cut = slice(number * per_part, (number + 1) * per_part)
        part = {name: value[cut] for name, value in columns.items()}
        _write_table(part_path(folder, 0, number), part, made, number)
    return folder


class Work:
    """A source that is written into a gallery.

    Args:
      model: trained embedding.
      source: images.
      folder: the gallery.
      made: what the parts are made of.
      append: whether images are added to those of the gallery.

    Attributes:
      folder: the gallery.
      made: what the parts are made of.
    """

    def __init__(self, model: Trained, source: Source, folder: Path, made: Made, append: bool = False):
        self._model, self._source, self.folder, self.made, self._append = model, source, folder, made, append
        # A source's labels are numbers of its own; the parts have those of the gallery.
        known = {name: label for label, name in enumerate(made.class_names or ())}
        self._labels = np.asarray([known.get(name, 0) for name in source.class_names], np.int32)
        self._told = of_table(source, made.class_names is not None)
        if "label_sets" in self._told:
            sets = self._told["label_sets"]
            self._told["label_sets"] = np.where(sets < 0, -1, self._labels[sets])
        self._all = made.records

    def records(self, number: int) -> np.ndarray:
        """The source's records of a part."""
        return self._all[number * self.made.per_part : (number + 1) * self.made.per_part]

    def has(self, number: int) -> bool:
        """Whether nothing of a part is left to do; errors as for ``open_records``."""
        return not len(self.open_records(number))

    def open_records(self, number: int) -> np.ndarray:
        """The records of a part to embed: all of an unfinished one; of another, see ``changes.to_try_again``.

        Raises:
          UserError: if the file is a part of another configuration.
        """
        found = self._written(number)
        return self.records(number) if found is None else self._to_try_again(number, found)

    def _written(self, number: int) -> changes.Written | None:
        return changes.written(self.folder, self.made, number, self._source, self.records(number))

    def _to_try_again(self, number: int, found: changes.Written) -> np.ndarray:
        if not found.skipped:
            return np.zeros(0, np.int64)
        return changes.to_try_again(self.folder, self.made, number, self._source, found, self._elsewhere)

    @functools.cached_property
    def _elsewhere(self) -> set[Key | None]:
        return changes.keys_elsewhere(self.folder, sources_of(self.folder), self.made.number)

    def write(self, number: int, done: Callable[[int], None] = lambda count: None) -> None:
        """Embeds the images of a part that are to be embedded and writes it, completely or not at all.

        Args:
          number: number of the part.
          done: receives the number of images of every finished batch.
        """
        found = self._written(number)
        records = self.records(number) if found is None else self._to_try_again(number, found)
        if not len(records):
            return
        # Before the images are read: what changes while this process embeds is tried again by the next.
        states = {record: changes.state_of(self._source, record, self.made) for record in records.tolist()}
        columns = embed_records(self._model, self._source, records, done)
        kept, unread, reasons = (columns.pop(name).tolist() for name in ("records", "skipped", "reasons"))
        skipped = {
            record: changes.Skipped(printable(self._source.name(record)), printable(reason), states[record])
            for record, reason in zip(unread, reasons, strict=True)
        }
        columns = self._with_names(columns, np.asarray(kept, np.int64)) if kept else {}
        path = part_path(self.folder, self.made.number, number)
        if found is not None:
            skipped |= {record: one for record, one in found.skipped.items() if record not in states}
            columns = changes.merged(path, found, records, np.asarray(kept, np.int64), columns)
        skipped = dict(sorted(skipped.items()))
        listing = skipped_path(self.folder, self.made.number, number)
        tried = changes.tried_path(self.folder, self.made.number, number)
        tried.unlink(missing_ok=True)
        if skipped:  # before the part, whose existence says that all is done
            write_json(listing, [[one.name, one.reason] for one in skipped.values()])
        else:
            listing.unlink(missing_ok=True)
        if columns:
            _write_table(path, columns, self.made, number)
        else:
            path.unlink(missing_ok=True)
        if skipped:
            changes.note_tried(tried, skipped)

    def _with_names(self, columns: dict[str, np.ndarray], kept: np.ndarray) -> dict[str, np.ndarray]:
        """The columns of embedded images with all that a part tells about them."""
        columns["files"] = np.asarray([self._source.name(int(record)) for record in kept])
        if self.made.class_names is not None:
            columns["labels"] = self._labels[self._source.labels[kept]]
        columns |= {name: value[kept] for name, value in self._told.items()}
        if "uncertainty" in columns:
            columns["uncertainty_norm"] = np.linalg.norm(columns["uncertainty"], axis=1)
        return columns

    def finish(self, say: Callable[[str], None]) -> None:
        """Says how much of the gallery exists, and lists unreadable images once all parts do."""
        done = sum(self._written(number) is not None for number in range(self.made.parts))
        if done < self.made.parts:
            say(f"{done:,} of {self.made.parts:,} parts of these images are in {self.folder}")
            return
        sources = sources_of(self.folder)
        tell_unreadable(self.folder, sources, self.made.number, say)
        gallery = reading.read_gallery(self.folder)
        say(f"complete: {len(gallery):,} images in {self.folder}")
        if self._append and (line := changes.line_about_changes(gallery, sources)):
            say(line)


def open_work(
    model: Trained,
    source: Source,
    out: str | Path,
    *,
    labelled: bool,
    origin: str,
    append: bool,
    say: Callable[[str], None],
) -> Work | None:
    """Finds or starts the source of these images in a gallery; ``None`` if the gallery has all of them already.

    Arguments and errors as for ``embed_to_gallery``.
    """
    folder = checked_folder(out, append)
    names = [source.name(record) for record in range(len(source))]
    classes = list(source.class_names) if labelled else None
    shown = [source.class_names[label] for label in source.labels.tolist()] if labelled else []
    told = of_table(source, labelled)
    more = [f"{name} {value.tolist()}" for name, value in told.items()]
    asked = Asked(
        names, classes, about_of(model, origin, source if labelled else None), digest([*names, "", *shown, *more]), told
    )
    while True:
        sources = sources_of(folder)
        same = next((made for made in sources if made.requested == asked.digest), None)
        if sources:
            check_alike(folder, same or sources[0], asked)
        made = same or _added(folder, sources, asked, append, say)
        if made is None:
            return None
        if same is not None or _create(source_path(folder, made.number), made):
            return Work(model, source, folder, made, append)
        # Another process was faster; its description is read.


def _added(
    folder: Path, sources: Sequence[Made], asked: Asked, append: bool, say: Callable[[str], None]
) -> Made | None:
    """The description of a new source; ``None`` if the gallery has all its images."""
    left_out: tuple[int, ...] = ()
    if sources:
        if not append:
            raise UserError(f"{folder}: holds other images; --append adds those that it lacks, or give another --out")
        # Of these sources alone: another process may just have started the one that this command wants, too.
        before = reading.read_gallery(folder, "--out", sources)
        check_told(folder, before.columns, asked.told)
        present = {
            key
            for _, part in before.batches(("files", "box"))
            for key in keys_of(texts(part["files"]), part.get("box"), without_dots)
        }
        mine = keys_of(asked.names, asked.told.get("box"), without_dots)
        left_out = tuple(record for record, key in enumerate(mine) if key in present)
        say(f"{len(left_out):,} of {len(asked.names):,} images are in the gallery already")
        if len(left_out) == len(asked.names):
            tell_unreadable(folder, sources, None, say)
            if line := changes.line_about_changes(before, sources):
                say(line)
            return None
    united = asked.class_names
    if sources and united is not None:
        united = list(dict.fromkeys([*(sources[-1].class_names or ()), *united]))
    return Made(len(sources), asked.about, united, asked.digest, len(asked.names), left_out, PART_IMAGES)


def _create(path: Path, made: Made) -> bool:
    """Writes the description of a source unless it exists; of several processes one succeeds."""
    temporary = path.with_name(f".idml_jax-{os.getpid()}-{path.name}")
    write_json(temporary, {**made._asdict(), "format": reading.FORMAT})
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        with contextlib.suppress(FileExistsError), open(path, "xb") as file:
            file.write(temporary.read_bytes())
            return True
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _write_table(path: Path, columns: dict[str, np.ndarray], made: Made, number: int) -> None:
    binary = any(not is_utf8(name) for name in columns["files"].tolist())
    known = {
        b"idml_jax": json.dumps(made.about).encode(),
        reading.PART_KEY: json.dumps({**made.identity, "part": number}).encode(),
    }
    if made.class_names is not None and len(made.class_names) <= _MANY_NAMES:
        known[b"class_names"] = json.dumps(made.class_names).encode()
    table = table_of(columns, made.class_names, binary).replace_schema_metadata(known)
    named = ["class_name"] if made.class_names is not None else False
    with atomic(path) as file:
        # Vectors do not compress; plain pages are read with a copy and nothing else.
        arrow().parquet.write_table(table, file, row_group_size=GROUP_ROWS, use_dictionary=named, compression="none")
