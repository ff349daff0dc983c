"""Splits by class or by image, and checks that metric learning can use them."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from idml_jax.data.sources import Source, Subset, sets_of
from idml_jax.errors import UserError


def select_classes(source: Source, classes: Sequence[int] | Int[np.ndarray, "c"]) -> Subset:
    """The images of some labels of a source."""
    return Subset(source, np.flatnonzero(np.isin(source.labels, np.asarray(classes, np.int64))))


def split_by_class(source: Source, train_classes: float) -> tuple[Subset, Subset]:
    """Splits the classes, in the order of their names, into training and test, as in the benchmarks' protocol.

    Args:
      source: all images.
      train_classes: share of the classes for training if below 1, otherwise their number.

    Returns:
      Training and test images.

    Raises:
      UserError: if one side would be left with fewer than two classes.
    """
    total = len(source.class_names)
    count = round(total * train_classes) if train_classes < 1 else int(train_classes)
    if count < 2 or total - count < 2:
        raise UserError(
            f"config.data.train_classes = {train_classes} splits {total} classes into {count} for training and "
            f"{total - count} for testing; both sides need at least 2"
        )
    return select_classes(source, range(count)), select_classes(source, range(count, total))


def hold_out_classes(source: Source, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Splits classes at random into training and validation, for choosing settings without using test classes.

    Args:
      source: training images.
      fraction: share of the classes to hold out.
      seed: seed of the choice.

    Returns:
      Training and validation images.

    Raises:
      UserError: if one side would be left with fewer than two classes.
    """
    total = len(source.class_names)
    count = round(total * fraction)
    if count < 2 or total - count < 2:
        raise UserError(
            f"config.data.validation_classes = {fraction} holds out {count} of {total} training classes; both sides "
            "need at least 2"
        )
    order = np.random.Generator(np.random.PCG64(seed)).permutation(total)
    return select_classes(source, order[count:]), select_classes(source, order[:count])


def hold_out_images(source: Source, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Splits the images of every class at random, for classification, where held-out images have known classes.

    Args:
      source: training images.
      fraction: share of each class's images to hold out, at least one image.
      seed: seed of the choice.

    Returns:
      Training and held-out images, with the same labels.

    Raises:
      UserError: if a class would be left without training images.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    held_out = []
    order = np.argsort(source.labels, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(source.labels[order])) + 1):
        label = source.labels[members[0]]
        count = max(round(len(members) * fraction), 1)
        if count >= len(members):
            raise UserError(
                f"holding out {fraction} of the {len(members)} images of class {source.class_names[label]} leaves none "
                "to train on"
            )
        held_out.append(rng.permutation(members)[:count])
    chosen, classes = np.sort(np.concatenate(held_out)), range(len(source.class_names))
    return Subset(source, np.setdiff1d(np.arange(len(source)), chosen), classes), Subset(source, chosen, classes)


def check_classes(source: Source, what: str, on_small_class: str, warn: Callable[[str], None]) -> Source:
    """Checks that there are at least two classes, each with at least two images.

    Args:
      source: images.
      what: description of the images, for messages.
      on_small_class: treatment of classes with one image, which can neither form a positive pair nor be retrieved:
        ``refuse``, ``skip`` or ``keep``.
      warn: receives one line about skipped or kept classes.

    Returns:
      The source, without its small classes under ``skip``.

    Raises:
      UserError: if a class is too small under ``refuse``, or there are fewer than two classes.
    """
    if on_small_class not in ("refuse", "skip", "keep"):
        raise UserError(f"config.data.on_small_class = {on_small_class!r}; known: refuse, skip, keep")
    sets = sets_of(source)
    rows = source.labels[:, None] if sets is None else sets
    counts = np.bincount(rows[rows >= 0], minlength=len(source.class_names))
    small = np.flatnonzero(counts < 2)
    if len(source.class_names) >= 2 and len(small):
        first = source.name(int(np.flatnonzero((rows == small[0]).any(axis=1))[0]))
        text = f"{what}: {len(small)} of {len(counts)} classes have a single image, the first {first}"
        if on_small_class == "refuse":
            raise UserError(
                f"{text}; every class needs two, or set config.data.on_small_class to skip (leave them out) or keep"
            )
        if on_small_class == "skip" and sets is not None:
            raise UserError(
                f"{text}; images with several labels are not left out by class: set config.data.on_small_class=keep"
            )
        warn(f"{text}; {'left out' if on_small_class == 'skip' else 'kept'}")
        if on_small_class == "skip":
            source = select_classes(source, np.flatnonzero(counts >= 2))
    if len(source.class_names) < 2:
        names = f" ({source.class_names[0]})" if len(source.class_names) else ""
        raise UserError(f"{what}: {len(source.class_names)} class{names}; metric learning needs at least 2")
    return source
