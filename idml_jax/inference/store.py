"""Embeddings on disk: written in parts, so that a stopped command goes on, and joined to one file as a stream.

The arrays of an ``.npz``: ``semantic`` [n, d], ``semantic_norm`` [n], ``uncertainty`` [n, k] and ``uncertainty_norm``
[n] where the run is introspective, ``files`` [n], ``labels`` [n] and ``class_names`` where classes are known, and
``about``, a JSON text on where they come from. A ``.parquet`` file has the same columns, a class's name beside its
number, and ``about`` in its metadata (key ``idml_jax``).
"""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from idml_jax.errors import UserError
from idml_jax.metrics.summary import Embedded
from idml_jax.runtime.files import write_json

SUFFIXES = (".npz", ".parquet")


class Index(NamedTuple):
    """Embeddings with what is known about them.

    Attributes:
      embedded: vectors; its labels are 0 where none are known.
      files: ``[n]`` paths or names.
      class_names: by label; ``None`` where no labels are known.
      about: where they come from: ``workdir``, ``step``, ``images``.
    """

    embedded: Embedded
    files: np.ndarray
    class_names: list[str] | None
    about: dict[str, Any]

    def class_of(self, row: int) -> str | None:
        """Name of a row's class, if known."""
        if self.class_names is None:
            return None
        label = int(self.embedded.labels[row])
        return self.class_names[label] if label < len(self.class_names) else str(label)


class Parts:
    """The folder of the parts of a file that is being made.

    Args:
      out: the file.
      identity: JSON-able; parts of another identity are thrown away.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]):
        self.folder = out.with_name(out.name + ".parts")
        self._about = self.folder / "about.json"
        self.started_over = False
        if self.folder.exists() and self._stored() != dict(identity):
            shutil.rmtree(self.folder)
            self.started_over = True
        if not self._about.exists():
            write_json(self._about, dict(identity))

    def _stored(self) -> Any:
        try:
            return json.loads(self._about.read_text())
        except (OSError, ValueError):
            return None

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"

    def has(self, number: int) -> bool:
        """Whether a part is there, whole."""
        try:
            with np.load(self._path(number), allow_pickle=False) as file:
                return "records" in file.files
        except Exception:  # missing or damaged alike: it is made again
            return False

    def write(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a part, whole or not at all."""
        temporary = self.folder / "part.tmp"
        with temporary.open("wb") as file:
            np.savez(file, **cast(Any, arrays))
        temporary.replace(self._path(number))

    def read(self, number: int) -> dict[str, np.ndarray]:
        """A part's arrays."""
        with np.load(self._path(number), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder)


def digest(lines: Sequence[str]) -> str:
    """What changes when a list of names does."""
    found = hashlib.sha256()
    for line in lines:
        found.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return found.hexdigest()


def check_suffix(path: Path, option: str) -> None:
    """Raises ``UserError`` unless a name ends as embeddings do."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{option}={path}: the name must end in {' or '.join(SUFFIXES)}")


def join(
    out: Path, parts: Callable[[], Iterator[dict[str, np.ndarray]]], class_names: Sequence[str] | None, about: dict
) -> None:
    """Writes the file of all parts, a part in memory at a time.

    Args:
      out: ``.npz`` or ``.parquet``; whole or not there.
      parts: starts an iteration over them; each holds columns of the same names, at least one row in all.
      class_names: by label, where known.
      about: where they come from.
    """
    temporary = out.with_name(out.name + ".tmp")
    try:
        (_join_npz if out.suffix == ".npz" else _join_parquet)(temporary, parts, class_names, json.dumps(about))
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _join_npz(path: Path, parts: Callable, class_names: Sequence[str] | None, about: str) -> None:
    rows: dict[str, int] = {}
    kinds: dict[str, np.dtype] = {}
    for part in parts():
        for name, value in part.items():
            rows[name] = rows.get(name, 0) + len(value)
            kinds[name] = np.promote_types(kinds.get(name, value.dtype), value.dtype)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
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


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("a .parquet file needs pyarrow, which is not installed; pip install pyarrow") from error
    return pyarrow


def _join_parquet(path: Path, parts: Callable, class_names: Sequence[str] | None, about: str) -> None:
    pa = _arrow()
    writer = None
    try:
        for part in parts():
            columns = {}
            for name, value in part.items():
                if value.ndim == 2:
                    flat = pa.array(np.ascontiguousarray(value).reshape(-1))
                    columns[name] = pa.FixedSizeListArray.from_arrays(flat, value.shape[1])
                else:
                    columns[name] = pa.array(value.tolist() if value.dtype.kind == "U" else value)
            if class_names is not None:
                columns["class_name"] = pa.array([class_names[label] for label in part["labels"]])
            known = {"idml_jax": about}
            if class_names is not None:
                known["class_names"] = json.dumps(list(class_names))
            table = pa.table(columns).replace_schema_metadata(known)
            if writer is None:
                writer = pa.parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def read(path: str | Path, option: str = "--index") -> Index:
    """Reads a file that ``join`` wrote, or an ``.npz`` with ``semantic`` (or ``embeddings``) from elsewhere.

    Raises:
      UserError: naming the file and what is wrong with it.
    """
    path = Path(path).expanduser()
    check_suffix(path, option)
    if not path.is_file():
        raise UserError(f"{path}: no such file ({option})")
    try:
        arrays = _read_parquet(path) if path.suffix == ".parquet" else _read_npz(path)
        about = json.loads(str(arrays.pop("about"))) if "about" in arrays else {}
    except UserError:
        raise
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: cannot be read as embeddings ({first})") from error
    semantic = arrays.get("semantic", arrays.get("embeddings"))
    if semantic is None or semantic.ndim != 2 or not len(semantic):
        raise UserError(f"{path}: needs the array semantic (or embeddings) [n, d]; it holds {', '.join(arrays)}")
    for name in ("uncertainty", "semantic_norm", "labels", "files"):
        if name in arrays and len(arrays[name]) != len(semantic):
            raise UserError(f"{path}: {name} has {len(arrays[name])} rows, the embeddings {len(semantic)}")
    labels, names = arrays.get("labels"), arrays.get("class_names")
    if labels is not None and names is None:
        names = np.arange(int(labels.max()) + 1).astype(str)
    files = arrays.get("files", np.asarray([f"row {row}" for row in range(len(semantic))]))
    embedded = Embedded(
        semantic,
        np.zeros(len(semantic), np.int32) if labels is None else labels,
        arrays.get("uncertainty"),
        arrays.get("semantic_norm"),
    )
    return Index(embedded, files, None if labels is None or names is None else [str(name) for name in names], about)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _read_parquet(path: Path) -> dict[str, np.ndarray]:
    pa = _arrow()
    table = pa.parquet.read_table(path)
    known = table.schema.metadata or {}
    arrays = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if pa.types.is_fixed_size_list(column.type):
            width = column.type.list_size
            arrays[name] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        elif pa.types.is_string(column.type):
            arrays[name] = np.asarray(column.to_pylist())
        else:
            arrays[name] = column.to_numpy(zero_copy_only=False)
    if b"idml_jax" in known:
        arrays["about"] = known[b"idml_jax"].decode()
    if b"class_names" in known:
        arrays["class_names"] = np.asarray(json.loads(known[b"class_names"]))
    return arrays
