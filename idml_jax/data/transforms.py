"""Bytes to uint8 pictures: the only place where images are decoded and cropped. Normalisation happens on the device."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

# Grain's threads are the parallelism; OpenCV's own on top would only compete with them.
cv2.setNumThreads(0)

MAX_PIXELS = 2**28
Transform = Callable[[UInt8[np.ndarray, "h w c"], np.random.Generator], UInt8[np.ndarray, "size size c"]]


class DecodeError(ValueError):
    """The bytes are not a whole picture."""


def _open(data: bytes) -> Image.Image:
    """Reads the header alone, which tells format and size before anything is allocated."""
    if not data:
        raise DecodeError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
    except Exception as error:
        raise DecodeError("not a picture in a known format") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")
    return image


def _is_cut_short(image: Image.Image, data: bytes) -> bool:
    """Whether the end marker is missing; OpenCV fills the rest of such a file with grey and says nothing."""
    markers = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
    return markers.get(image.format, b"") not in data[-4096:]


def check_whole(data: bytes) -> None:
    """Looks at header, size and end of an encoded picture; cheap, so it does not find every damage.

    Raises:
      DecodeError: as ``decode``.
    """
    image = _open(data)
    if _is_cut_short(image, data):
        _decode_carefully(image, 3)


def decode(data: bytes, channels: int = 3) -> UInt8[np.ndarray, "h w c"]:
    """Decodes JPEG, PNG, WebP, BMP, TIFF or GIF bytes; EXIF rotation is applied, an alpha channel dropped.

    Args:
      data: the file's bytes.
      channels: 3 for RGB, 1 for grey.

    Returns:
      ``[h, w, channels]`` uint8.

    Raises:
      DecodeError: if the data is empty, unreadable, truncated, or larger than ``MAX_PIXELS``.
    """
    header = _open(data)
    if _is_cut_short(header, data) or header.format == "GIF" or header.mode not in ("L", "RGB", "RGBA", "LA", "1", "P"):
        return _decode_carefully(header, channels)
    flag = cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flag)
    except cv2.error as error:
        raise DecodeError(f"not a readable picture ({error.err})") from error
    if image is None:
        raise DecodeError("not a readable picture")
    return image if channels == 3 else image[:, :, None]


def _decode_carefully(image: Image.Image, channels: int) -> UInt8[np.ndarray, "h w c"]:
    """The slow way, for files that OpenCV would pass over in silence (cut short) or convert wrongly (CMYK, 16 bit)."""
    try:
        image.load()  # raises for a truncated file
    except Exception as error:
        raise DecodeError(f"not a readable picture ({error})".replace("\n", " ")) from error
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        top = 65535.0 if values.max(initial=0) > 255 else 255.0
        image = Image.fromarray(np.clip(values * (255.0 / top), 0, 255).round().astype(np.uint8))
    image = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
    array = np.asarray(image)
    return array if channels == 3 else array[:, :, None]


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear when enlarging, area averaging when shrinking (plain bilinear aliases there)."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = height < image.shape[0] or width < image.shape[1]
    out = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return out if out.ndim == 3 else out[:, :, None]


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the picture at a fixed size, perhaps mirrored: the training transform of metric learning.

    Area and aspect ratio (log-uniform) are drawn up to ten times until the box fits, else the largest central box of
    an allowed ratio is taken, as in the Inception line of work.

    Attributes:
      size: side of the result in pixels.
      scale: range of the area relative to the picture.
      ratio: range of width over height.
      flip: mirror with probability one half.
      rotation: largest rotation in degrees, drawn uniformly (0: none); corners are filled by replicating the border.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    rotation: float = 0.0

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        top, left, height, width = self.box(image.shape[0], image.shape[1], rng)
        image = _resize(image[top : top + height, left : left + width], self.size, self.size)
        if self.rotation:
            center = ((self.size - 1) / 2, (self.size - 1) / 2)
            turn = cv2.getRotationMatrix2D(center, rng.uniform(-self.rotation, self.rotation), 1.0)
            turned = cv2.warpAffine(
                image, turn, (self.size, self.size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            )
            image = turned if turned.ndim == 3 else turned[:, :, None]
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        return np.ascontiguousarray(image)

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of the part, in pixels."""
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < box_width <= width and 0 < box_height <= height:
                top = int(rng.integers(0, height - box_height + 1))
                left = int(rng.integers(0, width - box_width + 1))
                return top, left, box_height, box_width
        box_width, box_height = width, height
        if width / height < self.ratio[0]:
            box_height = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            box_width = round(height * self.ratio[1])
        return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


@dataclass(frozen=True)
class ResizeCenterCrop:
    """The shorter side to ``resize`` pixels, then the central square of ``size``: the test transform.

    Attributes:
      size: side of the result in pixels.
      resize: length of the shorter side before the crop; at least ``size``.
    """

    size: int
    resize: int

    def __post_init__(self) -> None:
        if self.resize < self.size:
            raise ValueError(f"resize ({self.resize}) must be at least size ({self.size})")

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        height, width = image.shape[:2]
        shorter = min(height, width)
        new_height, new_width = (self.resize * side // shorter for side in (height, width))
        image = _resize(image, new_height, new_width)
        # torchvision's centre: half the difference, rounded.
        top, left = round((new_height - self.size) / 2), round((new_width - self.size) / 2)
        return np.ascontiguousarray(image[top : top + self.size, left : left + self.size])


CHANGES = ("crop", "blur", "noise", "occlusion")


@dataclass(frozen=True)
class Changed:
    """Another transform, after which the picture is made harder to recognise; for tests of the uncertainty.

    Attributes:
      transform: gives the picture.
      kind: ``crop`` keeps a random part of the area (1 - strength) and enlarges it; ``blur`` is Gaussian with a
        standard deviation of ``strength / 8`` of the side; ``noise`` replaces the share ``strength`` of the contrast
        by uniform noise; ``occlusion`` covers a random square of the area ``strength`` with the picture's mean colour.
      strength: in [0, 1).
    """

    transform: Transform
    kind: str
    strength: float

    def __post_init__(self) -> None:
        if self.kind not in CHANGES:
            raise ValueError(f"unknown change {self.kind!r}; known: {', '.join(CHANGES)}")
        if not 0 <= self.strength < 1:
            raise ValueError(f"strength {self.strength} must be in [0, 1)")

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        image = self.transform(image, rng)
        size = image.shape[0]
        if self.kind == "blur":
            return self._blur(image)
        if self.kind == "noise":
            noise = rng.uniform(0, 255, image.shape)
            return ((1 - self.strength) * image + self.strength * noise).round().astype(np.uint8)
        share = self.strength if self.kind == "occlusion" else 1 - self.strength
        side = max(1, round(size * math.sqrt(share)))
        top, left = rng.integers(0, size - side + 1, 2)
        if self.kind == "crop":
            return np.ascontiguousarray(_resize(image[top : top + side, left : left + side], size, size))
        covered = image.copy()
        covered[top : top + side, left : left + side] = image.mean(axis=(0, 1)).round().astype(np.uint8)
        return image if self.strength == 0 else covered

    def _blur(self, image: np.ndarray) -> np.ndarray:
        sigma = self.strength * image.shape[0] / 8
        blurred = cv2.GaussianBlur(image, (0, 0), sigma) if sigma > 0 else image
        return blurred if blurred.ndim == 3 else blurred[:, :, None]
