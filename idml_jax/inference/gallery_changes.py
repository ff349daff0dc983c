"""What has changed since a gallery was written: files that could not be read then, and files of its images.

Beside a part with unreadable images lies ``_tried-SSSS-NNNNNN.json``: their records, each with the state of its file
when it was read. It is written after its part and removed before that part is rewritten, so it always describes the
part beside it.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from idml_jax.data import tables
from idml_jax.data.sources import Source, key_of
from idml_jax.data.tables import arrow
from idml_jax.errors import UserError, printable
from idml_jax.inference import gallery as reading
from idml_jax.inference.arrays import column_of
from idml_jax.inference.gallery import Gallery, Made, part_path
from idml_jax.inference.own import Key, keys_of
from idml_jax.runtime.files import first_line, without_dots, write_json
from idml_jax.training.digests import FileState, file_state

_NEVER = (-1, -1)  # the state of no file: the image is tried again
_SHOWN = 3  # names in a line


class Skipped(NamedTuple):
    """An unreadable image.

    Attributes:
      name: its name, as in the list of these images.
      reason: why it cannot be read.
      state: its file when that was tried.
    """

    name: str
    reason: str
    state: FileState | None


class Written(NamedTuple):
    """What a finished part is of.

    Attributes:
      kept: ``[m]`` records in its file, in order.
      skipped: unreadable images by record, in order.
    """

    kept: Int[np.ndarray, "m"]
    skipped: dict[int, Skipped]


def tried_path(folder: Path, source: int, number: int) -> Path:
    """File with the states of the unreadable images of a part; it exists only if there are some."""
    return folder / f"_tried-{source:04d}-{number:06d}.json"


def state_of(source: Source, record: int, made: Made) -> FileState | None:
    """The state of an image's file; of an image of a table or data set that of the table it comes from.

    The state of a link to nothing is its own, and not that of the folder, which changes with other files.
    """
    name = key_of(source, record)
    if (found := file_state(name)) is not None:
        return found
    if tables.is_file_name(name):
        with contextlib.suppress(OSError, ValueError):
            link = os.lstat(name)
            return link.st_size, link.st_mtime_ns
        return None
    return file_state(str(made.about.get("images", "")))


def note_tried(path: Path, skipped: dict[int, Skipped]) -> None:
    """Writes the states of the unreadable images of a part."""
    write_json(path, [[record, one.state] for record, one in skipped.items()])


def written(folder: Path, made: Made, number: int, source: Source, records: Int[np.ndarray, "n"]) -> Written | None:
    """What a part holds.

    Args:
      folder: the gallery.
      made: what the part is made of.
      number: number of the part.
      source: images of the part's source.
      records: ``[n]`` records that the part is for.

    Returns:
      ``None`` if the part is missing, damaged, or does not agree with its list of unreadable images.

    Raises:
      UserError: if the file is a part of another configuration.
    """
    path, rows = part_path(folder, made.number, number), 0
    if path.exists():
        try:
            arrow().parquet.read_metadata(path)
        except Exception:  # damaged: it is made again
            return None
        _, rows = reading.check_part(path, made, number)
    listed = reading.skipped_images(folder, made, number)
    if rows + len(listed) != len(records):  # a process was stopped while it wrote the part again
        return None
    if not listed:
        return Written(records, {})
    names = {int(record): source.name(int(record)) for record in records}
    states = tried(tried_path(folder, made.number, number))
    if states is None:  # of an earlier version, or of a process that was stopped; the names of the list tell which
        known = {name for name, _ in listed}
        states = {record: _NEVER for record, name in names.items() if printable(name) in known}
    kept = np.asarray([record for record in names if record not in states], np.int64)
    if len(states) != len(listed) or len(kept) != rows or not states.keys() <= names.keys():
        return None
    if rows and stored(path, ("files",))["files"].tolist() != [names[int(record)] for record in kept]:
        return None
    pairs = zip(states.items(), listed, strict=True)
    return Written(kept, {record: Skipped(*pair, state) for (record, state), pair in pairs})


def tried(path: Path) -> dict[int, FileState | None] | None:
    """States by record; ``None`` if the file is missing or damaged."""
    try:
        return {int(record): None if state is None else tuple(state) for record, state in json.loads(path.read_text())}
    except (OSError, ValueError, TypeError):
        return None


def to_try_again(
    folder: Path, made: Made, number: int, source: Source, found: Written, elsewhere: set[Key | None]
) -> Int[np.ndarray, "k"]:
    """Records of a finished part to embed again: unreadable images whose files have changed since.

    If there are any, the part gets a new file, and then images whose files are newer than the part are among them:
    they could not be told from the others later.

    Args:
      folder: the gallery.
      made: what the part is made of.
      number: number of the part.
      source: images of the part's source.
      found: what the part holds.
      elsewhere: images that the gallery has from other sources; they are not embedded twice.
    """
    boxes = getattr(source, "fields", {}).get("box")
    changed = [r for r, one in found.skipped.items() if state_of(source, r, made) != one.state]
    names = [source.name(record) for record in changed]
    keys = keys_of(names, None if boxes is None else boxes[changed], without_dots)
    changed = [record for record, key in zip(changed, keys, strict=True) if key not in elsewhere]
    path = part_path(folder, made.number, number)
    if changed and path.exists():
        since = path.stat().st_mtime_ns
        states = {record: file_state(key_of(source, record)) for record in found.kept.tolist()}
        changed += [record for record, state in states.items() if state is not None and state[1] > since]
    return np.sort(np.asarray(changed, np.int64))


def keys_elsewhere(folder: Path, sources: Sequence[Made], number: int) -> set[Key | None]:
    """What identifies the images that a gallery has from sources other than that of this number."""
    found: set[Key | None] = set()
    for made in sources:
        for part in range(made.parts) if made.number != number else ():
            path = part_path(folder, made.number, part)
            if path.exists():
                columns = stored(path, ("files", "box"))
                found.update(keys_of(columns["files"].tolist(), columns.get("box"), without_dots))
    return found


def stored(path: Path, columns: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Columns of a part by name, without the class names; by default all.

    Raises:
      UserError: if the file is damaged.
    """
    try:
        with arrow().parquet.ParquetFile(path) as file:
            wanted = [name for name in file.schema_arrow.names if name in columns or not columns]
            table = file.read([name for name in wanted if name != "class_name"])
        return {name: column_of(table[name], name) for name in table.column_names}
    except Exception as error:  # damaged files can make the library raise anything
        raise UserError(f"{path}: not a part of a gallery ({first_line(error)})") from error


