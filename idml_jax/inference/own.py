"""Finds the images of one set of embeddings in another, so that a query does not find itself."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from idml_jax.inference.gallery import Gallery
from idml_jax.inference.index import Index, texts

Key = tuple[str, tuple[int, ...]]  # a picture, and the part of it that is the image; empty: all of it


def _same_file(one: Path | None, two: Path | None) -> bool:
    """Whether two files of embeddings are the same file or have the same content."""
    if one is None or two is None:
        return False
    if os.path.samefile(one, two):
        return True
    if not (one.is_file() and two.is_file()):  # galleries
        return False
    return one.stat().st_size == two.stat().st_size and _file_digest(one) == _file_digest(two)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _same_rows(queries: Index, index: Index) -> Int[np.ndarray, "n"] | None:
    """Row of the index that is the same row of their file as each query."""
    if queries.rows is None and index.rows is None:
        return np.arange(len(index.files))
    sides = [np.arange(len(side)) if side.rows is None else side.rows for side in (queries, index)]
    known = {row: place for place, row in enumerate(sides[1].tolist())}
    own = np.asarray([known.get(row, -1) for row in sides[0].tolist()])
    return own if (own >= 0).any() else None


def own_rows(queries: Index, index: Index) -> Int[np.ndarray, "n"] | None:
    """Row of the index with each query's own image, -1 if there is none; ``None`` if no query is in the index.

    A query's own image is the same row of the same file of embeddings, the image with the same existing absolute path,
    or the same image of the same split of the same run. Equal relative names are not enough, since ``1.jpg`` is in many
    folders.
    """
    if _same_file(queries.path, index.path):
        return _same_rows(queries, index)
    if not (queries.named and index.named):
        return None
    place = place_of(queries.about, index.about)
    known = {key: row for row, key in enumerate(keys_of(index.files.tolist(), index.boxes, place)) if key is not None}
    mine = keys_of(queries.files.tolist(), queries.boxes, place)
    own = np.asarray([-1 if key is None else known.get(key, -1) for key in mine])
    return own if (own >= 0).any() else None


def own_rows_in(queries: Index, gallery: Gallery) -> Int[np.ndarray, "n"] | None:
    """As ``own_rows``, for a gallery that is not read whole: the names of one batch are in memory at a time."""
    if _same_file(queries.path, gallery.folder):
        return np.arange(len(gallery)) if queries.rows is None else queries.rows
    if not queries.named:
        return None
    place = place_of(queries.about, gallery.about)
    known: dict[Key, list[int]] = {}
    for row, key in enumerate(keys_of(queries.files.tolist(), queries.boxes, place)):
        if key is not None:
            known.setdefault(key, []).append(row)
    own = np.full(len(queries), -1)
    if known:
        for first, part in gallery.batches(("files", "box")):
            for row, key in enumerate(keys_of(texts(part["files"]), part.get("box"), place), first):
                if key is not None and key in known:
                    own[known[key]] = row
    return own if (own >= 0).any() else None


def keys_of(
    names: Sequence[str], boxes: Int[np.ndarray, "n 4"] | None, place: Callable[[str], str | None] = lambda name: name
) -> list[Key | None]:
    """What identifies each image: the place of its picture, and its box; ``None``: nothing does."""
    parts = np.zeros((len(names), 0), int) if boxes is None else boxes
    places = [place(name) for name in names]
    return [
        None if found is None else (found, tuple(box) if any(box) else ())
        for found, box in zip(places, parts.tolist(), strict=True)
    ]


def place_of(one: Mapping[str, Any], two: Mapping[str, Any]) -> Callable[[str], str | None]:
    """A function from a name to what identifies the image in two sets of these origins; ``None``: nothing does."""
    origins = [(about.get("images"), about.get("weights", about.get("workdir"))) for about in (one, two)]
    if origins[0] == origins[1] and None not in origins[0] and str(origins[0][0]).startswith("split:"):
        return lambda name: name
    return lambda name: os.path.realpath(name) if os.path.isabs(name) and os.path.exists(name) else None
