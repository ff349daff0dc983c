"""Finds the images that a path names - an image, a folder, a table - with the classes and whatever else is known.

Every command reads tables through this module, so that a table means the same in training and in embedding.
"""

import difflib
import hashlib
import os
import sys
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.data import files, folders, tables
from idml_jax.data.columns import (
    ROLES,
    SEVERAL,
    WANTED,
    boxes_of,
    column_of,
    flags_of,
    labels_of,
    paths_of,
    split_of,
    text_of,
    weights_of,
)
from idml_jax.data.images.decode import ENDINGS
from idml_jax.data.sources import FolderSource, StoredSource
from idml_jax.data.tables import TABLES, StoredImages, Table
from idml_jax.errors import UserError, is_utf8

LISTS = TABLES


def _complain(line: str) -> None:
    print(line, file=sys.stderr)


class Listing(NamedTuple):
    """The rows of a table.

    Attributes:
      table: the table.
      paths: ``[n]`` absolute paths, or names of images that are stored in the table.
      labels: ``[n]`` names of the classes of each image; empty if none is given.
      splits: ``[n]`` names of the splits, as in ``folders.SPLIT_NAMES``; ``None`` without such a column.
      is_query: ``[n]``; ``None`` without such a column.
      is_gallery: ``[n]``; ``None`` without such a column.
      boxes: ``[n, 4]`` left, top, right, bottom in pixels; zeros: the whole image; ``None`` without boxes.
      groups: ``[n]`` names of groups, such as cameras; ``None`` without such a column.
      weights: ``[n]`` at least 0; ``None`` without such a column.
      pictures: ``[n]`` what tells each image from others: its path or, in memory, its content, and its box; empty for a
        saved data set, whose images would all have to be read.
    """

    table: Table
    paths: list[str]
    labels: list[tuple[str, ...]]
    splits: list[str] | None = None
    is_query: Bool[np.ndarray, "n"] | None = None
    is_gallery: Bool[np.ndarray, "n"] | None = None
    boxes: Int[np.ndarray, "n 4"] | None = None
    groups: np.ndarray | None = None
    weights: Float[np.ndarray, "n"] | None = None
    pictures: Sequence[Hashable] = ()

    @property
    def several(self) -> bool:
        """Whether any image has more than one label."""
        return any(len(names) > 1 for names in self.labels)


def read_listing(
    where: Path, root: str = "", option: str = "--images", warn: Callable[[str], None] = _complain
) -> Listing:
    """Reads a table.

    Args:
      where: its file, or the folder of a saved data set.
      root: folder that relative paths start from; empty: that of the table.
      option: name of the option, for messages.
      warn: receives a line about each unknown column with nearly the name of a known one, and one about files that do
        not exist.

    Raises:
      UserError: naming the file, the line, and what is wrong with it.
    """
    table = tables.read(where, WANTED, ROLES["path"], option)
    shown = files.shown(where)
    cells = {role: column_of(table, role, option) for role in ROLES}
    if cells["path"] is None:
        raise UserError(f"{shown}: has no column {ROLES['path'][0]} (or {', '.join(ROLES['path'][1:4])}) ({option})")
    for name in table.others:
        near = difflib.get_close_matches(name.lower(), WANTED, 1, 0.6)
        if near:
            warn(f"{shown}: the column {files.shown(name)!r} is not used; did you mean {near[0]!r}?")
    paths = paths_of(table, cells["path"], files.expand(root) if root else None, option)
    listing = Listing(
        table,
        paths,
        labels_of(table, cells, option),
        None if cells["split"] is None else [split_of(table, row, x) for row, x in enumerate(cells["split"])],
        flags_of(table, "is_query", cells["is_query"]),
        flags_of(table, "is_gallery", cells["is_gallery"]),
        boxes_of(table, cells),
        None if cells["group"] is None else np.asarray([text_of(value) for value in cells["group"]], "U"),
        weights_of(table, cells["weight"]),
    )
    listing = listing._replace(pictures=_pictures(listing))
    _check_encoding(listing)
    _check_files(listing, root, option, warn)
    _check_twice(listing, warn)
    _check_separators([value for value in cells["labels"] or () if isinstance(value, str) and value], shown, warn)
    return listing


def _pictures(listing: Listing) -> list[Hashable]:
    """``Listing.pictures``."""
    stored, boxes = listing.table.images, listing.boxes
    if stored is not None and not stored.in_memory:
        return []

    def picture(row: int) -> Hashable:
        data = None if stored is None else stored.read(row)
        return listing.paths[row] if data is None else hashlib.blake2b(data, digest_size=16).digest()

    found = map(picture, range(len(listing.paths)))
    return list(found if boxes is None else zip(found, map(tuple, boxes.tolist()), strict=True))


