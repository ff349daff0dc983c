"""Small versions of images, for pages and sheets."""

import numpy as np

from idml_jax.data.images.decode import DecodeError, Picture
from idml_jax.data.images.resample import resize

SIDE = 192  # pixels: sharp on fine screens, and enough when a click enlarges it


def thumbnail(data: bytes, side: int = SIDE, within: tuple[int, int, int, int] | None = None) -> np.ndarray | None:
    """A thumbnail of at most ``side`` pixels, ``[h, w, 3]`` uint8, of a picture or of a part of it (left, top, right,
    bottom); ``None`` if the image is unreadable."""
    try:
        pixels = Picture(data, 3, within).part(None)
    except DecodeError:
        return None
    scale = min(1.0, side / max(pixels.shape[:2]))
    height, width = (max(1, round(scale * n)) for n in pixels.shape[:2])
    return pixels if scale == 1.0 else np.ascontiguousarray(resize(pixels, height, width))
