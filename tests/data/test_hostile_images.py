"""Odd, damaged or malicious images: decoded like Pillow, or refused in one line."""

import io
import struct
import subprocess
import time
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from idml_jax.data.images import decode, resample, transforms
from idml_jax.data.images.transforms import DecodeError


def encode(array, fmt="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, fmt, **options)
    return buffer.getvalue()


PHOTO = cv2.resize(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8), (40, 30))


def exif(order, kind, count, value):
    """EXIF data with an orientation of some type."""
    end = "<" if order == b"II" else ">"
    entry = struct.pack(f"{end}HHI", 0x112, kind, count) + value
    return b"Exif\0\0" + order + struct.pack(f"{end}HIH", 42, 8, 1) + entry + struct.pack(f"{end}I", 0)


EXIF = {
    "byte": exif(b"II", 1, 1, b"\6\0\0\0"),
    "big-endian long": exif(b"MM", 4, 1, b"\0\0\0\6"),
    "little-endian long": exif(b"II", 4, 1, b"\6\0\0\0"),
    "big-endian short": exif(b"MM", 3, 1, b"\0\6\0\0"),
    "two shorts": exif(b"MM", 3, 2, b"\0\6\0\3"),
    "text": exif(b"II", 2, 1, b"6\0\0\0"),
    "a fraction nowhere": exif(b"II", 5, 1, b"\xff\xff\xff\0"),
    "no values": exif(b"II", 3, 0, b"\6\0\0\0"),
    "2^31 values": exif(b"II", 3, 2**31 - 1, b"\6\0\0\0"),
    "unknown type": exif(b"II", 99, 1, b"\6\0\0\0"),
    "nine": exif(b"II", 3, 1, b"\x09\0\0\0"),
    "cut short": exif(b"II", 3, 1, b"\6\0\0\0")[:19],
    "not TIFF": b"Exif\0\0XX*\0garbage",
}


class TestImages:
    @pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
    @pytest.mark.parametrize("name", EXIF)
    def test_odd_exif(self, name, fmt):
        """Orientation is applied like Pillow does; data that Pillow cannot interpret are ignored."""
        data = encode(PHOTO, fmt, exif=EXIF[name], **({"lossless": True} if fmt == "WEBP" else {}))
        image = Image.open(io.BytesIO(data))
        try:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        except Exception:
            expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(transforms.decode(data), expected)
        assert transforms.Picture(data).shape == expected.shape
        grey = transforms.decode(data, 1)
        assert grey.shape == (*expected.shape[:2], 1)
        transforms.check_whole(data)

    def test_exif_behind_the_pixels(self):
        data = encode(PHOTO)
        block = b"eXIf" + exif(b"MM", 3, 1, b"\0\6\0\0")[6:]
        place = data.index(b"IEND") - 4
        data = (
            data[:place]
            + struct.pack(">I", len(block) - 4)
            + block
            + struct.pack(">I", zlib.crc32(block))
            + data[place:]
        )
        image = Image.open(io.BytesIO(data))
        image.load()
        expected = np.asarray(ImageOps.exif_transpose(image))
        np.testing.assert_array_equal(transforms.decode(data), expected)

    def test_formats_by_content(self, tmp_path, monkeypatch):
        """PostScript would start a program; other formats of Pillow's are not in the documented list."""
        started = []
        monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: started.append(a))
        monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a))
        postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
        others = [encode(PHOTO, fmt) for fmt in ("ICO", "TGA", "SGI", "PCX", "DDS", "ICNS")]
        for data in (postscript, *others):
            for function in (transforms.decode, transforms.check_whole, transforms.Picture):
                with pytest.raises(DecodeError, match="not an image in a known format"):
                    function(data)
        assert not started
        # What is in the list is decoded, whatever the file is called.
        for fmt in decode.FORMATS:
            assert transforms.decode(encode(PHOTO, fmt)).shape == PHOTO.shape

    @pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (1, 50_000), (3, 70_000), (40_000, 50), (1, 1)])
    def test_thin_images(self, shape):
        data = encode(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
        start = time.monotonic()
        tracemalloc.start()
        for name in ("retrieval", "imagenet"):
            for method in ("fast", "exact"):
                for transform in transforms.create(name, size=224, resize=256, resample=method):
                    assert transform(transforms.Picture(data), np.random.default_rng(0)).shape == (224, 224, 3)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 100e6 and time.monotonic() - start < 10

    def test_the_crop_of_a_thin_image_is_that_of_the_whole(self):
        rng = np.random.default_rng(1)
        for height, width in ((4, 100), (100, 4), (7, 300), (300, 11)):
            image = rng.integers(0, 256, (height, width, 3), np.uint8)
            found = transforms.ResizeCenterCrop(16, 20)(image)
            shorter = min(height, width)
            whole = resample.resize(image, 20 * height // shorter, 20 * width // shorter, "exact")
            top, left = (round((side - 16) / 2) for side in whole.shape[:2])
            difference = np.abs(found.astype(int) - whole[top : top + 16, left : left + 16])
            assert difference.max() <= 2 and difference.mean() < 0.5

    @pytest.mark.parametrize("shape", [(1, 5000), (2, 40_000), (1, 1_000_000), (60_000, 100)])
    def test_thin_images_made_small(self, shape):
        """As in the thumbnails of a page."""
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        start, scale = time.monotonic(), 96 / max(shape)
        height, width = (max(1, round(scale * side)) for side in shape)
        assert resample.resize(image, height, width).shape == (height, width, 3)
        assert time.monotonic() - start < 5

    def test_crops_of_extreme_ratios(self):
        crop = transforms.RandomResizedCrop(16, scale=(1.0, 1.0), ratio=(0.1, 0.3))
        assert crop(PHOTO[:1], np.random.default_rng(0)).shape == (16, 16, 3)

    @pytest.mark.parametrize(
        "error", [MemoryError(), OverflowError("x"), struct.error("x"), SyntaxError("x"), KeyError("x")]
    )
    def test_whatever_fails_is_the_images_failure(self, error, monkeypatch):
        def fails(*arguments, **options):
            raise error

        data, tiff = encode(PHOTO), encode(PHOTO, "TIFF")
        transform = transforms.ResizeCenterCrop(16, 20)
        with monkeypatch.context() as patched:
            patched.setattr(cv2, "imdecode", fails)
            with pytest.raises(DecodeError, match="not a readable image"):
                transforms.decode(data)
        with monkeypatch.context() as patched:
            patched.setattr(Image.Image, "convert", fails)
            for function in (transforms.decode, transforms.check_whole):
                with pytest.raises(DecodeError, match="not a"):
                    function(tiff) if function is transforms.decode else function(tiff[:-1] or tiff)
        with monkeypatch.context() as patched:
            patched.setattr(cv2, "resize", fails)
            patched.setattr(cv2, "warpAffine", fails)
            with pytest.raises(DecodeError, match="not a readable image"):
                transform(transforms.Picture(data), None)
