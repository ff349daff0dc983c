"""Images as a caller of Python gives them - paths, a folder, images of Pillow, arrays - as a source.

Images in memory are encoded without loss and read by the decoder of files, so an array gives exactly what a file with
the same pixels gives: its EXIF orientation is applied, 16 bits become 8, and transparent pixels are laid on white.
"""

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from idml_jax.data import files, folders
from idml_jax.data.images.encode import png_of_array, png_of_pillow
from idml_jax.data.lists import list_images
from idml_jax.data.sources import Relabelled, Source
from idml_jax.errors import UserError, printable

_CHANNELS = (1, 3, 4)
_ACCEPTED = "a path, a folder, an image of Pillow, a numpy array, or a list of images"
_RANGES = (
    "pixels are uint8 (0 to 255) or uint16 (0 to 65535), or other numbers that are either fractions from 0 (black) to "
    "1 (white) or whole numbers from 0 to 255"
)


class Given(NamedTuple):
    """The images of a call.

    Attributes:
      source: images, with labels.
      labelled: whether their classes are known.
      single: whether they were named one by one, so that each must be readable.
      origin: where they are from, for the metadata of an index.
    """

    source: Source
    labelled: bool
    single: bool
    origin: str


class MemorySource:
    """Images in memory, and files, in one order.

    Args:
      items: path, encoded bytes, image of Pillow, or pixels ``[h, w]`` or ``[h, w, c]`` of uint8 or uint16, of each.
      names: name of each image in messages.
    """

    def __init__(self, items: Sequence[Any], names: Sequence[str]):
        self._items, self._names = list(items), list(names)
        self.labels = np.zeros(len(items), np.int32)
        self.class_names: Sequence[str] = [""]
        self.fields: dict[str, np.ndarray] = {}
        self._pillow = threading.Lock()  # Pillow reads its files when pixels are first needed

    def __len__(self) -> int:
        return len(self._items)

    def read(self, index: int) -> bytes:
        """The image as the content of a file."""
        item = self._items[index]
        if isinstance(item, str):
            return files.read_file(item)
        if isinstance(item, bytes):
            return item
        if isinstance(item, np.ndarray):
            return png_of_array(item)
        with self._pillow:
            return png_of_pillow(item)

    def name(self, index: int) -> str:
        """Path of the file, or the position of the image in the call."""
        return self._names[index]


def images_of(images: Any, labels: Any = None) -> Given:
    """The images of a call as a source.

    Args:
      images: path of an image, a folder or a list file; an image of Pillow; a numpy array ``[h, w]`` or ``[h, w, c]``,
        or a batch ``[n, h, w, c]``, c of 1, 3 (RGB) or 4 (RGB and alpha); or a list of such images, of any sizes.
        Arrays are uint8 or uint16; other numbers must be fractions from 0 to 1, or whole numbers from 0 to 255, over
        all arrays of the call.
      labels: class of each image, a name or a number; by default those of a folder or list file.

    Raises:
      UserError: naming what is no image, an array of another shape or range, or the wrong number of labels.
    """
    given = _given(images)
    return given if labels is None else _with_labels(given, labels)


def _given(images: Any) -> Given:
    if isinstance(images, str | os.PathLike):
        source, labelled = list_images(os.fspath(images), "images")
        path = files.expand(images)
        return Given(source, labelled, folders.is_image(path.name) and path.is_file(), str(path))
    if not isinstance(images, list | tuple):
        images = _listed(images)
    if not len(images):
        raise UserError("no images: the list is empty")
    items: list[Any] = []
    names: list[str] = []
    for position, image in enumerate(images):
        for part, name in _parts(image, f"image {position}" if len(images) > 1 else "the image"):
            items.append(part)
            names.append(name)
    _to_pixels(items)
    return Given(MemorySource(items, names), False, True, "memory")


def _listed(images: Any) -> list[Any]:
    """One image, or an array of several, as a list."""
    if isinstance(images, Image.Image | bytes | Mapping):  # a mapping is no list of images, whatever its keys are
        return [images]
    if not hasattr(images, "__array__"):
        return list(images) if hasattr(images, "__iter__") else [images]
    if getattr(images, "dtype", None) is not None and np.dtype(object) == images.dtype:  # of arrays or of paths
        return list(images)
    array = np.asarray(images)
    if array.dtype.kind in "US":
        return array.reshape(-1).tolist()
    array = _checked(_array(images, "the array"), "the array")
    return list(array) if array.ndim == 4 else [array]


