"""The built-in data set: content of the images, correctness of the ambiguity, and safe preparation."""

import collections
import itertools
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest
import tensorflow_datasets as tfds

from idml_jax.data.glyphs import builder as glyphs
from idml_jax.data.glyphs import draw as glyphs_draw
from idml_jax.data.glyphs import examples

SKIP = {"image": tfds.decode.SkipDecoding()}
SMALL = {"train_classes": 12, "test_classes": 6, "images_per_class": 20, "degraded": 0.5}


def read(builder: glyphs.Glyphs, split: str) -> list[dict]:
    source = builder.as_data_source(split)
    return [source[i] for i in range(len(source))]


def raw(builder: glyphs.Glyphs) -> list[dict]:
    """All records in their order, the images as PNG bytes."""
    sources = [builder.as_data_source(split, decoders=SKIP) for split in ("train", "test")]
    return [source[i] for source in sources for i in range(len(source))]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def draw(code: str, seed: int, kind: str = "clean", ambiguity: float = 0.0, other: str = "A") -> np.ndarray:
    rng = np.random.default_rng(seed)
    return glyphs_draw.picture(rng, ord(code), 32, kind, ambiguity, ord(other)).astype(np.float32)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> glyphs.Glyphs:
    return glyphs.prepare(tmp_path_factory.mktemp("small"), glyphs.GlyphsConfig(name="small", **SMALL))


# What the set holds.


def test_counts_fields_and_ranges(small):
    for split, classes in (("train", 12), ("test", 6)):
        records = read(small, split)
        assert len(records) == small.info.splits[split].num_examples == classes * 20
        labels = collections.Counter(int(record["label"]) for record in records)
        assert set(labels.values()) == {20} and len(labels) == classes
        for record in records:
            assert set(record) == {"image", "label", "ambiguity", "kind", "other_label"}
            assert record["image"].shape == (32, 32, 1) and record["image"].dtype == np.uint8
            kind = glyphs.KINDS[record["kind"]]
            assert (record["ambiguity"] == 0) if kind == "clean" else (0 < record["ambiguity"] < 1)
            if kind == "blend":
                assert record["other_label"] in labels and record["other_label"] != record["label"]
            else:
                assert record["other_label"] == -1


def test_half_is_degraded_evenly_and_up_to_any_strength(small):
    records = read(small, "train") + read(small, "test")
    kinds = collections.Counter(glyphs.KINDS[record["kind"]] for record in records)
    assert abs(kinds["clean"] / len(records) - 0.5) < 0.1  # five standard errors
    assert all(kinds[kind] > 0.07 * len(records) for kind in glyphs.KINDS)
    strengths = [record["ambiguity"] for record in records if record["ambiguity"]]
    assert np.percentile(strengths, 20) == pytest.approx(0.2, abs=0.1)
    assert np.percentile(strengths, 80) == pytest.approx(0.8, abs=0.1)


def test_no_character_is_in_both_splits(small):
    train, test = ({int(record["label"]) for record in read(small, split)} for split in ("train", "test"))
    assert train == set(range(12)) and test == set(range(12, 18))
    classes = glyphs.choose_classes(small.builder_config)
    assert not set(classes["train"]) & set(classes["test"])


def test_names_are_readable_and_name_what_is_shown(small):
    names = small.info.features["label"].names
    assert len(set(names)) == len(names) == 18
    for name in names:
        code, words = name.split(" ", 1)
        assert unicodedata.lookup(words) == chr(int(code.removeprefix("U+"), 16))
    # Reading the set back gives the same names, without choosing the characters again.
    assert tfds.builder_from_directory(small.data_dir).info.features["label"].names == names


def test_both_splits_mix_the_scripts():
    classes = glyphs.choose_classes(glyphs.Glyphs.builder_configs["default"])
    assert [len(classes[split]) for split in ("train", "test")] == [300, 200]
    for script in ("LATIN", "CYRILLIC", "GEORGIAN", "ARROW"):
        shares = [
            np.mean([script in unicodedata.name(chr(code)) for code in classes[split]]) for split in ("train", "test")
        ]
        assert min(shares) > 0.03 and max(shares) < 3 * min(shares), (script, shares)


# Determinism.


