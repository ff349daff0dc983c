"""Decoding and transforms: formats are decoded correctly or refused; results agree with Pillow and torchvision."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

from idml_jax.data.images import colour, decode, resample, transforms, turbo
from idml_jax.data.images.transforms import DecodeError, Picture
from idml_jax.errors import UserError
from idml_jax.training import config as config_lib
from idml_jax.training.config_checks import validate

PHOTOS = [np.ascontiguousarray(photo) for photo in load_sample_images().images]  # 427 x 640, full of detail
PHOTO = PHOTOS[0][:120, :160]


def encode(picture, fmt="PNG", **options):
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    buffer = io.BytesIO()
    picture.save(buffer, fmt, **options)
    return buffer.getvalue()


def pillow(data):
    image = Image.open(io.BytesIO(data))
    if image.has_transparency_data:  # such pictures are laid on white
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def difference(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()


class TestFormats:
    """What Pillow's convert("RGB") gives, to the bit, unless said otherwise."""

    @pytest.mark.parametrize(
        "data",
        [
            encode(PHOTO, "JPEG", quality=90),
            encode(PHOTO, "JPEG", quality=90, subsampling=0),
            encode(PHOTO, "JPEG", progressive=True, optimize=True),
            encode(PHOTO, "JPEG") + b"trailing bytes",
            encode(PHOTO, "JPEG") + b"\0" * 100,
            encode(Image.fromarray(PHOTO).convert("L"), "JPEG"),
            encode(Image.fromarray(PHOTO).convert("CMYK"), "JPEG"),
            encode(PHOTO, "PNG"),
            encode(Image.fromarray(PHOTO).convert("L"), "PNG"),
            encode(Image.fromarray(PHOTO).convert("LA"), "PNG"),
            encode(Image.fromarray(PHOTO).convert("1"), "PNG"),
            encode(Image.fromarray(PHOTO).convert("P"), "PNG"),
            encode(Image.fromarray(PHOTO).quantize(16), "PNG", transparency=bytes(range(0, 160, 10))),
            encode(Image.fromarray(PHOTO).quantize(16), "PNG", transparency=3),
            encode(np.dstack([PHOTO, np.tile(np.arange(160, dtype=np.uint8), (120, 1))]), "PNG"),
            encode(np.dstack([PHOTO, np.tile(np.arange(160, dtype=np.uint8), (120, 1))]), "WEBP", lossless=True),
            encode(PHOTO, "WEBP", quality=80),
            encode(PHOTO, "BMP"),
            encode(PHOTO, "GIF"),
            encode(PHOTO, "TIFF"),
            encode(PHOTO, "TIFF", compression="tiff_lzw"),
            encode(Image.fromarray(PHOTO).convert("CMYK"), "TIFF"),
            encode(PHOTO, "PPM"),
        ],
    )
    def test_as_pillow(self, data):
        expected = pillow(data)
        np.testing.assert_array_equal(transforms.decode(data), expected)
        assert Picture(data).shape == expected.shape
        transforms.check_whole(data)
        grey = transforms.decode(data, channels=1)
        assert grey.shape == (120, 160, 1)
        # The grey of a JPEG is its own luma, not that of rounded colours.
        assert difference(grey[:, :, 0], Image.fromarray(expected).convert("L")) < 0.6

    @pytest.mark.parametrize("top", [65535, 200, 40_000])
    def test_sixteen_bits_keep_their_range(self, top):
        """Also dark ones, which a guess from the values would take for 8 bits."""
        wide = np.linspace(0, top, 120 * 160).reshape(120, 160).astype(np.uint16)
        expected = np.round(wide / 65535.0 * 255)
        pgm = b"P5 160 120 65535\n" + wide.astype(">u2").tobytes()
        for data in (encode(wide, "PNG"), encode(wide, "TIFF"), pgm):
            found = transforms.decode(data)
            assert found.shape == (120, 160, 3)
            assert np.abs(found - expected[:, :, None]).max() <= 1

    def test_sixteen_bit_colour(self):
        wide = (PHOTO.astype(np.uint16) * 257).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in wide)

        def chunk(name, body):
            return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

        head = chunk(b"IHDR", struct.pack(">IIBBBBB", 160, 120, 16, 2, 0, 0, 0))
        data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        np.testing.assert_array_equal(transforms.decode(data), PHOTO)

    @pytest.mark.parametrize("mode,message", [("F", "floating point"), ("I", "32 bits")])
    def test_unknown_ranges_are_refused(self, mode, message):
        data = encode(Image.fromarray(PHOTO).convert("L").convert(mode), "TIFF")
        with pytest.raises(DecodeError, match=message):
            transforms.decode(data)

    @pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_turned_photographs_are_turned_upright(self, fmt, orientation):
        from PIL import ImageOps

        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if fmt == "WEBP" else {}
        data = encode(PHOTO, fmt, exif=exif, **options)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        np.testing.assert_array_equal(transforms.decode(data), expected)
        picture = Picture(data)
        assert picture.shape == expected.shape
        np.testing.assert_array_equal(picture.part((10, 20, 30, 40)), expected[10:40, 20:60])

    @pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG", "TIFF"])
    def test_of_an_animation_the_first_frame(self, fmt):
        frames = [Image.fromarray(np.full((20, 30, 3), value, np.uint8)) for value in (200, 90, 10)]
        options = {"lossless": True} if fmt == "WEBP" else {}
        data = encode(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 3
        np.testing.assert_array_equal(transforms.decode(data), np.full((20, 30, 3), 200))

    @pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
    @pytest.mark.parametrize("kept", [0.02, 0.3, 0.9])
    def test_files_that_are_cut_short_are_refused(self, fmt, kept):
        data = encode(PHOTO, fmt)
        for function in (transforms.decode, lambda d: Picture(d).part((0, 0, 5, 5))):
            with pytest.raises(DecodeError, match="not a"):
                function(data[: int(kept * len(data))])

    def test_data_that_are_not_an_image(self):
        for data, message in ((b"", "empty"), (b"\0" * 1000, "known format"), (b"\xff\xd8\xff\xd9", "not a")):
            for function in (transforms.decode, transforms.check_whole):
                with pytest.raises(DecodeError, match=message):
                    function(data)

    @pytest.mark.parametrize("side", [10_000, 20_000, 60_000])
    def test_bombs_are_refused_by_their_header(self, side):
        """By size alone: the pixels that the headers promise are not there."""
        jpeg = bytearray(encode(PHOTO, "JPEG"))
        place = jpeg.index(b"\xff\xc0")
        jpeg[place + 5 : place + 9] = struct.pack(">HH", side, side)
        png = bytearray(encode(PHOTO))
        png[16:24] = struct.pack(">II", side, side)
        png[29:33] = struct.pack(">I", zlib.crc32(bytes(png[12:29])))
        for data in (jpeg, png):
            for function in (transforms.decode, transforms.check_whole, Picture):
                with pytest.raises(DecodeError, match="pixels .*limit of 89478485"):
                    function(bytes(data))


class TestParts:
    @pytest.mark.skipif(turbo.library() is None, reason="needs libturbojpeg 3 (extra 'turbo')")
    @pytest.mark.parametrize("options", [{"subsampling": s} for s in (0, 1, 2)] + [{"progressive": True}, {"grey": 1}])
    def test_a_part_is_bit_for_bit_that_of_the_whole(self, options):
        photo = Image.fromarray(PHOTOS[1]).convert("L" if options.pop("grey", 0) else "RGB")
        data, rng = encode(photo, "JPEG", quality=90, **options), np.random.default_rng(0)
        for channels in (3, 1):
            whole = transforms.decode(data, channels)
            for _ in range(25):
                (top, bottom), (left, right) = (np.sort(rng.choice(side + 1, 2, False)) for side in (427, 640))
                box = (int(top), int(left), int(bottom - top), int(right - left))
                found = turbo.decode_part(data, box, (427, 640), channels)
                np.testing.assert_array_equal(found, whole[top:bottom, left:right])
                np.testing.assert_array_equal(Picture(data, channels).part(box), whole[top:bottom, left:right])
        # Neither a damaged file nor a larger one before spoils the next.
        assert turbo.decode_part(b"\xff\xd8\xff nonsense", (0, 0, 5, 5), (10, 10), 3) is None
        small = encode(PHOTO[:40, :50], "JPEG")
        for _ in range(2):
            found = turbo.decode_part(small, (20, 30, 10, 20), (40, 50), 3)
            np.testing.assert_array_equal(found, transforms.decode(small)[20:30, 30:50])
            assert turbo.decode_part(data, (400, 600, 20, 30), (427, 640), 3) is not None

    def test_without_the_library_the_same(self, monkeypatch):
        data = encode(PHOTO, "JPEG")
        crop = transforms.RandomResizedCrop(32)
        expected = [crop(Picture(data), np.random.default_rng(seed)) for seed in range(10)]
        monkeypatch.setattr(turbo, "library", lambda: None)
        for seed, image in enumerate(expected):
            np.testing.assert_array_equal(crop(Picture(data), np.random.default_rng(seed)), image)
            # And the encoded image gives what the decoded one does.
            np.testing.assert_array_equal(crop(transforms.decode(data), np.random.default_rng(seed)), image)

    def test_large_photographs_are_decoded_reduced(self):
        assert decode.reduction((895, 896), (224, 224)) == 1 and decode.reduction((896, 896), (224, 224)) == 2
        assert decode.reduction((9000, 9000), (224, 224)) == 8
        data = encode(PHOTOS[0], "JPEG", quality=95)
        part = Picture(data).part((80, 120, 240, 320), (32, 32))
        assert part.shape == (120, 160, 3)


def torchvision_train(data, box, size):
    """resized_crop over Pillow."""
    top, left, height, width = box
    image = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def torchvision_test(data, size, resize):
    """Resize(resize) and CenterCrop(size) over Pillow."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    short, long = min(width, height), max(width, height)
    long = int(resize * long / short)
    image = image.resize((resize, long) if width <= height else (long, resize), Image.Resampling.BILINEAR)
    top, left = int(round((image.height - size) / 2.0)), int(round((image.width - size) / 2.0))  # noqa: RUF046
    return np.asarray(image.crop((left, top, left + size, top + size)))


class TestAgreement:
    """Mean absolute differences of 255; docs/input_pipeline.md has those of many photographs."""

    # A test on two photographs of fine detail; smoother ones differ less.
    @pytest.mark.parametrize("method,mean,worst", [("exact", 0.0, 0.0), ("fast", 0.8, 2.0)])
    @pytest.mark.parametrize("size", [32, 64, 224])
    def test_random_resized_crop(self, method, mean, worst, size):
        crop, found = transforms.RandomResizedCrop(size, flip=False, resample=method), []
        for seed in range(24):
            data = encode(PHOTOS[seed % 2], "JPEG", quality=92)
            box = crop.box(427, 640, np.random.default_rng(seed))
            image = crop(Picture(data), np.random.default_rng(seed))
            found.append(difference(image, torchvision_train(data, box, size)))
        assert np.mean(found) <= mean and max(found) <= worst, (np.mean(found), max(found))

    @pytest.mark.parametrize("method,mean", [("exact", 0.0), ("fast", 1.0)])
    @pytest.mark.parametrize("shape", [(427, 640), (427, 301), (300, 300), (123, 411), (256, 341), (421, 639)])
    @pytest.mark.parametrize("size,resize", [(224, 256), (27, 33)])
    def test_resize_and_central_crop(self, method, mean, shape, size, resize):
        data = encode(PHOTOS[1][: shape[0], : shape[1]], "JPEG", quality=92)
        image = transforms.ResizeCenterCrop(size, resize, method)(Picture(data))
        assert difference(image, torchvision_test(data, size, resize)) <= mean

    @pytest.mark.parametrize("scale", [0.4, 1.0, 1.1, 1.5, 2.0, 2.7, 3.3, 4.0, 5.3, 9.1])
    def test_fast_resampling_is_nearer_than_plain_bilinear(self, scale):
        import cv2

        source, side = PHOTOS[0][:400, :400], round(400 / scale)
        exact = resample.resize(source, side, side, "exact")
        fast = difference(resample.resize(source, side, side), exact)
        assert fast <= (1.4 if scale < 2 else 0.85)
        if scale >= 1.5:
            assert fast < 0.5 * difference(cv2.resize(source, (side, side)), exact)

    def test_brightness_and_mean_are_kept(self):
        flat = np.full((90, 100, 3), (10, 128, 250), np.uint8)
        for size in (30, 41, 200):
            expected = np.broadcast_to(flat[:1, :1], (size, size, 3))
            np.testing.assert_array_equal(resample.resize(flat, size, size), expected)

    @pytest.mark.parametrize("factor", [0.6, 0.83, 1.0, 1.27, 1.4])
    def test_colour_changes_are_pillows(self, factor):
        for photo in PHOTOS:
            image = Image.fromarray(photo)
            for ours, theirs in (
                (colour.brightness, ImageEnhance.Brightness),
                (colour.contrast, ImageEnhance.Contrast),
                (colour.saturation, ImageEnhance.Color),
            ):
                expected = np.asarray(theirs(image).enhance(factor), int)
                found = ours(photo, factor).astype(int)
                assert np.abs(found - expected).max() <= 1 and np.abs(found - expected).mean() < 0.05, ours

    def test_jitter_draws_factors_and_orders(self):
        made = {tuple(colour.jitter(PHOTO, 0.4, np.random.default_rng(s)).mean((0, 1))) for s in range(50)}
        assert len(made) == 50
        np.testing.assert_array_equal(colour.jitter(PHOTO, 0.0, np.random.default_rng(0)), PHOTO)
        means = [colour.jitter(PHOTO, 0.4, np.random.default_rng(s)).mean() for s in range(200)]
        assert 0.55 * PHOTO.mean() < min(means) < 0.75 * PHOTO.mean() and max(means) > 1.15 * PHOTO.mean()

    def test_lighting_adds_principal_components(self):
        vectors = colour.EIGENVECTORS
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=2e-3)
        np.testing.assert_allclose(colour.lighting_shift([1, 0, 0]), 255 * 0.2175 * vectors[:, 0])
        grey = np.full((4, 4, 3), 128, np.uint8)
        shifts = [colour.lighting(grey, 0.1, np.random.default_rng(s))[0, 0] - 128.0 for s in range(3000)]
        expected = vectors @ np.diag((25.5 * colour.EIGENVALUES) ** 2) @ vectors.T + np.eye(3) / 12
        np.testing.assert_allclose(np.cov(np.array(shifts).T), expected, atol=1.0)


class TestTransforms:
    def test_cifar_is_a_crop_of_the_padded_picture(self):
        image, seen = PHOTO[:32, :32], set()
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        windows = {}
        for top in range(9):
            for left in range(9):
                window = padded[top : top + 32, left : left + 32]
                windows[window.tobytes()] = (top, left, 0)
                windows[window[:, ::-1].tobytes()] = (top, left, 1)
        train, test = transforms.create("cifar", size=32, resize=32)
        for seed in range(600):
            out = train(image, np.random.default_rng(seed))
            assert out.flags.c_contiguous
            seen.add(windows[out.tobytes()])
        assert len(seen) > 150  # of 162
        np.testing.assert_array_equal(test(Picture(encode(image))), image)
        with pytest.raises(DecodeError, match="160 x 120 pixels, but .*image_size = 32"):
            test(PHOTO)
        with pytest.raises(DecodeError, match="too few"):
            train(PHOTO[:10], np.random.default_rng(0))

    def test_imagenet_is_crop_then_jitter_then_lighting(self):
        train, test = transforms.create("imagenet", size=64, resize=72)
        image, rng = train(PHOTO, np.random.default_rng(3)), np.random.default_rng(3)
        expected = transforms.RandomResizedCrop(64)(PHOTO, rng)
        expected = colour.lighting(colour.jitter(expected, 0.4, rng), 0.1, rng)
        np.testing.assert_array_equal(image, expected)
        assert test == transforms.ResizeCenterCrop(64, 72)
        plain, _ = transforms.create("imagenet", size=64, resize=72, color_jitter=0.0, lighting=0.0)
        expected = transforms.RandomResizedCrop(64)(PHOTO, np.random.default_rng(3))
        np.testing.assert_array_equal(plain(PHOTO, np.random.default_rng(3)), expected)

    def test_boxes_of_large_photographs_lie_on_the_grid(self):
        crop = transforms.RandomResizedCrop(16)
        for seed in range(100):
            box = crop.box(300, 400, np.random.default_rng(seed))
            step = decode.reduction(box[2:], (16, 16))
            assert step in (1, 2, 4, 8) and all(value % step == 0 for value in box)
            assert box[0] + box[2] <= 300 and box[1] + box[3] <= 400
            assert 0.06 < box[2] * box[3] / 120_000 <= 1 and math.log(4 / 3) + 0.2 > abs(math.log(box[3] / box[2]))

    @pytest.mark.parametrize(
        "fields,message",
        [
            ({"transform": "imgnet"}, "config.data.transform = 'imgnet'; known: retrieval, imagenet, cifar"),
            ({"resample": "slow"}, "config.data.resample = 'slow'; known: fast, exact"),
            ({"color_jitter": 1.5}, r"config.data.color_jitter = 1.5 must be in \[0, 1\]"),
            ({"lighting": -0.1}, r"config.data.lighting = -0.1 must be in \[0, 1\]"),
            ({"pad": -1}, "config.data.pad = -1 must be at least 0"),
            ({"transform": "cifar", "rotation": 5.0}, "rotation = 5.0 needs config.data.transform = 'retrieval'"),
            ({"transform": "imagenet", "channels": 1, "mean": (0.5,), "std": (0.5,)}, "lighting changes colours"),
        ],
    )
    def test_settings_are_checked(self, fields, message):
        config = config_lib.default_config()
        for field, value in fields.items():
            config.data[field] = value
        with pytest.raises(UserError, match=message):
            validate(config)
