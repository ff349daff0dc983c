"""Reads and checks embeddings with their metadata from a file of any origin.

The arrays of a file: ``semantic`` (or ``embeddings``) [n, d]; optionally ``uncertainty`` [n, k], ``semantic_norm`` [n],
``ambiguity`` [n], ``risk`` [n], ``labels`` [n] (numbers from 0, or names), ``class_names`` by label, ``files`` [n], and
``about``, a JSON text about the origin of the embeddings. Of images from a table also ``label_sets`` [n, l] (all labels
of an image, filled up with -1), ``group`` [n], ``box`` [n, 4], ``is_query`` [n] and ``is_gallery`` [n].
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.errors import UserError, warn
from idml_jax.inference import arrays as stored_arrays
from idml_jax.inference.told import OF_TABLES, check_shape, told_by_table, warn_of_unused
from idml_jax.ism import Metric
from idml_jax.metrics.checks import too_small
from idml_jax.metrics.embedded import Embedded, rows_of
from idml_jax.runtime.files import first_line, user_path

SUFFIXES = (".npz", ".parquet")
COLUMNS = ("semantic", "embeddings", "uncertainty", "semantic_norm", "ambiguity", "risk", "labels", "files")
_WANTED = frozenset((*COLUMNS, *OF_TABLES, "class_names", "about"))
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
      boxes: ``[n, 4]`` left, top, right, bottom of each image in its picture; zeros: all of it; ``None`` without boxes.
      marked: ``[n, 2]`` whether each image is a query and whether it is in the gallery, if a table told it.
      rows: ``[n]`` rows of the file, if they are some of it; ``None``: all.
    """

    embedded: Embedded
    files: np.ndarray
    class_names: Sequence[str] | None
    about: dict[str, Any]
    ambiguity: Float[np.ndarray, "n"] | None = None
    path: Path | None = None
    named: bool = True
    boxes: Int[np.ndarray, "n 4"] | None = None
    marked: Bool[np.ndarray, "n 2"] | None = None
    rows: Int[np.ndarray, "n"] | None = None

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

    def classes_of(self, row: int) -> tuple[str, ...]:
        """Names of all classes of a row, of which there may be several; none if they are unknown."""
        if self.class_names is None or self.embedded.sets is None:
            first = self.class_of(row)
            return () if first is None else (first,)
        return tuple(str(self.class_names[label]) for label in self.embedded.sets[row].tolist() if label >= 0)

    def box_of(self, row: int) -> tuple[int, int, int, int] | None:
        """The part of its picture that an image is: left, top, right, bottom in pixels; ``None``: all of it."""
        if self.boxes is None or not self.boxes[row].any():
            return None
        left, top, right, bottom = map(int, self.boxes[row])
        return left, top, right, bottom

    def name_of(self, row: int) -> str:
        """Path or name of an image, with its box if it is a part of a picture."""
        return named(str(self.files[row]), self.box_of(row))

    def take(self, rows: Int[np.ndarray, "k"]) -> "Index":
        """Some rows of it."""
        some = lambda column: None if column is None else column[rows]
        return replace(
            self,
            embedded=rows_of(self.embedded, rows),
            files=self.files[rows],
            ambiguity=some(self.ambiguity),
            boxes=some(self.boxes),
            marked=some(self.marked),
            rows=rows if self.rows is None else self.rows[rows],
        )

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
            check_shape(path, name, arrays[name], semantic.shape, 2 if wide else 1)
    numbers = {name: checked_numbers(path, name, arrays[name]) for name in COLUMNS[:6] if name in arrays}
    classes, class_names = _labels(path, arrays)
    semantic = numbers.get("semantic", numbers.get("embeddings"))
    assert semantic is not None
    files = texts(arrays["files"]) if "files" in arrays else [f"row {row}" for row in range(len(semantic))]
    told = told_by_table(path, arrays, semantic.shape, classes, class_names)
    embedded = Embedded(
        semantic,
        np.zeros(len(semantic), np.int32) if classes is None else classes,
        numbers.get("uncertainty"),
        numbers.get("semantic_norm"),
        told.sets,
        told.groups,
        risk=numbers.get("risk"),
    )
    about = checked_about(path, arrays["about"]) if "about" in arrays else {}
    warn_of_wrong_labels(path, about)
    warn_of_unused(path, names, _WANTED)
    return Index(
        embedded,
        np.asarray(files),
        class_names,
        about,
        numbers.get("ambiguity"),
        path,
        named="files" in arrays,
        boxes=told.boxes,
        marked=told.marked,
    )


