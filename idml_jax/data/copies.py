"""Images that stand in two parts of a data set, such as ``test/`` made by copying ``train/``."""

import os
from itertools import islice

import numpy as np

from idml_jax.data.files import read_file, shown
from idml_jax.data.sources import Source, key_of
from idml_jax.errors import UserError

_LOOKED_AT = 1000  # images of the part that should be new
_READ = 50  # pairs whose bytes are compared


def copies_line(new: Source, known: Source, what: str, other: str) -> str:
    """Looks for copied files: the same place below the folder of the part, the same size and content.

    At most 1,000 images are looked at and 50 pairs are read, whatever the size of the set, so this finds parts that
    were copied as a whole; single copies are found by ``python -m idml_jax.audit``. The same path is no copy, since
    several rows of a table may be objects in one file.

    Args:
      new: images that should not be among the known ones.
      known: images to compare with.
      what: what the new images are, in plural.
      other: what the known images are.

    Returns:
      A line that names the first pair, or an empty one.
    """
    if not (len(new) and len(known)) or _size(key_of(new, 0)) is None:
        return ""  # records of prepared data are no files
    some, theirs = _some(new), _folder(_some(known))
    mine = _folder(some)
    pairs = ((path, theirs + path[len(mine) :]) for path in some)
    same_size = (
        pair for pair in pairs if pair[0] != pair[1] and (size := _size(pair[1])) is not None and size == _size(pair[0])
    )
    found = [pair for pair in islice(same_size, _READ) if _same(*pair)]
    if found:  # the files are there; the known images need not be all of their folder
        keys = {key_of(known, index) for index in range(len(known))}
        found = [pair for pair in found if pair[1] in keys]
    if not found:
        return ""
    one, other_one = found[0]
    return (
        f"{what} are copies of {other} ({len(found)} found among those looked at; the first: {shown(one)} and "
        f"{shown(other_one)}), so recall comes out too high"
    )


def is_copy(one: str, other: str) -> bool:
    """Whether two files have the same content; false where one of them is none or cannot be read."""
    size = _size(one)
    return size is not None and size == _size(other) and _same(one, other)


def _some(source: Source) -> list[str]:
    """The paths of at most 1,000 images, spread over the source."""
    places = np.unique(np.linspace(0, len(source) - 1, min(len(source), _LOOKED_AT)).astype(int))
    return [key_of(source, int(place)) for place in places]


def _folder(paths: list[str]) -> str:
    """The folder that all are in."""
    try:
        return os.path.commonpath(paths)
    except ValueError:  # some relative, some not
        return ""


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):  # not a file; ValueError: a name that no file can have
        return None


def _same(one: str, other: str) -> bool:
    try:
        return read_file(one) == read_file(other)
    except (OSError, UserError):  # said where the image is used
        return False
