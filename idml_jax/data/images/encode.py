"""Encodes images in memory without loss, so that they pass through the one decoder exactly like files."""

import io

import cv2
import numpy as np
from jaxtyping import UInt
from PIL import Image

from idml_jax.data.images.decode import FAST_FORMATS, UPRIGHT, DecodeError

_ORIENTATION = 0x0112  # the EXIF tag that tells how a photograph was held
# Pillow's modes that a PNG stores as they are; others are converted to RGB, as the decoder does with them.
_STORED = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def png_of_array(pixels: UInt[np.ndarray, "h w c"]) -> bytes:
    """A PNG of an image.

    Args:
      pixels: ``[h, w]`` or ``[h, w, c]`` uint8 or uint16; 1 channel is grey, 3 are RGB, 4 are RGB and alpha.

    Raises:
      DecodeError: if OpenCV cannot store it.
    """
    pixels = np.ascontiguousarray(pixels)
    if pixels.ndim == 3 and pixels.shape[2] > 1:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR if pixels.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
    try:
        done, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 0])
    except cv2.error as error:
        raise DecodeError(f"cannot be stored as an image ({error.err})") from error
    if not done:
        raise DecodeError("cannot be stored as an image")
    return data.tobytes()


def png_of_pillow(image: Image.Image) -> bytes:
    """A PNG of the current frame of an image of Pillow, with its EXIF orientation.

    Raises:
      DecodeError: for pixels whose range is unknown (modes I and F).
    """
    if image.mode in ("I", "F"):
        raise DecodeError(f"pixels of {'32 bits' if image.mode == 'I' else 'floating point'}, whose range is unknown")
    image.load()
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # invalid EXIF data are ignored, as in files
        orientation = 1
    if image.mode.startswith("I;16"):
        turned = image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
        return png_of_array(np.asarray(turned).astype(np.uint16))
    stored = image if image.mode in _STORED else image.convert("RGBA" if image.has_transparency_data else "RGB")
    buffer = io.BytesIO()
    exif = Image.Exif()
    if orientation in UPRIGHT or stored is not image or _is_careful(image):
        exif[_ORIENTATION] = orientation if orientation in UPRIGHT else 1
    stored.save(buffer, "PNG", compress_level=1, exif=exif.tobytes() if len(exif) else b"", icc_profile=None)
    return buffer.getvalue()


def _is_careful(image: Image.Image) -> bool:
    """Whether Pillow decodes the image's file, not OpenCV, whose grey of a colour may differ by 1.

    A PNG with EXIF data is decoded by Pillow too.
    """
    if image.format in ("JPEG", "MPO"):
        return False
    return "exif" in image.info or (image.format is not None and image.format not in FAST_FORMATS)
