"""Reads a gallery: a folder of Parquet parts, which may be larger than memory.

``inference.gallery_parts`` writes it. The folder holds ``part-SSSS-NNNNNN.parquet`` (part N of source S: the images of
one ``embed`` command), ``_source-SSSS.json`` (what the source's parts are made of) and ``_skipped-SSSS-NNNNNN.json``
(images of a part that could not be read; ``_tried-SSSS-NNNNNN.json``: the state of their files then). Names that begin
with an underscore are no data for DuckDB, pandas and pyarrow, so that the folder opens in them as one table.
"""

import contextlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from idml_jax.data.tables import arrow
from idml_jax.errors import UserError
from idml_jax.inference.arrays import column_of
from idml_jax.inference.index import (
    COLUMNS,
    Index,
    checked_about,
    checked_numbers,
    read,
    texts,
    warn_of_wrong_labels,
)
from idml_jax.inference.told import OF_TABLES, told_by_table
from idml_jax.ism import Metric
from idml_jax.metrics.blocks import Block
from idml_jax.metrics.embedded import Embedded
from idml_jax.runtime.files import first_line, user_path

FORMAT = 1
BLOCK_ROWS = 65536  # rows searched at a time
READ_ROWS = 8192  # rows read at a time
PART_KEY = b"idml_jax_part"
_WANTED = (*COLUMNS, *OF_TABLES)
_NUMBERS = ("semantic", "uncertainty", "semantic_norm", "ambiguity", "risk")


