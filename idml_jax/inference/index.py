"""Reads and checks embeddings with their metadata from a file of any origin.

The arrays of a file: ``semantic`` (or ``embeddings``) [n, d]; optionally ``uncertainty`` [n, k], ``semantic_norm`` [n],
``ambiguity`` [n], ``risk`` [n], ``labels`` [n] (numbers from 0, or names), ``class_names`` by label, ``files`` [n], and
``about``, a JSON text about the origin of the embeddings.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from idml_jax.errors import UserError
from idml_jax.inference import arrays as stored_arrays
from idml_jax.ism import Metric
from idml_jax.metrics.embedded import Embedded
from idml_jax.runtime.files import first_line, user_path

SUFFIXES = (".npz", ".parquet")
COLUMNS = ("semantic", "embeddings", "uncertainty", "semantic_norm", "ambiguity", "risk", "labels", "files")
_WANTED = frozenset((*COLUMNS, "class_names", "about"))
# Known entries of ``about``, and their types.
_ABOUT: dict[str, type | tuple[type, ...]] = {
    "workdir": str, "step": int, "images": str, "temperature": (int, float), "relative": bool, "form": str,
    "weights": str,
}  # fmt: skip
# The metric computes sums of four squares in float32.
_LARGEST = math.sqrt(float(np.finfo(np.float32).max) / 16)


class Numbered(Sequence[str]):
    """Names of classes that have only numbers: the numbers themselves, from 0.

    Args:
      count: number of classes.
    """

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, label: int) -> str:  # type: ignore[override]  # no slices
        if not 0 <= label < self._count:
            raise IndexError(label)
        return str(label)


@dataclass(frozen=True, eq=False, repr=False)
class Index:
    """Embeddings with their metadata; ``len`` gives the number of images.

    Attributes:
      embedded: embeddings; labels are 0 if unknown.
      files: ``[n]`` paths or names.
      class_names: names by label; ``None`` if labels are unknown.
      about: their origin: ``workdir``, ``step``, ``images``, ``weights``; and the metric's ``temperature`` and
        ``relative``.
      ambiguity: ``[n]`` true ambiguity of each image, if known.
      path: path of the file; ``None`` for embeddings made in memory.
      named: whether ``files`` were stored in the file; otherwise they were generated on reading.
    """

    embedded: Embedded
    files: np.ndarray
    class_names: Sequence[str] | None
    about: dict[str, Any]
    ambiguity: Float[np.ndarray, "n"] | None = None
    path: Path | None = None
    named: bool = True

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.semantic.shape))
        classes = "classes unknown" if self.class_names is None else f"{len(self.class_names):,} classes"
        uncertainty = "no uncertainty" if self.uncertainty is None else f"{self.uncertainty.shape[1]} of uncertainty"
        return f"Index({shape} embeddings, {uncertainty}, {classes})"

    @property
    def semantic(self) -> Float[np.ndarray, "n d"]:
        """``[n, d]``, what the images show."""
        return self.embedded.semantic

    @property
    def uncertainty(self) -> Float[np.ndarray, "n k"] | None:
        """``[n, k]``, how ambiguous the images are; ``None`` where the run has not learned it."""
        return self.embedded.uncertainty

    @property
    def labels(self) -> list[str] | None:
        """Name of the class of every image; ``None`` if unknown."""
        return None if self.class_names is None else [str(self.class_of(row)) for row in range(len(self))]

    def class_of(self, row: int) -> str | None:
        """Name of a row's class, if known."""
        if self.class_names is None:
            return None
        label = int(self.embedded.labels[row])
        if not 0 <= label < len(self.class_names):
            raise UserError(f"{self.files[row]}: label {label}, but there are {len(self.class_names):,} class names")
        return self.class_names[label]

    @property
    def metric(self) -> Metric:
        """The metric that the embeddings were trained with; the default if unknown."""
        return Metric.from_about(self.about)


