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
    """Looks for copied files: the same class folder, name, size and content.

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
    places = np.unique(np.linspace(0, len(new) - 1, min(len(new), _LOOKED_AT)).astype(int))
    wanted = {_end(path): path for path in (key_of(new, int(place)) for place in places)}
    keys = (key_of(known, index) for index in range(len(known)))
    candidates = ((wanted[end], path) for path in keys if wanted.get(end := _end(path), path) != path)
    same_size = (pair for pair in candidates if (size := _size(pair[0])) is not None and size == _size(pair[1]))
    found = [pair for pair in islice(same_size, _READ) if _same(*pair)]
    if not found:
        return ""
    mine, theirs = found[0]
    return (
        f"{what} are copies of {other} ({len(found)} found among those looked at; the first: {shown(mine)} and "
        f"{shown(theirs)}), so recall comes out too high"
    )


def _end(path: str) -> str:
    """Class folder and name."""
    return "/".join(path.replace(os.sep, "/").rsplit("/", 2)[-2:])


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
