"""Decodes bytes to uint8 images; the only decoder of the package.

An image is decoded as by Pillow's ``Image.open(...).convert("RGB")``, except that the EXIF orientation is applied and
transparent pixels are laid on white; invalid EXIF data are ignored. Colour profiles are ignored, and the first frame of
an animation is used.

The content determines the format, not the file name, and only the formats in ``FORMATS`` are tried: other formats that
Pillow knows start programs (PostScript) or do not hold photographs. Any failure with one image is a ``DecodeError``.
"""

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from idml_jax.data.images import turbo
from idml_jax.errors import UserError
from idml_jax.runtime.options import limit

# The pipeline already runs threads; OpenCV's own threads would only compete with them.
cv2.setNumThreads(0)
# A damaged image is reported by a ``DecodeError``, not by OpenCV's log lines.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# Pillow warns about odd metadata; real problems raise.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Formats by Pillow's name, with the file extensions that folders are searched for. (Importing a plug-in makes
# Pillow know the format without loading all the others.)
FORMATS: dict[str, tuple[str, ...]] = {
    JpegImagePlugin.JpegImageFile.format: (".jpg", ".jpeg", ".jfif", ".jpe"),
    PngImagePlugin.PngImageFile.format: (".png",),
    WebPImagePlugin.WebPImageFile.format: (".webp",),
    BmpImagePlugin.BmpImageFile.format: (".bmp",),
    TiffImagePlugin.TiffImageFile.format: (".tif", ".tiff"),
    GifImagePlugin.GifImageFile.format: (".gif",),
    PpmImagePlugin.PpmImageFile.format: (".ppm", ".pgm"),
}
if features.check("avif"):
    from PIL import AvifImagePlugin

    FORMATS[AvifImagePlugin.AvifImageFile.format] = (".avif",)
if importlib.util.find_spec("pillow_heif") is not None:
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS["HEIF"] = (".heic", ".heif", ".hif")
ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)

