"""Writes embeddings to disk in parts, so that a stopped command can resume, and joins them into one file as a stream.

The arrays of an ``.npz``: ``semantic`` [n, d], ``semantic_norm`` [n], ``uncertainty`` [n, k] and ``uncertainty_norm``
[n] if the run is introspective, ``risk`` [n] if it has a risk head, ``files`` [n], ``labels`` [n] and ``class_names``
if classes are known, and ``about``, a JSON text about their origin; and, of images from a table, the arrays of
``told.OF_TABLES``. A ``.parquet`` file has the same columns, the class name next to the class number, and ``about`` in
its metadata (key ``idml_jax``). ``inference.index`` reads both.
"""

import contextlib
import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from idml_jax.data.tables import arrow
from idml_jax.errors import UserError, is_utf8
from idml_jax.inference.gallery import read_stored as read
from idml_jax.inference.index import SUFFIXES, Index, check_suffix
from idml_jax.inference.own import own_rows
from idml_jax.runtime.files import TEMPORARY, atomic, locked, user_path, write_json
from idml_jax.training.digests import weights_digest

__all__ = [
    "SUFFIXES", "Index", "Parts", "check_finite", "check_suffix", "digest", "join", "own_rows", "read", "save",
    "weights_digest", "writing",
]  # fmt: skip


PartsOf = Callable[[], Iterator[dict[str, np.ndarray]]]


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Makes sure that only one process writes a file of embeddings.

    Raises:
      UserError: naming the process that is already writing it.
    """
    with locked(out.with_name(out.name + ".lock"), f"{out}: another process is writing it; wait for it"):
        yield


def check_finite(arrays: Mapping[str, np.ndarray], names: Sequence[str], network: str) -> None:
    """Refuses NaN and infinite embeddings.

    Args:
      arrays: arrays ``[n, ...]`` by name.
      names: ``[n]`` names of the images.
      network: name of the network in messages.

    Raises:
      UserError: naming the network and the first such image.
    """
    for name, value in arrays.items():
        bad = ~np.isfinite(value.reshape(len(value), -1)).all(axis=1) if len(value) else np.zeros(0, bool)
        if bad.any():
            raise UserError(
                f"{network} gives NaN or infinity in {name} for {int(bad.sum()):,} of {len(bad):,} images, the first "
                f"{names[int(bad.argmax())]}; its weights are damaged or the training has diverged"
            )


class Parts:
    """The folder with the finished parts of a file that is being written.

    Args:
      out: the file.
      identity: JSON-serialisable; parts with another identity are discarded.
    """

    def __init__(self, out: Path, identity: Mapping[str, object]):
        self.folder = out.with_name(out.name + ".parts")
        self._about = self.folder / "about.json"
        self.started_over = False
        # Weights identified by their digest may be in any folder.
        kept = {k: v for k, v in identity.items() if "weights" not in identity or k not in ("workdir", "step")}
        if self.folder.is_symlink():
            raise UserError(f"{self.folder}: is a link; parts are only kept in a real folder")
        if self.folder.exists() and self._stored() != kept:
            if not self._about.is_file() and any(path.suffix != TEMPORARY for path in self.folder.iterdir()):
                raise UserError(f"{self.folder}: is not a folder of parts; move it away, or give another --out")
            shutil.rmtree(self.folder)
            self.started_over = True
        if not self._about.exists():
            write_json(self._about, kept)

    def _stored(self) -> object:
        try:
            return json.loads(self._about.read_text())
        except (OSError, ValueError):
            return None

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"

    def has(self, number: int) -> bool:
        """Whether a complete part exists."""
        try:
            with np.load(self._path(number), allow_pickle=False) as file:
                return "records" in file.files
        except Exception:  # missing or damaged: it is computed again
            return False

    def write(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a part, completely or not at all."""
        with atomic(self._path(number)) as file:
            np.savez(file, **cast(Any, arrays))

    def read(self, number: int) -> dict[str, np.ndarray]:
        """A part's arrays."""
        with np.load(self._path(number), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder)


def digest(lines: Sequence[str]) -> str:
    """A fingerprint of a list of names."""
    found = hashlib.sha256()
    for line in lines:
        found.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return found.hexdigest()