def merged(
    path: Path, found: Written, records: Int[np.ndarray, "k"], kept: Int[np.ndarray, "m"], new: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The columns of a part after some of its images were embedded again.

    Args:
      path: its file; need not exist.
      found: what it holds.
      records: ``[k]`` records that were embedded again.
      kept: ``[m]`` those of them that could be read.
      new: their columns, each ``[m, ...]``; empty if there are none.

    Raises:
      UserError: if the file has other columns than the new rows.
    """
    if not len(found.kept):
        return new
    old, stay = stored(path), ~np.isin(found.kept, records)
    if new and old.keys() != new.keys():
        raise UserError(f"{path}: has the columns {', '.join(old)}, and this run {', '.join(new)}; give another --out")
    order = np.argsort(np.concatenate([found.kept[stay], kept]))
    rows = {name: [value[stay], new[name]] if new else [value[stay]] for name, value in old.items()}
    return {name: np.concatenate(both)[order] for name, both in rows.items()} if len(order) else {}


def line_about_changes(gallery: Gallery, sources: Sequence[Made]) -> str:
    """Counts and names images of a gallery whose files are gone or newer than their part; empty if there are none.

    Images of Parquet tables and saved data sets are not looked at, since the table may hold them itself.
    """
    plain = (*tables.TEXT, *tables.JSON_LINES)
    origins = [str(made.about.get("images", "")) for made in sources]
    of_files = [not tables.is_table(where) or Path(where).suffix.lower() in plain for where in origins]
    starts, gone, newer = [part.first for part in gallery.parts], [], []
    times = [part.path.stat().st_mtime_ns for part in gallery.parts]
    for first, names in gallery.names():
        place = int(np.searchsorted(starts, first, side="right")) - 1
        if not of_files[int(gallery.parts[place].path.name.split("-")[1])]:
            continue
        for name in names:
            if not name.startswith("/"):  # no file, but a record of a data set
                continue
            state = file_state(name)
            if state is None:
                gone.append(name)
            elif state[1] > times[place]:
                newer.append(name)
    told = [f"{len(some):,} {what} ({_first(some)})" for some, what in ((gone, "gone"), (newer, "newer")) if some]
    if not told:
        return ""
    return (
        f"{gallery.folder}: the files of {len(gone) + len(newer):,} of its images are not those that were embedded: "
        f"{', '.join(told)}; the gallery keeps their old vectors; to bring them up to date, embed all of it anew into "
        "another --out"
    )


def _first(names: Sequence[str]) -> str:
    different = list(dict.fromkeys(names))
    return ", ".join(map(printable, different[:_SHOWN])) + (", ..." if len(different) > _SHOWN else "")