def checked_numbers(path: Path, name: str, value: np.ndarray) -> np.ndarray:
    """A column of numbers as float32 or float64; ``UserError`` for text, NaN, infinity and what float32 cannot hold.

    Embeddings may not be too small for it either, but what else is told of images may be 0 or nearly so.
    """
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
    if name in ("semantic", "embeddings"):
        single = rows.astype(np.float32, copy=False)
        if lost := too_small(rows, np.einsum("nd,nd->n", single, single)):
            raise UserError(f"{path}: {name}: {lost}")
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


def warn_of_wrong_labels(path: Path, about: Mapping[str, Any]) -> None:
    """Says which labels of a stored set are wrong on purpose, as ``about`` tells; metrics and answers use them."""
    if about.get("wrong_labels"):
        warn(f"{path}: {about['wrong_labels']:,} labels are wrong on purpose (config.data.label_noise of its run)")


def check_temperature(value: float) -> bool:
    """Whether a number is a valid temperature of the metric."""
    return 0 < value < math.inf


def check_comparable(
    queries: Index,
    index: Index,
    named: str,
    other: str,
    settings: Collection[str] = ("temperature", "relative", "form", "risk"),
) -> None:
    """Checks that the vectors of two sets can be compared.

    Args:
      queries: first set.
      index: second set.
      named: name of the first set in messages.
      other: name of the second set in messages.
      settings: settings of the metric, and the risk head, in which the sets must agree, if both have them.

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
            cure = "; embed one of them again" if name == "risk" else ""  # python -m idml_jax.risk may have fitted anew
            raise UserError(
                f"{named} was made with {name} = {mine} and {other} with {theirs}; they cannot be compared{cure}"
            )


def named(file: str, box: Sequence[int] | None) -> str:
    """Name of an image, with its box if it is a part of a picture."""
    return file if box is None else f"{file} (box {','.join(map(str, box))})"


def sets_in_common(queries: Index, gallery: Index) -> tuple[Int[np.ndarray, "n l"], Int[np.ndarray, "m l"]]:
    """As ``labels_in_common``, all labels of each image, filled up with -1 to the same width l."""
    sides = []
    for index, numbers in zip((queries, gallery), _numbers(queries, gallery) or (None, None), strict=True):
        sets = index.embedded.every_label
        sides.append(sets if numbers is None else np.where(sets < 0, -1, numbers[sets]))
    width = max(side.shape[1] for side in sides)
    one, two = (np.pad(side, ((0, 0), (0, width - side.shape[1])), constant_values=-1) for side in sides)
    return one, two


def _numbers(queries: Index, gallery: Index) -> tuple[Int[np.ndarray, "c"], Int[np.ndarray, "d"]] | None:
    """A number for each label of two sets, equal for equal names; ``None`` if one of them has no names."""
    one, two = queries.class_names, gallery.class_names
    if one is None or two is None or isinstance(one, Numbered) or isinstance(two, Numbered):
        return None
    known = {name: number for number, name in enumerate(dict.fromkeys([*one, *two]))}
    found = [np.asarray([known[name] for name in names], np.int64) for names in (one, two)]
    return found[0], found[1]


def labels_in_common(queries: Index, gallery: Index) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "m"], bool]:
    """Relabels two sets so that equal classes have equal labels.

    Returns:
      Labels of the first and of the second set, and whether classes were matched by name. If a set has no names, its
      numbers are taken as those of the other.
    """
    numbers = _numbers(queries, gallery)
    if numbers is None:
        numbered = isinstance(queries.class_names, Numbered) and isinstance(gallery.class_names, Numbered)
        return queries.embedded.labels, gallery.embedded.labels, numbered
    return numbers[0][queries.embedded.labels], numbers[1][gallery.embedded.labels], True
