"""The gallery in which held-out images play queries, as like the one in use as can be."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from idml_jax.errors import UserError, warn
from idml_jax.inference.index import Index, Numbered, sets_in_common
from idml_jax.inference.own import own_rows
from idml_jax.metrics.calibration import HeldOut
from idml_jax.metrics.embedded import joined, rows_of


class Files(NamedTuple):
    """Where the images are that the confidence is fitted on.

    Attributes:
      held_out: a file of embeddings, or images in class folders; empty: the index itself.
      distractors: the same, of other classes that the held-out images search, too; empty: none.
    """

    held_out: str = ""
    distractors: str = ""


def held_out_beside(held_out: Index, index: Index, distractors: Index | None = None) -> HeldOut:
    """The held-out images as queries that search each other, the images of an index, and distractors.

    So the confidence is fitted in a gallery that is at least as large and as dense as the one in use. Distractors are
    images of the same kind as the held-out ones, best the training images: without them the classes that held-out
    images are most easily confused with may be missing, and answers look surer than they are. Classes are the same if
    they have the same name; classes that have only numbers are taken as different ones. Images of the index that are
    themselves held out count once, and so do distractors that are held out or in the index.

    Args:
      held_out: embeddings with classes.
      index: embeddings that are searched.
      distractors: embeddings with classes.

    Raises:
      UserError: for distractors beside images with several classes.
    """
    queries, others = held_out.embedded, index.embedded
    kept = _not_in(index, held_out)
    if held_out is index or not kept.any():
        found = HeldOut(queries)
        return found if distractors is None else _with(found, (held_out, index, kept & False), distractors)
    mine, theirs = sets_in_common(held_out, index)
    if index.class_names is None:
        theirs = np.full(theirs.shape, -1)
    elif isinstance(index.class_names, Numbered) or isinstance(held_out.class_names, Numbered):
        theirs = np.where(theirs < 0, -1, theirs + int(mine.max()) + 1)
    several = queries.sets is not None or others.sets is not None
    with_labels = lambda side, sets: side._replace(labels=sets[:, 0], sets=sets if several else None)
    queries, others = with_labels(queries, mine), with_labels(others, theirs)
    found = HeldOut(queries, joined([queries, rows_of(others, kept)]), np.arange(len(queries.labels)))
    return found if distractors is None else _with(found, (held_out, index, kept), distractors)


def _not_in(one: Index, other: Index) -> Bool[np.ndarray, "n"]:
    """Whether each row of one index is no image of the other."""
    places, kept = own_rows(other, one), np.ones(len(one), bool)
    if places is not None:
        kept[places[places >= 0]] = False
    return kept


def warn_of_shared(held_out: Index, named: str, asked: Index | None, what: str) -> None:
    """Warns if a confidence is fitted on images that are asked or measured with it.

    Args:
      held_out: the images that it is fitted on.
      named: their name in the message.
      asked: the images that it serves; ``None``: unknown.
      what: what these are, for the message.
    """
    shared = 0 if asked is None else int((~_not_in(asked, held_out)).sum())
    if asked is not None and shared:
        warn(
            f"{named}: {shared:,} of the {len(asked):,} {what} {'is' if shared == 1 else 'are'} among these images, on "
            "which the confidence is fitted; so answers look surer than they are"
        )


def _with(found: HeldOut, sides: tuple[Index, Index, Bool[np.ndarray, "m"]], distractors: Index) -> HeldOut:
    """Adds distractors to the gallery of held-out images.

    Args:
      found: held-out images in their gallery.
      sides: the held-out images, the index, and which rows of it are in the gallery.
      distractors: embeddings with classes.
    """
    held_out, index, kept = sides
    gallery = found.queries if found.gallery is None else found.gallery
    if gallery.sets is not None or distractors.embedded.sets is not None:
        raise UserError("distractors: every image needs one class; here images have several")
    known: dict[str, int] = {}
    if not any(isinstance(side.class_names, Numbered) for side in (held_out, index, distractors)):
        known |= _numbers(held_out, gallery.labels[: len(held_out)])
        known |= _numbers(index, gallery.labels[len(held_out) :], kept)
    fresh, numbers = int(gallery.labels.max()) + 1, distractors.embedded.labels
    names = [str(number) for number in range(int(numbers.max()) + 1)]
    if distractors.class_names is not None and not isinstance(distractors.class_names, Numbered):
        names = list(distractors.class_names)
    place = np.asarray([known.get(name, fresh + number) for number, name in enumerate(names)])
    more = distractors.embedded._replace(labels=place[numbers])
    rows = _not_in(distractors, held_out) & _not_in(distractors, index)
    return found._replace(
        gallery=joined([gallery, rows_of(more, rows)]),
        own=np.arange(len(found.queries.labels)),
    )


def _numbers(index: Index, labels: Int[np.ndarray, "k"], kept: Bool[np.ndarray, "n"] | None = None) -> dict[str, int]:
    """The label of each named class of the rows that are kept."""
    if index.class_names is None:
        return {}
    own = index.embedded.labels if kept is None else index.embedded.labels[kept]
    some, first = np.unique(own, return_index=True)
    return {index.class_names[int(one)]: int(labels[row]) for one, row in zip(some, first, strict=True)}
