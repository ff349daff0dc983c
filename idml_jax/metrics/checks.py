"""Checks of input arrays; errors are one line that names the argument."""

from __future__ import annotations

import contextlib

import jax
import numpy as np
from jaxtyping import Float, Num, Shaped

# Input arrays: jax or numpy.
Array = jax.Array | np.ndarray


def embedding_rows(
    embeddings: Num[Array, "n d"], name: str, *, small: bool = False
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n"]]:
    """float32 rows [n, d] on the host and their squared norms [n]; ValueError unless all are finite and float32 can
    hold them, their products too. small: any smallness is right, as of an uncertainty that has vanished."""
    given = np.asarray(embeddings)
    if given.ndim != 2 or given.shape[1] == 0:
        raise ValueError(f"{name}: expected shape [rows, width], got {given.shape}")
    if len(given) == 0:
        raise ValueError(f"{name}: no rows")
    if given.dtype.kind in "cUSO":
        raise ValueError(f"{name}: expected real numbers, got {given.dtype}")
    with np.errstate(over="ignore", invalid="ignore"):  # told below, in one line
        rows = given.astype(np.float32, copy=False)
        norms = np.einsum("nd,nd->n", rows, rows)
    # A distance adds up to four such terms.
    if not norms.max() < np.finfo(np.float32).max / 4:
        raise ValueError(f"{name}: NaN, infinite or too large for float32")
    if not small and (lost := too_small(given, norms)):
        raise ValueError(f"{name}: {lost}")
    return rows, norms


def too_small(rows: Num[np.ndarray, "n d"], norms: Float[np.ndarray, "n"]) -> str:
    """What float32 cannot hold of rows because it is too small: the largest squares, or a whole row; empty: nothing.

    Args:
      rows: ``[n, d]`` finite, of any type.
      norms: ``[n]`` their squared lengths in float32.
    """
    single = np.finfo(np.float32)
    # Below, squares lose digits to underflow.
    doubtful = np.flatnonzero(norms < rows.shape[1] * float(single.tiny) / float(single.eps))
    if not len(doubtful):
        return ""
    largest = np.abs(rows[doubtful]).max(axis=1).astype(np.float64)
    cure = "multiply all by one factor, or normalise them"
    if len(doubtful) == len(rows) and largest.max() > 0:
        return f"too small for float32, the largest number is {largest.max():.2g}; {cure}"
    gone = doubtful[(largest > 0) & (largest < float(single.tiny))]
    if rows.dtype.itemsize > 4 and len(gone):
        return f"{len(gone):,} rows are too small for float32 but not 0, the first is row {gone[0]}; {cure}"
    return ""


def label_array(labels: Shaped[Array, "..."], name: str) -> Shaped[np.ndarray, "..."]:
    """Labels on the host; ValueError where rows hold different numbers of them."""
    with contextlib.suppress(ValueError):  # numpy refuses lists whose shape is not that of an array
        found = np.asarray(labels)
        if found.dtype.kind != "O" or not any(isinstance(x, list | set | np.ndarray) for x in found.flat):
            return found
    raise ValueError(f"{name}: rows hold different numbers of labels")


def label_column(
    labels: Shaped[Array, "n"], rows: int, name: str, of: str, several: str = ""
) -> Shaped[np.ndarray, "n"]:
    """Labels [rows] on the host, of any sortable kind; several: what takes several labels per row, for the error."""
    labels = label_array(labels, name)
    if labels.shape != (rows,):
        cure = f"; several labels per row: {several}" if several and labels.ndim == 2 else ""
        raise ValueError(f"{name}: expected shape ({rows},), one per row of {of}, got {labels.shape}{cure}")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise ValueError(f"{name}: NaN or infinite")
    if labels.dtype.kind == "O":
        found = labels.tolist()
        if None in found:
            raise ValueError(f"{name}: None is no label")
        if len({isinstance(label, str | bytes) for label in found}) > 1:
            raise ValueError(f"{name}: every label is a name, or every one a number")
    return labels


def score_column(scores: Num[Array, "n"], name: str, rows: int | None = None) -> Float[np.ndarray, "n"]:
    """Scores [n] as float64 on the host; ValueError for other shapes, no entries or NaN (infinity is a score)."""
    scores = np.asarray(scores)
    if scores.ndim != 1 or (rows is not None and len(scores) != rows):
        raise ValueError(f"{name}: expected shape ({'n' if rows is None else rows},), got {scores.shape}")
    if len(scores) == 0:
        raise ValueError(f"{name}: no entries")
    scores = scores.astype(np.float64)
    if np.isnan(scores).any():
        raise ValueError(f"{name}: NaN")
    return scores


def _are_names(labels: Shaped[np.ndarray, "n"]) -> bool:
    return labels.dtype.kind in "US" or (
        labels.dtype.kind == "O" and any(isinstance(x, str | bytes) for x in labels.flat)
    )


def check_pair(
    gallery: object | None, gallery_labels: Shaped[Array, "m"] | None, labels: Shaped[Array, "n"] | None = None
) -> None:
    """Raises ValueError unless both are given or neither is, and unless both sides' labels are names, or numbers."""
    if labels is not None and gallery_labels is not None:
        sides = label_array(labels, "labels"), label_array(gallery_labels, "gallery_labels")
        if _are_names(sides[0]) != _are_names(sides[1]):
            told = f"{sides[0].dtype} and {sides[1].dtype}"
            raise ValueError(f"gallery_labels: names on one side and numbers on the other, {told}")
    if (gallery is None) != (gallery_labels is None):
        missing = "gallery" if gallery is None else "gallery_labels"
        raise ValueError(f"{missing}: missing; gallery and gallery_labels go together")


def check_width(queries: Float[np.ndarray, "n d"], gallery: Float[np.ndarray, "m e"]) -> None:
    """Raises ValueError unless both sides are equally wide."""
    if gallery.shape[1] != queries.shape[1]:
        raise ValueError(f"gallery: width {gallery.shape[1]} differs from the embeddings' width {queries.shape[1]}")