def _parts(image: Any, name: str) -> list[tuple[Any, str]]:
    """An element of a list of images: a file, encoded bytes, an image of Pillow, or one or several arrays."""
    if isinstance(image, str | os.PathLike):
        path = files.expand(os.fspath(image))
        if path.is_dir():
            raise UserError(f"{files.shown(path)}: a folder in a list of images; give the folder itself")
        return [(str(path), str(path))]
    if isinstance(image, bytes):
        return [(image, name)]
    if isinstance(image, Image.Image):
        file = getattr(image, "filename", "")
        return [(image, os.path.abspath(file) if isinstance(file, str) and file else name)]
    array = _checked(_array(image, name), name)
    if array.ndim == 4:
        return [(part, f"{name}, {row}") for row, part in enumerate(array)]
    return [(array, name)]


def _array(value: Any, name: str) -> np.ndarray:
    if not hasattr(value, "__array__"):
        raise UserError(f"{name} is {type(value).__name__}; an image is given as {_ACCEPTED}")
    try:
        array = np.asarray(value)
    except Exception as error:  # a tensor on another device, or one that needs gradients
        raise UserError(f"{name} cannot be read as a numpy array ({printable(error)})") from error
    if array.dtype.kind not in "uifb":
        raise UserError(f"{name} has the type {array.dtype}; {_RANGES}")
    return array


def _checked(array: np.ndarray, name: str) -> np.ndarray:
    """An array that is an image, ``[h, w]`` or ``[h, w, c]``, or several, ``[n, h, w, c]``."""
    shape = array.shape
    if array.ndim == 2 or (array.ndim in (3, 4) and shape[-1] in _CHANNELS):
        if not array.size:
            raise UserError(f"{name} has the shape {shape}, so no pixels")
        return array
    if array.ndim in (3, 4) and shape[-3] in _CHANNELS:
        first = "np.moveaxis(x, -3, -1)"
        raise UserError(f"{name} has the shape {shape}, channels first; channels are last here: {first} moves them")
    if array.ndim == 3 and shape[-1] == 2:
        raise UserError(f"{name} has the shape {shape}, grey and alpha if the last axis is colours: x[..., 0] is grey")
    if array.ndim == 3:
        raise UserError(
            f"{name} has the shape {shape}; grey images are a list of [h, w], or [n, h, w, 1]: x[..., None]"
        )
    raise UserError(
        f"{name} has the shape {shape}; an image is [h, w] or [h, w, c], a batch [n, h, w, c], c of 1, 3, 4"
    )


def _to_pixels(items: list[Any]) -> None:
    """Converts arrays of other numbers than uint8 and uint16, whose range is that of all of them together."""
    others = []
    for place, item in enumerate(items):
        if isinstance(item, np.ndarray) and item.dtype == bool:
            items[place] = item.astype(np.uint8) * np.uint8(255)
        elif isinstance(item, np.ndarray) and item.dtype not in (np.uint8, np.uint16):
            others.append(place)
    if not others:
        return
    numbers = [items[place] for place in others]
    low, high = float(np.min([x.min() for x in numbers])), float(np.max([x.max() for x in numbers]))  # NaN stays NaN
    whole = all(x.dtype.kind in "ui" or bool((x == np.floor(x)).all()) for x in numbers)
    told = f"the images are {numbers[0].dtype} from {low:.4g} to {high:.4g}"
    if not np.isfinite([low, high]).all():
        raise UserError(f"{told}: NaN or infinity is no pixel")
    if low < 0:
        raise UserError(f"{told}, below 0: the model normalises images by itself, so give them as they are; {_RANGES}")
    if whole and high == 1:
        raise UserError(f"{told}, whole numbers: 1 may be white (then give x.astype(bool)) or nearly black (uint8)")
    if whole and high <= 255:
        converted = [x.astype(np.uint8) for x in numbers]
    elif high <= 1:
        converted = [np.round(x.astype(np.float64) * 255.0).astype(np.uint8) for x in numbers]
    else:
        cure = "x.round().clip(0, 255).astype(np.uint8) makes them so" if high <= 256 else "scale them"
        raise UserError(f"{told}{'' if whole else ', with fractions'}: their range is unknown; {_RANGES}; {cure}")
    for place, value in zip(others, converted, strict=True):
        items[place] = value


def _with_labels(given: Given, labels: Any) -> Given:
    try:
        values = np.asarray(labels)
    except ValueError as error:
        raise UserError("labels differ in their number or shape; each image has one label here") from error
    if values.shape != (len(given.source),):
        raise UserError(f"labels have the shape {values.shape}, but there are {len(given.source):,} images")
    if values.dtype.kind not in "iuUS":
        raise UserError(f"labels have the type {values.dtype}; they are names or whole numbers")
    found, numbers = np.unique(values, return_inverse=True)
    names = [name.decode() if isinstance(name, bytes) else str(name) for name in found.tolist()]
    fields = {name: value for name, value in given.source.fields.items() if name != "labels"}
    return given._replace(source=Relabelled(given.source, numbers, names, fields), labelled=True)
