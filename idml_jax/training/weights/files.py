"""Reads the tensors of files: safetensors, and PyTorch's formats. The only importer of both packages for reading."""

import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from idml_jax.data.stored.plain_pickle import PickleError
from idml_jax.errors import UserError, printable
from idml_jax.runtime.files import first_line, write_bytes
from idml_jax.training.weights import plain_torch
from idml_jax.training.weights.tensors import CONTAINERS, Named

# Dictionaries of tensors lie at most so deep in a checkpoint ({"state": {"model": {...}}}).
_DEEPEST = 3


def read_files(files: tuple[Path, ...]) -> tuple[dict[str, Named], dict[str, str]]:
    """Reads the files of one set of weights.

    Args:
      files: one file, or the pieces of weights in several.

    Returns:
      The dictionaries of tensors as float32 arrays, by their place in the file (empty: the file itself); and the
      metadata of a ``.safetensors`` file.

    Raises:
      UserError: if a file is damaged, holds no tensors, or holds a tensor of another file.
    """
    containers: dict[str, Named] = {}
    metadata: dict[str, str] = {}
    for file in files:
        _refuse_stand_in(file)
        if file.suffix == ".safetensors":
            named, about = read_safetensors(file)
            metadata.update(about)
            found = {"": named}
        else:
            found = read_torch(file)
        for place, named in found.items():
            known = containers.setdefault(place, {})
            twice = known.keys() & named.keys()
            if twice:
                raise UserError(f"{file}: holds {sorted(twice)[0]}, which another file of these weights holds too")
            known.update(named)
    return containers, metadata


def _refuse_stand_in(path: Path) -> None:
    """Refuses what often lies in the place of weights: a pointer of Git LFS, or a web page."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:
        return  # the reader says what is wrong
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path}: is a pointer of Git LFS, not the weights; run git lfs pull, or download the file itself"
        )
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{path}: is a web page, not weights; download the file itself, not the page about it")


def read_safetensors(path: Path) -> tuple[Named, dict[str, str]]:
    """The tensors, and the metadata."""
    import ml_dtypes  # noqa: F401  numpy then knows bfloat16
    from safetensors import numpy as safetensors
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118  it is no dictionary
                _check_type(path, name, file.get_slice(name).get_dtype())
        named = safetensors.load_file(path)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be read as safetensors ({first_line(error)})") from error
    return {name: value.astype(np.float32) for name, value in named.items()}, metadata


_FLOATS = ("float64", "float32", "float16", "bfloat16", "F64", "F32", "F16", "BF16")
_WHOLE = re.compile(r"(u?int|bool|[iu]\d)\w*", re.IGNORECASE)


def _check_type(path: Path, name: str, kind: str) -> None:
    """Refuses quantised weights: without their scales, their numbers are others.

    Args:
      path: the file, for the message.
      name: of the tensor; counters and indices may hold whole numbers, ``weight`` may not.
      kind: type of its numbers, as numpy, PyTorch or safetensors call it.

    Raises:
      UserError: naming tensor and type.
    """
    allowed = kind in _FLOATS or (_WHOLE.fullmatch(kind) and not name.endswith("weight"))
    if not allowed:
        raise UserError(
            f"{path}: {name} holds numbers of type {kind}, as quantised weights do; give the weights in float32, "
            "float16 or bfloat16"
        )


def write_safetensors(path: Path, named: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes a ``.safetensors`` file, completely or not at all."""
    from safetensors import numpy as safetensors

    write_bytes(path, safetensors.save({n: np.ascontiguousarray(v) for n, v in named.items()}, metadata))


def read_torch(path: Path) -> dict[str, Named]:
    """The dictionaries of tensors in a file of PyTorch, by their place in it."""
    content, kind, dense = _content(path)
    found = {
        place: {name: dense(name, value) for name, value in named.items()}
        for place, named in _dictionaries(content, kind)
    }
    if not found and content == {}:
        return {"": {}}
    if not found:
        there = sorted(map(str, content))[:6] if isinstance(content, Mapping) else []
        holds = f"a {type(content).__name__}" + (f" of {', '.join(map(printable, there))}" if there else "")
        raise UserError(f"{path}: holds no state_dict, alone or under {', '.join(CONTAINERS)}; it holds {holds}")
    return found


def _content(path: Path) -> tuple[Any, type, Callable[[str, Any], np.ndarray]]:
    """What a file of PyTorch holds, the type of a tensor in it, and the function that gives a tensor's numbers."""
    if _is_program(path):
        raise UserError(
            f"{path}: is a program of TorchScript, which would be run to be read; save its state_dict alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), OTHER_FILE)"
        )
    try:
        import torch
    except ImportError:
        return _content_without_torch(path)
    try:
        # Only tensors and plain containers are unpickled: a weights file cannot run code.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path}: is damaged, or holds more than tensors and is refused ({printable(_told(error))}); "
            "save the state_dict alone: torch.save(model.state_dict(), FILE)"
        ) from error
    return content, torch.Tensor, lambda name, value: _dense(path, name, value)


def _told(error: Exception) -> str:
    """What PyTorch says is wrong, without its advice to unpickle whatever is there."""
    if found := re.search(r"GLOBAL ([\w.]+) was not an allowed global", str(error)):
        return f"it holds objects of {found[1]}"
    line = first_line(error)
    return line.split("Re-running", 1)[0].split("This file can still be loaded", 1)[0].strip(" .,") or "damaged"


def _is_program(path: Path) -> bool:
    """Whether a file is an archive of TorchScript."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False  # the reader says what is wrong


def _content_without_torch(path: Path) -> tuple[Any, type, Callable[[str, Any], np.ndarray]]:
    try:
        content, array = plain_torch.read(path)
    except (PickleError, OSError) as error:
        raise UserError(
            f"{path}: is damaged, or holds more than dense tensors ({first_line(error)}); the rest is read by PyTorch, "
            "which is not installed; save the state_dict alone (torch.save(model.state_dict(), FILE)), or install it "
            "(pip install torch)"
        ) from error

    def dense(name: str, value: plain_torch.PlainTensor) -> np.ndarray:
        _check_type(path, name, np.dtype(value.storage.dtype).name)
        return array(value)

    return content, plain_torch.PlainTensor, dense


def _dictionaries(content: Any, tensor: type, place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every dictionary of tensors by name in nested dictionaries; other entries beside the tensors are passed over."""
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return
    named = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, tensor)}
    if named:
        yield place, named
    for key, value in content.items():
        # States of optimizers hold tensors too, of the parameters' shapes.
        if isinstance(key, str) and "optim" not in key:
            yield from _dictionaries(value, tensor, f"{place}.{key}" if place else key, depth + 1)


def _dense(path: Path, name: str, value: Any) -> np.ndarray:
    """A PyTorch tensor as a float32 array; also for sparse and quantised tensors."""
    try:
        value = value.detach()
        value = value.dequantize() if value.is_quantized else value
        _check_type(path, name, str(value.dtype).removeprefix("torch."))
        value = value.to_dense() if value.layout != _strided() else value
        return value.float().numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UserError(f"{path}: {name} cannot be read as numbers ({first_line(error)})") from error


def _strided() -> Any:
    import torch

    return torch.strided
