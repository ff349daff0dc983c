"""Random colour changes on uint8 images, as defined by torchvision and AlexNet.

The blends are those of Pillow's ``ImageEnhance``: of the image with black (brightness), with the mean of its grey
version (contrast) or with its grey version (saturation), truncated to whole numbers after each. Operations that are the
same for all pixels use a table of 256 values per channel, so they cost one look-up each.
"""

import cv2
import numpy as np
from jaxtyping import Float, UInt8

# Principal components of ImageNet's RGB values in [0, 1] (Krizhevsky et al. 2012), one column per component.
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])

_VALUES = np.arange(256, dtype=np.float32)


def _blend_table(other: float, factor: float) -> UInt8[np.ndarray, "256"]:
    """``other + factor * (value - other)``, clipped to [0, 255]."""
    other, factor = np.float32(other), np.float32(factor)
    return np.clip(other + factor * (_VALUES - other), 0, 255).astype(np.uint8)


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.shape[2] == 3 else image[:, :, 0]


def _look_up(image: np.ndarray, table: np.ndarray) -> UInt8[np.ndarray, "h w c"]:
    return cv2.LUT(image, table).reshape(image.shape)


def brightness(image: UInt8[np.ndarray, "h w c"], factor: float) -> UInt8[np.ndarray, "h w c"]:
    """Blends with black; 1 changes nothing."""
    return _look_up(image, _blend_table(0.0, factor))


def contrast(image: UInt8[np.ndarray, "h w c"], factor: float) -> UInt8[np.ndarray, "h w c"]:
    """Blends with the mean of the grey image, rounded to a whole number; 1 changes nothing."""
    mean = int(cv2.mean(_grey(image))[0] + 0.5)
    return _look_up(image, _blend_table(mean, factor))


def saturation(image: UInt8[np.ndarray, "h w c"], factor: float) -> UInt8[np.ndarray, "h w c"]:
    """Blends with the grey image; 1 changes nothing, and grey images stay as they are."""
    if image.shape[2] == 1:
        return image
    grey = cv2.cvtColor(_grey(image), cv2.COLOR_GRAY2RGB)
    # addWeighted rounds; subtracting a half (and its rounding error) makes it truncate.
    return cv2.addWeighted(image, factor, grey, 1 - factor, -0.499)


def jitter(image: UInt8[np.ndarray, "h w c"], strength: float, rng: np.random.Generator) -> UInt8[np.ndarray, "h w c"]:
    """Brightness, contrast and saturation in random order, each by a factor in [1 - strength, 1 + strength].

    Args:
      image: ``[h, w, 3 or 1]`` uint8.
      strength: in [0, 1].
      rng: generator of the factors and the order.

    Returns:
      The changed image.
    """
    changes = (brightness, contrast, saturation)
    factors = rng.uniform(1 - strength, 1 + strength, 3)
    for which in rng.permutation(3):
        image = changes[which](image, float(factors[which]))
    return image


def lighting_shift(alphas: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3"]:
    """The offset of R, G and B (in 0 to 255) for the given multiples of the principal components."""
    return EIGENVECTORS @ (np.asarray(alphas) * EIGENVALUES) * 255


def lighting(
    image: UInt8[np.ndarray, "h w 3"], strength: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Adds random multiples of ImageNet's principal colour components, normal with standard deviation ``strength``.

    The sum is rounded and clipped to [0, 255]; the result differs from the floating-point one by 0.25 on average.

    Args:
      image: ``[h, w, 3]`` uint8.
      strength: standard deviation of the multiples.
      rng: generator of the multiples.

    Returns:
      The changed image.
    """
    shift = lighting_shift(rng.normal(0.0, strength, 3)).astype(np.float32)
    tables = np.clip(_VALUES[:, None] + shift, 0, 255).round().astype(np.uint8)
    return cv2.LUT(image, tables.reshape(1, 256, 3))
