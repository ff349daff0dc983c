"""A loaded run in Python: what counts as images, that arrays are read like files, and the answers of a search."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from runs_made import small_config

import idml_jax
from idml_jax import embed, embeddings, evaluate, search
from idml_jax.data.given import images_of
from idml_jax.data.images.decode import decode
from idml_jax.errors import UserError
from idml_jax.inference import encoded
from idml_jax.ism import Embedding, introspective_distance
from idml_jax.reporting import answers
from idml_jax.training import workdir

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (9, 12, 4), np.uint8)
DEEP = RNG.integers(0, 65536, (9, 12), np.uint16)


def pixels_of(images, channels=3):
    source = images_of(images).source
    return [decode(source.read(i), channels) for i in range(len(source))]


def file_of(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "array", [PIXELS[..., :3], PIXELS, PIXELS[..., 0], DEEP], ids=["rgb", "rgba", "grey", "16 bits"]
)
def test_an_array_gives_exactly_what_a_file_of_its_pixels_gives(tmp_path, array, channels):
    file = file_of(tmp_path, Image.fromarray(array))
    expected = decode(file.read_bytes(), channels)
    for given in (
        array,
        [array],
        Image.fromarray(array),
        [file],
        np.asarray(array)[..., None] if array.ndim == 2 else array,
    ):
        np.testing.assert_array_equal(pixels_of(given, channels)[0], expected)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "LA", "I;16", "CMYK"])
def test_an_image_of_pillow_gives_what_its_file_gives(tmp_path, mode, orientation):
    whole = Image.fromarray(DEEP) if mode == "I;16" else Image.fromarray(PIXELS[..., :3]).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = file_of(tmp_path, whole, f"x.{'tif' if mode == 'CMYK' else 'png'}", exif=exif)
    for channels in (1, 3):
        expected = decode(file.read_bytes(), channels)
        # From bytes: of a TIFF that it maps into memory, Pillow drops the orientation without turning the pixels.
        opened = Image.open(io.BytesIO(file.read_bytes()))
        np.testing.assert_array_equal(pixels_of(opened, channels)[0], expected)


def test_numbers_whose_range_is_plain_are_pixels():
    grey = PIXELS[..., 0]
    for given in (
        grey / 255,
        (grey / 255).astype(np.float32),
        grey.astype(float),
        grey.astype(np.int64),
        grey[..., None],
    ):
        np.testing.assert_array_equal(pixels_of(given, 1)[0][..., 0], grey)
    np.testing.assert_array_equal(pixels_of(np.eye(3) > 0, 1)[0][..., 0], 255 * np.eye(3))
    # The range is that of all arrays together: a black image beside others is black.
    two = pixels_of([np.zeros((2, 2)), np.full((3, 2), 0.5)], 1)
    assert two[0].max() == 0 and two[1].shape == (3, 2, 1) and two[1].max() == 128
    assert len(pixels_of(np.stack([PIXELS, PIXELS]))) == len(pixels_of(iter([PIXELS, PIXELS]))) == 2


@pytest.mark.parametrize(
    "images,message",
    [
        (RNG.normal(size=(4, 4, 3)), "below 0: the model normalises"),
        (np.full((4, 4), 77.5), "with fractions: their range is unknown; pixels are uint8 .0 to 255"),
        (np.full((4, 4), 300), "their range is unknown"),
        (np.full((4, 4), np.nan), "NaN or infinity is no pixel"),
        (np.ones((4, 4)), "1 may be white .then give x.astype.bool.. or nearly black"),
        (np.zeros((3, 8, 9), np.uint8), "channels first; channels are last here: np.moveaxis"),
        (np.zeros((2, 3, 8, 9), np.uint8), "channels first"),
        (np.zeros((5, 8, 9), np.uint8), r"shape .5, 8, 9.; grey images are a list of \[h, w\]"),
        (np.zeros((6, 8, 2), np.uint8), r"shape .6, 8, 2., grey and alpha .*: x\[\.\.\., 0\] is grey"),
        (np.zeros(4, np.uint8), r"shape .4,.; an image is \[h, w\]"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((4, 4), complex), "has the type complex128"),
        ([], "no images"),
        (7, "is int; an image is given as a path"),
        ([np.zeros((4, 4), np.uint8), None], "image 1 is NoneType"),
        (["nothing.png"], None),
    ],
    ids=str,
)
def test_what_is_no_image_is_refused_in_one_line(images, message):
    if message is None:
        with pytest.raises(UserError, match=r"nothing.png: cannot be read"):
            pixels_of(images)
        return
    with pytest.raises(UserError, match=message) as caught:
        images_of(images)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def model(finished):
    return idml_jax.load(finished[0])


@pytest.fixture(scope="module")
def photos(model, image_folder):
    return model.embed(image_folder / "test")


def test_embeddings_are_an_index(model, photos, image_folder, tmp_path):
    assert len(photos) == 96 and photos.semantic.shape == (96, 16) == photos.uncertainty.shape
    assert photos.labels[0] == "class_04" and photos.files[0].endswith("class_04/00.png")
    assert len(repr(photos)) < 100 and len(repr(model)) < 300 and len(repr(model.embedder)) < 200
    files = photos.files[:3].tolist()
    arrays = [np.asarray(Image.open(file)) for file in files]
    for given in (files, arrays, [Image.open(file) for file in files], np.stack(arrays)[..., None], np.asarray(files)):
        np.testing.assert_allclose(model.embed(given).semantic, photos.semantic[:3], atol=1e-6)
    saved = embeddings.save(model.embed(arrays, labels=["a", "b", "a"]), tmp_path / "x.npz")
    again = embeddings.read(saved)
    assert again.labels == ["a", "b", "a"] and again.files.tolist() == ["image 0", "image 1", "image 2"]
    assert again.about == {**photos.about, "images": "memory"}
    with pytest.raises(UserError, match="overwrite=True"):
        embeddings.save(again, saved)
    with pytest.raises(UserError, match="labels have the shape"):
        model.embed(arrays, labels=["a"])
    with pytest.raises(UserError, match="labels differ in their number or shape; each image has one label here"):
        model.embed(arrays, labels=[("a", "b"), ("c",), ("a", "b")])


def test_search_and_comparison(model, photos, image_folder, finished):
    file = photos.files[5]
    (answer,) = model.search(file, photos, 3)
    assert len(answer) == 3 and [near.distance for near in answer] == sorted(near.distance for near in answer)
    assert (answer.file, answer.label, answer.distance) == answer[0][:3] and answer.file != file
    assert 0 <= answer.probability <= 1 and answer.uncertainty > 0 and "\n" not in repr(answer)
    # An array has no name by which it is known to be an image of the index.
    array = np.asarray(Image.open(file))
    (own,) = model.search(array, photos, 1)
    assert own.file == file and own.distance < 1e-3
    everyone = model.search(photos, photos, 1)
    assert len(everyone) == 96 and everyone[5].file == answer.file
    unknown = model.search(array, photos.files[:4].tolist(), 9)[0]
    assert unknown.probability is None and unknown.label is None and len(unknown) == 4
    with pytest.raises(UserError, match="k = 0 must be"):
        model.search(array, photos, 0)
    compared = model.compare(file, answer.file)
    assert compared.distance == pytest.approx(answer.distance, abs=1e-5)
    assert compared.introspective_distance == pytest.approx(answer[0].introspective_distance, abs=1e-5)
    with pytest.raises(UserError, match="the second is 96 images"):
        model.compare(file, photos)


def test_modules_of_commands_are_functions_too(finished, photos, tmp_path):
    file = photos.files[5]
    assert len(idml_jax.embed(finished[0], file)) == 1
    saved = str(embeddings.save(photos, tmp_path / "photos.npz"))
    (answer,) = idml_jax.search(file, saved, 2)
    assert len(answer) == 2 and answer.file != file
    assert callable(embed.main) and callable(search.main) and callable(idml_jax.report) and callable(idml_jax.train)
    with pytest.raises(UserError, match="images need model="):
        idml_jax.search(file, [file])
    assert evaluate(saved).queries == 96


def test_loading_is_silent(finished):
    code = "import idml_jax, sys; print(len(repr(idml_jax.load(sys.argv[1]))) < 300)"
    done = subprocess.run([sys.executable, "-c", code, str(finished[0])], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("True", "")


def test_the_metric_says_what_it_compares():
    with pytest.raises(ValueError, match=r"got ndarray; Embedding\(semantic, uncertainty\) makes"):
        introspective_distance(np.eye(2))
    with pytest.raises(ValueError, match="finite number above 0"):
        introspective_distance(Embedding(np.eye(2)), temperature=0)


def test_labels_of_pairs_may_be_names():
    pairs = idml_jax.pairs_from_labels
    np.testing.assert_array_equal(pairs(["a", "b", "a"]).positive, pairs(np.array([0, 1, 0])).positive)
    both = pairs(np.array(["b", "c"]), ["c", "b", "a"])
    np.testing.assert_array_equal(both.positive, [[False, True, False], [True, False, False]])
    with pytest.raises(ValueError, match="names or numbers, not both"):
        pairs(["a"], np.array([1]))
    # Tables hold names as objects, and some files as bytes.
    assert pairs(np.array(["b", "c"], object), np.array([b"c", b"b"])).positive.tolist() == [
        [False, True],
        [True, False],
    ]
    with pytest.raises(ValueError, match="NaN is no label"):
        pairs(np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match="needs Pairs, as pairs_from_labels.* got ndarray"):
        idml_jax.losses.contrastive(np.eye(2), np.array([0, 1]))


def test_sheets_show_the_images_of_a_run_that_have_moved(photos, image_folder, finished, tmp_path):
    run, old, new = shutil.copytree(finished[0], tmp_path / "run"), tmp_path / "old", tmp_path / "now" / "here"
    shutil.copytree(image_folder, new)
    files = [str(old / os.path.relpath(file, image_folder)) for file in photos.files]
    index = dataclasses.replace(photos, files=np.asarray(files), about={**photos.about, "images": "split:test"})
    values = json.loads((run / "config.json").read_text())
    values["data"]["root"] = str(old)
    (run / "config.json").write_text(json.dumps(values))
    assert workdir.remember_places(small_config(new), run)
    read, stays = answers.picture_reader(index, str(run)), answers.picture_reader(photos, str(finished[0]))
    for file, own in zip(files[::9], photos.files[::9].tolist(), strict=True):
        np.testing.assert_array_equal(read(file), stays(own))
    (new / "test" / "class_04" / "00.png").unlink()
    assert answers.picture_reader(index, str(run))(files[0]) is None and read(str(old / "none.png")) is None


def test_moved_files_are_found_by_the_folder_that_most_of_them_were_in():
    names = ["/new/a/1.png", "/new/a/2.png", "/new/b/a/1.png", "/new/b/a/2.png"]
    old = [name.replace("/new", "/x/b") for name in names]
    assert encoded.moved_to(old, names) == dict(zip(old, names, strict=True))
    assert (
        encoded.moved_to(["cub/test/1"], names)
        == encoded.moved_to(old, ["cub/test/1"])
        == encoded.moved_to(old, [])
        == {}
    )
    assert encoded.moved_to(["/old/a/1.png"], ["/new/a/1.png"]) == {"/old/a/1.png": "/new/a/1.png"}
