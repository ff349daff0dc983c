"""The columns of a table of images: what they are called, and their values checked."""

import functools
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.data import files, folders
from idml_jax.data.tables import Table
from idml_jax.errors import UserError
from idml_jax.runtime.files import without_dots

# The columns of a table: what a column means, and the names that it may have.
ROLES: dict[str, tuple[str, ...]] = {
    "path": ("path", "paths", "file", "files", "filename", "file_name", "filepath", "file_path", "image", "images",
             "image_path", "image_file", "img", "img_path", "img_file"),
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
WANTED = frozenset(name for names in ROLES.values() for name in names)
_CORNERS = ("x1", "y1", "x2", "y2")
_A_LIST = re.compile(r"\[.*\]|\(.*,.*\)|\{.*\}", re.DOTALL)  # as Python and pandas write one
SEVERAL = "|"  # separates the labels of an image in a cell of text
_TRUE, _FALSE = {"true", "1", "1.0", "yes", "y"}, {"false", "0", "0.0", "no", "n", ""}
_EMPTY = {"", "nan", "none", "null", "<na>"}


def column_of(table: Table, role: str, option: str) -> list[Any] | None:
    """The column of a role, a key of ``ROLES``; ``None`` if the table has none; refuses two."""
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


def text_of(value: Any) -> str:
    """A value as text, with the spaces that are part of it; empty for what is missing or blank."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():  # a column of whole numbers with an empty cell
        return str(int(value))
    text = str(value)
    return text if text.strip() else ""


def paths_of(table: Table, cells: list[Any], root: Path | None, option: str) -> list[str]:
    """Absolute paths, relative ones from ``root`` or the table's folder; names of images in the table as they stand."""
    above = root or (table.where if table.where.is_dir() else table.where.parent)
    stored = table.images is not None
    paths, plain = [], functools.cache(without_dots)  # of folders, which are few
    for row, value in enumerate(cells):
        name = text_of(value)
        if not name and stored:
            paths.append(table.place(row))
        elif not name:
            raise UserError(f"{table.place(row)}: no path ({option})")
        elif stored:
            paths.append(name)
        else:
            folder, file = os.path.split(above / os.path.expanduser(name))
            paths.append(os.path.join(plain(folder), file))
    return paths


def labels_of(table: Table, cells: dict[str, list[Any] | None], option: str) -> list[tuple[str, ...]]:
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
            f"{table.place(without)}: no class ({text_of((cells['path'] or [''])[without])}), while other lines have "
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
    text = text_of(value)
    if several and _A_LIST.fullmatch(text.strip()):
        raise UserError(
            f"{table.place(row)}: labels = {text[:80]!r} is the text of a list and would be one class; separate the "
            f"labels of an image by {SEVERAL!r}, or store lists (Parquet, JSON lines)"
        )
    parts = [part.strip() for part in text.split(SEVERAL)] if several else [text]
    return [part for part in parts if part]


def split_of(table: Table, row: int, value: Any) -> str:
    """The split that a value names."""
    name = folders.SPLIT_NAMES.get(text_of(value).strip().lower())
    if name is None:
        raise UserError(f"{table.place(row)}: split {text_of(value)!r}; known: {', '.join(folders.SPLIT_NAMES)}")
    return name


def flags_of(table: Table, name: str, cells: list[Any] | None) -> Bool[np.ndarray, "n"] | None:
    """A column of true and false; empty values are false."""
    if cells is None:
        return None
    found = np.zeros(len(cells), bool)
    for row, value in enumerate(cells):
        text = text_of(value).strip().lower()
        if text not in _TRUE and text not in _FALSE | _EMPTY:
            raise UserError(f"{table.place(row)}: {name} = {text_of(value)!r}; it must be true or false")
        found[row] = text in _TRUE
    return found


def boxes_of(table: Table, cells: dict[str, list[Any] | None]) -> Int[np.ndarray, "n 4"] | None:
    """Boxes from one column or from four; zeros where there is none."""
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
        parts = (
            list(value) if isinstance(value, list | tuple) else text_of(value).strip(" []()").replace(",", " ").split()
        )
        if all(text_of(part).strip().lower() in _EMPTY for part in parts):
            continue  # the whole image
        try:
            numbers = [round(float(part)) for part in parts]
            left, top, right, bottom = numbers
            good = 0 <= left < right < 2**31 and 0 <= top < bottom < 2**31
        except (TypeError, ValueError, OverflowError):
            good, numbers = False, []
        if not good:
            raise UserError(
                f"{table.place(row)}: box {' '.join(text_of(part) for part in parts)[:80]!r}; it must be x1,y1,x2,y2 "
                "in pixels, from the upper left corner, with x1 < x2 and y1 < y2"
            )
        boxes[row] = numbers
    return boxes


def weights_of(table: Table, cells: list[Any] | None) -> Float[np.ndarray, "n"] | None:
    """A column of numbers of at least 0."""
    if cells is None:
        return None
    found = np.ones(len(cells), np.float64)
    for row, value in enumerate(cells):
        try:
            found[row] = float(text_of(value))
        except ValueError:
            found[row] = math.nan
        if not 0 <= found[row] < math.inf:
            raise UserError(f"{table.place(row)}: weight {text_of(value)!r}; it must be a number of at least 0")
    return found
