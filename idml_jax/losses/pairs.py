"""The relation between the rows and the columns of a matrix: which entries a loss compares, and how.

A loss sees labels only through ``Pairs``. Padding, several labels per image, hierarchies, query x gallery, a memory of
past embeddings and the shards of a batch are all expressed by building ``Pairs``.
"""

import contextlib
from collections.abc import Callable
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
      labels: ``[n]`` integer labels of the rows, any integers; outside of ``jit`` also names, as numpy arrays or lists
        of text. Numpy arrays and lists may also hold integers that do not fit into the integers of JAX (int32).
      reference_labels: ``[m]`` labels of the columns; ``None`` compares the rows with themselves, and then no row is
        paired with itself.
      mask: ``[n]``, false for rows (and, without ``reference_labels``, columns) that are padding.
      reference_mask: ``[m]``, false for columns that are padding; only with ``reference_labels``.
      axis_name: under ``pmap`` or ``shard_map``, the mapped axis: the rows are this device's, and without
        ``reference_labels`` the columns are those of all devices, as ``gather`` returns them.

    Returns:
      ``Pairs`` of shape ``[n, m]``.

    Raises:
      ValueError: if the labels are not vectors, one is missing (``None`` or NaN), rows hold different numbers of them,
        they mix names and numbers, or a mask does not fit; or if they do not fit into int32 while those of the other
        side are traced.

    >>> pairs_from_labels(jnp.array([0, 0, 1])).positive.tolist()
    [[False, True, False], [True, False, False], [False, False, False]]
    """
    labels, reference_labels = as_arrays(labels, reference_labels)
    columns = labels if reference_labels is None else reference_labels
    if labels.ndim != 1 or columns.ndim != 1:
        raise ValueError(f"labels need the shape [n]; got {labels.shape} and {columns.shape}")
    return _related(labels, reference_labels, mask, reference_mask, axis_name, _equal)


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
      labels: ``[n, l]`` labels of each row, at least 0, filled up with -1; or ``[n]``, one label of each, -1 for none.
        Names (as for ``pairs_from_labels``) are filled up with ``''``, which is no label. The name ``'-1'`` is refused:
        numpy makes it of -1 beside names. A row without a label is a negative of every other one.
      reference_labels: the same of the columns; ``None`` compares the rows with themselves, and then no row is paired
        with itself.
      mask: as for ``pairs_from_labels``, like the others.
      reference_mask: ``[m]``.
      axis_name: the mapped axis.

    Returns:
      ``Pairs`` of shape ``[n, m]``.

    Raises:
      ValueError: if the labels are neither vectors nor matrices, a name is ``'-1'``, or for what ``pairs_from_labels``
        refuses.

    >>> pairs_from_label_sets(jnp.array([[0, 1], [1, -1], [2, -1]]), jnp.array([0, 1])).positive.tolist()
    [[True, True], [False, True], [False, False]]
    >>> pairs_from_label_sets([["a", "b"], ["b", ""], ["c", ""]]).positive.tolist()
    [[False, True, False], [True, False, False], [False, False, False]]
    """
    labels, reference_labels = as_arrays(labels, reference_labels, fill=True)
    columns = labels if reference_labels is None else reference_labels
    if labels.ndim not in (1, 2) or columns.ndim not in (1, 2):
        raise ValueError(f"labels need the shape [n] or [n, l]; got {labels.shape} and {columns.shape}")
    return _related(labels, reference_labels, mask, reference_mask, axis_name, _same)


def _related(
    labels: Array,
    reference_labels: Array | None,
    mask: Bool[Array, "n"] | None,
    reference_mask: Bool[Array, "m"] | None,
    axis_name: AxisName | None,
    same: Callable[[Array, Array], Bool[Array, "n m"]],
) -> Pairs:
    """The relation of checked labels, of which ``same`` says whether they are the same."""
    columns = labels if reference_labels is None else reference_labels
    if mask is not None:
        mask = jnp.asarray(mask, bool)
        if mask.shape != labels.shape[:1]:
            raise ValueError(f"the mask needs the labels' shape {labels.shape[:1]}; got {mask.shape}")
    if reference_labels is None:
        if reference_mask is not None:
            raise ValueError("reference_mask needs reference_labels: without them the mask covers the columns too")
        columns, reference_mask = gather((columns, mask), axis_name)
    return pairs_from_relation(
        same(labels, columns),
        mask,
        reference_mask=reference_mask,
        exclude_self=reference_labels is None,
        axis_name=axis_name,
    )


def _equal(labels: Array, columns: Array) -> Bool[Array, "n m"]:
    """Which rows and columns have the same label."""
    return labels[:, None] == columns[None, :]


def _same(labels: Array, columns: Array) -> Bool[Array, "n m"]:
    """Which rows and columns share a label; those below 0 are none."""
    if labels.ndim == columns.ndim == 1:
        return _equal(labels, columns) & (labels >= 0)[:, None]
    labels, columns = (x[:, None] if x.ndim == 1 else x for x in (labels, columns))
    equal = labels[:, None, :, None] == columns[None, :, None, :]
    return jnp.any(equal & (labels >= 0)[:, None, :, None], axis=(2, 3))


