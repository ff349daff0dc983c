"""Decodes a part of a JPEG with libjpeg-turbo 3, if it is installed; the pixels equal those of a full decoding.

The library is searched in the system (``libturbojpeg``) and in the PyPI package ``turbojpeg``, which includes it.
Without it everything works, but takes slightly longer per image.
"""

import ctypes
import functools
import importlib.util
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

_NAMES = ("libturbojpeg.so.0", "libturbojpeg.0.dylib", "turbojpeg.dll")
_DECOMPRESS, _RGB, _GREY = 1, 0, 6
# Parts start at a multiple of the largest chroma block and include a margin for its interpolation on all sides.
_ALIGN, _MARGIN = 32, 16


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


def _candidates() -> Iterator[str]:
    """Names and paths under which the library may be found, the system's first."""
    yield from _NAMES
    spec = importlib.util.find_spec("turbojpeg")
    if spec is not None and spec.origin:
        folder = Path(spec.origin).parent
        places = (folder / "turbojpeg.libs", folder / ".dylibs", folder / "turbojpeg" / ".dylibs", folder)
        yield from map(str, itertools.chain.from_iterable(sorted(p.glob("*libturbojpeg*")) for p in places))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, or ``None`` if version 3 is not installed."""
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name in _candidates():
        try:
            found = ctypes.CDLL(name)
            found.tj3Init.restype = pointer
            found.tj3Init.argtypes = [ctypes.c_int]
            found.tj3DecompressHeader.argtypes = [pointer, ctypes.c_char_p, size]
            found.tj3SetCroppingRegion.argtypes = [pointer, _Region]
            found.tj3Decompress8.argtypes = [pointer, ctypes.c_char_p, size, pointer, ctypes.c_int, ctypes.c_int]
            found.tj3Destroy.argtypes = [pointer]
            found.tj3Destroy.restype = None
        except (OSError, AttributeError):
            continue
        return found
    return None


class _Handle:
    """A decompressor; one per thread, since it has state."""

    def __init__(self, library: ctypes.CDLL):
        self._destroy, self.pointer = library.tj3Destroy, library.tj3Init(_DECOMPRESS)

    def __del__(self) -> None:
        if self.pointer:
            self._destroy(self.pointer)


_local = threading.local()


def decode_part(
    data: bytes, box: tuple[int, int, int, int], size: tuple[int, int], channels: int
) -> UInt8[np.ndarray, "h w c"] | None:
    """Decodes a part of a JPEG with 1 or 3 components.

    Args:
      data: the file's bytes.
      box: top, left, height and width in pixels.
      size: height and width of the whole image in pixels.
      channels: 3 for RGB, 1 for grey.

    Returns:
      ``[height, width, channels]``, bit for bit that part of the whole image; ``None`` if the library is missing or
      reports any problem with the file, which must then be decoded as a whole.
    """
    turbo = library()
    if turbo is None:
        return None
    handle = getattr(_local, "handle", None)
    if handle is None:
        handle = _local.handle = _Handle(turbo)
    out = _decode(turbo, handle.pointer, data, box, size, channels) if handle.pointer else None
    if out is None:
        _local.handle = None  # after an error it would refuse good files too
    return out


def _decode(
    turbo: ctypes.CDLL, handle: int, data: bytes, box: tuple[int, int, int, int], size: tuple[int, int], channels: int
) -> np.ndarray | None:
    if turbo.tj3DecompressHeader(handle, data, len(data)):
        return None
    top, left, height, width = box
    x, y = max(0, (left - _MARGIN) // _ALIGN * _ALIGN), max(0, top - _MARGIN)
    right, bottom = min(size[1], left + width + _MARGIN), min(size[0], top + height + _MARGIN)
    if turbo.tj3SetCroppingRegion(handle, _Region(x, y, right - x, bottom - y)):
        return None
    out = np.empty((bottom - y, right - x, channels), np.uint8)
    if turbo.tj3Decompress8(handle, data, len(data), out.ctypes.data, 0, _RGB if channels == 3 else _GREY):
        return None
    return out[top - y : top - y + height, left - x : left - x + width]
