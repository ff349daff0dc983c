"""Finds the images that a path names - an image, a folder, a table - with the classes and whatever else is known.

Every command reads tables through this module, so that a table means the same in training and in embedding.
"""

import difflib
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.data import files, folders, tables
from idml_jax.data.images.decode import ENDINGS
from idml_jax.data.sources import FolderSource, StoredSource
from idml_jax.data.tables import TABLES, StoredImages, Table
from idml_jax.errors import UserError

LISTS = TABLES
# The columns of a table: what a column means, and the names that it may have.
ROLES: dict[str, tuple[str, ...]] = {
    "path": ("path", "paths", "file", "files", "filename", "file_name", "filepath", "file_path", "image", "images",
             "image_path", "img"),
    "label": ("label", "class", "class_name", "target", "category"),
    "labels": ("labels", "classes", "tags"),
    "split": ("split", "subset", "partition"),
    "is_query": ("is_query",),
    "is_gallery": ("is_gallery",),
    "box": ("box",),
    "x1": ("x1", "x_1"), "y1": ("y1", "y_1"), "x2": ("x2", "x_2"), "y2": ("y2", "y_2"),
    "group": ("group", "camera", "camera_id"),
    "weight": ("weight", "sample_weight"),
}  # fmt: skip
_WANTED = frozenset(name for names in ROLES.values() for name in names)
_CORNERS = ("x1", "y1", "x2", "y2")
SEVERAL = "|"  # separates the labels of an image in a cell of text
_TRUE, _FALSE = {"true", "1", "1.0", "yes", "y"}, {"false", "0", "0.0", "no", "n", ""}
_EMPTY = {"", "nan", "none", "null", "<na>"}


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
    table = tables.read(where, _WANTED, ROLES["path"], option)
    shown = files.shown(where)
    cells = {role: _column(table, role, option) for role in ROLES}
    if cells["path"] is None:
        raise UserError(f"{shown}: has no column {ROLES['path'][0]} (or {', '.join(ROLES['path'][1:4])}) ({option})")
    for name in table.others:
        near = difflib.get_close_matches(name.lower(), _WANTED, 1, 0.6)
        if near:
            warn(f"{shown}: the column {files.shown(name)!r} is not used; did you mean {near[0]!r}?")
    paths = _paths(table, cells["path"], files.expand(root) if root else None, option)
    listing = Listing(
        table,
        paths,
        _labels(table, cells, option),
        None if cells["split"] is None else [_split(table, row, x) for row, x in enumerate(cells["split"])],
        _flags(table, "is_query", cells["is_query"]),
        _flags(table, "is_gallery", cells["is_gallery"]),
        _boxes(table, cells),
        None if cells["group"] is None else np.asarray([_text(value) for value in cells["group"]], "U"),
        _weights(table, cells["weight"]),
    )
    _check_files(listing, root, option, warn)
    return listing


def _column(table: Table, role: str, option: str) -> list[Any] | None:
    found = [name for name in ROLES[role] if name in table.columns]
    if len(found) > 1:
        # Of an image and its path, the image itself is read.
        if role == "path" and table.images is not None and "image" in found:
            return table.columns["image"]
        raise UserError(
            f"{files.shown(table.where)}: the columns {' and '.join(found[:2])} mean the same, the {role}; rename one "
            f"of them ({option})"
        )
    return table.columns[found[0]] if found else None


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value == int(value):  # a column of whole numbers with an empty cell
        return str(int(value))
    return str(value).strip()


def _paths(table: Table, cells: list[Any], root: Path | None, option: str) -> list[str]:
    above = root or (table.where if table.where.is_dir() else table.where.parent)
    stored = table.images is not None
    paths = []
    for row, value in enumerate(cells):
        name = _text(value)
        if not name and stored:
            paths.append(table.place(row))
        elif not name:
            raise UserError(f"{table.place(row)}: no path ({option})")
        else:
            paths.append(name if stored else str(above / os.path.expanduser(name)))
    return paths


def _labels(table: Table, cells: dict[str, list[Any] | None], option: str) -> list[tuple[str, ...]]:
    """The classes of each image, from a column with one or with several."""
    one, several = cells["label"], cells["labels"]
    if one is not None and several is not None:
        raise UserError(f"{files.shown(table.where)}: has both a column for one label and one for several ({option})")
    column = several if one is None else one
    if column is None:
        return [()] * len(table.lines)
    role = "labels" if one is None else "label"
    known = next((table.class_names[name] for name in ROLES[role] if name in table.class_names), None)
    found = [tuple(dict.fromkeys(_names(table, row, x, known, one is None))) for row, x in enumerate(column)]
    # An unlabeled set of Hugging Face has -1 in every row.
    without = next((row for row, names in enumerate(found) if not names), None)
    if without is not None and any(found):
        raise UserError(
            f"{table.place(without)}: no class ({_text((cells['path'] or [''])[without])}), while other lines have "
            f"one; give every image a class or none ({option})"
        )
    return found