class Made(NamedTuple):
    """What the parts of one source are made of.

    Attributes:
      number: place of the source in the gallery, from 0.
      about: origin of the embeddings, as an index holds it.
      class_names: names by label, of all sources up to this one; ``None`` if classes are unknown.
      requested: digest of names and classes of all images that the command names.
      total: number of these images.
      left_out: records among them that the gallery had already.
      per_part: images of a part.
    """

    number: int
    about: dict[str, Any]
    class_names: list[str] | None
    requested: str
    total: int
    left_out: tuple[int, ...]
    per_part: int

    @property
    def records(self) -> Int[np.ndarray, "n"]:
        """Records that are embedded."""
        return np.setdiff1d(np.arange(self.total), np.asarray(self.left_out, np.int64), assume_unique=True)

    @property
    def parts(self) -> int:
        """Number of parts."""
        return -(-(self.total - len(self.left_out)) // self.per_part)

    @property
    def identity(self) -> dict[str, Any]:
        """What a part must agree in to be of this source."""
        same = {name: self.about.get(name) for name in ("weights", "temperature", "relative", "form")}
        return {"format": FORMAT, "requested": self.requested, "source": self.number, "per_part": self.per_part, **same}


def source_path(folder: Path, number: int) -> Path:
    """File that describes a source."""
    return folder / f"_source-{number:04d}.json"


def part_path(folder: Path, source: int, number: int) -> Path:
    """File of a part."""
    return folder / f"part-{source:04d}-{number:06d}.parquet"


def skipped_path(folder: Path, source: int, number: int) -> Path:
    """File with the unreadable images of a part; it exists only if there are some."""
    return folder / f"_skipped-{source:04d}-{number:06d}.json"


def is_gallery(path: str | Path) -> bool:
    """Whether a path is the folder of a gallery."""
    with contextlib.suppress(UserError, OSError):
        return source_path(user_path(path), 0).is_file()
    return False


def sources_of(folder: Path) -> list[Made]:
    """The sources of a gallery, in the order in which they were added; empty if the folder is none.

    Raises:
      UserError: naming a description that is damaged or of another format.
    """
    found: list[Made] = []
    while (path := source_path(folder, len(found))).exists():
        try:
            read = json.loads(path.read_text())
            known = {name: read[name] for name in Made._fields if name != "left_out"}
            made = Made(**known, left_out=tuple(map(int, read["left_out"])))
            right = read["format"] == FORMAT and made.number == len(found) and made.per_part > 0
            names = made.class_names
            if not right or not (names is None or all(isinstance(name, str) for name in names)):
                raise ValueError(f"format {read['format']!r}, source {made.number!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: is not the description of a gallery's source in format {FORMAT} ({first_line(error)})"
            ) from error
        checked_about(path, np.asarray(json.dumps(made.about)))
        found.append(made)
    return found


class Part(NamedTuple):
    """A part that exists.

    Attributes:
      path: its file.
      first: number of its first row in the gallery.
      rows: number of its rows.
    """

    path: Path
    first: int
    rows: int


@dataclass(frozen=True, eq=False, repr=False)
class Gallery:
    """A folder of embeddings; ``len`` gives the number of images. Only what is asked for is read.

    Attributes:
      folder: the folder.
      about: origin of the embeddings, of the first source.
      class_names: names by label; ``None`` if labels are unknown.
      parts: its parts, in order.
      columns: names of the columns, with the width of those that hold vectors and 0 for the others.
    """

    folder: Path
    about: dict[str, Any]
    class_names: list[str] | None
    parts: list[Part]
    columns: dict[str, int]

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)

    def __repr__(self) -> str:
        return f"Gallery({len(self):,} x {self.width} embeddings in {len(self.parts):,} parts, {self.folder})"

    @property
    def width(self) -> int:
        """Dimensions of the semantic embedding."""
        return self.columns["semantic"]

    @property
    def metric(self) -> Metric:
        """The metric that the embeddings were trained with; the default if unknown."""
        return Metric.from_about(self.about)

    @cached_property
    def labels(self) -> Int[np.ndarray, "n"] | None:
        """Label of every row; ``None`` if unknown."""
        if self.class_names is None:
            return None
        found = np.concatenate([part["labels"] for _, part in self.batches(("labels",))]).astype(np.int64)
        if found.min() < 0 or found.max() >= len(self.class_names):
            raise UserError(f"{self.folder}: labels reach beyond its {len(self.class_names):,} class names")
        return found

    def names(self) -> Iterator[tuple[int, list[str]]]:
        """Number of the first row and names of the images of one batch after another."""
        for first, part in self.batches(("files",)):
            yield first, texts(part["files"])

    def batches(self, columns: Collection[str]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Number of the first row and some columns, ``READ_ROWS`` rows or fewer at a time; numbers are checked."""
        for part in self.parts:
            first = part.first
            with _opened(part.path) as file:
                for batch in file.iter_batches(READ_ROWS, columns=[name for name in self.columns if name in columns]):
                    arrays = {name: self._column(part.path, name, batch.column(name)) for name in batch.schema.names}
                    yield first, arrays
                    first += batch.num_rows
            if first != part.first + part.rows:
                raise UserError(f"{part.path}: has {first - part.first:,} rows, but declares {part.rows:,}")

    def _column(self, path: Path, name: str, column: Any) -> np.ndarray:
        value = column_of(column, name)
        if name not in _NUMBERS:
            return value
        value = checked_numbers(path, name, value)
        return value.astype(np.float32, copy=False) if name in ("semantic", "uncertainty") else value

    def blocks(self, left_out: Bool[np.ndarray, "n"] | None = None, rows: int = BLOCK_ROWS) -> Iterator[Block]:
        """Semantic embeddings with their row numbers, in blocks of equal size (the last may be smaller).

        Args:
          left_out: ``[n]`` rows to leave out.
          rows: rows of a block.
        """
        numbers, block, filled = np.empty(rows, np.int64), np.empty((rows, self.width), np.float32), 0
        for first, part in self.batches(("semantic",)):
            value, here = part["semantic"], np.arange(first, first + len(part["semantic"]))
            if left_out is not None:
                kept = ~left_out[here]
                value, here = value[kept], here[kept]
            while len(here):
                some = min(len(here), rows - filled)
                block[filled : filled + some], numbers[filled : filled + some] = value[:some], here[:some]
                value, here, filled = value[some:], here[some:], filled + some
                if filled == rows:
                    yield numbers, block
                    filled = 0
        if filled:
            yield numbers[:filled], block[:filled]

    def take(self, rows: Int[np.ndarray, "k"], columns: Collection[str] = _WANTED) -> dict[str, np.ndarray]:
        """Some columns of some rows.

        Args:
          rows: row numbers, ascending, each once.
          columns: names; those that the gallery lacks are left out.
        """
        pa, found = arrow(), []
        wanted = [name for name in self.columns if name in columns]
        for part in self.parts:
            here = rows[(rows >= part.first) & (rows < part.first + part.rows)] - part.first
            if not len(here):
                continue
            with _opened(part.path) as file:
                first = 0
                for group in range(file.num_row_groups):
                    size = file.metadata.row_group(group).num_rows
                    inside = here[(here >= first) & (here < first + size)] - first
                    if len(inside):
                        table = file.read_row_group(group, columns=wanted).take(pa.array(inside))
                        found.append({n: self._column(part.path, n, table[n].combine_chunks()) for n in wanted})
                    first += size
        whole = {name: np.concatenate([part[name] for part in found]) for name in wanted}
        if any(len(column) != len(rows) for column in whole.values()):
            raise UserError(f"{self.folder}: its parts have fewer rows than they declare")
        return whole

    def index(self, rows: Int[np.ndarray, "k"] | None = None) -> Index:
        """Some rows (ascending, each once), or all, as an index in memory."""
        if rows is None:
            batches = list(self.batches(_WANTED))
            columns = {name: np.concatenate([part[name] for _, part in batches]) for name in batches[0][1]}
        else:
            columns = self.take(rows)
        labels = columns["labels"].astype(np.int64) if self.class_names is not None else None
        if labels is not None and len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names or ()):
            raise UserError(f"{self.folder}: labels reach beyond its {len(self.class_names or ()):,} class names")
        told = told_by_table(self.folder, columns, columns["semantic"].shape, labels, self.class_names)
        embedded = Embedded(
            columns["semantic"],
            np.zeros(len(columns["semantic"]), np.int32) if labels is None else labels,
            columns.get("uncertainty"),
            columns.get("semantic_norm"),
            told.sets,
            told.groups,
            risk=columns.get("risk"),
        )
        files, ambiguity = np.asarray(texts(columns["files"])), columns.get("ambiguity")
        more: dict[str, Any] = {"boxes": told.boxes, "marked": told.marked, "rows": rows}
        return Index(embedded, files, self.class_names, self.about, ambiguity, self.folder, **more)

    @property
    def megabytes(self) -> float:
        """Memory in MiB that the vectors of all rows take."""
        return len(self) * 4 * sum(self.columns.values()) / 2**20


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A part, memory-mapped; what pyarrow raises becomes one line with the part's name."""
    try:
        with arrow().parquet.ParquetFile(path, memory_map=True) as file:
            yield file
    except (UserError, MemoryError, GeneratorExit):
        raise
    except Exception as error:  # damaged files can make the library raise anything
        raise UserError(f"{path}: not a part of a gallery ({first_line(error)})") from error


def read_stored(path: str | Path, option: str = "--index", *, labels: bool = False) -> Index:
    """Reads embeddings from a file (``index.read``, with the same arguments and errors) or from all of a gallery."""
    if not is_gallery(path):
        return read(path, option, labels=labels)
    gallery = read_gallery(path, option)
    if labels and gallery.class_names is None:
        raise UserError(f"{gallery.folder}: needs classes, and its images have none ({option})")
    return gallery.index()


def read_gallery(path: str | Path, option: str = "--index", sources: Sequence[Made] | None = None) -> Gallery:
    """Opens the folder of a gallery.

    Args:
      path: the folder.
      option: name of the command-line option, for messages.
      sources: sources to read; by default all.

    Raises:
      UserError: if it is not a gallery, parts are missing or damaged, or belong to another one.
    """
    folder = user_path(path)
    sources = sources_of(folder) if sources is None else sources
    if not sources:
        raise UserError(f"{folder}: is not a gallery of idml_jax.embed --shard ({option})")
    parts: list[Part] = []
    shapes, missing = {}, []
    for made in sources:
        for number in range(made.parts):
            found = part_path(folder, made.number, number)
            first = parts[-1].first + parts[-1].rows if parts else 0
            if not found.exists():
                if not all_skipped(folder, made, number):
                    missing.append(found.name)
                continue
            schema, rows = check_part(found, made, number)
            shapes[found] = schema
            parts.append(Part(found, first, rows))
    if missing:
        total = sum(made.parts for made in sources)
        raise UserError(
            f"{folder}: {len(missing):,} of {total:,} parts are missing, the first {missing[0]}; run the embed command "
            "of that source again, it makes the missing ones"
        )
    if not parts:
        raise UserError(f"{folder}: none of its images could be read")
    kinds = set(shapes.values())
    if len(kinds) > 1:
        odd = next(path for path in shapes if shapes[path] != shapes[parts[0].path])
        raise UserError(f"{odd}: has other columns or widths than {parts[0].path.name}")
    columns = dict(next(iter(kinds)))
    if "semantic" not in columns or "files" not in columns:
        raise UserError(f"{parts[0].path}: needs the columns semantic and files; it holds {', '.join(columns)}")
    for made in sources:
        warn_of_wrong_labels(folder, made.about)
    classes: Sequence[str] | None = sources[-1].class_names
    return Gallery(folder, sources[0].about, None if classes is None else list(classes), parts, columns)


def all_skipped(folder: Path, made: Made, number: int) -> bool:
    """Whether no image of a part could be read, so that it has no file."""
    size = len(made.records[number * made.per_part : (number + 1) * made.per_part])
    return len(skipped_images(folder, made, number)) == size


def skipped_images(folder: Path, made: Made, number: int) -> list[tuple[str, str]]:
    """Name and reason of every unreadable image of a part."""
    path = skipped_path(folder, made.number, number)
    if not path.exists():
        return []
    try:
        return [(str(name), str(reason)) for name, reason in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: is not a list of unreadable images ({first_line(error)})") from error


def check_part(path: Path, made: Made, number: int) -> tuple[tuple[tuple[str, int], ...], int]:
    """Columns with their widths (0 for plain ones) and number of rows of a part.

    Raises:
      UserError: if the file is damaged, or is a part of something else.
    """
    with _opened(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
        told = (schema.metadata or {}).get(PART_KEY, b"")
        widths = tuple((column.name, getattr(column.type, "list_size", 0)) for column in schema)
    try:
        known = json.loads(told)
    except ValueError:
        known = None
    if known != {**made.identity, "part": number}:
        raise UserError(
            f"{path}: is a part of another configuration (other images, classes, weights or settings of the metric); "
            "move it away, or give another --out"
        )
    return widths, rows
