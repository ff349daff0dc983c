"""What a data set on disk looks like: which of its files are images, of which class and split.

A layout looks at a source once, reads its lists and answers with a ``Plan``; the images themselves are read later, one
after the other, in the order of the folder or archive.
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
      split: where it belongs.
      label: index into the plan's class names.
      name: of its file.
      read: its encoded bytes; only until the next record is asked for.
    """

    split: str
    label: int
    name: str
    read: Callable[[], bytes]


class Plan(NamedTuple):
    """A data set found in a source.

    Attributes:
      layout: what was found, in words.
      class_names: name of every label, over all splits.
      splits: names, in order.
      records: all images of all splits, mixed, always in the same order.
      listed: number of images by split where lists tell it before the images are read.
      notes: lines about what of the source is passed over.
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
      missing: after all records were asked for, the listed images that the source does not hold.

    Args:
      source: folder or archive.
      places: split and label by the image's key.
      key: of a file, by its name in the source; ``None`` if it is none of the set's images.
      enter: which archives to enter.
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
      UserError: if it is no text.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        if b"\0" in data:
            raise UserError(f"{name}: not a text file") from None
        return data.decode("latin-1")


def rows(data: bytes, name: str, columns: int, header: int = 0) -> list[list[str]]:
    """The rows of a list with columns set apart by blanks; the last column may hold blanks.

    Args:
      data: content.
      name: of the file, for messages.
      columns: how many a row must have.
      header: lines to pass over.

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
    """A number of a list.

    Raises:
      UserError: if it is none.
    """
    try:
        return int(value)
    except ValueError:
        raise UserError(f"{name}: {value[:50]!r} stands where a number should") from None


def find(contents: Mapping[str, bytes], base: str) -> str | None:
    """The name of the file with a base name that lies least deep, ``None`` if there is none."""
    found = [name for name in contents if name.rsplit("/", 1)[-1] == base]
    return min(found, key=lambda name: (name.count("/"), name), default=None)


def parent(name: str) -> str:
    """The folder of a file with a trailing ``/``, empty at the top."""
    return name.rpartition("/")[0] + "/" if "/" in name else ""


def not_found(source: Path, title: str, wanted: str) -> UserError:
    """The error for a source without any known layout of a data set."""
    return UserError(f"{source}: no known layout of {title}; expected {wanted}")


def folder(source: Path) -> Plan:
    """Class folders: ``train/<class>/`` and ``test/<class>/`` (or ``val``; or ``query`` and ``gallery``); or
    ``<class>/`` alone, stored as one split that is divided by class when it is read. A folder or an archive."""
    passed = folders.Passed()
    names = []
    for entry in archives.walk(source, passed=passed):
        if is_image(entry.name):
            names.append(entry.name)
        else:
            passed.add(folders.OTHER, entry.name)
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
    # tfds writes the names to a text file, one a line.
    return Plan(shape, list(map(files.shown, classes)), order, records, listed, passed.lines(source))


def by_pattern(pattern: str) -> Callable[[str], bool]:
    """Whether the base name of a path fits a pattern as a whole, without regard to case."""
    known = re.compile(pattern, re.IGNORECASE)
    return lambda name: known.fullmatch(name.rsplit("/", 1)[-1]) is not None