def test_same_seed_same_bytes_other_seed_other_bytes(small, tmp_path):
    again = glyphs.prepare(tmp_path, glyphs.GlyphsConfig(name="small", **SMALL))
    assert raw(again) == raw(small)
    assert again.info.features["label"].names == small.info.features["label"].names
    other = glyphs.prepare(tmp_path, glyphs.GlyphsConfig(name="other", seed=1, **SMALL))
    assert set(other.info.features["label"].names) != set(small.info.features["label"].names)
    # Not only the choice of characters differs, but the images of the same one.
    first, second = (
        examples.example(glyphs.series_of(glyphs.GlyphsConfig(name="x", seed=seed), "train", [65, 66]), 0, 0).png
        for seed in (0, 1)
    )
    assert first != second


def test_a_picture_depends_on_no_other(small, tmp_path):
    fewer = glyphs.prepare(tmp_path, glyphs.GlyphsConfig(name="fewer", **(SMALL | {"images_per_class": 7})))
    pictures = {record["image"].tobytes() for record in read(small, "train")}
    shorter = {record["image"].tobytes() for record in read(fewer, "train")}
    assert len(shorter) == 12 * 7 and shorter < pictures


# The ambiguity is true.


@pytest.mark.parametrize("kind", glyphs.KINDS[1:])
def test_without_ambiguity_every_kind_is_clean(kind):
    # A blur of no width still passes through the filter.
    np.testing.assert_allclose(draw("R", 3, kind, 0.0), draw("R", 3), atol=1)


@pytest.mark.parametrize("kind", glyphs.KINDS[1:])
def test_likeness_to_the_clean_picture_falls_with_ambiguity(kind):
    strengths = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    likeness = np.array([[correlation(draw("R", s, kind, a), draw("R", s)) for a in strengths] for s in range(40)])
    means = likeness.mean(0)
    assert np.all(np.diff(means) < -0.02), means


def test_blur_takes_the_edges():
    def edges(ambiguity: float) -> float:
        total = 0.0
        for seed in range(20):
            rng = np.random.default_rng(seed)
            picture = glyphs_draw.picture(rng, ord("R"), 32, "blur", ambiguity).astype(np.float32)
            smooth = cv2.GaussianBlur(picture, (0, 0), 1)  # leaves the grain out
            total += float(np.square(np.diff(smooth, axis=0)).sum() + np.square(np.diff(smooth, axis=1)).sum())
        return total

    energies = [edges(a) for a in (0.0, 0.1, 0.25, 0.5, 1.0)]
    assert all(weaker < 0.8 * stronger for stronger, weaker in itertools.pairwise(energies)), energies
    assert energies[-1] < 0.05 * energies[0]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_occlusion_hides_that_share_of_the_ink(share):
    hidden = []
    for seed in range(30):
        ink = glyphs_draw.layer(np.random.default_rng(seed), ord("R"), 32)
        changed = np.abs(draw("R", seed, "occlusion", share) - draw("R", seed)) > 0
        hidden.append(ink[changed].sum() / ink.sum())
    # A patch of the ink's own shade can leave a few pixels unchanged.
    assert np.median(hidden) == pytest.approx(share, abs=0.03)
    assert np.mean(np.abs(np.array(hidden) - share) < 0.05) > 0.8


def test_at_full_strength_nothing_is_left():
    noisy = [correlation(draw("R", s, "noise", 1.0), draw("R", s)) for s in range(20)]
    assert np.mean(np.abs(noisy)) < 0.06
    hidden = glyphs_draw._cover(np.random.default_rng(0), glyphs_draw.layer(np.random.default_rng(1), ord("R"), 32), 1)
    assert not glyphs_draw.layer(np.random.default_rng(1), ord("R"), 32)[~hidden].any()


def test_a_blend_shows_both_characters():
    def mean_picture(**kwargs) -> np.ndarray:
        return np.mean([draw("R", seed, **kwargs) for seed in range(60)], axis=0)

    first = mean_picture()
    second, third = (np.mean([draw(code, seed) for seed in range(1000, 1060)], axis=0) for code in "W+")
    even = mean_picture(kind="blend", ambiguity=1.0, other="W")
    slight = mean_picture(kind="blend", ambiguity=0.05, other="W")

    def weights(picture: np.ndarray) -> np.ndarray:
        """How much of R, W and + the image holds, by least squares."""
        basis = np.stack([p.ravel() - p.mean() for p in (first, second, third)], axis=1)
        return np.linalg.lstsq(basis, picture.ravel() - picture.mean(), rcond=None)[0]

    np.testing.assert_allclose(weights(even), (0.5, 0.5, 0.0), atol=0.12)
    np.testing.assert_allclose(weights(slight), (0.89, 0.11, 0.0), atol=0.08)


