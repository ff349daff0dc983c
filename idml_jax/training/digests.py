"""Digests of weights and images, by which stored results are recognised as theirs."""

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from idml_jax.data.sources import Source, key_of, movable_names
from idml_jax.models import naming


def weights_digest(variables: Mapping[str, Any]) -> str:
    """Digest of a network's weights: 16 hexadecimal digits that change with any weight.

    Args:
      variables: ``params`` (only ``trunk`` and ``heads`` count) and ``batch_stats``.
    """
    found = hashlib.sha256()
    flat = naming.flatten(variables)
    for name in sorted(n for n in flat if n.startswith(("params/trunk/", "params/heads/", "batch_stats/"))):
        value = np.ascontiguousarray(flat[name])
        found.update(f"{name} {value.shape} {value.dtype}\n".encode())
        found.update(value.tobytes())
    return found.hexdigest()[:16]


FileState = tuple[int, int]  # size in bytes and time of change in ns


def file_state(path: str | os.PathLike) -> FileState | None:
    """Size and time of change of a file, by which a changed one is noticed without reading it.

    Returns:
      ``None`` if there is no file, or one that cannot be read, as reading it will say.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    return status.st_size, status.st_mtime_ns


def images_digest(source: Source) -> str:
    """Digest of the images of a source: their names in order and, of files, size and time of change.

    Paths are relative to the common folder, so the data may be moved as a whole. Images that are not files, such as
    records of prepared data, are recognised by their names alone.
    """
    keys = [key_of(source, index) for index in range(len(source))]
    found = hashlib.sha256()
    for key, name in zip(keys, movable_names(keys), strict=True):
        found.update(name.encode("utf-8", "surrogateescape") + b"\0")
        state = file_state(key)
        if state is not None:
            found.update(f"{state[0]} {state[1]}\n".encode())
    return found.hexdigest()[:16]
