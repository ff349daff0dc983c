"""What a table said about its images, as a file of embeddings holds it: arrays of their own, checked when read."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from idml_jax.data.columns import ROLES
from idml_jax.errors import UserError, warn
from idml_jax.inference.arrays import SEVERAL_LABELS

# Names of the arrays, and their number of axes.
OF_TABLES = {"label_sets": 2, "group": 1, "box": 2, "is_query": 1, "is_gallery": 1}
_SHAPES = {
    "label_sets": "whole numbers [n, l]", "group": "numbers or text [n]", "box": "whole numbers [n, 4]",
    "is_query": "true or false, or 1 or 0", "is_gallery": "true or false, or 1 or 0",
}  # fmt: skip
# Arrays of this package's own files that nothing reads.
_OWN = ("uncertainty_norm", "class_name")
# Names of columns of tables that embeddings call otherwise. A camera is for ``evaluate --exclude=camera``.
_OTHERWISE = {
    **dict.fromkeys((*ROLES["label"], *ROLES["labels"]), "labels"),
    **dict.fromkeys(ROLES["path"], "files"),
    **dict.fromkeys(("x", "features", "vectors", "embedding"), "embeddings"),
}


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
        raise UserError(f"{path}: {name} holds {value.dtype} {list(value.shape)}; it should be {_SHAPES[name]}")
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
    flags = {name: _flags(path, arrays, name) for name in ("is_query", "is_gallery")}
    given = [flag for flag in flags.values() if flag is not None]
    if len(given) == 1:
        has, lacks = sorted(flags, key=lambda name: flags[name] is None)
        warn(f"{path}: {has} is not used, as there is no {lacks}; both together say which images search which")
    return np.stack(given, axis=1) if len(given) == 2 else None


def _flags(path: Path, arrays: Mapping[str, np.ndarray], name: str) -> np.ndarray | None:
    """True and false, which may be given as 1 and 0."""
    value = _of_kind(path, arrays, name, "biu")
    if value is None or value.dtype.kind == "b":
        return value
    wrong = (value != 0) & (value != 1)
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(f"{path}: {name} holds {value[row]} in row {row}; it should be {_SHAPES[name]}")
    return value.astype(bool)


def warn_of_unused(path: Path, names: Collection[str], used: Collection[str]) -> None:
    """Names the arrays of a file that are not used but look as if they were meant to be.

    Args:
      path: the file.
      names: names of all its arrays.
      used: names of the arrays that are read.
    """
    missing = [name for name in used if name not in names]
    if "semantic" in names and "embeddings" in names:
        warn(f"{path}: embeddings is not used, as there is semantic")
    elif "semantic" in names or "embeddings" in names:
        missing = [name for name in missing if name not in ("semantic", "embeddings")]
    for name in names:
        if name in used or name in _OWN:
            continue
        if name.lower() in ROLES["split"]:
            if "is_query" in missing and "is_gallery" in missing:
                told = "is_query and is_gallery [n], true or false, say which images search which"
                warn(f"{path}: {name} is not used, so that its parts are one set; {told}")
            continue
        near = difflib.get_close_matches(name.lower(), (*missing, *_OTHERWISE), 1, 0.8)
        meant = _OTHERWISE.get(near[0], near[0]) if near else ""
        if meant in missing:
            warn(f"{path}: {name} is not used; is it meant as {meant}? Then rename it")


def check_shape(path: Path, name: str, value: np.ndarray, of: tuple[int, ...], dimensions: int) -> None:
    """Raises ``UserError`` unless an array has a row for each embedding and so many axes."""
    if len(of) != 2:
        raise UserError(f"{path}: {name} has the shape {value.shape}; embeddings should be [n, d]")
    if value.ndim != dimensions or value.shape[0] != of[0]:
        cure = f"; {SEVERAL_LABELS}" if name == "labels" and value.ndim == 2 else ""
        wanted = "[n]" if dimensions == 1 else "[n, d]"
        raise UserError(f"{path}: {name} has the shape {value.shape}, the embeddings {of}; it should be {wanted}{cure}")
    if not of[0]:
        raise UserError(f"{path}: no rows")
    if value.ndim == 2 and not value.shape[1]:
        raise UserError(f"{path}: {name} has the shape {value.shape}, so no dimensions")
