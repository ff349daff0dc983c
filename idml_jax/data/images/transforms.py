"""Training and test transforms from images to uint8 crops of one size. Normalisation happens on the device.

Boxes, rounding, antialiased bilinear resampling and colour changes are defined as in torchvision (with Pillow). A
transform is a function of an image, decoded or encoded (then only the needed part is decoded), and a random generator.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import UInt8

from idml_jax.data.images import colour
from idml_jax.data.images.decode import DecodeError, Picture, check_whole, decode, one_image_fails, reduction
from idml_jax.data.images.resample import METHODS, resize, resize_part
from idml_jax.errors import UserError

__all__ = ["DecodeError", "Picture", "Transform", "check_whole", "create", "decode"]

# Aspect ratio above which the test transform resamples only the crop.
_THIN = 20

AnyPicture = UInt8[np.ndarray, "h w c"] | Picture
Transform = Callable[[AnyPicture, np.random.Generator], UInt8[np.ndarray, "size size c"]]


def _resample_part(
    image: AnyPicture, box: tuple[int, int, int, int], height: int, width: int, method: str
) -> UInt8[np.ndarray, "height width c"]:
    """Resamples the part of an image in a box of top, left, height and width."""
    top, left, box_height, box_width = box
    with one_image_fails():
        if not isinstance(image, Picture):
            return resize(image[top : top + box_height, left : left + box_width], height, width, method)
        part = image.part(box, (height, width) if method == "fast" else None)
        whole = part.shape[:2] == (box_height, box_width)
        reduced = 1 if whole else reduction((box_height, box_width), (height, width))
        extent = (box_height / reduced, box_width / reduced)
        return resize(part, height, width, method, reduced=reduced, extent=extent)


def _pixels(image: AnyPicture) -> UInt8[np.ndarray, "h w c"]:
    return image.part(None) if isinstance(image, Picture) else image


def _mirror(image: np.ndarray) -> np.ndarray:
    return cv2.flip(image, 1).reshape(image.shape)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image at a fixed size, possibly mirrored: the training transform of metric learning.

    Area and aspect ratio (log-uniform) are drawn up to ten times until the box fits; otherwise the largest central box
    of an allowed ratio is used, as for Inception networks. For a box at least four times as large as the result,
    position and size are multiples of 2 (4, 8) pixels, so that a JPEG may be decoded at 1/2 (1/4, 1/8) of its size.

    Attributes:
      size: side of the result in pixels.
      scale: range of the area as a share of the image.
      ratio: range of width over height.
      flip: whether to mirror with probability 1/2.
      rotation: largest rotation in degrees, drawn uniformly (0: none); corners are filled by replicating the border.
      resample: ``fast`` or ``exact``, see ``resample``.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    rotation: float = 0.0
    resample: str = "fast"

    def __call__(self, image: AnyPicture, rng: np.random.Generator) -> np.ndarray:
        box = self.box(image.shape[0], image.shape[1], rng)
        image = _resample_part(image, box, self.size, self.size, self.resample)
        if self.rotation:
            center = ((self.size - 1) / 2, (self.size - 1) / 2)
            turn = cv2.getRotationMatrix2D(center, rng.uniform(-self.rotation, self.rotation), 1.0)
            turned = cv2.warpAffine(
                image, turn, (self.size, self.size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
            )
            image = turned.reshape(image.shape)
        if self.flip and rng.random() < 0.5:
            image = _mirror(image)
        return image

    def box(self, height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of the part, in pixels."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            for_area, for_ratio, down, right = rng.random(4).tolist()
            area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * for_area)
            ratio = math.exp(low + (high - low) * for_ratio)
            box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < box_width <= width and 0 < box_height <= height:
                top, left = int(down * (height - box_height + 1)), int(right * (width - box_width + 1))
                return self._to_grid(top, left, box_height, box_width)
        box_width, box_height = width, height
        if width / height < self.ratio[0]:
            box_height = max(1, round(width / self.ratio[0]))
        elif width / height > self.ratio[1]:
            box_width = max(1, round(height * self.ratio[1]))
        return self._to_grid((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)

    def _to_grid(self, top: int, left: int, height: int, width: int) -> tuple[int, int, int, int]:
        step = reduction((height, width), (self.size, self.size))
        return top // step * step, left // step * step, height // step * step, width // step * step


@dataclass(frozen=True)
class ImageNetTrain:
    """Random resized crop, mirroring, colour jitter and PCA lighting: the ImageNet training transform.

    Attributes:
      crop: crop and mirroring.
      color_jitter: strength of the changes of brightness, contrast and saturation, in [0, 1]; hue is unchanged.
      lighting: standard deviation of the multiples of ImageNet's principal components of colour.
    """

    crop: RandomResizedCrop
    color_jitter: float = 0.4
    lighting: float = 0.1

    def __call__(self, image: AnyPicture, rng: np.random.Generator) -> np.ndarray:
        image = self.crop(image, rng)
        if self.color_jitter:
            image = colour.jitter(image, self.color_jitter, rng)
        return colour.lighting(image, self.lighting, rng) if self.lighting else image


@dataclass(frozen=True)
class PaddedCrop:
    """A random crop of an image with a black border, possibly mirrored: the training transform of CIFAR.

    Attributes:
      size: side of the result in pixels.
      pad: width of the border in pixels.
      flip: whether to mirror with probability 1/2.
    """

    size: int
    pad: int = 4
    flip: bool = True

    def __call__(self, image: AnyPicture, rng: np.random.Generator) -> np.ndarray:
        image = _pixels(image)
        height, width = (side + 2 * self.pad for side in image.shape[:2])
        if min(height, width) < self.size:
            raise DecodeError(f"{image.shape[1]} x {image.shape[0]} pixels are too few for a crop of {self.size}")
        padded = np.pad(image, ((self.pad, self.pad), (self.pad, self.pad), (0, 0)))
        top, left = (int(rng.integers(0, side - self.size + 1)) for side in (height, width))
        out = padded[top : top + self.size, left : left + self.size]
        return _mirror(out) if self.flip and rng.random() < 0.5 else np.ascontiguousarray(out)


@dataclass(frozen=True)
class AsIs:
    """The unchanged image, which must have the right size: the test transform of CIFAR.

    Attributes:
      size: side of the image in pixels.
    """

    size: int

    def __call__(self, image: AnyPicture, rng: np.random.Generator | None = None) -> np.ndarray:
        image = _pixels(image)
        if image.shape[:2] != (self.size, self.size):
            raise DecodeError(
                f"{image.shape[1]} x {image.shape[0]} pixels, but config.data.transform = 'cifar' takes images of "
                f"config.data.image_size = {self.size} as they are"
            )
        return image


@dataclass(frozen=True)
class ResizeCenterCrop:
    """Resizes the shorter side to ``resize`` pixels, then takes the central square of ``size``: the test transform.

    Attributes:
      size: side of the result in pixels.
      resize: length of the shorter side before the crop; at least ``size``.
      resample: ``fast`` or ``exact``, see ``resample``.
    """

    size: int
    resize: int
    resample: str = "fast"

    def __post_init__(self) -> None:
        if self.resize < self.size:
            raise ValueError(f"resize ({self.resize}) must be at least size ({self.size})")

    def __call__(self, image: AnyPicture, rng: np.random.Generator | None = None) -> np.ndarray:
        height, width = image.shape[:2]
        shorter = min(height, width)
        new_height, new_width = (self.resize * side // shorter for side in (height, width))
        if max(height, width) > _THIN * shorter:
            return self._centre_of_thin(_pixels(image), new_height, new_width)
        image = _resample_part(image, (0, 0, height, width), new_height, new_width, self.resample)
        # torchvision's centre: half the difference, rounded.
        top, left = round((new_height - self.size) / 2), round((new_width - self.size) / 2)
        return np.ascontiguousarray(image[top : top + self.size, left : left + self.size])

    def _centre_of_thin(self, image: np.ndarray, height: int, width: int) -> np.ndarray:
        """The crop of a very thin image, whose resized version would be huge: only the crop is resampled, exactly."""
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        with one_image_fails():
            return resize_part(image, (height, width), (top, left, self.size, self.size))


TRANSFORMS = ("retrieval", "imagenet", "cifar")


def create(
    name: str,
    *,
    size: int,
    resize: int,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    rotation: float = 0.0,
    pad: int = 4,
    color_jitter: float = 0.4,
    lighting: float = 0.1,
    resample: str = "fast",
) -> tuple[Transform, Transform]:
    """Creates the training and the test transform by name.

    Args:
      name: ``retrieval`` (crop, rotation, mirroring), ``imagenet`` (with colour jitter and lighting) or ``cifar``
        (crop of the padded image; none at test).
      size: side of the images in pixels.
      resize: shorter side before the central crop at test.
      crop_scale: range of the crop's area as a share of the image.
      crop_ratio: range of the crop's width over its height.
      flip: whether to mirror at random.
      rotation: largest rotation in degrees, for ``retrieval``.
      pad: width of the border in pixels, for ``cifar``.
      color_jitter: strength in [0, 1], for ``imagenet``.
      lighting: standard deviation of the lighting, for ``imagenet``.
      resample: ``fast`` or ``exact``.

    Returns:
      Both transforms.

    Raises:
      UserError: for an unknown name or method.
    """
    if name not in TRANSFORMS:
        raise UserError(f"config.data.transform = {name!r}; known: {', '.join(TRANSFORMS)}")
    if resample not in METHODS:
        raise UserError(f"config.data.resample = {resample!r}; known: {', '.join(METHODS)}")
    if name == "cifar":
        return PaddedCrop(size, pad, flip), AsIs(size)
    turn = rotation if name == "retrieval" else 0.0
    (low, high), (narrow, wide) = crop_scale, crop_ratio
    train = RandomResizedCrop(size, (low, high), (narrow, wide), flip, turn, resample)
    test = ResizeCenterCrop(size, resize, resample)
    return (train if name == "retrieval" else ImageNetTrain(train, color_jitter, lighting)), test


CHANGES = ("crop", "blur", "noise", "occlusion")


@dataclass(frozen=True)
class Changed:
    """Applies a transform and then makes the image harder to recognise; used to test the uncertainty.

    Attributes:
      transform: transform to apply first.
      kind: ``crop`` keeps a random part of the area (1 - strength) and enlarges it; ``blur`` is Gaussian with a
        standard deviation of ``strength / 8`` of the side; ``noise`` replaces the share ``strength`` of the contrast
        by uniform noise; ``occlusion`` covers a random square of the area ``strength`` with the image's mean colour.
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

    def __call__(self, image: AnyPicture, rng: np.random.Generator) -> np.ndarray:
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
            return np.ascontiguousarray(resize(image[top : top + side, left : left + side], size, size))
        covered = image.copy()
        covered[top : top + side, left : left + side] = image.mean(axis=(0, 1)).round().astype(np.uint8)
        return image if self.strength == 0 else covered

    def _blur(self, image: np.ndarray) -> np.ndarray:
        sigma = self.strength * image.shape[0] / 8
        blurred = cv2.GaussianBlur(image, (0, 0), sigma) if sigma > 0 else image
        return blurred if blurred.ndim == 3 else blurred[:, :, None]


@dataclass(frozen=True)
class SometimesChanged:
    """Applies a transform and then makes some images harder to recognise; used in training.

    Attributes:
      transform: transform to apply first.
      probability: probability that an image is changed.
      kinds: kinds of change, see ``Changed``; one is drawn, with a strength uniform in [0.1, 0.75].
    """

    transform: Transform
    probability: float
    kinds: tuple[str, ...] = CHANGES

    def __call__(self, image: AnyPicture, rng: np.random.Generator) -> np.ndarray:
        if rng.random() >= self.probability:
            return self.transform(image, rng)
        kind = self.kinds[rng.integers(len(self.kinds))]
        return Changed(self.transform, kind, rng.uniform(0.1, 0.75))(image, rng)