def join(out: Path, parts: PartsOf, class_names: Sequence[str] | None, about: dict) -> None:
    """Joins all parts into one file, with one part in memory at a time.

    Args:
      out: ``.npz`` or ``.parquet``, written completely or not at all.
      parts: starts an iteration over the parts; all have the same columns and together at least one row.
      class_names: names by label, if known.
      about: origin of the embeddings.
    """
    with atomic(out) as file:
        (_join_npz if out.suffix == ".npz" else _join_parquet)(file, parts, class_names, json.dumps(about))


def save(index: Index, path: str | Path, *, overwrite: bool = False) -> Path:
    """Writes embeddings made in memory to a file, as ``python -m idml_jax.embed`` does.

    Args:
      index: embeddings, such as those of ``Model.embed``.
      path: ``.npz`` or ``.parquet``.
      overwrite: replace an existing file.

    Returns:
      The file.

    Raises:
      UserError: if the name has another ending, or the file exists.
    """
    path = user_path(path)
    check_suffix(path, "path")
    if path.exists() and not overwrite:
        raise UserError(f"{path} already exists; overwrite=True replaces it")
    part = columns_of(index)
    join(path, lambda: iter([part]), index.class_names, index.about)
    return path


def columns_of(index: Index) -> dict[str, np.ndarray]:
    """The columns of a file with these embeddings."""
    embedded = index.embedded
    columns: dict[str, np.ndarray | None] = {
        "semantic": embedded.semantic,
        "semantic_norm": embedded.semantic_norm,
        "uncertainty": embedded.uncertainty,
        "uncertainty_norm": None if embedded.uncertainty is None else embedded.uncertainty_norm,
        "risk": embedded.risk,
        "files": np.asarray(index.files, "U"),
        "labels": None if index.class_names is None else embedded.labels.astype(np.int32),
        "ambiguity": index.ambiguity,
        "label_sets": embedded.sets,
        "group": embedded.groups,
        "box": index.boxes,
        "is_query": None if index.marked is None else index.marked[:, 0],
        "is_gallery": None if index.marked is None else index.marked[:, 1],
    }
    return {name: value for name, value in columns.items() if value is not None}


def _join_npz(out: BinaryIO, parts: PartsOf, class_names: Sequence[str] | None, about: str) -> None:
    rows: dict[str, int] = {}
    kinds: dict[str, np.dtype] = {}
    for part in parts():
        for name, value in part.items():
            rows[name] = rows.get(name, 0) + len(value)
            kinds[name] = np.promote_types(kinds.get(name, value.dtype), value.dtype)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name in rows:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                started = False
                for part in parts():
                    value = np.ascontiguousarray(part[name].astype(kinds[name], copy=False))
                    if not started:
                        header = np.lib.format.header_data_from_array_1_0(value)
                        header["shape"] = (rows[name], *value.shape[1:])
                        np.lib.format.write_array_header_2_0(file, header)
                        started = True
                    file.write(value.tobytes())
        extra = {"about": np.asarray(about)}
        if class_names is not None:
            extra["class_names"] = np.asarray(list(class_names))
        for name, value in extra.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, value, allow_pickle=False)


def _join_parquet(out: BinaryIO, parts: PartsOf, class_names: Sequence[str] | None, about: str) -> None:
    pa = arrow()
    writer = None
    # Names that are not UTF-8 are stored as bytes; all rows of a column have the same type.
    binary = any(not is_utf8(name) for part in parts() for name in part.get("files", ()))
    try:
        for part in parts():
            known = {"idml_jax": about}
            if class_names is not None:
                known["class_names"] = json.dumps(list(class_names))
            table = table_of(part, class_names, binary).replace_schema_metadata(known)
            if writer is None:
                writer = pa.parquet.ParquetWriter(out, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def table_of(part: Mapping[str, np.ndarray], class_names: Sequence[str] | None, binary: bool) -> Any:
    """Columns as a table of pyarrow, the class name next to the class number; binary: names of files as bytes."""
    pa, columns = arrow(), {}
    for name, value in part.items():
        if value.ndim == 2:
            flat = pa.array(np.ascontiguousarray(value).reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(flat, value.shape[1])
        else:
            columns[name] = pa.array(_names(value, binary)) if value.dtype.kind == "U" else pa.array(value)
    if class_names is not None:
        named = [class_names[label] for label in part["labels"].tolist()]
        columns["class_name"] = pa.array([name.encode("utf-8", "backslashreplace").decode() for name in named])
    return pa.table(columns)


def _names(values: np.ndarray, binary: bool) -> list[bytes] | list[str]:
    names: list[str] = values.tolist()
    return [name.encode("utf-8", "surrogateescape") for name in names] if binary else names