# Pillow's own limit against decompression bombs: 268 MB of RGB. The environment variable sets another.
MAX_PIXELS = 89_478_485
_LIMIT = "IDML_JAX_MAX_PIXELS"
# Formats that OpenCV decodes like Pillow, but faster; Pillow decodes the others.
FAST_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP")
_FAST_MODES = ("L", "RGB", "1")
# The operation that undoes each EXIF orientation.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# OpenCV's flags by channels and reduction factor.
_GREY = {
    1: cv2.IMREAD_GRAYSCALE,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
_COLOUR = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


class DecodeError(ValueError):
    """The bytes are not a complete image of a supported format."""


@contextlib.contextmanager
def one_image_fails() -> Iterator[None]:
    """Converts any failure with one image, including lack of memory, to a ``DecodeError``."""
    try:
        yield
    except (DecodeError, UserError):
        raise
    except MemoryError as error:
        raise DecodeError("not a readable image (not enough memory)") from error
    except Exception as error:
        reason = getattr(error, "err", None) or str(error) or type(error).__name__
        raise DecodeError(f"not a readable image ({' '.join(str(reason).split())})") from error


class _Jpeg(NamedTuple):
    """The header of a plain JPEG."""

    height: int
    width: int
    components: int
    exif: bool


def _jpeg_header(data: bytes) -> _Jpeg | None:
    """Size and components of a complete 8-bit JPEG with 1 or 3 components; ``None`` for other data."""
    # A complete file ends with an end marker, which a few bytes may follow.
    if data[:3] != b"\xff\xd8\xff" or b"\xff\xd9" not in data[-64:]:
        return None
    place, exif, end, frame = 2, False, len(data) - 10, None
    while place < end and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = int.from_bytes(data[place + 5 : place + 7]), int.from_bytes(data[place + 7 : place + 9])
            precision, components = data[place + 4], data[place + 9]
            plain = precision == 8 and components in (1, 3) and marker <= 0xC2 and height and width
            if frame is not None or not plain:
                return None
            frame = (height, width, components)
        if marker == 0xE1 and data[place + 4 : place + 8] == b"Exif":
            exif = True
        if 0xD0 <= marker <= 0xDA:  # the pixels begin
            break
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return None if frame is None else _Jpeg(*frame, exif)


def max_pixels() -> int:
    """The largest number of pixels of a picture.

    Raises:
      UserError: if the environment variable is not a number.
    """
    value = limit(_LIMIT, MAX_PIXELS)
    if value > MAX_PIXELS:  # Pillow refuses twice its own limit by itself
        Image.MAX_IMAGE_PIXELS = value
    return value


def _check_size(height: int, width: int) -> None:
    most = max_pixels()
    if height * width > most:
        raise DecodeError(f"{width} x {height} pixels are more than the limit of {most} ({_LIMIT} sets it)")


def _open(data: bytes) -> Image.Image:
    """Reads only the header, to know format and size before allocating memory."""
    if not data:
        raise DecodeError("the file is empty")
    if data[:8] == b"\x89PNG\r\n\x1a\n":  # before Pillow, which warns of such sizes
        _check_size(int.from_bytes(data[20:24]), int.from_bytes(data[16:20]))
    most = max_pixels()
    try:
        image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
    except Image.DecompressionBombError as error:
        raise DecodeError(f"it has more pixels than the limit of {most} ({_LIMIT} sets it)") from error
    except Exception as error:
        raise DecodeError("not an image in a known format") from error
    _check_size(image.size[1], image.size[0])
    return image


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether OpenCV decodes the data like Pillow; OpenCV silently fills truncated files with grey."""
    if image.format not in FAST_FORMATS or image.mode not in _FAST_MODES or getattr(image, "is_animated", False):
        return False
    if image.has_transparency_data:
        return False
    if image.format in ("JPEG", "MPO"):
        return b"\xff\xd9" in data[-64:]
    # The EXIF data of a PNG may follow its pixels, where opening the file does not find them.
    return "exif" not in image.info and (image.format != "PNG" or (b"IEND" in data[-64:] and b"eXIf" not in data))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The operation that turns a photograph upright; ``None`` if there is none or the EXIF data are invalid."""
    try:
        return UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:
        return None


def _turned(data: bytes, pixels: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
    """Pixels of a JPEG with EXIF data, turned upright."""
    try:
        turn = _turn(_open(data))
    except DecodeError:  # only the metadata are bad; the pixels are fine
        turn = None
    if turn is None:
        return pixels
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).transpose(turn)
    return np.asarray(image).reshape(image.height, image.width, pixels.shape[2])


def check_whole(data: bytes) -> None:
    """Checks header, size and end of an encoded image; a cheap check that does not find all damage.

    Raises:
      DecodeError: as ``decode``.
    """
    with one_image_fails():
        header = _jpeg_header(data)
        if header is not None:
            _check_size(header.height, header.width)
            return
        image = _open(data)
        if not _is_plain(image, data):
            _decode_carefully(image, 3)


def decode(data: bytes, channels: int = 3) -> UInt8[np.ndarray, "h w c"]:
    """Decodes an image of one of ``FORMATS``; EXIF rotation is applied, transparent pixels are laid on white.

    Args:
      data: the file's bytes.
      channels: 3 for RGB, 1 for grey.

    Returns:
      ``[h, w, channels]`` uint8.

    Raises:
      DecodeError: if the data is empty, unreadable, truncated, or larger than ``MAX_PIXELS``.
    """
    return Picture(data, channels).part(None)


def _decode_fast(data: bytes, channels: int, reduce: int = 1) -> UInt8[np.ndarray, "h w c"]:
    flags = (_COLOUR if channels == 3 else _GREY)[reduce] | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise DecodeError(f"not a readable image ({error.err})") from error
    if image is None:
        raise DecodeError("not a readable image")
    if channels == 1:
        return image[:, :, None]
    return image if reduce == 1 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _decode_carefully(image: Image.Image, channels: int) -> UInt8[np.ndarray, "h w c"]:
    """Decodes with Pillow, for files that OpenCV accepts though truncated or converts differently (CMYK, 16 bit)."""
    try:
        image.load()  # raises for a truncated file
    except Exception as error:
        raise DecodeError(f"not a readable image ({error})".replace("\n", " ")) from error
    # 16-bit grey; Pillow loads a PGM file as 32 bits with the range of 16.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        values = np.asarray(image).astype(np.float32)
        image_8 = Image.fromarray((values * (255.0 / 65535.0)).round().astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DecodeError(f"pixels of {'32 bits' if image.mode == 'I' else 'floating point'}, whose range is unknown")
    else:
        image_8 = _on_white(image) if image.has_transparency_data else image
    turn = _turn(image)
    image_8 = image_8 if turn is None else image_8.transpose(turn)
    array = np.asarray(image_8.convert("RGB" if channels == 3 else "L"))
    return array if channels == 3 else array[:, :, None]


def _on_white(image: Image.Image) -> Image.Image:
    """A picture with transparent pixels on white; opaque ones keep their colours."""
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


class Picture:
    """An encoded image whose pixels are decoded when a part is requested.

    Args:
      data: the file's bytes.
      channels: 3 for RGB, 1 for grey.
      within: left, top, right and bottom, in pixels of the upright picture, of the part that is the image; ``None``:
        all of it.

    Attributes:
      shape: height, width and channels.

    Raises:
      DecodeError: as ``decode``, and if the part lies outside of the picture.
    """

    def __init__(self, data: bytes, channels: int = 3, within: tuple[int, int, int, int] | None = None):
        self._data, self._channels = data, channels
        self._whole: np.ndarray | None = None
        self.shape: tuple[int, int, int]
        with one_image_fails():
            header = _jpeg_header(data)
            if header is not None:
                _check_size(header.height, header.width)
            # The size of a turned photograph is known only after decoding.
            if header is not None and not header.exif:
                self.shape = (header.height, header.width, channels)
            else:
                self._whole = self._decode(header)
                self.shape = (*self._whole.shape[:2], channels)
        self._full, self._corner = self.shape[:2], (0, 0)
        if within is not None:
            left, top, right, bottom = within
            height, width = self._full
            if not (0 <= left < right <= width and 0 <= top < bottom <= height):
                raise DecodeError(f"the box {','.join(map(str, within))} is not within the {width} x {height} pixels")
            self._corner, self.shape = (top, left), (bottom - top, right - left, channels)

    def _decode(self, header: _Jpeg | None) -> UInt8[np.ndarray, "h w c"]:
        if header is not None:
            pixels = _decode_fast(self._data, self._channels)
            return _turned(self._data, pixels) if header.exif else pixels
        image = _open(self._data)
        plain = _is_plain(image, self._data)
        return _decode_fast(self._data, self._channels) if plain else _decode_carefully(image, self._channels)

    @property
    def data(self) -> bytes:
        """The bytes of the file."""
        return self._data

    def part(
        self, box: tuple[int, int, int, int] | None, wanted: tuple[int, int] | None = None
    ) -> UInt8[np.ndarray, "h w c"]:
        """The pixels of a box.

        Args:
          box: top, left, height and width in pixels; ``None``: the whole image.
          wanted: height and width in pixels that the box will be resampled to. A JPEG with at least four times as
            many pixels per side is decoded at 1/2 (1/4, 1/8) of its size, which leaves at least twice as many.

        Returns:
          ``[height, width, channels]``, with height and width divided by ``reduction(...)``.

        Raises:
          DecodeError: if the data is damaged.
        """
        with one_image_fails():
            return self._part(box, wanted)

    def _part(
        self, box: tuple[int, int, int, int] | None, wanted: tuple[int, int] | None
    ) -> UInt8[np.ndarray, "h w c"]:
        (height, width), (down, across) = self._full, self._corner
        top, left, box_height, box_width = box or (0, 0, *self.shape[:2])
        top, left = top + down, left + across
        if self._whole is None and wanted is not None:
            reduce = reduction((box_height, box_width), wanted)
            if reduce > 1:
                small = _decode_fast(self._data, self._channels, reduce)
                bottom, right = -(-(top + box_height) // reduce), -(-(left + box_width) // reduce)
                return small[top // reduce : bottom, left // reduce : right]
        # Below four fifths, decoding less outweighs reading the header twice.
        if self._whole is None and box_height * box_width < 0.8 * height * width:
            found = turbo.decode_part(self._data, (top, left, box_height, box_width), (height, width), self._channels)
            if found is not None:
                return found
        if self._whole is None:
            self._whole = self._decode(_jpeg_header(self._data))
        return self._whole[top : top + box_height, left : left + box_width]


def reduction(box: tuple[int, int], wanted: tuple[int, int]) -> int:
    """Factor (1, 2, 4 or 8) by which a JPEG can be reduced in decoding so that twice the wanted pixels remain."""
    scale = min(box[0] / wanted[0], box[1] / wanted[1])
    return next((reduce for reduce in (8, 4, 2) if scale >= 2 * reduce), 1)
