"""Reads PyTorch's files of tensors without PyTorch; nothing in them is executed.

Both formats: a zip archive of ``data.pkl`` and one file per storage (since PyTorch 1.6), and the older sequence of
pickles followed by the storages. Only dense tensors of plain numbers are read.
"""

import io
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from idml_jax.data.stored.plain_pickle import Name, PickleError, interpret

_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of the older format
_TYPES: dict[str, Any] = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
_BUILDERS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}
_NAMES = _BUILDERS | {("torch", name) for name in _TYPES}


class _Storage(NamedTuple):
    key: str
    dtype: Any
    size: int


class PlainTensor(NamedTuple):
    """A tensor as a file describes it: a view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: Path) -> tuple[object, Callable[[PlainTensor], np.ndarray]]:
    """Reads a file of tensors.

    Args:
      path: a file that ``torch.save`` wrote.

    Returns:
      What was saved, with a ``PlainTensor`` in the place of every tensor; and the function that gives its array.

    Raises:
      PickleError: if the file is damaged, or holds more than plain containers of dense tensors.
    """
    if zipfile.is_zipfile(path):
        content, storages = _read_zip(path)
    else:
        content, storages = _read_sequence(path)
    return content, lambda tensor: _array(tensor, storages)


def _read_zip(path: Path) -> tuple[object, dict[str, bytes]]:
    storages: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise PickleError("the archive holds no data.pkl")
            folder = pickles[0].removesuffix("data.pkl")
            if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
                raise PickleError("its numbers are big-endian")

            def outside(identity: object) -> _Storage:
                storage = _storage(identity)
                if storage.key not in storages:
                    member = archive.getinfo(f"{folder}data/{storage.key}")
                    # PyTorch stores without compression, so what is read is no larger than the file.
                    if member.compress_type != zipfile.ZIP_STORED or member.file_size != _bytes(storage):
                        raise PickleError(f"storage {storage.key} has another size than it says")
                    storages[storage.key] = archive.read(member)
                return storage

            return interpret(archive.read(pickles[0]), _NAMES, _call, outside), storages
    except (OSError, KeyError, NotImplementedError, zipfile.BadZipFile) as error:
        raise PickleError(str(error) or "damaged") from error


def _read_sequence(path: Path) -> tuple[object, dict[str, bytes]]:
    data = path.read_bytes()
    if not data.startswith(_MAGIC):
        raise PickleError("no file of PyTorch")
    file = io.BytesIO(data)
    nothing: tuple[()] = ()
    for _ in range(3):  # the magic number, the version of the format, the sizes of C's types
        interpret(file, nothing, _call)
    seen: dict[str, _Storage] = {}

    def outside(identity: object) -> _Storage:
        storage = _storage(identity)
        if seen.setdefault(storage.key, storage) != storage:
            raise PickleError(f"storage {storage.key} has two types")
        return storage

    content = interpret(file, _NAMES, _call, outside)
    keys = interpret(file, nothing, _call)
    storages: dict[str, bytes] = {}
    for key in keys if isinstance(keys, list) else ():
        size = int.from_bytes(file.read(8), "little")
        if key not in seen or size != seen[key].size:
            raise PickleError(f"storage {key!r} has another size than it says")
        storages[key] = file.read(_bytes(seen[key]))
        if len(storages[key]) != _bytes(seen[key]):
            raise PickleError("cut short")
    return content, storages


def _bytes(storage: _Storage) -> int:
    return storage.size * np.dtype(storage.dtype).itemsize


def _storage(identity: object) -> _Storage:
    """The storage that a persistent id names: ``("storage", type, key, device, numbers)``, in older files one more."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise PickleError("damaged")
    _, kind, key, _, size = identity[:5]
    known = isinstance(kind, Name) and kind.module == "torch" and kind.name in _TYPES
    if not known or not isinstance(key, str) or type(size) is not int or size < 0 or identity[5:] not in ((), (None,)):
        raise PickleError("it holds more than dense tensors")
    return _Storage(key, _TYPES[kind.name], size)


def _call(function: Name, arguments: tuple) -> object:
    if function.name == "OrderedDict":
        if arguments:
            raise PickleError("damaged")
        return {}
    if function.name == "_rebuild_parameter":
        return arguments[0]
    storage, offset, shape, strides = arguments[:4]
    whole = lambda values: isinstance(values, tuple) and all(type(value) is int and value >= 0 for value in values)
    if not isinstance(storage, _Storage) or not whole((offset,)) or not whole(shape) or not whole(strides):
        raise PickleError("it holds more than dense tensors")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    # A tensor that repeats its storage would be larger than the file.
    if math.prod(shape) > storage.size or (math.prod(shape) and last >= storage.size):
        raise PickleError("a tensor is larger than its storage")
    return PlainTensor(storage, offset, shape, strides)


def _array(tensor: PlainTensor, storages: dict[str, bytes]) -> np.ndarray:
    if tensor.storage.key not in storages:
        raise PickleError(f"storage {tensor.storage.key} is missing")
    flat = np.frombuffer(storages[tensor.storage.key], tensor.storage.dtype)[tensor.offset :]
    steps = tuple(stride * flat.itemsize for stride in tensor.strides)
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, steps, writeable=False).astype(np.float32)
