"""The relation between the rows and the columns of a matrix: which entries a loss compares, and how.

A loss sees labels only through ``Pairs``. Padding, several labels per image, hierarchies, query x gallery, a memory of
past embeddings and the shards of a batch are all expressed by building ``Pairs``.
"""

from itertools import accumulate
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

__all__ = [
    "AxisName", "Pairs", "concatenate_pairs", "gather", "mask_rows", "pairs_from_label_sets", "pairs_from_labels",
    "pairs_from_relation",
]  # fmt: skip

AxisName = str | tuple[str, ...]
Tree = TypeVar("Tree")


class Pairs(NamedTuple):
    """Which entries of an ``[n, m]`` matrix are compared, and how; an entry in neither is ignored.

    Attributes:
      positive: ``[n, m]`` bool, pairs of the same class.
      negative: ``[n, m]`` bool, pairs of different classes.
    """

    positive: Bool[Array, "n m"]
    negative: Bool[Array, "n m"]


def gather(tree: Tree, axis_name: AxisName | None) -> Tree:
    """Gathers the rows of all devices, in the order of the devices; for ``pmap`` and ``shard_map``.

    Not needed under ``jit`` with sharded arrays, where the batch is global.

    Args:
      tree: any pytree of arrays with the device's ``n`` rows, such as embeddings and labels.
      axis_name: the mapped axis (or axes); ``None`` returns the tree as it is.

    Returns:
      The tree with ``devices * n`` rows. It is differentiable: the gradient goes back to the device that owns the row.
    """
    if axis_name is None:
        return tree
    everyone = lambda x: jax.lax.all_gather(x, axis_name, axis=0, tiled=True)
    leaves, structure = jax.tree.flatten(tree)
    # Matrices of one type, such as s and u, are gathered side by side: one collective here and one for the gradient.
    together: dict[Any, list[int]] = {}
    for index, leaf in enumerate(leaves):
        together.setdefault(leaf.dtype if leaf.ndim == 2 else index, []).append(index)
    for group in together.values():
        if len(group) == 1:
            leaves[group[0]] = everyone(leaves[group[0]])
            continue
        matrices = [leaves[index] for index in group]
        ends = list(accumulate(matrix.shape[1] for matrix in matrices))
        parts = jnp.split(everyone(jnp.concatenate(matrices, axis=1)), ends[:-1], axis=1)
        for index, part in zip(group, parts, strict=True):
            leaves[index] = part
    return cast(Tree, jax.tree.unflatten(structure, leaves))


def row_offset(rows: int, axis_name: AxisName | None) -> Int[Array, ""] | int:
    """Index, among the rows of all devices, of this device's first row."""
    return 0 if axis_name is None else rows * jax.lax.axis_index(axis_name)


def pairs_from_relation(
    same: Bool[Array, "n m"],
    mask: Bool[Array, "n"] | None = None,
    *,
    reference_mask: Bool[Array, "m"] | None = None,
    exclude_self: bool = False,
    axis_name: AxisName | None = None,
) -> Pairs:
    """Pairs from a relation: entries that are not the same are different, except padding and a row with itself.

    With several labels per image, ``same`` is for instance ``(y @ y.T) > 0`` for multi-hot ``y``. For a relation with
    ignored entries (a hierarchy where cousins are neither alike nor different) build ``Pairs`` directly.

    Args:
      same: ``[n, m]`` bool.
      mask: ``[n]``, false for rows that are padding.
      reference_mask: ``[m]``, false for columns that are padding.
      exclude_self: the columns are the rows (of all devices, with ``axis_name``): no row is paired with itself.
      axis_name: the mapped axis whose devices hold the rows.

    Returns:
      ``Pairs`` of shape ``[n, m]``.

    Raises:
      ValueError: if the shapes do not fit.

    >>> pairs_from_relation(jnp.array([[True, False]])).negative.tolist()
    [[False, True]]
    """
    same = jnp.asarray(same, bool)
    if same.ndim != 2:
        raise ValueError(f"a relation needs the shape [n, m]; got {same.shape}")
    n, m = same.shape
    valid = jnp.ones((n, m), bool)
    if mask is not None:
        mask = jnp.asarray(mask, bool)
        if mask.shape != (n,):
            raise ValueError(f"the mask needs the rows' shape {(n,)}; got {mask.shape}")
        valid &= mask[:, None]
    if reference_mask is not None:
        reference_mask = jnp.asarray(reference_mask, bool)
        if reference_mask.shape != (m,):
            raise ValueError(f"the reference mask needs the columns' shape {(m,)}; got {reference_mask.shape}")
        valid &= reference_mask[None, :]
    if exclude_self:
        own = row_offset(n, axis_name) + jnp.arange(n)
        valid &= own[:, None] != jnp.arange(m)[None, :]
    return Pairs(same & valid, ~same & valid)


