"""Hierarchies of classes: a loss at every level, with weights; import from ``idml_jax.losses``."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from idml_jax.losses.pairs import AxisName, Pairs, pairs_from_labels, rectangular

__all__ = ["over_levels", "pairs_from_levels"]


def pairs_from_levels(
    labels: Int[Array, "n levels"],
    reference_labels: Int[Array, "m levels"] | None = None,
    mask: Bool[Array, "n"] | None = None,
    *,
    reference_mask: Bool[Array, "m"] | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Pairs, ...]:
    """The relation at each level of a hierarchy: same or different family, genus, species.

    Args:
      labels: ``[n, levels]`` of the rows, from coarse to fine. A label may repeat under other parents: rows are the
        same at a level if they are the same at all levels down to it.
      reference_labels: ``[m, levels]`` of the columns; ``None`` compares the rows with themselves.
      mask: ``[n]``, false for padding.
      reference_mask: ``[m]``, false for columns that are padding.
      axis_name: as for ``pairs_from_labels``.

    Returns:
      One ``Pairs`` of shape ``[n, m]`` per level.

    Raises:
      ValueError: if the labels are not matrices, or for what ``pairs_from_labels`` refuses.

    >>> species = jnp.array([[0, 0], [0, 1], [1, 0]])  # two species of one genus, one of another
    >>> [int(pairs.positive.sum()) for pairs in pairs_from_levels(species)]  # at the level of the genus: 0 and 1
    [2, 0]
    """
    columns = None if reference_labels is None else _matrix(reference_labels, "reference_labels")
    labels = _matrix(labels, "labels")
    if labels.ndim != 2 or (columns is not None and (columns.ndim != 2 or columns.shape[1] != labels.shape[1])):
        raise ValueError(f"labels of levels need the shape [n, levels]; got {labels.shape}")
    found: list[Pairs] = []
    for level in range(labels.shape[1]):
        pairs = pairs_from_labels(
            labels[:, level],
            None if columns is None else columns[:, level],
            mask,
            reference_mask=reference_mask,
            axis_name=axis_name,
        )
        if found:
            above = found[-1].positive
            pairs = Pairs(pairs.positive & above, pairs.negative | (pairs.positive & ~above))
        found.append(pairs)
    return tuple(found)


def _matrix(labels: Any, name: str) -> Any:
    """Labels as an array; those of numpy stay there, where large numbers keep their digits."""
    return labels if isinstance(labels, jax.Array) else rectangular(labels, name, "[n, levels], one of each level")


def over_levels(
    loss: Callable[..., Float[Array, "..."]],
    matrix: Float[Array, "n m"],
    levels: Sequence[Pairs],
    level_weights: Sequence[float],
    **options: object,
) -> Float[Array, "..."]:
    """The weighted sum of a loss over the levels of a hierarchy.

    A pair that shares a species is a positive at every level, one that shares only the family at the first: the
    strength of a pair follows from the finest level that it shares. The form of Zhang et al., "Use All The Labels",
    CVPR 2022, for any loss.

    Args:
      loss: a loss of this package.
      matrix: ``[n, m]`` distances or similarities, whichever the loss reads.
      levels: the relation at each level, from ``pairs_from_levels``.
      level_weights: a weight for each level.
      **options: options of the loss.

    Returns:
      The sum.

    Raises:
      ValueError: if there is no level, or not one weight per level.

    >>> levels = losses.pairs_from_levels(jnp.array([[0, 0], [0, 1], [1, 0]]))
    >>> distance = jnp.array([[0.0, 0.2, 0.6], [0.2, 0.0, 0.6], [0.6, 0.6, 0.0]])
    >>> round(float(losses.over_levels(losses.contrastive, distance, levels, (1.0, 0.5))), 3)  # 0.2 + 0.5 (0.5 - 0.2)
    0.35
    """
    if not len(levels):
        raise ValueError("levels must be at least one relation; got none")
    if len(level_weights) != len(levels):
        raise ValueError(f"{len(levels)} levels need as many weights; got {len(level_weights)}")
    terms = [weight * loss(matrix, pairs, **options) for pairs, weight in zip(levels, level_weights, strict=True)]
    return jnp.sum(jnp.stack(terms), axis=0)