def _check_encoding(listing: Listing) -> None:
    """Refuses classes and groups that are not UTF-8; file names may be anything."""
    for what, names in (("class", listing.labels), ("group", listing.groups)):
        for row, several in enumerate(() if names is None else names):
            for name in several if what == "class" else (several,):
                if not is_utf8(name):
                    raise UserError(
                        f"{listing.table.place(row)}: the {what} {files.shown(name)} is not UTF-8; save the table as "
                        "UTF-8"
                    )


def _check_separators(labels: list[str], shown: str, warn: Callable[[str], None]) -> None:
    """Warns of texts in a column of several labels that look as if another sign separated them."""
    joined = [text for text in labels if "," in text or ";" in text]
    if joined and 2 * len(joined) >= len(labels) and not any(SEVERAL in text for text in labels):
        warn(
            f"{shown}: {len(joined):,} of {len(labels):,} labels are texts as {joined[0][:60]!r}, each of them one "
            f"class; several labels of an image are separated by {SEVERAL!r}"
        )


def _check_twice(listing: Listing, warn: Callable[[str], None]) -> None:
    """Counts rows that name or hold an image again, in the same box and split."""
    table, columns = listing.table, (listing.splits, listing.is_query, listing.is_gallery)
    seen: dict[tuple, int] = {}
    twice = []
    for row, picture in enumerate(listing.pictures):
        first = seen.setdefault((picture, *(None if x is None else x[row] for x in columns)), row)
        if first != row:
            twice.append((first, row))
    if not twice:
        return
    shown, (one, other) = files.shown(table.where), twice[0]
    others = sum(listing.labels[a] != listing.labels[b] for a, b in twice)
    told = f", {others:,} of them with another class" if others else ""
    how = "names" if table.images is None else "holds"
    rows = f"{len(twice):,} rows {how[:-1]}" if len(twice) > 1 else f"1 row {how}"
    warn(
        f"{shown}: {rows} an image again{told}, the first {files.shown(listing.paths[one])} "
        f"({table.unit}s {table.lines[one]:,} and {table.lines[other]:,})"
    )


def _check_files(listing: Listing, root: str, option: str, warn: Callable[[str], None]) -> None:
    """Counts listed files that do not exist; raises if none does."""
    table, paths = listing.table, listing.paths
    if table.images is not None:
        return
    shown = files.shown(table.where)
    absent = [path for path in dict.fromkeys(paths) if not os.path.exists(path)]
    total = len(set(paths))
    odd = "" if all(map(is_utf8, absent)) else "; the table is not UTF-8, as the names of files mostly are"
    if len(absent) == total:
        told = f"relative to {files.shown(files.expand(root))}" if root else "relative to the list"
        raise UserError(
            f"{shown}: none of its {total:,} files exists, the first {files.shown(absent[0])}; paths are {told}"
            f"{odd} ({option})"
        )
    if absent:
        warn(f"{shown}: {len(absent):,} of {total:,} files do not exist, the first {files.shown(absent[0])}{odd}")


def source_of(
    listing: Listing, rows: Int[np.ndarray, "k"] | None = None, classes: Sequence[str] | None = None
) -> FolderSource:
    """Some rows of a table as a source.

    Args:
      listing: the table.
      rows: ``[k]`` rows; all by default.
      classes: names of the labels; by default those of the rows, sorted. Unlabeled images have the label 0.

    Returns:
      The images, whose ``fields`` hold ``row``, the number of each row in the table, and, where the table has them,
      ``box`` [k, 4], ``group`` [k], ``weight`` [k], ``is_query`` [k], ``is_gallery`` [k] and, if any image of the table
      has several labels, ``labels`` [k, l], all labels of each image, filled up with -1.
    """
    rows = np.arange(len(listing.paths)) if rows is None else rows
    own = [listing.labels[row] for row in rows]
    if classes is None:
        classes = sorted({name for names in own for name in names}) or [""]
    number = {name: label for label, name in enumerate(classes)}
    fields: dict[str, np.ndarray] = {"row": rows.astype(np.int64)}
    columns = {
        "box": listing.boxes,
        "group": listing.groups,
        "weight": listing.weights,
        "is_query": listing.is_query,
        "is_gallery": listing.is_gallery,
    }
    fields |= {name: column[rows] for name, column in columns.items() if column is not None}
    if listing.several:
        sets = np.full((len(rows), max(len(names) for names in listing.labels)), -1, np.int32)
        for place, names in enumerate(own):
            sets[place, : len(names)] = [number[name] for name in names]
        fields["labels"] = sets
    labels = np.asarray([number[names[0]] if names else 0 for names in own], np.int32)
    paths = [listing.paths[row] for row in rows]
    stored: StoredImages | None = listing.table.images
    if stored is None:
        return FolderSource(paths, labels, classes, fields)
    return StoredSource(paths, labels, classes, fields, stored)


