"""Searches a file or a gallery for queries, and gives the images that matter as an index in memory.

A gallery that is larger than the allowed memory is searched block by block, or approximately by faiss. What is kept are
the images near some query: at least the 20 nearest of each, on which the vote and most scores of an answer depend. So
the answers are those of a search of the whole gallery in memory.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from idml_jax.errors import UserError, warn
from idml_jax.inference import approximate, exclude
from idml_jax.inference.approximate import Approximate
from idml_jax.inference.choices import MEMORY
from idml_jax.inference.exclude import Rule
from idml_jax.inference.gallery import Gallery, is_gallery, read_gallery
from idml_jax.inference.held_out import Files, warn_of_shared
from idml_jax.inference.index import Index, check_comparable, read
from idml_jax.inference.model import Trained
from idml_jax.inference.own import own_rows, own_rows_in
from idml_jax.inference.search import open_index
from idml_jax.inference.sureness import Confidence, Wanted, distractors_of, fit, told_of
from idml_jax.inference.trained_on import warn_of_training_images
from idml_jax.metrics import class_means
from idml_jax.metrics.blocks import neighbours_in_blocks
from idml_jax.metrics.embedded import Embedded, rows_of

VOTERS = 20  # neighbours that scores and votes use
# Scores that need more of the gallery than the images near the queries.
NEED_ALL = ("class_margin", "answer_density", *class_means.SCORES)


class Searched(NamedTuple):
    """What is searched.

    Attributes:
      head: the whole index; of a gallery that is not read whole its first row, for its settings.
      gallery: the gallery, if it is not read whole.
      ann: index of faiss, if the search is approximate.
      rules: images to leave out.
    """

    head: Index
    gallery: Gallery | None = None
    ann: Approximate | None = None
    rules: tuple[Rule, ...] = ()


class Near(NamedTuple):
    """The images of an index that matter for some queries.

    Attributes:
      images: these images.
      own: ``[n]`` row of ``images`` with each query itself, -1: none; ``None`` if no query is in it.
      whole: all images that were searched; of a gallery that is not read whole only their labels.
      rows: row of ``whole`` of each row of ``images``.
      whole_own: as ``own``, for ``whole``.
    """

    images: Index
    own: Int[np.ndarray, "n"] | None
    whole: Index
    rows: Int[np.ndarray, "m"]
    whole_own: Int[np.ndarray, "n"] | None


def open_searched(
    where: str, rules: tuple[Rule, ...] = (), *, memory: int = MEMORY, ann: bool = False,
    say: Callable[[str], None] = print,
) -> Searched:  # fmt: skip
    """Opens a file of embeddings or the folder of a gallery.

    Args:
      where: the file or folder.
      rules: images to leave out.
      memory: MiB of vectors up to which a gallery is read whole.
      ann: search approximately, by faiss.
      say: receives lines about faiss.

    Raises:
      UserError: if it cannot be read, or ``ann`` is asked of a file.
    """
    if not is_gallery(where):
        if ann:
            raise UserError(f"--ann: {where} is not a gallery; embed --shard=1/1 writes one")
        return Searched(read(where), rules=rules)
    gallery = read_gallery(where)
    if not ann and gallery.megabytes <= memory:
        return Searched(gallery.index(), rules=rules)
    found = approximate.open_or_build(gallery, say) if ann else None
    return Searched(gallery.index(np.arange(1)), gallery, found, rules)


def near(
    searched: Searched,
    queries: Index,
    k: int,
    *,
    keep_same: bool = False,
    say: Callable[[str], None] = print,
    warn: Callable[[str], None] = warn,
) -> Near:
    """The images of an index that matter for some queries.

    Args:
      searched: what is searched.
      queries: the queries.
      k: number of neighbours that are wanted.
      keep_same: let an image find itself.
      say: receives a line for each rule that leaves out images.
      warn: receives a line about each list of them with lines that are for no image.

    Raises:
      UserError: if nothing is left to find, or a rule is for no image.
    """
    if searched.gallery is None:
        index = searched.head
        own = None if keep_same else own_rows(queries, index)
        if searched.rules:
            index, own = exclude.kept(index, exclude.without(index, searched.rules, say, warn), own)
        return Near(index, own, index, np.arange(len(index)), own)
    gallery = searched.gallery
    gone, own = _left_out(gallery, searched.rules, say, warn), None if keep_same else own_rows_in(queries, gallery)
    if own is not None and gone is not None:
        own = np.where((own >= 0) & gone[np.maximum(own, 0)], -1, own)
    remaining = len(gallery) if gone is None else int((~gone).sum())
    depth = min(max(k, VOTERS), remaining - (own is not None))
    if depth < 1:
        raise UserError(f"{gallery.folder}: holds nothing but the query")
    vectors = queries.embedded.semantic
    if searched.ann is None:
        found = neighbours_in_blocks(vectors, gallery.blocks(gone), depth, own=own)
    else:
        found = approximate.search(searched.ann, gallery, vectors, depth, own=own, left_out=gone)
    rows = np.unique(found.index)
    # Rows of the gallery to those of what is kept of it.
    place = None if gone is None else np.cumsum(~gone) - 1
    number = lambda x: x if place is None else place[x]
    labels = np.zeros(len(gallery), np.int32) if gallery.labels is None else gallery.labels
    sets = _label_sets(gallery) if "label_sets" in gallery.columns else None
    embedded = Embedded(np.zeros((len(gallery), 0), np.float32), labels, sets=sets)
    embedded = embedded if gone is None else rows_of(embedded, ~gone)
    whole = Index(embedded, np.zeros(remaining, "U1"), gallery.class_names, gallery.about)
    mine = None if own is None else np.where(own >= 0, number(np.maximum(own, 0)), -1)
    return Near(gallery.index(rows), _in(own, rows), whole, number(rows), mine)


def _in(own: Int[np.ndarray, "n"] | None, rows: Int[np.ndarray, "m"]) -> Int[np.ndarray, "n"] | None:
    """The place of each query's own row among some rows; -1 where it is not there."""
    if own is None:
        return None
    place = np.minimum(np.searchsorted(rows, own), len(rows) - 1)
    found = np.where(rows[place] == own, place, -1)
    return found if (found >= 0).any() else None