# Every character can be read, and told from the others.


def mean_face(code: int) -> np.ndarray:
    """The character upright, centred and of one size, averaged over some faces: [1024]."""
    pictures = []
    for face in ("DejaVuSans", "DejaVuSans-BoldOblique", "DejaVuSerif-Italic", "DejaVuSansMono", "STIXGeneral"):
        if face in glyphs_draw.characters().get(code, (face,)):
            mask = glyphs_draw.glyph(face, code)
            scale = 26 / max(mask.shape)
            mask = cv2.resize(mask, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            height, width = mask.shape
            top, left = (32 - height) // 2, (32 - width) // 2
            pictures.append(np.pad(mask, ((top, 32 - height - top), (left, 32 - width - left))).astype(np.float32))
    return np.mean(pictures, axis=0).ravel()


def test_no_two_characters_look_the_same():
    likeness = np.corrcoef([mean_face(code) for code in glyphs_draw.characters()])
    np.fill_diagonal(likeness, 0)
    assert likeness.max() < 0.92
    # The same measure tells twins: A of Latin and Cyrillic, small and capital letters.
    for one, other in ("A\u0410", "oO", "zZ"):
        assert correlation(mean_face(ord(one)), mean_face(ord(other))) > 0.93


@pytest.mark.parametrize(
    "twins",
    [
        "A\u0391\u0410",  # Latin, Greek, Cyrillic
        "Oo\u03bf\u041e",
        "xX\u0445\u0425\u00d7",
        "P\u03a1\u0420",
        "'|l\u01c0\u2223",  # bars
        "-\u2212",
    ],
)
def test_twins_are_left_out(twins):
    """Among them characters that differ in size alone: every glyph is brought to one size."""
    assert len(set(map(ord, twins)) & set(glyphs_draw.characters())) <= 1


def test_characters_are_drawn_in_many_faces_and_are_no_marks():
    characters = glyphs_draw.characters()
    assert len(characters) >= 500 and list(characters) == sorted(characters)
    for code, faces in characters.items():
        assert len(faces) >= 6
        assert unicodedata.category(chr(code))[0] not in "MZC"
        assert min(max(glyphs_draw.glyph(face, code).shape) for face in faces[::5]) >= 64


def test_nothing_is_empty_or_cut_off():
    for i, code in enumerate(glyphs_draw.characters()):
        ink = glyphs_draw.layer(np.random.default_rng(i), code, 32)
        rim = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        assert 0.01 < ink.mean() < 0.8 and ink.max() <= 1, chr(code)
        assert rim.max() < 0.6, chr(code)  # at least half a pixel is free


# Reading and preparing.


def test_threads_read_the_png_bytes(small):
    source = small.as_data_source("train", decoders=SKIP)
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda i: source[i]["image"], range(len(source))))
    for record, image in zip(read(small, "train"), images, strict=True):
        assert isinstance(image, bytes) and image.startswith(b"\x89PNG")
        decoded = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_GRAYSCALE)
        np.testing.assert_array_equal(decoded, record["image"][..., 0])


def test_another_process_draws_the_same_without_tensorflow_and_without_chatter(tmp_path):
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        "from idml_jax.data.glyphs import builder as glyphs\n"
        "builder = glyphs.prepare(sys.argv[1], 'tiny')\n"
        "source = builder.as_data_source('test', decoders={'image': tfds.decode.SkipDecoding()})\n"
        "assert len(source) == 36 and isinstance(source[35]['image'], bytes)\n"
        "assert not {'tensorflow', 'torch', 'jax'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stdout and "examples/s" not in done.stderr and "%|" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["glyphs"]
    here = glyphs.prepare(tmp_path / "here", "tiny")
    assert raw(glyphs.prepare(tmp_path, "tiny")) == raw(here)


