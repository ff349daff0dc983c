"""Layouts of data sets on disk: which files are images, and their classes and splits.

A layout scans a source once, reads its lists and returns a ``Plan``; the images are read later, one by one, in the
order of the folder or archive.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from idml_jax.data import files, folders
from idml_jax.data.folders import is_image
from idml_jax.data.stored import archives
from idml_jax.errors import UserError


class Record(NamedTuple):
    """An image of a data set before it is stored.

    Attributes:
      split: name of its split.
      label: index into the plan's class names.
      name: name of its file.
      read: returns its encoded bytes; valid only until the next record is requested.
    """

    split: str
    label: int
    name: str
    read: Callable[[], bytes]


class Plan(NamedTuple):
    """A data set found in a source.

    Attributes:
      layout: description of the layout found.
      class_names: name of every label, over all splits.
      splits: names of the splits, in order.
      records: iterates over all images of all splits, mixed, always in the same order.
      listed: number of images by split, if lists give it before the images are read.
      notes: lines about what is skipped in the source.
    """

    layout: str
    class_names: Sequence[str]
    splits: Sequence[str]
    records: "Callable[[], Iterator[Record]]"
    listed: Mapping[str, int] | None = None
    notes: Sequence[str] = ()


class Place(NamedTuple):
    """Split and label of an image that a list names."""

    split: str
    label: int


class Listed:
    """The images that a list names, found among the files of a source.

    Attributes:
      missing: listed images that the source does not hold; complete after all records were read.

    Args:
      source: folder or archive.
      places: split and label by the image's key.
      key: gives the key of a file from its name in the source; ``None`` if it is not an image of the set.
      enter: which archives to enter; see ``archives.walk``.
    """

    def __init__(
        self,
        source: Path,
        places: Mapping[str, Place],
        key: Callable[[str], str | None],
        enter: Callable[[str], bool] = lambda name: True,
    ):
        self._source, self._places, self._key, self._enter = source, places, key, enter
        self.missing: list[str] = []

    def __call__(self) -> Iterator[Record]:
        left = dict(self._places)
        for entry in archives.walk(self._source, self._enter):
            key = self._key(entry.name)
            place = left.pop(key, None) if key is not None else None
            if place is not None:
                yield Record(place.split, place.label, entry.name, entry.read)
        self.missing = list(left)

    def listed(self, splits: Sequence[str]) -> dict[str, int]:
        """Number of listed images by split."""
        counts = dict.fromkeys(splits, 0)
        for place in self._places.values():
            counts[place.split] += 1
        return counts


def text(data: bytes, name: str) -> str:
    """The content of a list.

    Raises:
      UserError: if it is not text.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        if b"\0" in data:
            raise UserError(f"{name}: not a text file") from None
        return data.decode("latin-1")


def rows(data: bytes, name: str, columns: int, header: int = 0) -> list[list[str]]:
    """The rows of a list with columns separated by spaces; the last column may contain spaces.

    Args:
      data: content of the file.
      name: name of the file, for messages.
      columns: number of columns that each row must have.
      header: number of lines to skip.

    Raises:
      UserError: naming the first row with fewer columns.
    """
    found = []
    for number, line in enumerate(text(data, name).splitlines(), 1):
        if number <= header or not line.strip():
            continue
        row = line.split(maxsplit=columns - 1)
        if len(row) < columns:
            raise UserError(f"{name}, line {number}: {line.strip()!r} has {len(row)} columns; expected {columns}")
        found.append([cell.strip() for cell in row])
    if not found:
        raise UserError(f"{name}: empty")
    return found


def whole_number(value: str, name: str) -> int:
    """Parses a whole number from a list.

    Raises:
      UserError: if it is not a whole number.
    """
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{name}: {value[:50]!r} is not a number") from None


def find(contents: Mapping[str, bytes], base: str) -> str | None:
    """The least nested file with a base name; ``None`` if there is none."""
    found = [name for name in contents if name.rsplit("/", 1)[-1] == base]
    return min(found, key=lambda name: (name.count("/"), name), default=None)


def parent(name: str) -> str:
    """The folder of a file with a trailing ``/``, empty at the top."""
    return name.rpartition("/")[0] + "/" if "/" in name else ""


def not_found(source: Path, title: str, wanted: str) -> UserError:
    """The error for a source without any known layout of a data set."""
    return UserError(f"{source}: no known layout of {title}; expected {wanted}")


def folder(source: Path) -> Plan:
    """A plan for class folders in a folder or archive: ``train/<class>/`` and ``test/<class>/`` (or ``val``; or
    ``query`` and ``gallery``), or ``<class>/`` alone, stored as one split that is divided by class when it is read."""
    passed = folders.Passed()
    names = []
    for entry in archives.walk(source, passed=passed):
        if is_image(entry.name):
            names.append(entry.name)
        else:
            passed.add(folders.kind_of_other(entry.name), entry.name)
    if not names:
        raise UserError(f"{source}: it holds no images; expected {source}/<class>/*.jpg")
    found = folders.for_training(folders.arrange(names, source, passed.folders), source)
    folders.check_placed(names, found, source, passed)
    places = [place for place in map(found.place, names) if place is not None]
    classes = sorted({place.class_name for place in places})
    label_of = {name: label for label, name in enumerate(classes)}
    present = {place.split for place in places}
    order = [split for split in ("train", "test", "query", "gallery", "images") if split in present]
    listed: dict[str, int] = dict.fromkeys(order, 0)
    for place in places:
        listed[place.split] += 1

    def records() -> Iterator[Record]:
        for entry in archives.walk(source):
            place = found.place(entry.name) if is_image(entry.name) else None
            if place is not None:
                yield Record(place.split, label_of[place.class_name], entry.name, entry.read)

    shape = f"{', '.join(sorted(found.splits))} of class folders" if found.depth else "class folders"
    # tfds writes the names to a text file, one per line.
    return Plan(shape, list(map(files.shown, classes)), order, records, listed, passed.lines(source))


def by_pattern(pattern: str) -> Callable[[str], bool]:
    """A function that tests whether the whole base name of a path matches a pattern, ignoring case."""
    known = re.compile(pattern, re.IGNORECASE)
    return lambda name: known.fullmatch(name.rsplit("/", 1)[-1]) is not None