def _names(table: Table, row: int, value: Any, known: list[str] | None, several: bool) -> list[str]:
    if isinstance(value, list | tuple):
        return [name for part in value for name in _names(table, row, part, known, False)]
    if known is not None and isinstance(value, int):
        if value == -1:
            return []
        if not 0 <= value < len(known):
            raise UserError(f"{table.place(row)}: label {value}, but there are {len(known):,} class names")
        return [known[value]]
    text = _text(value)
    parts = [part.strip() for part in text.split(SEVERAL)] if several else [text]
    return [part for part in parts if part]


def _split(table: Table, row: int, value: Any) -> str:
    name = folders.SPLIT_NAMES.get(_text(value).lower())
    if name is None:
        raise UserError(f"{table.place(row)}: split {_text(value)!r}; known: {', '.join(folders.SPLIT_NAMES)}")
    return name


def _flags(table: Table, name: str, cells: list[Any] | None) -> Bool[np.ndarray, "n"] | None:
    if cells is None:
        return None
    found = np.zeros(len(cells), bool)
    for row, value in enumerate(cells):
        text = _text(value).lower()
        if text not in _TRUE and text not in _FALSE | _EMPTY:
            raise UserError(f"{table.place(row)}: {name} = {_text(value)!r}; it must be true or false")
        found[row] = text in _TRUE
    return found


def _boxes(table: Table, cells: dict[str, list[Any] | None]) -> Int[np.ndarray, "n 4"] | None:
    column = cells["box"]
    given = [name for name in _CORNERS if cells[name] is not None]
    if column is None and not given:
        return None
    shown = files.shown(table.where)
    if column is not None and given:
        raise UserError(f"{shown}: has a column box and columns {', '.join(given)}; keep one of them")
    if column is None:
        missing = [name for name in _CORNERS if cells[name] is None]
        if missing:
            raise UserError(f"{shown}: has columns {', '.join(given)}, but no {missing[0]}")
        column = [list(parts) for parts in zip(*(cells[name] or () for name in _CORNERS), strict=True)]
    boxes = np.zeros((len(column), 4), np.int32)
    for row, value in enumerate(column):
        parts = list(value) if isinstance(value, list | tuple) else _text(value).strip("[]()").replace(",", " ").split()
        if all(_text(part).lower() in _EMPTY for part in parts):
            continue  # the whole image
        try:
            numbers = [round(float(part)) for part in parts]
            left, top, right, bottom = numbers
            good = 0 <= left < right < 2**31 and 0 <= top < bottom < 2**31
        except (TypeError, ValueError, OverflowError):
            good, numbers = False, []
        if not good:
            raise UserError(
                f"{table.place(row)}: box {' '.join(_text(part) for part in parts)[:80]!r}; it must be x1,y1,x2,y2 in "
                "pixels, from the upper left corner, with x1 < x2 and y1 < y2"
            )
        boxes[row] = numbers
    return boxes


def _weights(table: Table, cells: list[Any] | None) -> Float[np.ndarray, "n"] | None:
    if cells is None:
        return None
    found = np.ones(len(cells), np.float64)
    for row, value in enumerate(cells):
        try:
            found[row] = float(_text(value))
        except ValueError:
            found[row] = math.nan
        if not 0 <= found[row] < math.inf:
            raise UserError(f"{table.place(row)}: weight {_text(value)!r}; it must be a number of at least 0")
    return found


def _check_files(listing: Listing, root: str, option: str, warn: Callable[[str], None]) -> None:
    """Counts listed files that do not exist; raises if none does."""
    table, paths = listing.table, listing.paths
    if table.images is not None:
        return
    shown = files.shown(table.where)
    absent = [path for path in dict.fromkeys(paths) if not os.path.exists(path)]
    total = len(set(paths))
    if len(absent) == total:
        told = f"relative to {files.shown(files.expand(root))}" if root else "relative to the list"
        raise UserError(
            f"{shown}: none of its {total:,} files exists, the first {files.shown(absent[0])}; paths are {told} "
            f"({option})"
        )
    if absent:
        warn(f"{shown}: {len(absent):,} of {total:,} files do not exist, the first {files.shown(absent[0])}")


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