def as_arrays(labels: Any, reference_labels: Any, fill: bool = False) -> tuple[Array, Array | None]:
    """Labels of rows and columns as arrays of JAX in which different labels stay different.

    Names are numbered, and so are numbers that the types of JAX would merge (2**32 is 0 in int32, 16777217.0 is
    16777216.0 in float32).

    Args:
      labels: labels of the rows.
      reference_labels: labels of the columns, or ``None``.
      fill: labels below 0 and the name ``''`` are none, and become -1 if they are numbered.

    Raises:
      ValueError: as ``pairs_from_labels``.
    """
    named = {"labels": labels} | ({} if reference_labels is None else {"reference_labels": reference_labels})
    as_they_are = lambda x: isinstance(x, jax.core.Tracer) or (isinstance(x, jax.Array) and x.dtype.kind in "iub")
    given = [some if as_they_are(some) else _checked(some, name, fill) for name, some in named.items()]
    if not _fit(given):
        if any(isinstance(some, jax.core.Tracer) for some in given):
            raise ValueError(
                "labels that are names, or beyond int32, need concrete labels on the other side, not traced ones"
            )
        given = _numbered([np.asarray(some) for some in given], fill)
    arrays = [jnp.asarray(some) for some in given]
    return arrays[0], None if reference_labels is None else arrays[1]


def rectangular(given: Any, name: str, expected: str) -> np.ndarray:
    """Labels as an array of numpy; ``ValueError``, naming them and what is expected, if rows hold different numbers."""
    with contextlib.suppress(ValueError):  # numpy refuses lists whose shape is not that of an array
        labels = np.asarray(given)
        several = (list, tuple, set, np.ndarray)
        if labels.dtype.kind != "O" or not any(isinstance(label, several) for label in labels.flat):
            return labels
    raise ValueError(f"{name}: rows hold different numbers of labels; expected {expected}")


def _checked(given: Any, name: str, fill: bool) -> np.ndarray:
    """Labels as text or as numbers; tables hold names as objects, some files as bytes."""
    none = "-1, or '' among names, is no label" if fill else "leave such rows out, or mask them and give them any label"
    expected = "[n, l], filled up with -1, or with '' if they are names" if fill else "[n], one of each"
    labels = rectangular(given, name, expected)
    if labels.dtype.kind in "SO":
        every = list(labels.flat)
        if any(_is_missing(label) for label in every):
            raise ValueError(f"{name}: None or NaN is no label; {none}")
        if all(isinstance(label, str | bytes) for label in every):
            texts = [label.decode("utf-8", "replace") if isinstance(label, bytes) else label for label in every]
            labels = np.asarray(texts, str).reshape(labels.shape)
        elif any(isinstance(label, str | bytes) for label in every):
            kinds = sorted({type(label).__name__ for label in every})
            raise ValueError(f"{name} are names or numbers, not both; got {' and '.join(kinds)}")
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        raise ValueError(f"{name}: NaN is no label; {none}")
    if fill and labels.dtype.kind == "U" and (labels == "-1").any():
        raise ValueError(f"{name}: the text '-1' is a name here; names are filled up with '', only numbers with -1")
    return labels


def _is_missing(label: Any) -> bool:
    """None, NaN, and what tables hold in their place."""
    try:
        return label is None or bool(label != label)
    except (TypeError, ValueError):  # pandas.NA is neither true nor false
        return True


def _fit(given: list[Any]) -> bool:
    """Whether JAX compares the labels as they are: numbers that its type of all of them holds exactly."""
    if all(isinstance(some, jax.Array) and some.dtype == given[0].dtype for some in given):
        return True
    if any(some.dtype.kind in "USOMm" for some in given):
        return False
    narrow = jax.dtypes.canonicalize_dtype
    common = narrow(jnp.result_type(*(narrow(some.dtype) for some in given)))
    others = [some for some in given if some.dtype != common and not isinstance(some, jax.core.Tracer)]
    with np.errstate(over="ignore", invalid="ignore"):
        return all((some.astype(common) == some).all() for some in map(np.asarray, others))


def _numbered(given: list[np.ndarray], fill: bool) -> list[np.ndarray]:
    """Numbers from 0 in place of labels, the same in all."""
    if len({some.dtype.kind in "US" for some in given}) > 1:
        raise ValueError(f"labels are names or numbers, not both; got {' and '.join(str(x.dtype) for x in given)}")
    if len({some.dtype.kind for some in given}) > 1:
        given = [some.astype(object) for some in given]  # as Python's numbers, which compare exactly
    every = np.concatenate([some.reshape(-1) for some in given])
    try:
        numbers = np.unique(every, return_inverse=True)[1].astype(np.int32)
    except TypeError:
        kinds = sorted({type(label).__name__ for label in every.tolist()})
        raise ValueError(f"labels must all be names or all be numbers; got {', '.join(kinds)}") from None
    if fill and every.dtype.kind in "iufOU":
        none = every == "" if every.dtype.kind == "U" else every < 0
        numbers = np.where(none, -1, numbers).astype(np.int32)
    parts = np.split(numbers, np.cumsum([some.size for some in given])[:-1])
    return [part.reshape(some.shape) for part, some in zip(parts, given, strict=True)]


def mask_rows(pairs: Pairs, mask: Bool[Array, "n"] | None) -> Pairs:
    """The pairs without those of rows whose mask is false; ``None``: all.

    Raises:
      ValueError: if the mask does not have the rows' shape.

    >>> pairs = pairs_from_labels(jnp.arange(2), jnp.arange(2))
    >>> mask_rows(pairs, jnp.array([True, False])).negative.tolist()
    [[False, True], [False, False]]
    """
    if mask is None:
        return pairs
    mask = jnp.asarray(mask, bool)
    if mask.shape != pairs.positive.shape[:1]:
        raise ValueError(f"the mask needs the rows' shape {pairs.positive.shape[:1]}; got {mask.shape}")
    return Pairs(*(relation & mask[:, None] for relation in pairs))


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