def pairs_from_labels(
    labels: Int[Array, "n"],
    reference_labels: Int[Array, "m"] | None = None,
    mask: Bool[Array, "n"] | None = None,
    *,
    reference_mask: Bool[Array, "m"] | None = None,
    axis_name: AxisName | None = None,
) -> Pairs:
    """The relation of same and different labels.

    Args:
      labels: ``[n]`` integer labels of the rows; outside of ``jit`` also names, as numpy arrays or lists of text.
      reference_labels: ``[m]`` labels of the columns; ``None`` compares the rows with themselves, and then no row is
        paired with itself.
      mask: ``[n]``, false for rows (and, without ``reference_labels``, columns) that are padding.
      reference_mask: ``[m]``, false for columns that are padding; only with ``reference_labels``.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis: the rows are this device's, and without
        ``reference_labels`` the columns are those of all devices, as ``gather`` returns them.

    Returns:
      ``Pairs`` of shape ``[n, m]``.

    Raises:
      ValueError: if the labels are not vectors or a mask does not fit.

    >>> pairs_from_labels(jnp.array([0, 0, 1])).positive.tolist()
    [[False, True, False], [True, False, False], [False, False, False]]
    """
    if any(_are_names(some) for some in (labels, reference_labels)):
        labels, reference_labels = _numbered(labels, reference_labels)
    for some in (labels, reference_labels):
        if isinstance(some, np.ndarray) and some.dtype.kind == "f" and np.isnan(some).any():
            raise ValueError("labels: NaN is no label")
    labels = jnp.asarray(labels)
    columns = labels if reference_labels is None else jnp.asarray(reference_labels)
    if labels.ndim != 1 or columns.ndim != 1:
        raise ValueError(f"labels need the shape [n]; got {labels.shape} and {columns.shape}")
    columns = None if reference_labels is None else columns
    return pairs_from_label_sets(labels, columns, mask, reference_mask=reference_mask, axis_name=axis_name)


def pairs_from_label_sets(
    labels: Int[Array, "n"] | Int[Array, "n l"],
    reference_labels: Int[Array, "m"] | Int[Array, "m k"] | None = None,
    mask: Bool[Array, "n"] | None = None,
    *,
    reference_mask: Bool[Array, "m"] | None = None,
    axis_name: AxisName | None = None,
) -> Pairs:
    """The relation of images that share a label and images that share none.

    Args:
      labels: ``[n, l]`` labels of each row, at least 0, filled up with -1; or ``[n]``, one label of each.
      reference_labels: the same of the columns; ``None`` compares the rows with themselves, and then no row is paired
        with itself.
      mask: as for ``pairs_from_labels``, like the others.
      reference_mask: ``[m]``.
      axis_name: the mapped axis.

    Returns:
      ``Pairs`` of shape ``[n, m]``.

    Raises:
      ValueError: if the labels are neither vectors nor matrices, or a mask does not fit.

    >>> pairs_from_label_sets(jnp.array([[0, 1], [1, -1], [2, -1]]), jnp.array([0, 1])).positive.tolist()
    [[True, True], [False, True], [False, False]]
    """
    labels = jnp.asarray(labels)
    columns = labels if reference_labels is None else jnp.asarray(reference_labels)
    if labels.ndim not in (1, 2) or columns.ndim not in (1, 2):
        raise ValueError(f"labels need the shape [n] or [n, l]; got {labels.shape} and {columns.shape}")
    if mask is not None:
        mask = jnp.asarray(mask, bool)
        if mask.shape != labels.shape[:1]:
            raise ValueError(f"the mask needs the labels' shape {labels.shape[:1]}; got {mask.shape}")
    if reference_labels is None:
        if reference_mask is not None:
            raise ValueError("reference_mask needs reference_labels: without them the mask covers the columns too")
        columns, reference_mask = gather((columns, mask), axis_name)
    return pairs_from_relation(
        _same(labels, columns),
        mask,
        reference_mask=reference_mask,
        exclude_self=reference_labels is None,
        axis_name=axis_name,
    )


