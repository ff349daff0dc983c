"""Finds the images that a path names: an image, a folder, or a list of paths, optionally with classes."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from idml_jax.data import files, folders
from idml_jax.data.images.decode import ENDINGS
from idml_jax.data.sources import FolderSource
from idml_jax.errors import UserError

LISTS = (".txt", ".tsv", ".csv", ".lst")
MAX_LIST_BYTES = 2**30
_PATH_NAMES = {"path", "paths", "file", "files", "filename", "file_name", "filepath", "file_path", "image", "images",
               "image_path"}  # fmt: skip
_CLASS_NAMES = {"class", "classes", "class_name", "label", "labels", "target", "category"}


def _complain(line: str) -> None:
    print(line, file=sys.stderr)


def list_images(
    where: str | Path, option: str = "--images", warn: Callable[[str], None] = _complain
) -> tuple[FolderSource, bool]:
    """Finds the images that a path names.

    A folder has the same classes as in training; if any image is outside the class folders, the classes are unknown. A
    list has one path per line, relative to the list, and optionally a class in a second column. Columns are separated
    by tabs, commas or semicolons; values may be in double quotes; a header line with column names is recognised.

    Args:
      where: image, folder or list.
      option: name of the command-line option, for messages.
      warn: receives one line per kind of file that is skipped, and one about listed files that do not exist.

    Returns:
      The images sorted by name (for a list: in its order), and whether their classes are known.

    Raises:
      UserError: if there are no images, or the list cannot be parsed.
    """
    path = files.expand(where)
    shown = files.shown(path)
    if os.path.isdir(path):
        return _of_folder(path, option, warn)
    if not os.path.exists(path):
        raise UserError(f"{shown}: no such file or folder ({option})")
    if not os.path.isfile(path):
        raise UserError(f"{shown}: neither a regular file nor a folder ({option})")
    if folders.is_image(path.name):
        return _labelled([str(path)], [""])
    if path.suffix.lower() not in LISTS:
        raise UserError(f"{shown}: neither an image nor a folder nor a list ({', '.join(LISTS)}) ({option})")
    rows = _read_list(path, option)
    names = [row.class_name for row in rows]
    without = next((row for row in rows if not row.class_name), None)
    if without is not None and any(names):
        raise UserError(
            f"{shown}, line {without.line}: no class ({files.shown(without.path)}), while other lines have one; give "
            f"every image a class or none ({option})"
        )
    paths = [str(path.parent / os.path.expanduser(row.path)) for row in rows]
    absent = [file for file in paths if not os.path.exists(file)]
    if len(absent) == len(paths):
        raise UserError(
            f"{shown}: none of its {len(paths):,} files exists, the first {files.shown(absent[0])}; paths are "
            f"relative to the list ({option})"
        )
    if absent:
        warn(f"{shown}: {len(absent):,} of {len(paths):,} files do not exist, the first {files.shown(absent[0])}")
    return _labelled(paths, names)


def listed_paths(where: str | Path, option: str) -> list[str]:
    """The paths of a list as they stand, and those relative to the list; files need not exist.

    Raises:
      UserError: if the list is missing or cannot be parsed.
    """
    path = files.expand(where)
    if not os.path.isfile(path):
        raise UserError(f"{files.shown(path)}: no such file ({option})")
    rows = _read_list(path, option)
    return [*(row.path for row in rows), *(str(path.parent / os.path.expanduser(row.path)) for row in rows)]


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


class _Row(NamedTuple):
    """A line of a list."""

    line: int
    path: str
    class_name: str


def _read_list(where: Path, option: str) -> list[_Row]:
    shown = files.shown(where)
    problem = f"{shown}: cannot be read as a list of paths; it is not UTF-8 text ({option})"
    lines = files.read_text(where, MAX_LIST_BYTES, problem).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    # Spaces of ASCII alone: a file may be named by others.
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip(" \t\n\r\v\f")]
    if not numbered:
        raise UserError(f"{shown}: lists no images ({option})")
    separator = _separator(where, [line for _, line in numbered[:100]])
    cells = [(number, _cells(line, separator, f"{shown}, line {number}")) for number, line in numbered]
    path_column, class_column = 0, 1
    header = [cell.lower() for cell in cells[0][1]]
    if any(cell in _PATH_NAMES for cell in header) and all(not folders.is_image(cell) for cell in header):
        path_column = next(i for i, cell in enumerate(header) if cell in _PATH_NAMES)
        class_column = next((i for i, cell in enumerate(header) if cell in _CLASS_NAMES), -1)
        cells = cells[1:]
        if not cells:
            raise UserError(f"{shown}: lists no images ({option})")
    rows = []
    for number, row in cells:
        if len(row) <= path_column or not row[path_column]:
            raise UserError(f"{shown}, line {number}: no path ({option})")
        rows.append(_Row(number, row[path_column], row[class_column] if 0 <= class_column < len(row) else ""))
    return rows


def _separator(where: Path, lines: list[str]) -> str:
    """The column separator: in a ``.csv`` file the one of most lines; otherwise a tab if there is one, or the comma or
    semicolon that follows a path with an image extension in every line."""
    if where.suffix.lower() == ".csv":
        counts = {separator: sum(separator in line for line in lines) for separator in ",;\t"}
        return max(counts, key=lambda separator: counts[separator])
    if any("\t" in line for line in lines) or where.suffix.lower() == ".tsv":
        return "\t"
    for separator in ",;":
        first = [line.split(separator)[0].strip().strip('"') for line in lines if separator in line]
        fits = [folders.is_image(cell) or cell.lower() in _PATH_NAMES for cell in first]
        if len(fits) == len(lines) and all(fits):
            return separator
    return "\t"


def _cells(line: str, separator: str, where: str) -> list[str]:
    """The values of a line, without quotes and surrounding spaces."""
    if '"' not in line:
        return [cell.strip() for cell in line.split(separator)]
    cell = re.compile(rf' *"((?:[^"]|"")*)" *(?={separator}|$)|([^{separator}]*)')
    cells, place = [], 0
    while place <= len(line):
        match = cell.match(line, place)
        assert match is not None  # it may be empty
        quoted, plain = match.groups()
        if plain is not None and plain.strip().startswith('"'):
            raise UserError(f"{where}: its quotes are not balanced")
        cells.append(plain.strip() if plain is not None else quoted.replace('""', '"'))
        place = match.end() + 1
    return cells