def check_suffix(path: Path, option: str) -> None:
    """Raises ``UserError`` unless a file name has the extension of embeddings."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{option}={path}: the name must end in {' or '.join(SUFFIXES)}")


def read(path: str | Path, option: str = "--index", *, labels: bool = False) -> Index:
    """Reads embeddings written by ``store.join``, or a file with the same arrays from elsewhere.

    Args:
      path: ``.npz`` or ``.parquet`` file.
      option: name of the command-line option, for messages.
      labels: whether the file must have labels; its name may then have any extension.

    Returns:
      The embeddings. Numbers are float32 or float64, labels int64.

    Raises:
      UserError: naming the file and what is wrong with it.
    """
    path = user_path(path)
    if not labels:
        check_suffix(path, option)
    if not path.is_file():
        raise UserError(f"{path}: {'is not a file' if path.exists() else 'no such file'} ({option})")
    arrays, names = stored_arrays.read(path, _WANTED)
    semantic = arrays.get("semantic", arrays.get("embeddings"))
    if semantic is None or (labels and "labels" not in arrays):
        needed = " and labels [n]" if labels else ""
        held = ", ".join(sorted(names)) or "nothing"
        raise UserError(f"{path}: needs the arrays semantic (or embeddings) [n, d]{needed}; it holds {held}")
    for name in COLUMNS:
        if name in arrays:
            wide = name in ("semantic", "embeddings", "uncertainty")
            _check_shape(path, name, arrays[name], semantic.shape, 2 if wide else 1)
    numbers = {name: checked_numbers(path, name, arrays[name]) for name in COLUMNS[:6] if name in arrays}
    classes, class_names = _labels(path, arrays)
    semantic = numbers.get("semantic", numbers.get("embeddings"))
    assert semantic is not None
    files = texts(arrays["files"]) if "files" in arrays else [f"row {row}" for row in range(len(semantic))]
    embedded = Embedded(
        semantic,
        np.zeros(len(semantic), np.int32) if classes is None else classes,
        numbers.get("uncertainty"),
        numbers.get("semantic_norm"),
        risk=numbers.get("risk"),
    )
    about = checked_about(path, arrays["about"]) if "about" in arrays else {}
    return Index(
        embedded, np.asarray(files), class_names, about, numbers.get("ambiguity"), path, named="files" in arrays
    )


def _check_shape(path: Path, name: str, value: np.ndarray, of: tuple[int, ...], dimensions: int) -> None:
    if len(of) != 2 or value.ndim != dimensions or value.shape[0] != of[0]:
        raise UserError(f"{path}: {name} has the shape {value.shape}, the embeddings {of}; they should be [n, d]")
    if not of[0]:
        raise UserError(f"{path}: no rows")
    if value.ndim == 2 and not value.shape[1]:
        raise UserError(f"{path}: {name} has the shape {value.shape}, so no dimensions")


def checked_numbers(path: Path, name: str, value: np.ndarray) -> np.ndarray:
    """A column of numbers as float32 or float64; ``UserError`` for text, NaN, infinity and what float32 cannot hold."""
    if value.dtype.kind not in "fiub":
        raise UserError(f"{path}: {name} holds {value.dtype}, not numbers")
    value = value.astype(np.float64 if value.dtype.itemsize >= 8 else np.float32, copy=False)
    rows = value if value.ndim == 2 else value[:, None]
    largest = max(-float(rows.min()), float(rows.max()))
    if not np.isfinite(rows.min() + rows.max()):
        bad = ~np.isfinite(rows).all(axis=1)
        if bad.any():
            raise UserError(f"{path}: {name} holds NaN or infinity, first in row {int(bad.argmax())}")
    if largest > _LARGEST / math.sqrt(rows.shape[1]):
        raise UserError(f"{path}: {name} holds numbers too large for float32 ({largest:.3g})")
    return value


def texts(value: np.ndarray) -> list[str]:
    """Converts an array of names, which may be bytes, to strings."""
    if value.dtype.kind == "S":
        return [name.decode("utf-8", "surrogateescape") for name in value.reshape(-1).tolist()]
    return [str(name) for name in value.reshape(-1).tolist()]


def _labels(path: Path, arrays: Mapping[str, np.ndarray]) -> tuple[Int[np.ndarray, "n"] | None, Sequence[str] | None]:
    labels, names = arrays.get("labels"), arrays.get("class_names")
    if labels is None:
        return None, None
    if labels.dtype.kind in "US":
        found, numbers = np.unique(np.asarray(texts(labels)), return_inverse=True)
        return numbers.astype(np.int64), found.tolist()
    whole = labels.dtype.kind != "f" or bool(np.isfinite(labels).all() and (labels == np.floor(labels)).all())
    if not whole or int(labels.min()) < 0 or int(labels.max()) >= 2**63 - 1:
        wrong = next((x for x in labels.tolist() if not 0 <= x < 2**63 - 1 or x != int(x)), "")
        raise UserError(f"{path}: labels are whole numbers from 0, or names; here is {wrong!r}")
    labels = labels.astype(np.int64)
    if names is None:
        return labels, Numbered(int(labels.max()) + 1)
    if names.ndim != 1 or int(labels.max()) >= names.size:
        raise UserError(f"{path}: labels go up to {int(labels.max()):,}, but class_names has {names.size:,}")
    return labels, texts(names)


def checked_about(path: Path, value: np.ndarray) -> dict[str, Any]:
    """The origin of embeddings from its JSON text; ``UserError`` for values that cannot be."""
    try:
        about = json.loads(texts(value)[0])
    except (ValueError, IndexError, RecursionError) as error:
        raise UserError(f"{path}: about is not JSON ({first_line(error)})") from error
    if not isinstance(about, dict):
        raise UserError(f"{path}: about is {type(about).__name__}, not a JSON object")
    for name, kinds in _ABOUT.items():
        value = about.get(name)
        if name in about and (not isinstance(value, kinds) or isinstance(value, bool) is not (kinds is bool)):
            raise UserError(f"{path}: about says {name} = {value!r}, which cannot be")
    if not check_temperature(about.get("temperature", 1.0)):
        raise UserError(f"{path}: about says temperature = {about['temperature']!r}, which must be above 0 and finite")
    try:
        Metric.from_about(about)
    except ValueError as error:
        raise UserError(f"{path}: about: {error}") from error
    return about


def check_temperature(value: float) -> bool:
    """Whether a number is a valid temperature of the metric."""
    return 0 < value < math.inf


def check_comparable(
    queries: Index, index: Index, named: str, other: str, settings: Collection[str] = ("temperature", "relative")
) -> None:
    """Checks that the vectors of two sets can be compared.

    Args:
      queries: first set.
      index: second set.
      named: name of the first set in messages.
      other: name of the second set in messages.
      settings: settings of the metric in which the sets must agree, if both have them.

    Raises:
      UserError: if their widths differ, or their weights or settings are known to differ.
    """
    for name in ("semantic", "uncertainty"):
        one, two = getattr(queries.embedded, name), getattr(index.embedded, name)
        if one is not None and two is not None and one.shape[1] != two.shape[1]:
            raise UserError(
                f"{named} has {one.shape[1]} dimensions of {name}, {other} has {two.shape[1]}; they cannot be compared"
            )
    mine, theirs = queries.about.get("weights"), index.about.get("weights")
    if mine is not None and theirs is not None and mine != theirs:
        raise UserError(
            f"{named} was embedded with the weights {mine} and {other} with {theirs}; vectors of two networks cannot "
            "be compared"
        )
    for name in settings:
        mine, theirs = queries.about.get(name), index.about.get(name)
        if mine is not None and theirs is not None and mine != theirs:
            raise UserError(f"{named} was made with {name} = {mine} and {other} with {theirs}; they cannot be compared")


def labels_in_common(queries: Index, gallery: Index) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "m"], bool]:
    """Relabels two sets so that equal classes have equal labels.

    Returns:
      Labels of the first and of the second set, and whether classes were matched by name. If a set has no names, its
      numbers are taken as those of the other.
    """
    one, two = queries.class_names, gallery.class_names
    numbered = isinstance(one, Numbered), isinstance(two, Numbered)
    if one is None or two is None or any(numbered):
        return queries.embedded.labels, gallery.embedded.labels, all(numbered)
    known = {name: number for number, name in enumerate(dict.fromkeys([*one, *two]))}
    both = [
        np.asarray([known[name] for name in names], np.int64)[index.embedded.labels]
        for names, index in ((one, queries), (two, gallery))
    ]
    return both[0], both[1], True


def _same_file(one: Path | None, two: Path | None) -> bool:
    """Whether two files of embeddings are the same file or have the same content."""
    if one is None or two is None:
        return False
    if os.path.samefile(one, two):
        return True
    if not (one.is_file() and two.is_file()):  # a gallery
        return False
    return one.stat().st_size == two.stat().st_size and _file_digest(one) == _file_digest(two)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def own_rows(queries: Index, index: Index) -> Int[np.ndarray, "n"] | None:
    """Row of the index with each query's own image, -1 if there is none; ``None`` if no query is in the index.

    A query's own image is the same row of the same file of embeddings, the image with the same existing absolute path,
    or the same image of the same split of the same run. Equal relative names are not enough, since ``1.jpg`` is in many
    folders.
    """
    if _same_file(queries.path, index.path):
        return np.arange(len(index.files))
    if not (queries.named and index.named):
        return None
    place = place_of(queries.about, index.about)
    known = {found: row for row, name in enumerate(index.files.tolist()) if (found := place(name)) is not None}
    own = np.asarray([known.get(place(name) or "", -1) for name in queries.files.tolist()])
    return own if (own >= 0).any() else None


def place_of(one: Mapping[str, Any], two: Mapping[str, Any]) -> Callable[[str], str | None]:
    """A function from a name to what identifies the image in two sets of these origins; ``None``: nothing does."""
    origins = [(about.get("images"), about.get("weights", about.get("workdir"))) for about in (one, two)]
    if origins[0] == origins[1] and None not in origins[0] and str(origins[0][0]).startswith("split:"):
        return lambda name: name
    return lambda name: os.path.realpath(name) if os.path.isabs(name) and os.path.exists(name) else None
