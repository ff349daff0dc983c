"""The splits of a table of images, for training."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool

from idml_jax.data import files
from idml_jax.data.lists import Listing, read_listing, source_of
from idml_jax.data.sources import FolderSource
from idml_jax.errors import UserError

_OPTION = "config.data.root"


def table_splits(root: str, image_root: str = "", warn: Callable[[str], None] = print) -> dict[str, FolderSource]:
    """Finds the images that a table lists, by split.

    Without a column ``split`` all images are one set, unless ``is_query`` and ``is_gallery`` mark the test images.
    Where they do, the marked rows among the test images are the queries and the gallery.

    Args:
      root: the table, see ``lists.read_listing``.
      image_root: folder that relative paths start from; empty: that of the table.
      warn: receives one line per kind of thing that is left out.

    Returns:
      ``images``, or ``train`` with ``test``, or with ``query`` and ``gallery``, and ``validation`` if there are both
      validation and test images. Query and gallery share their labels.

    Raises:
      UserError: naming the table and what is wrong with it.
    """
    listing = read_listing(files.expand(root), image_root, _OPTION, warn)
    shown = files.shown(files.expand(root))
    if not any(listing.labels):
        raise UserError(
            f"{shown}: has no column label (or labels); training needs the class of every image ({_OPTION})"
        )
    split = _split_of_rows(listing, shown, warn)
    if set(split) == {"images"}:
        if listing.several:
            raise UserError(
                f"{shown}: has images with several labels, which are not divided by class; add a column split with "
                f"train and test ({_OPTION})"
            )
        return {"images": source_of(listing)}
    parts = {name: np.flatnonzero(split == name) for name in ("train", "test", "validation")}
    if not len(parts["test"]):
        parts["test"], parts["validation"] = parts["validation"], parts["test"]
    for name in ("train", "test"):
        if not len(parts[name]):
            raise UserError(f"{shown}: has no rows of the split {name} ({_OPTION})")
    _check_shared(listing, parts, warn)
    found = {"train": source_of(listing, parts["train"])}
    if len(parts["validation"]):
        found["validation"] = source_of(listing, parts["validation"])
    marked = _marked(listing, shown)
    if marked is None:
        return found | {"test": source_of(listing, parts["test"])}
    return found | _query_and_gallery(listing, parts["test"], marked, shown, warn)


def _check_shared(listing: Listing, parts: dict[str, np.ndarray], warn: Callable[[str], None]) -> None:
    """Counts test and validation images that are training images, too."""
    pictures, table = listing.pictures, listing.table
    if not pictures:
        return
    trained = {pictures[row]: row for row in reversed(parts["train"].tolist())}
    for name in ("test", "validation"):
        shared = [row for row in parts[name].tolist() if pictures[row] in trained]
        if shared:
            first, again = trained[pictures[shared[0]]], shared[0]
            warn(
                f"{files.shown(table.where)}: {len(shared):,} of {len(parts[name]):,} {name} images are training "
                f"images, too, the first {files.shown(listing.paths[again])} ({table.unit}s {table.lines[first]:,} and "
                f"{table.lines[again]:,}); metrics of such images are not those of new ones"
            )


def _split_of_rows(listing: Listing, shown: str, warn: Callable[[str], None]) -> np.ndarray:
    """Train, test, validation, extra or images for each row."""
    marked = _marked(listing, shown)
    if listing.splits is None:
        if marked is None:
            return np.full(len(listing.paths), "images")
        return np.where(marked[0] | marked[1], "test", "train")
    split = np.asarray(listing.splits)
    if listing.is_query is not None and np.isin(split, ["query", "gallery"]).any():
        raise UserError(f"{shown}: has splits query and gallery and columns is_query and is_gallery; keep one of them")
    extra = int((split == "extra").sum())
    if extra:
        warn(f"{shown}: skipped {extra:,} rows of splits that are not used in training")
    return np.where(np.isin(split, ["query", "gallery"]), "test", split)


def _marked(listing: Listing, shown: str) -> tuple[Bool[np.ndarray, "n"], Bool[np.ndarray, "n"]] | None:
    """Which rows are queries and which are in the gallery, by their columns."""
    flags = listing.is_query, listing.is_gallery
    if flags[0] is None and flags[1] is None:
        split = np.asarray(listing.splits or [])
        named = split == "query", split == "gallery"
        return named if named[0].any() or named[1].any() else None
    if flags[0] is None or flags[1] is None:
        there, missing = ("is_gallery", "is_query") if flags[0] is None else ("is_query", "is_gallery")
        raise UserError(f"{shown}: has a column {there}, but no {missing} ({_OPTION})")
    return flags[0], flags[1]


def _query_and_gallery(
    listing: Listing,
    rows: np.ndarray,
    marked: tuple[np.ndarray, np.ndarray],
    shown: str,
    warn: Callable[[str], None],
) -> dict[str, FolderSource]:
    query, gallery = rows[marked[0][rows]], rows[marked[1][rows]]
    for name, some in (("is_query", query), ("is_gallery", gallery)):
        if not len(some):
            raise UserError(f"{shown}: no row of the test images has {name} = true ({_OPTION})")
    neither = len(rows) - int((marked[0][rows] | marked[1][rows]).sum())
    if neither:
        warn(f"{shown}: skipped {neither:,} test images that are neither queries nor in the gallery")
    classes = sorted({name for row in (*query, *gallery) for name in listing.labels[row]})
    return {"query": source_of(listing, query, classes), "gallery": source_of(listing, gallery, classes)}
