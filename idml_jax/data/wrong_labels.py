"""Wrong training labels on purpose, whose truth is kept: a share of the images is moved to other classes."""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.data.images.transforms import ResizeCenterCrop
from idml_jax.data.pipeline import Reading
from idml_jax.data.sources import Relabelled, Source
from idml_jax.errors import UserError

KINDS = ("uniform", "confusable")
TRUE_LABEL, IS_WRONG = "true_label", "wrong_label"

# Classes among which a wrong label of the kind "confusable" is drawn, and what they are found from.
NEIGHBOURS = 5
_SIDE = 16
_IMAGES = 20
# Own images that every class keeps.
_OWN = 2
# Classes compared with all others at a time.
_BLOCK = 1024


def with_wrong_labels(
    source: Source, share: float, *, seed: int = 0, kind: Literal["uniform", "confusable"] = "uniform"
) -> Source:
    """Gives a share of the images the label of another class.

    The images are chosen at random over the whole source; every class keeps two images of its own, so that it still
    exists (a class of few images may therefore lose a smaller share). A wrong label is drawn from all other classes, or
    from the ``NEIGHBOURS`` most confusable ones: those with the nearest means of the plain pixels, see ``class_means``.

    Args:
      source: images with true labels.
      share: share of the images, in [0, 1); 0 returns the source itself.
      seed: seed of the choice and of the wrong labels. A larger share with the same seed adds wrong labels and keeps
        those of a smaller one.
      kind: where wrong labels come from.

    Returns:
      The source with wrong labels and with the fields ``true_label`` and ``wrong_label``.

    Raises:
      UserError: if so many images cannot be moved; naming an image that cannot be read.
    """
    if not share:
        return source
    count = round(len(source) * share)
    order = _movable(source.labels, np.random.default_rng((seed, 0)))
    if count > len(order):
        raise UserError(
            f"config.data.label_noise.share = {share} means {count:,} of {len(source):,} training images with a wrong "
            f"label; at most {len(order):,} can have one, since every class keeps {_OWN} of its own"
        )
    chosen = order[:count]
    labels = np.array(source.labels, np.int32)
    # A draw for every image, so that a larger share keeps the labels of a smaller one.
    draws = np.random.default_rng((seed, 1)).random(len(source))[chosen]
    candidates = _candidates(source, kind)
    own = labels[chosen]
    if candidates is None:
        others = len(source.class_names) - 1
        drawn = np.minimum((draws * others).astype(np.int32), others - 1)
        labels[chosen] = drawn + (drawn >= own)
    else:
        width = candidates.shape[1]
        labels[chosen] = candidates[own, np.minimum((draws * width).astype(np.int32), width - 1)]
    truth = np.asarray(source.labels, np.int32)
    fields = {**source.fields, TRUE_LABEL: truth, IS_WRONG: labels != truth}
    return Relabelled(source, labels, source.class_names, fields)


def _movable(labels: Int[np.ndarray, "n"], rng: np.random.Generator) -> Int[np.ndarray, "m"]:
    """All images in random order, without the last two of every class."""
    order = rng.permutation(len(labels))
    by_class = np.argsort(labels[order], kind="stable")
    sizes = np.bincount(labels)
    ends = np.repeat(np.cumsum(sizes), sizes)
    keeps = ends - np.arange(len(labels)) <= _OWN
    return order[np.sort(by_class[~keeps])]


def _candidates(source: Source, kind: str) -> Int[np.ndarray, "c k"] | None:
    """Classes that the wrong labels of each class are drawn from; ``None``: all others."""
    if kind == "uniform":
        return None
    means = class_means(source)
    squares, width = np.sum(means**2, axis=1), min(NEIGHBOURS, len(means) - 1)
    rows = []
    for start in range(0, len(means), _BLOCK):
        some = means[start : start + _BLOCK]
        distances = squares[None, :] - 2.0 * some @ means.T  # and the square of the row, the same for all columns
        distances[np.arange(len(some)), start + np.arange(len(some))] = np.inf
        rows.append(np.argsort(distances, axis=1, kind="stable")[:, :width])
    return np.concatenate(rows)


def class_means(source: Source) -> Float[np.ndarray, "c f"]:
    """The mean picture of every class: grey, 16 x 16 pixels, each image with mean 0 and length 1.

    A cheap stand-in for what a network confuses: it sees coarse shape and shading, not parts. At most 20 images of a
    class are read.
    """
    reading = Reading(ResizeCenterCrop(_SIDE, _SIDE), channels=1)
    means = np.zeros((len(source.class_names), _SIDE * _SIDE))
    order = np.argsort(source.labels, kind="stable")
    ends = np.cumsum(np.bincount(source.labels, minlength=len(means)))[:-1]
    for total, members in zip(means, np.split(order, ends), strict=True):
        members = members[:_IMAGES]
        for index in members.tolist():
            image = reading.load(source, index, 0, 0).astype(np.float64).ravel()
            image -= image.mean()
            total += image / max(float(np.linalg.norm(image)), 1e-9) / len(members)
    return means


def wrong_labels_of(source: Source) -> Bool[np.ndarray, "n"] | None:
    """Which images have a wrong label on purpose; ``None`` if labels are as found."""
    return source.fields.get(IS_WRONG)