def test_an_interrupted_preparation_leaves_no_half_set(tmp_path, monkeypatch):
    calls = iter(range(10))
    example = examples.example

    def interrupted(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return example(*args)

    with monkeypatch.context() as patch:
        patch.setattr(examples, "example", interrupted)
        with pytest.raises(KeyboardInterrupt):
            glyphs.prepare(tmp_path, "tiny")
    folder = tmp_path / "glyphs" / "tiny"
    assert not list(folder.iterdir())
    # What a killed process leaves is passed over.
    (folder / "incomplete.ABC123_1.0.0").mkdir()
    (folder / "incomplete.ABC123_1.0.0" / "glyphs-train.array_record-00000-of-00001").write_bytes(b"half")
    builder = glyphs.prepare(tmp_path, "tiny")
    assert len(builder.as_data_source("train")) == 48
    assert glyphs.prepare(tmp_path, "tiny").data_dir == builder.data_dir


def test_two_processes_may_prepare_the_same_set(tmp_path, monkeypatch):
    split_generators = glyphs.Glyphs._split_generators

    def overtaken(self, dl_manager):
        monkeypatch.setattr(glyphs.Glyphs, "_split_generators", split_generators)
        glyphs.prepare(tmp_path, "tiny")  # the other process, which finishes first
        return split_generators(self, dl_manager)

    monkeypatch.setattr(glyphs.Glyphs, "_split_generators", overtaken)
    builder = glyphs.prepare(tmp_path, "tiny")
    assert len(builder.as_data_source("train")) == 48
    assert len(builder.info.features["label"].names) == 14
    assert [path.name for path in (tmp_path / "glyphs" / "tiny").iterdir()] == ["1.0.0"]


def test_another_set_of_that_name_is_refused(small):
    data_dir = Path(small.data_dir).parents[2]
    with pytest.raises(ValueError, match="other parameters"):
        glyphs.prepare(data_dir, glyphs.GlyphsConfig(name="small", **(SMALL | {"seed": 5})))


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="known: default, tiny"):
        glyphs.prepare(tmp_path, "glyphz")
    with pytest.raises(ValueError, match="characters that differ enough"):
        glyphs.prepare(tmp_path, glyphs.GlyphsConfig(name="many", train_classes=5000))
    for bad in ({"train_classes": 1}, {"images_per_class": 0}, {"image_size": 8}, {"seed": -1}, {"degraded": 1.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            glyphs.GlyphsConfig(name="bad", **bad)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        glyphs.prepare(tmp_path / "file", "tiny")


def test_missing_fonts_name_their_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path / "mpl"))
    glyphs_draw.characters.cache_clear()
    with pytest.raises(FileNotFoundError) as error:
        glyphs.prepare(tmp_path / "data", "tiny")
    assert str(tmp_path / "mpl" / "fonts" / "ttf") in str(error.value) and "\n" not in str(error.value)


# Several processes.


@pytest.fixture
def series():
    return examples.Series(
        seed=3, split=1, share=0.5, side=24, images_per_class=4, codes=list(glyphs_draw.characters())[:7]
    )


def test_several_processes_draw_the_same_images(series):
    other = series._replace(split=0, images_per_class=2, codes=series.codes[2:])
    alone, three = (list(examples.drawn([series, other], processes)) for processes in (1, 3))
    assert alone == three and [len(images) for images in alone] == [4] * 7 + [2] * 5
    assert len({image.png for images in alone for image in images}) == 38


@pytest.mark.parametrize("program", ["/nowhere/python", "", "false", "half"])
def test_a_process_that_fails_is_replaced(series, monkeypatch, tmp_path, program):
    if program == "half":  # writes its first block and a part of the second
        script = tmp_path / "half"
        code = f"{sys.executable} -m idml_jax.data.glyphs.examples | head -c 4000"
        script.write_text(f"#!/bin/sh\n{code}\n")
        script.chmod(0o700)
        program = str(script)
    alone = list(examples.drawn([series], 1))
    monkeypatch.setattr(sys, "executable", program)
    assert list(examples.drawn([series], 2)) == alone


def test_processes_end_with_the_one_that_asked(series, monkeypatch):
    started, popen = [], subprocess.Popen

    def noted(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    long = series._replace(images_per_class=200, codes=list(glyphs_draw.characters())[:25])
    images = examples.drawn([long], 2)
    next(images)
    images.close()
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_the_stored_characters_are_those_of_these_fonts(monkeypatch):
    if glyphs_draw.fonts_digest() != glyphs_draw._KNOWN_FONTS:
        pytest.skip("other fonts")
    stored = glyphs_draw.characters()
    monkeypatch.setattr(glyphs_draw, "_KNOWN_FONTS", "")
    assert glyphs_draw.characters.__wrapped__() == stored
