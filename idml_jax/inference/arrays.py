"""Reads named arrays of an untrusted ``.npz`` or Parquet file: nothing is unpickled, and memory is bounded."""

import contextlib
import json
import math
import sys
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import numpy as np

from idml_jax.data.columns import ROLES
from idml_jax.data.tables import arrow
from idml_jax.errors import UserError
from idml_jax.runtime.files import first_line

# A file may always declare this many bytes; beyond that, only a multiple of its size on disk.
_SMALL = 256 * 2**20
_LARGEST_RATIO = 100
_ROWS = 16384  # rows of a Parquet file read at a time
SEVERAL_LABELS = (
    "several labels of an image are label_sets [n, l], numbers of class_names filled up with -1, and labels [n] is its "
    "first column"
)
_KINDS = "fiubUS"  # numpy kinds of numbers and text


class _NotArrays(Exception):
    """The reason why a file cannot be read."""


def read(path: Path, wanted: Collection[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Reads some arrays of a file.

    Args:
      path: ``.parquet``; anything else is read as ``.npz``.
      wanted: names of the arrays to read; other arrays are not read. ``about`` and ``class_names`` of a Parquet file
        come from its metadata.

    Returns:
      The arrays (numbers or text) by name, and the names of all arrays in the file.

    Raises:
      UserError: naming the file and what is wrong with it.
    """
    kind = "a Parquet file of plain columns" if path.suffix == ".parquet" else "an .npz file of plain arrays"
    try:
        return (_read_parquet if path.suffix == ".parquet" else _read_npz)(path, wanted)
    except (UserError, MemoryError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{path}: does not fit into memory") from error
    except Exception as error:  # damaged files can make the libraries raise anything
        raise UserError(f"{path}: not {kind} ({first_line(error)})") from error


def is_table_of_images(path: Path) -> bool:
    """Whether a Parquet file has a column of images or their paths, and none of vectors; false if it is damaged."""
    with contextlib.suppress(Exception), arrow().parquet.ParquetFile(path) as file:
        names = set(file.schema_arrow.names)
        return not names & {"semantic", "embeddings"} and not {n.lower() for n in names}.isdisjoint(ROLES["path"])
    return False


def _check_size(promised: int, path: Path) -> None:
    stored = path.stat().st_size
    if promised > max(_SMALL, _LARGEST_RATIO * stored):
        raise _NotArrays(f"it has {stored:,} bytes but declares {promised:,} or more")


def _read_npz(path: Path, wanted: Collection[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        members = [(member.filename.removesuffix(".npy"), member) for member in archive.infolist()]
        names = [name for name, _ in members]
        chosen = {name: member for name, member in members if name in wanted}
        for name in chosen:
            if names.count(name) > 1:
                raise _NotArrays(f"it holds {name} {names.count(name)} times")
        _check_size(sum(member.file_size for member in chosen.values()), path)
        for name, member in chosen.items():
            with archive.open(member) as file:
                _check_header(file, name, member.file_size)
            with archive.open(member) as file:
                arrays[name] = _checked_text(np.lib.format.read_array(file, allow_pickle=False), name)
    return arrays, names


def _checked_text(value: np.ndarray, name: str) -> np.ndarray:
    """Checks that text contains only valid characters; Python cannot make strings of others."""
    if value.dtype.kind != "U":
        return value
    value = np.ascontiguousarray(value, value.dtype.newbyteorder("="))
    if value.nbytes and value.reshape(-1).view(np.uint32).max() > sys.maxunicode:
        raise _NotArrays(f"{name} holds characters that do not exist")
    return value


def _check_header(file: IO[bytes], name: str, size: int) -> None:
    """Checks that the declared size of an array is present, since NumPy allocates it before reading."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise _NotArrays(f"{name} has version {version[0]}.{version[1]} of NumPy's format")
    first = version == (1, 0)
    shape, _, dtype = (np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0)(file)
    if dtype.kind == "O":
        raise _NotArrays(f"{name} holds objects, which would have to be unpickled")
    if dtype.kind not in _KINDS:
        raise _NotArrays(f"{name} holds {dtype}, not numbers")
    promised = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or promised != size - file.tell():
        raise _NotArrays(f"{name} declares {promised:,} bytes but has {size - file.tell():,}")


def _read_parquet(path: Path, wanted: Collection[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    pa = arrow()
    with pa.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        names, known = list(schema.names), dict(schema.metadata or {})
        chosen = [name for name in dict.fromkeys(names) if name in wanted]
        for name in chosen:
            if names.count(name) > 1:
                raise _NotArrays(f"it holds {name} {names.count(name)} times")
        batches, held = [], 0
        # Sizes in the metadata are not used: if they are damaged, pyarrow aborts the whole process.
        for batch in file.iter_batches(_ROWS, columns=chosen):
            held += batch.nbytes
            _check_size(held, path)
            batches.append(batch)
        table = pa.Table.from_batches(batches, pa.schema([schema.field(name) for name in chosen]))
    arrays = {name: column_of(table[name].combine_chunks(), name) for name in chosen}
    if b"idml_jax" in known:
        arrays["about"] = np.asarray(known[b"idml_jax"].decode())
    if b"class_names" in known:
        stored = json.loads(known[b"class_names"])
        if not isinstance(stored, list):
            raise _NotArrays(f"class_names is {type(stored).__name__}, not a list")
        arrays["class_names"] = np.asarray([str(name) for name in stored], "U")
    return arrays, names


def column_of(column: Any, name: str) -> np.ndarray:
    """A column of numbers, text or lists of numbers as an array of one or two dimensions."""
    pa = arrow()
    if isinstance(column, pa.ChunkedArray):  # a table without rows
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if column.null_count:
        raise _NotArrays(f"{name} has {column.null_count:,} empty entries")
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if lists or pa.types.is_fixed_size_list(kind):
        values = column.flatten()
        if pa.types.is_nested(kind.value_type):
            raise _NotArrays(f"{name} holds {kind}, neither numbers nor text")
        widths = {kind.list_size} if not lists else set(column.value_lengths().unique().to_pylist())
        if len(widths) > 1:
            cure = f"; {SEVERAL_LABELS}" if name == "labels" else ""
            raise _NotArrays(f"{name} has rows of different widths: {', '.join(map(str, sorted(widths)[:3]))}{cure}")
        return column_of(values, name).reshape(len(column), next(iter(widths), 0))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return np.asarray(column.to_pylist(), "U")
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return np.asarray([value.decode("utf-8", "surrogateescape") for value in column.to_pylist()], "U")
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise _NotArrays(f"{name} holds {kind}, neither numbers nor text")
    return column.to_numpy(zero_copy_only=False)
