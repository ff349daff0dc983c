"""Randomly changed valid files cause only one-line errors, and memory stays bounded."""

import bz2
import gzip
import io
import lzma
import pickle
import tracemalloc
import warnings
import zipfile

import archives_made as made
import cv2
import numpy as np
import pytest
from PIL import Image

from idml_jax.data import files, lists
from idml_jax.data.images import decode, transforms
from idml_jax.data.images.transforms import DecodeError
from idml_jax.data.stored import layouts, plain_pickle
from idml_jax.errors import UserError

COUNTS = [100, pytest.param(2000, marks=pytest.mark.slow)]
PHOTO = cv2.resize(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8), (40, 30))


def changed(data, rng):
    """A file with bits flipped, a part cut out, zeroed, repeated or inserted, or the end cut off; perhaps twice."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 3))):
        first, second = sorted(int(x) for x in rng.integers(0, len(data) + 1, 2))
        second = min(second, first + int(rng.integers(1, 64)))
        match int(rng.integers(6)):
            case 0:
                for place in rng.integers(0, max(len(data), 1), int(rng.integers(1, 8))):
                    if len(data):
                        data[place] ^= 1 << int(rng.integers(8))
            case 1:
                del data[first:second]
            case 2:
                data[first:second] = bytes(second - first)
            case 3:
                data[second:second] = data[first:second]
            case 4:
                data[first:first] = rng.integers(0, 256, int(rng.integers(1, 32)), np.uint8).tobytes()
            case 5:
                del data[first:]
    return bytes(data)


def pictures():
    exif = Image.Exif()
    exif[0x0112] = 6
    for fmt in decode.FORMATS:
        for mode in ("RGB", "L", "P") if fmt in ("PNG", "GIF", "TIFF") else ("RGB",):
            buffer = io.BytesIO()
            options = {"exif": exif} if fmt in ("JPEG", "PNG", "WEBP", "TIFF") else {}
            Image.fromarray(PHOTO).convert(mode).save(buffer, fmt, **options)
            yield buffer.getvalue()
    for options in ({"progressive": True}, {"quality": 95}):
        buffer = io.BytesIO()
        Image.fromarray(PHOTO).save(buffer, "JPEG", **options)
        yield buffer.getvalue()


@pytest.mark.parametrize("count", COUNTS)
def test_images(count):
    rng, valid = np.random.default_rng(count), list(pictures())
    train, test = transforms.create("imagenet", size=16, resize=20)
    outcomes = {"refused": 0, "decoded": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the filter of the package, which pytest takes away
        for number in range(count):
            data = changed(valid[number % len(valid)], rng)
            for use in (
                transforms.check_whole,
                lambda d: transforms.decode(d, 1),
                lambda d: train(transforms.Picture(d), np.random.default_rng(0)),
                lambda d: test(transforms.Picture(d), None),
            ):
                try:
                    use(data)
                    outcomes["decoded"] += 1
                except DecodeError as error:
                    assert "\n" not in str(error)
                    outcomes["refused"] += 1
    assert min(outcomes.values()) > count / 5


def packed():
    names = {f"c{k}/{i}.jpg": made.jpeg(k, i, 16) for k in range(3) for i in range(2)}
    tar = made.tar_bytes(names)
    yield "x.tar", tar
    yield "x.tar.gz", gzip.compress(tar)
    yield "x.tar.bz2", bz2.compress(tar)
    yield "x.tar.xz", lzma.compress(tar)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, data in names.items():
                archive.writestr(name, data)
        yield "x.zip", buffer.getvalue()
    yield "x.zip", made.zip_bytes({"in.tar": tar, "in.zip": made.zip_bytes(names)})
    yield "x.tar.gz", made.tar_bytes({"in.tgz": gzip.compress(tar), "in.zip": made.zip_bytes(names)}, "w:gz")


@pytest.mark.parametrize("count", COUNTS)
def test_archives(count, tmp_path):
    rng, valid = np.random.default_rng(count), list(packed())
    original = {f"{k}/{i}": made.jpeg(k, i, 16) for k in range(3) for i in range(2)}
    tracemalloc.start()
    for number in range(count):
        name, data = valid[number % len(valid)]
        (tmp_path / name).write_bytes(changed(data, rng))
        try:
            for record in layouts.folder(tmp_path / name).records():
                try:
                    found = record.read()
                except files.FileError as error:
                    assert "\n" not in str(error)
                    continue
                if name != "x.tar":  # a plain tar has checksums of its headers alone
                    assert found in original.values(), "changed bytes passed for whole ones"
        except UserError as error:
            assert "\n" not in str(error)
    assert tracemalloc.get_traced_memory()[1] < 300e6
    tracemalloc.stop()


@pytest.mark.parametrize("count", COUNTS)
def test_lists(count, tmp_path):
    made.write_files(tmp_path, {"a/1.jpg": b"x", "b/2.jpg": b"x"})
    rows = "path,label\na/1.jpg,x\n", "a/1.jpg\tx\nb/2.jpg\ty\n", 'File;Class\n"a/1.jpg";"y"\nb/2.jpg;y\n', "a/1.jpg\n"
    rng, said = np.random.default_rng(count), []
    for number in range(count):
        path = tmp_path / f"x{lists.LISTS[number % 4]}"
        path.write_bytes(changed(rows[number // 4 % 4].encode(), rng))
        try:
            source, known = lists.list_images(path, warn=said.append)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        assert len(source) and len(source.labels) == len(source.paths)
        assert known or source.class_names == [""]
        for index in range(len(source)):
            try:
                source.read(index)
            except files.FileError as error:
                assert "\n" not in str(error)
    assert not any("\n" in line for line in said)


@pytest.mark.parametrize("count", COUNTS)
def test_pickles(count):
    batch = {b"data": np.zeros((2, 12), np.uint8), b"labels": [1, 2], b"filenames": [b"a", b"b"], b"x": "text"}
    rng = np.random.default_rng(count)
    for number in range(count):
        data = changed(pickle.dumps(batch, number % 6), rng)
        try:
            values = plain_pickle.load(data)
        except plain_pickle.PickleError as error:
            assert "\n" not in str(error)
            continue
        plain_pickle.byte_table(values.get("data"), 12)
