"""Checks of input arrays; errors are one line that names the argument."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Float, Num, Shaped

# Input arrays: jax or numpy.
Array = jax.Array | np.ndarray


def embedding_rows(embeddings: Num[Array, "n d"], name: str) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n"]]:
    """float32 rows [n, d] on the host and their squared norms [n]; ValueError unless all are finite."""
    rows = np.asarray(embeddings)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name}: expected shape [rows, width], got {rows.shape}")
    if len(rows) == 0:
        raise ValueError(f"{name}: no rows")
    if rows.dtype.kind in "cUSO":
        raise ValueError(f"{name}: expected real numbers, got {rows.dtype}")
    rows = rows.astype(np.float32, copy=False)
    norms = np.einsum("nd,nd->n", rows, rows)
    # A distance adds up to four such terms.
    if not norms.max() < np.finfo(np.float32).max / 4:
        raise ValueError(f"{name}: NaN, infinite or too large for float32")
    return rows, norms


def label_column(labels: Shaped[Array, "n"], rows: int, name: str, of: str) -> Shaped[np.ndarray, "n"]:
    """Labels [rows] on the host, of any sortable kind."""
    labels = np.asarray(labels)
    if labels.shape != (rows,):
        raise ValueError(f"{name}: expected shape ({rows},), one per row of {of}, got {labels.shape}")
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


def _are_names(labels: Shaped[Array, "n"]) -> bool:
    labels = np.asarray(labels)
    return labels.dtype.kind in "US" or (
        labels.dtype.kind == "O" and any(isinstance(x, str | bytes) for x in labels.flat)
    )


def check_pair(
    gallery: object | None, gallery_labels: Shaped[Array, "m"] | None, labels: Shaped[Array, "n"] | None = None
) -> None:
    """Raises ValueError unless both are given or neither is, and unless both sides' labels are names, or numbers."""
    if labels is not None and gallery_labels is not None and _are_names(labels) != _are_names(gallery_labels):
        kinds = np.asarray(labels).dtype, np.asarray(gallery_labels).dtype
        raise ValueError(f"gallery_labels: names on one side and numbers on the other, {kinds[0]} and {kinds[1]}")
    if (gallery is None) != (gallery_labels is None):
        missing = "gallery" if gallery is None else "gallery_labels"
        raise ValueError(f"{missing}: missing; gallery and gallery_labels go together")


def check_width(queries: Float[np.ndarray, "n d"], gallery: Float[np.ndarray, "m e"]) -> None:
    """Raises ValueError unless both sides are equally wide."""
    if gallery.shape[1] != queries.shape[1]:
        raise ValueError(f"gallery: width {gallery.shape[1]} differs from the embeddings' width {queries.shape[1]}")