def _same(labels: Array, columns: Array) -> Bool[Array, "n m"]:
    """Which rows and columns share a label."""
    if labels.ndim == columns.ndim == 1:
        return labels[:, None] == columns[None, :]
    labels, columns = (x[:, None] if x.ndim == 1 else x for x in (labels, columns))
    equal = labels[:, None, :, None] == columns[None, :, None, :]
    return jnp.any(equal & (labels >= 0)[:, None, :, None], axis=(2, 3))


def _are_names(labels: Any) -> bool:
    return not isinstance(labels, jax.Array) and labels is not None and np.asarray(labels).dtype.kind in "USO"


def _as_text(labels: np.ndarray) -> np.ndarray:
    """Names as text, where they are objects or bytes; other labels as they are."""
    if labels.dtype.kind not in "SO" or not all(isinstance(label, str | bytes) for label in labels.flat):
        return labels
    texts = [label.decode("utf-8", "replace") if isinstance(label, bytes) else label for label in labels.flat]
    return np.asarray(texts).reshape(labels.shape)


def _numbered(labels: Any, reference_labels: Any) -> tuple[Any, Any]:
    """Numbers in place of names, the same in both."""
    given = [np.asarray(some) for some in (labels, reference_labels) if some is not None]
    # Tables hold names as objects, some files as bytes.
    given = [_as_text(some) for some in given]
    if len({some.dtype.kind for some in given}) > 1:
        raise ValueError(f"labels are names or numbers, not both; got {' and '.join(str(x.dtype) for x in given)}")
    numbers = np.unique(np.concatenate([some.reshape(-1) for some in given]), return_inverse=True)[1]
    rows = numbers[: given[0].size].reshape(given[0].shape).astype(np.int32)
    return rows, None if reference_labels is None else numbers[given[0].size :].reshape(given[1].shape).astype(np.int32)


def mask_rows(pairs: Pairs, mask: Bool[Array, "n"] | None) -> Pairs:
    """The pairs without those of rows whose mask is false; ``None``: all.

    >>> pairs = pairs_from_labels(jnp.arange(2), jnp.arange(2))
    >>> mask_rows(pairs, jnp.array([True, False])).negative.tolist()
    [[False, True], [False, False]]
    """
    return pairs if mask is None else Pairs(*(relation & mask[:, None] for relation in pairs))


def concatenate_pairs(*pairs: Pairs) -> Pairs:
    """Concatenates relations of the same rows along the columns, such as the batch and a memory.

    Args:
      *pairs: relations of shapes ``[n, m_1]``, ``[n, m_2]``, ...

    Returns:
      ``Pairs`` of shape ``[n, m_1 + m_2 + ...]``.

    >>> pairs = pairs_from_labels(jnp.array([0]), jnp.array([0, 1]))
    >>> concatenate_pairs(pairs, pairs).positive.tolist()
    [[True, False, True, False]]
    """
    return Pairs(*(jnp.concatenate(parts, axis=1) for parts in zip(*pairs, strict=True)))