def _left_out(
    gallery: Gallery, rules: tuple[Rule, ...], say: Callable[[str], None], warn: Callable[[str], None]
) -> Bool[np.ndarray, "n"] | None:
    if not rules:
        return None
    labels = gallery.labels if any(rule.class_name is not None for rule in rules) else None
    if labels is not None and "label_sets" in gallery.columns:
        labels = _label_sets(gallery)
    return exclude.left_out(rules, gallery.names(), labels, gallery.class_names, len(gallery), say, warn)


def _label_sets(gallery: Gallery) -> Int[np.ndarray, "n l"]:
    """All labels of every row, filled up with -1."""
    return np.concatenate([part["label_sets"] for _, part in gallery.batches(("label_sets",))])


def confidence_near(
    files: Files,
    searched: Searched,
    named: str,
    model: Callable[[], Trained],
    names: Collection[str],
    wanted: Wanted,
    queries: Index | None = None,
) -> Confidence:
    """As ``sureness.confidence_for``, for a gallery that is not read whole.

    The held-out images search each other and the gallery. Scores that need all of the gallery are left out.

    Raises:
      UserError: where ``confidence_for`` does; if a precision is wanted without held-out images; or if held-out classes
        are in the gallery, since taking those out of it needs all of it.
    """
    held_out = files.held_out
    if not held_out:
        if wanted.some:
            raise UserError(
                f"{named}: is not read whole, so the confidence cannot be fitted on itself; give --held_out, or a "
                "larger --memory without --ann"
            )
        return Confidence(None, "how sure answers are is unknown: the gallery is not read whole; give --held_out")
    others = open_index(held_out, "--held_out", model)
    check_comparable(others, searched.head, held_out, named)
    if others.class_names is None or len(np.unique(others.embedded.labels)) < 2:
        raise UserError(f"{held_out}: the held-out images need at least 2 known classes")
    here = {others.class_names[int(label)] for label in np.unique(others.embedded.labels)}
    if shared := sorted(here & set(searched.head.class_names or ())):
        raise UserError(
            f"{held_out}: {len(shared):,} of its classes are in {named}, the first {shared[0]}; a gallery that is "
            "not read whole needs held-out classes that it lacks; or give a larger --memory without --ann"
        )
    warn_of_training_images(others, held_out)
    warn_of_shared(others, held_out, queries, "queries")
    quiet = lambda line: None  # the search of the queries says it
    beside = near(searched, others, VOTERS + 1, say=quiet, warn=quiet).images
    distractors = distractors_of(files, searched.head, named, model)
    fitted = fit(others, beside, [name for name in names if name not in NEED_ALL], wanted, distractors)
    return Confidence(fitted, f"how sure: from {len(fitted.correct):,} queries of {held_out}{told_of(files)}")
