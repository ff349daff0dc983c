"""The example next to an exported model transforms images like the package."""

import ast
import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from idml_jax.data.images.transforms import Picture, ResizeCenterCrop
from idml_jax.inference.export import EXAMPLE, ONNX_EXAMPLE


@pytest.fixture
def load():
    """The example's loading function, for any size."""

    def of(size, resize, channels):
        about = {"size": size, "resize": resize, "channels": channels}
        names = {"np": np, "Image": Image, "ImageOps": ImageOps, "about": about}
        tree = ast.parse(EXAMPLE)
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        exec(compile(tree, "example.py", "exec"), names)
        return names["load"]

    return of


def encoded(width, height, mode="RGB", fmt="PNG", orientation=None):
    rng = np.random.default_rng(width * height)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 2**16, (height, width), np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
    options = {}
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def check(load, data, size, resize, channels=3, off=0):
    expected = ResizeCenterCrop(size, resize, "exact")(Picture(data, channels))
    found = load(size, resize, channels)(io.BytesIO(data))
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_allclose(found.astype(int), expected.astype(int), atol=off, rtol=0)


def test_odd_sizes(load):
    sides = [*range(17, 60, 3), 97, 131, 211]
    for width in sides:
        check(load, encoded(width, 37), 16, 18)
        check(load, encoded(37, width), 16, 19)
    check(load, encoded(16, 16), 16, 16)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "TIFF"])
def test_turned_photographs(load, fmt, orientation):
    check(load, encoded(41, 30, fmt=fmt, orientation=orientation), 16, 18)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "mode,fmt",
    [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16", "PPM"), ("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("1", "PNG"),
     ("LA", "PNG"), ("RGB", "BMP"), ("RGB", "PPM"), ("RGB", "GIF"), ("CMYK", "JPEG")],
)  # fmt: skip
def test_kinds_of_pixels(load, mode, fmt, channels):
    # Of colours with transparency OpenCV, which decodes them here, rounds the grey otherwise.
    check(load, encoded(41, 30, mode, fmt), 16, 18, channels, off=1 if (mode, channels) == ("RGBA", 1) else 0)


def test_sixteen_bits_turned(load):
    check(load, encoded(41, 30, "I;16", "TIFF", 6), 16, 18)


@pytest.mark.parametrize("example", [EXAMPLE, ONNX_EXAMPLE], ids=["stablehlo", "onnx"])
def test_unreadable_images_are_refused_in_a_line(tmp_path, example):
    """The images are read before the model computes, so that any model does."""
    (tmp_path / "jax.py").write_text(
        "class export:\n    call = deserialize = classmethod(lambda export, data: export)\n"
    )
    (tmp_path / "onnxruntime.py").write_text("class InferenceSession:\n    __init__ = lambda self, path: None\n")
    (tmp_path / "onnxruntime.py").open("a").write("    get_outputs = lambda self: []\n")
    (tmp_path / "model.stablehlo").write_bytes(b"")
    (tmp_path / "about.json").write_text('{"size": 16, "resize": 18, "channels": 3}')
    (tmp_path / "example.py").write_text(example)
    (tmp_path / "whole.jpg").write_bytes(encoded(97, 131, fmt="JPEG"))
    (tmp_path / "cut.jpg").write_bytes(encoded(97, 131, fmt="JPEG")[:-300])
    (tmp_path / "text.png").write_bytes(b"nothing")

    def said(*names):
        words = [sys.executable, "example.py", *names]
        found = subprocess.run(
            words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True
        )
        assert found.returncode == 1 and not found.stdout
        return found.stderr

    assert said("whole.jpg", "cut.jpg").startswith(
        "error: cut.jpg: cannot be read as an image (image file is truncated"
    )
    assert said("cut.jpg").count("\n") == 1
    assert said("text.png") == "error: text.png: cannot be read as an image (cannot identify image file)\n"
    assert said("none.jpg") == "error: none.jpg: cannot be read as an image (No such file or directory)\n"
    assert said() == "error: no images are named; give some: python example.py a.jpg b.jpg\n"
