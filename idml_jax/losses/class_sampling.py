"""A random share of the classes as negatives, for softmax losses over very many classes (An et al., CVPR 2022).

Partial FC compares a batch with the proxies of its own classes and with a random share of the others, new in every
step: the matrix of images and proxies shrinks by that share. Here a drawn negative also stands for the negatives that
were not drawn (``stands_for``), so the expectation of each softmax's denominator is that of all classes.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

__all__ = ["ClassSample", "compared_classes", "sample_classes", "take_classes"]


class ClassSample(NamedTuple):
    """The classes that a batch is compared with.

    Attributes:
      classes: ``[m]`` their indices, without repetition.
      real: ``[m]`` false for rows of the table that are padding.
      stands_for: ``[m]`` number of classes that each stands for as a negative: 1 for the classes of the batch, the
        inverse of the probability to be drawn for the others.
      groups: number of groups of rows that were drawn from separately.
    """

    classes: Int[Array, "m"]
    real: Bool[Array, "m"]
    stands_for: Float[Array, "m"]
    groups: int


def sample_classes(
    key: PRNGKeyArray,
    labels: Int[Array, "n"],
    num_classes: int,
    share: float,
    *,
    rows: int | None = None,
    groups: int = 1,
) -> ClassSample:
    """Draws classes without replacement; those of the batch are always in.

    The number of classes is fixed by the shapes: one for each image, and ``share`` of the remaining ones. Where images
    share a class, more of the others are drawn.

    Args:
      key: random key, the same on every device.
      labels: ``[n]`` classes of the batch.
      num_classes: number of classes.
      share: share of the classes, in (0, 1].
      rows: number of rows of the table of proxies, of which the last may be padding; by default ``num_classes``.
      groups: number of groups of adjacent rows, one for each device that the table is split over. As many classes are
        drawn from each, so no proxy has to leave its device. Must divide the rows.

    Returns:
      The classes, group by group.

    Raises:
      ValueError: if the share is not in (0, 1], the groups do not divide the rows, or a label is not below the number
        of classes (traced labels are not checked).

    >>> drawn = sample_classes(jax.random.key(0), jnp.array([3, 3, 7]), num_classes=10, share=0.4)
    >>> sorted(drawn.classes.tolist())[:1], {3, 7} <= set(drawn.classes.tolist()), len(drawn.classes)
    ([0], True, 6)
    """
    rows = num_classes if rows is None else rows
    if not 0 < share <= 1:
        raise ValueError(f"the share of classes must be above 0 and at most 1; got {share}")
    if rows % groups:
        raise ValueError(f"{groups} groups do not divide {rows} rows")
    given = np.zeros(0, int) if isinstance(labels, jax.core.Tracer) else np.asarray(labels)
    if (given >= num_classes).any():
        raise ValueError(f"labels must be below the number of classes, {num_classes}; one is {given.max()}")
    of_group = rows // groups
    count = _drawn_of_group(labels.shape[0], num_classes, share, of_group, groups)
    index = jnp.arange(rows)
    in_batch = jnp.zeros(rows, bool).at[labels].set(True)
    real = index < num_classes
    # A uniform number depends only on its position, so the draws of a row do not depend on the number of rows.
    rank = jax.random.uniform(key, (rows,)) + jnp.where(in_batch, 2.0, 0.0) - jnp.where(real, 0.0, 2.0)
    by_group = lambda x: x.reshape(groups, of_group)
    _, places = jax.lax.top_k(by_group(rank), count)
    take = lambda x: jnp.take_along_axis(by_group(x), places, axis=1)
    inside, usable = take(in_batch), take(real)
    drawn, possible = (jnp.sum(x, axis=1) for x in (usable & ~inside, by_group(real & ~in_batch)))
    factor = possible / jnp.maximum(drawn, 1)
    stands_for = jnp.where(inside | ~usable, 1.0, factor[:, None])
    return ClassSample(take(index).reshape(-1), usable.reshape(-1), stands_for.reshape(-1), groups)


def compared_classes(batch: int, num_classes: int, share: float, *, rows: int | None = None, groups: int = 1) -> int:
    """Number of classes that a batch of so many images is compared with; arguments as for ``sample_classes``.

    Any group may hold all classes of the batch, so each has room for as many: with many groups, or a large batch, the
    share of the classes is larger than the one that was asked for.

    >>> compared_classes(512, 100_000, 0.1), compared_classes(4_096, 100_000, 0.1, rows=100_096, groups=8)
    (10461, 39496)
    """
    of_group = (num_classes if rows is None else rows) // groups
    return min(groups * _drawn_of_group(batch, num_classes, share, of_group, groups), num_classes)


def _drawn_of_group(batch: int, num_classes: int, share: float, of_group: int, groups: int) -> int:
    """Number of classes that are taken from each group: all that may be in the batch, and a share of the others."""
    own = min(batch, of_group)
    # The first group is full of classes even where others hold padding; of those that are left one is drawn at least.
    left = min(of_group, num_classes) > own
    return own + max(math.ceil(share * max(num_classes / groups - own, 0)), int(left))


def take_classes(table: Float[Array, "rows width"], sample: ClassSample) -> Float[Array, "m width"]:
    """The rows of the drawn classes; every group takes its own, so a table split by rows stays where it is."""
    groups, (rows, width) = sample.groups, table.shape
    places = sample.classes.reshape(groups, -1) - jnp.arange(groups)[:, None] * (rows // groups)
    found = jnp.take_along_axis(table.reshape(groups, rows // groups, width), places[:, :, None], axis=1)
    return found.reshape(-1, width)
