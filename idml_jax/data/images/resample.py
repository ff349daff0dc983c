"""Resampling with the antialiased bilinear filter of torchvision's transforms, exactly or fast.

The filter is a triangle scaled with the image: if an image shrinks by s, each output pixel is the mean of the pixels
within distance s, weighted by 1 - distance / s. ``exact`` uses Pillow and gives torchvision's pixels. ``fast``
filters with a few taps and interpolates linearly, both in OpenCV; the taps minimise the squared error of the two steps
together against the triangle, over all positions between two pixels. ``docs/input_pipeline.md`` reports the error.
"""

import functools
import math

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

METHODS = ("fast", "exact")
# Ratio of the two sides' scales above which ``exact`` is faster.
_MAX_STRETCH = 8


@functools.lru_cache(maxsize=4096)
def _taps(steps: int, halvings: int) -> Float[np.ndarray, "k"]:
    """The filter to apply before linear interpolation with a step of ``steps / 64`` pixels.

    Args:
      steps: 64 times the scale.
      halvings: number of times that pairs of pixels were averaged before, which is part of the smoothing.

    Returns:
      An odd number of symmetric taps, which sum to 1.
    """
    scale = steps / 64
    if scale <= 1:
        return np.ones(1, np.float32)
    # A triangle of half-width s has variance s^2 / 6; the mean of m pixels already contributes (1 - 1 / m^2) / 12.
    width = math.sqrt(max(scale**2 - (1 - 4.0**-halvings) / 2, 1.0))
    reach = max(1, math.ceil(scale - 0.15) - 1)
    places = np.arange(-reach - math.ceil(scale) - 2, reach + math.ceil(scale) + 3)
    phases = (np.arange(32)[:, None] + 0.5) / 32 - 0.5
    triangle = np.maximum(0, 1 - np.abs(places - phases) / width)
    triangle /= triangle.sum(1, keepdims=True)
    linear = np.maximum(0, 1 - np.abs(places - phases))
    columns = [linear] + [np.roll(linear, k, 1) + np.roll(linear, -k, 1) for k in range(1, reach + 1)]
    # Photographs have mostly low frequencies; running sums weigh the errors accordingly.
    matrix = np.cumsum(np.stack(columns, -1), axis=1).reshape(-1, reach + 1)
    target = np.cumsum(triangle, axis=1).reshape(-1)
    # The taps sum to 1, so the middle one follows from the others.
    others = matrix[:, 1:] - 2 * matrix[:, :1]
    side = np.linalg.lstsq(others, target - matrix[:, 0], rcond=None)[0]
    taps = np.concatenate([side[::-1], [1 - 2 * side.sum()], side]).astype(np.float32)
    taps.flags.writeable = False
    return taps


def resize(
    image: UInt8[np.ndarray, "h w c"],
    height: int,
    width: int,
    method: str = "fast",
    *,
    reduced: int = 1,
    extent: tuple[float, float] | None = None,
) -> UInt8[np.ndarray, "height width c"]:
    """Resamples an image.

    Args:
      image: ``[h, w, 1 or 3]`` uint8.
      height: height of the result in pixels.
      width: width of the result in pixels.
      method: one of ``METHODS``.
      reduced: factor (1, 2, 4 or 8) by which the image was reduced in decoding; ``fast`` takes it into account.
      extent: height and width that the result covers, in pixels of ``image``, if they are not whole numbers.

    Returns:
      ``[height, width, c]`` uint8.
    """
    extent = extent or (image.shape[0], image.shape[1])
    if image.shape[:2] == extent == (height, width):
        return image
    scales = extent[0] / height, extent[1] / width
    # The fast filters are as long as the scale and need a solver, which is too expensive for thin images.
    if method == "exact" or max(scales) > _MAX_STRETCH * min(scales):
        pixels = Image.fromarray(np.ascontiguousarray(image if image.shape[2] == 3 else image[:, :, 0]))
        box = (
            None
            if image.shape[:2] == extent
            else (0.0, 0.0, min(extent[1], image.shape[1]), min(extent[0], image.shape[0]))
        )
        out = np.asarray(pixels.resize((width, height), Image.Resampling.BILINEAR, box=box))
    else:
        out = _resize_fast(image, (height, width), extent, reduced.bit_length() - 1)
    return out.reshape(height, width, image.shape[2])


def resize_part(
    image: UInt8[np.ndarray, "h w c"], size: tuple[int, int], box: tuple[int, int, int, int]
) -> UInt8[np.ndarray, "height width c"]:
    """Computes only a part of a resized image; equals the method ``exact`` up to rounding.

    Args:
      image: ``[h, w, 1 or 3]`` uint8.
      size: height and width in pixels that the whole image would be resized to.
      box: top, left, height and width in pixels of the part, in the resized image.

    Returns:
      ``[height, width, c]`` uint8.
    """
    top, left, height, width = box
    down, across = image.shape[0] / size[0], image.shape[1] / size[1]
    # The filter reaches one scale (at least one pixel) to each side; other pixels are not needed.
    reach_down, reach_across = math.ceil(max(down, 1)) + 1, math.ceil(max(across, 1)) + 1
    first_row, first_column = max(0, int(top * down) - reach_down), max(0, int(left * across) - reach_across)
    last_row = min(image.shape[0], math.ceil((top + height) * down) + reach_down)
    last_column = min(image.shape[1], math.ceil((left + width) * across) + reach_across)
    near = np.ascontiguousarray(image[first_row:last_row, first_column:last_column])
    pixels = Image.fromarray(near if near.shape[2] == 3 else near[:, :, 0])
    area = (
        max(0.0, left * across - first_column),
        max(0.0, top * down - first_row),
        min(float(near.shape[1]), (left + width) * across - first_column),
        min(float(near.shape[0]), (top + height) * down - first_row),
    )
    out = np.asarray(pixels.resize((width, height), Image.Resampling.BILINEAR, box=area))
    return out.reshape(height, width, image.shape[2])


def _resize_fast(image: np.ndarray, size: tuple[int, int], extent: tuple[float, float], halvings: int) -> np.ndarray:
    # Averaging two by two pixels is fast and leaves less to filter. An odd last row or column has no partner.
    while min(extent[0] / size[0], extent[1] / size[1]) > 4.1:
        height, width = image.shape[0] // 2, image.shape[1] // 2
        image = cv2.resize(image[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
        extent = (extent[0] / 2, extent[1] / 2)
        halvings += 1
    scales = extent[0] / size[0], extent[1] / size[1]
    vertical, horizontal = (_taps(round(64 * scale), halvings) for scale in scales)
    if len(vertical) > 1 or len(horizontal) > 1:
        image = cv2.sepFilter2D(image, -1, horizontal, vertical, borderType=cv2.BORDER_REPLICATE)
    if image.shape[:2] == extent:
        return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    # The same for a fractional extent: the source position of each pixel's centre.
    origin = [(scale - 1) / 2 for scale in scales]
    places = np.array([[scales[1], 0, origin[1]], [0, scales[0], origin[0]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, places, size[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)
