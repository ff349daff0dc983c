"""Finds the images of one set of embeddings in another, so that a query does not find itself."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from idml_jax.data.files import shown
from idml_jax.data.tables import row_of_a_table
from idml_jax.errors import warn
from idml_jax.inference.gallery import Gallery
from idml_jax.inference.index import Index, texts

_SAME = 0.03  # distance of two vectors of one image, relative to their length: other devices, other batches
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

    A query's own image is the same row of the same file of embeddings, the image with the same existing absolute path
    (of a table that holds its images: the same row of it), or the same image of the same split of the same run. Equal
    relative names are not enough, since ``1.jpg`` is in many folders. If the index's image is no longer at its path, it
    has moved: then it is the existing query of the same file name and about the same vector.
    """
    if _same_file(queries.path, index.path):
        return _same_rows(queries, index)
    if not (queries.named and index.named):
        return None
    place = place_of(queries.about, index.about)
    theirs = keys_of(index.files.tolist(), index.boxes, place)
    known = {key: row for row, key in enumerate(theirs) if key is not None}
    mine = keys_of(queries.files.tolist(), queries.boxes, place)
    own = np.asarray([-1 if key is None else known.get(key, -1) for key in mine])
    _note_listed_twice(theirs, known, mine)
    moved = _Moved(queries, own, same_split(queries.about, index.about))
    moved.note(index.files.tolist(), index.boxes, theirs)
    own = moved.found([(0, {"semantic": index.semantic})])
    return own if (own >= 0).any() else None


def _note_listed_twice(theirs: Sequence[Key | None], known: Mapping[Key, int], mine: Iterable[Key | None]) -> None:
    """Warns of queries that stand in the index more than once: only the last of their rows is left out."""
    if sum(key is not None for key in theirs) == len(known):
        return
    count = Counter(key for key in theirs if key is not None)
    twice = [key for key in mine if key is not None and count[key] > 1]
    if twice:
        warn(
            f"{len(twice):,} queries stand in the index more than once, the first {twice[0][0]}; such a query finds "
            "itself in its other row: embed each image once"
        )


class _Moved:
    """Finds the images of an index that have moved since they were embedded: by file name and box, and by the vector.

    Args:
      queries: the queries.
      own: own rows that are known already; -1: none.
      same_split: whether both are the same split of the same run, whose images may be in two places.
    """

    def __init__(self, queries: Index, own: Int[np.ndarray, "n"], same_split: bool):
        self._queries, self._own, self._same_split = queries, own.copy(), same_split
        self._asked: dict[Key, list[int]] = {}
        self._rows: dict[Key, list[int]] = {}
        names = queries.files.tolist()
        for query, key in enumerate(keys_of(names, queries.boxes, os.path.basename)):
            if key is not None and own[query] < 0 and os.path.isabs(names[query]) and os.path.exists(names[query]):
                self._asked.setdefault(key, []).append(query)

    def __bool__(self) -> bool:
        return bool(self._asked)

    def note(
        self,
        names: Sequence[str],
        boxes: Int[np.ndarray, "n 4"] | None,
        places: Sequence[Key | None],
        first: int = 0,
    ) -> None:
        """Notes the rows of the index, from ``first`` on, that no longer exist and whose names are asked for."""
        if not self._asked:
            return
        base = lambda name: os.path.basename(name) if os.path.isabs(name) else None
        for row, (place, key) in enumerate(zip(places, keys_of(names, boxes, base), strict=True), first):
            if key in self._asked and (place is None or self._same_split):
                assert key is not None
                self._rows.setdefault(key, []).append(row)

    def found(self, batches: Iterable[tuple[int, Mapping[str, np.ndarray]]]) -> Int[np.ndarray, "n"]:
        """The own rows with those of the images that have moved: the nearest of a name, if its vector is the same."""
        if not self._rows:
            return self._own
        nearest = np.full(len(self._own), _SAME)
        rows = {key: np.asarray(some) for key, some in self._rows.items()}
        for first, part in batches:
            vectors = part["semantic"]
            for key, some in rows.items():
                here = some[np.searchsorted(some, first) : np.searchsorted(some, first + len(vectors))]
                for query in self._asked[key] if len(here) else ():
                    mine = self._queries.semantic[query]
                    distance = np.linalg.norm(vectors[here - first] - mine, axis=1) / max(np.linalg.norm(mine), 1e-30)
                    if distance.min() < nearest[query]:
                        nearest[query], self._own[query] = distance.min(), here[distance.argmin()]
        again = np.flatnonzero(nearest < _SAME)
        if len(again) and not self._same_split:
            warn(
                f"{len(again):,} images have the names and vectors of images of the index that are no longer at their "
                f"paths, the first {shown(self._queries.files[again[0]])}: taken as the same images, moved"
            )
        return self._own


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
    for first, part in gallery.batches(("files", "box")) if known else ():
        for row, key in enumerate(keys_of(texts(part["files"]), part.get("box"), place), first):
            if key is not None and key in known:
                own[known[key]] = row
    moved = _Moved(queries, own, same_split(queries.about, gallery.about))
    for first, part in gallery.batches(("files", "box")) if moved else ():
        names, boxes = texts(part["files"]), part.get("box")
        moved.note(names, boxes, keys_of(names, boxes, place), first)
    own = moved.found(gallery.batches(("semantic",)))
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


def same_split(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Whether two sets of these origins are the same split of the same run."""
    origins = [(about.get("images"), about.get("weights", about.get("workdir"))) for about in (one, two)]
    return origins[0] == origins[1] and None not in origins[0] and str(origins[0][0]).startswith("split:")


def place_of(one: Mapping[str, Any], two: Mapping[str, Any]) -> Callable[[str], str | None]:
    """A function from a name to what identifies the image in two sets of these origins; ``None``: nothing does."""
    if same_split(one, two):
        return lambda name: name
    return existing_place


def existing_place(name: str) -> str | None:
    """The place of an image by its absolute path without links, or by its row of a table; ``None``: it has none."""
    if not os.path.isabs(name):
        return None
    if os.path.exists(name):
        return os.path.realpath(name)
    stored = row_of_a_table(name)
    return os.path.realpath(stored[0]) + stored[1] if stored and os.path.exists(stored[0]) else None
