"""What a table said about its images, as a file of embeddings holds it: arrays of their own, checked when read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from idml_jax.errors import UserError

# Names of the arrays, and their number of axes.
OF_TABLES = {"label_sets": 2, "group": 1, "box": 2, "is_query": 1, "is_gallery": 1}


class Told(NamedTuple):
    """What a table says about images, as ``Embedded`` and ``Index`` hold it; ``None``: nothing."""

    sets: Int[np.ndarray, "n l"] | None
    groups: np.ndarray | None
    boxes: Int[np.ndarray, "n 4"] | None
    marked: Bool[np.ndarray, "n 2"] | None


def told_by_table(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    of: tuple[int, ...],
    labels: Int[np.ndarray, "n"] | None,
    class_names: Sequence[str] | None,
) -> Told:
    """The columns of ``OF_TABLES`` among the arrays of a file, checked.

    Args:
      path: the file or folder, for messages.
      arrays: arrays by name.
      of: shape of the embeddings.
      labels: label of each image, if known.
      class_names: names by label, if known.
    """
    for name, axes in OF_TABLES.items():
        if name in arrays:
            check_shape(path, name, arrays[name], of, axes)
    return Told(
        _sets(path, arrays, labels, len(class_names or ())),
        _of_kind(path, arrays, "group", "iubUS"),
        _of_kind(path, arrays, "box", "iu", 4),
        _marked(path, arrays),
    )


def _of_kind(
    path: Path, arrays: Mapping[str, np.ndarray], name: str, kinds: str, width: int | None = None
) -> np.ndarray | None:
    """An array of a table; other kinds and widths are refused."""
    value = arrays.get(name)
    if value is not None and (value.dtype.kind not in kinds or (width and value.shape[1] != width)):
        raise UserError(f"{path}: {name} holds {value.dtype} {list(value.shape)}, which is not what a table gives")
    return value


def _sets(path: Path, arrays: Mapping[str, np.ndarray], labels: np.ndarray | None, classes: int) -> np.ndarray | None:
    """All labels of each image, the first as in ``labels``."""
    sets = _of_kind(path, arrays, "label_sets", "iu")
    if sets is not None and (labels is None or not np.array_equal(sets[:, 0], labels)):
        raise UserError(f"{path}: the first column of label_sets must be the labels")
    if sets is not None and int(sets.max()) >= classes:
        raise UserError(f"{path}: label_sets go up to {int(sets.max()):,}, but there are {classes:,} class names")
    return sets


def _marked(path: Path, arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
    flags = [_of_kind(path, arrays, name, "b") for name in ("is_query", "is_gallery")]
    if any(flag is None for flag in flags):
        return None
    return np.stack([flag for flag in flags if flag is not None], axis=1)


def check_shape(path: Path, name: str, value: np.ndarray, of: tuple[int, ...], dimensions: int) -> None:
    """Raises ``UserError`` unless an array has a row for each embedding and so many axes."""
    if len(of) != 2 or value.ndim != dimensions or value.shape[0] != of[0]:
        raise UserError(f"{path}: {name} has the shape {value.shape}, the embeddings {of}; they should be [n, d]")
    if not of[0]:
        raise UserError(f"{path}: no rows")
    if value.ndim == 2 and not value.shape[1]:
        raise UserError(f"{path}: {name} has the shape {value.shape}, so no dimensions")