def list_images(
    where: str | Path, option: str = "--images", warn: Callable[[str], None] = _complain, root: str = ""
) -> tuple[FolderSource, bool]:
    """Finds the images that a path names.

    A folder has the same classes as in training; if any image is outside the class folders, the classes are unknown.
    For a table see ``ROLES`` and docs/data.md: a text file has one path per line, and optionally a class in a second
    column, or a header line with the names of its columns, separated by tabs, commas or semicolons; values may be in
    double quotes.

    Args:
      where: image, folder or table.
      option: name of the command-line option, for messages.
      warn: receives one line per kind of file that is skipped, one about listed files that do not exist, and one
        about each column that may be misspelt.
      root: folder that relative paths of a table start from; empty: that of the table.

    Returns:
      The images sorted by name (for a table: in its order), and whether their classes are known.

    Raises:
      UserError: if there are no images, or the table cannot be parsed.
    """
    path = files.expand(where)
    shown = files.shown(path)
    if tables.is_table(path) and (path.is_dir() or path.is_file()):
        listing = read_listing(path, root, option, warn)
        if listing.weights is not None:
            warn(f"{shown}: weights are for training; they are not used here")
        if listing.splits is not None:
            warn(f"{shown}: its column of splits is for training; here all of its images are read")
        return source_of(listing), bool(listing.labels[0])
    if root:
        raise UserError(
            f"--root={root}: relative paths are those of a table ({', '.join(TABLES)}), which {shown} isn't"
        )
    if os.path.isdir(path):
        return _of_folder(path, option, warn)
    if not os.path.exists(path):
        raise UserError(f"{shown}: no such file or folder ({option})")
    if not os.path.isfile(path):
        raise UserError(f"{shown}: neither a regular file nor a folder ({option})")
    if folders.is_image(path.name):
        return _labelled([str(path)], [""])
    raise UserError(f"{shown}: neither an image nor a folder nor a list ({', '.join(LISTS)}) ({option})")


def listed_paths(where: str | Path, option: str) -> list[tuple[str, str]]:
    """The path of each row of a table as it stands, and relative to the table; files need not exist.

    Raises:
      UserError: if the table is missing or cannot be parsed.
    """
    path = files.expand(where)
    if not os.path.isfile(path):
        raise UserError(f"{files.shown(path)}: no such file ({option})")
    table = tables.read(path, WANTED, ROLES["path"], option)
    names = [text_of(value) for value in column_of(table, "path", option) or ()]
    return list(zip(names, paths_of(table, names, None, option), strict=True))


def _of_folder(root: Path, option: str, warn: Callable[[str], None]) -> tuple[FolderSource, bool]:
    found = folders.images(root)
    if not found.names:
        endings = ", ".join(ending[1:] for ending in ENDINGS)
        raise UserError(f"{files.shown(root)}: holds no images ({option}; {endings})")
    arrangement = folders.arrange(found.names, root, found.passed.folders)
    if arrangement.depth:  # all images are wanted, including those outside the splits
        tops = {name.removeprefix(arrangement.prefix).split("/")[0] for name in found.names}
        arrangement = arrangement._replace(splits={top: arrangement.splits.get(top, top) for top in tops})
    places = [arrangement.place(name) for name in found.names]
    loose = [name for name, place in zip(found.names, places, strict=True) if place is None]
    if not loose:
        folders.check_placed(found.names, arrangement, root, found.passed)
    for line in found.passed.lines(root):
        warn(line)
    if loose and len(loose) < len(places):
        warn(
            f"{files.shown(root)}: classes are unknown, as {len(loose):,} of {len(places):,} images lie outside class "
            f"folders, the first {files.shown(loose[0])}"
        )
    classes = ["" if place is None else place.class_name for place in places]
    return _labelled([str(path) for path in found.paths], classes)


def _labelled(paths: list[str], names: list[str]) -> tuple[FolderSource, bool]:
    known = all(names)
    classes = sorted(set(names)) if known else [""]
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.asarray([label_of[name] if known else 0 for name in names], np.int32)
    return FolderSource(paths, labels, classes), known
