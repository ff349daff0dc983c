"""Wrong labels on purpose: how many, which, and that their truth is kept."""

import json
import shutil

import cv2
import numpy as np
import pytest
from runs_made import small_config

from idml_jax.data.glyphs import builder, examples
from idml_jax.data.wrong_labels import class_means, with_wrong_labels, wrong_labels_of
from idml_jax.errors import UserError
from idml_jax.inference import model as trained
from idml_jax.inference.embed import embed_to_file, split_source
from idml_jax.inference.gallery import read_stored
from idml_jax.inference.gallery_parts import embed_to_gallery
from idml_jax.training.build import data_of
from idml_jax.training.config_checks import validate
from idml_jax.training.data_record import check, record_of, remember
from idml_jax.training.workdir import read


class Pictures:
    """Pictures of classes, of which neighbours in number look alike: an edge that moves by three pixels."""

    def __init__(self, labels, fields=None):
        self.labels, self.fields = np.asarray(labels, np.int32), fields or {}
        self.class_names = [f"c{label}" for label in range(self.labels.max() + 1)]

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        image = np.full((32, 32), 255, np.uint8)
        image[:, : 4 + 3 * int(self.labels[index])] = 0
        return cv2.imencode(".png", image)[1].tobytes()

    def name(self, index):
        return f"picture {index}"


SOURCE = Pictures(np.repeat(np.arange(8), 20), {"ambiguity": np.arange(160.0)})


def test_the_share_is_exact_and_the_truth_is_kept():
    noisy = with_wrong_labels(SOURCE, 0.4, seed=3)
    wrong = noisy.labels != SOURCE.labels
    assert wrong.sum() == 64 == noisy.fields["wrong_label"].sum()
    np.testing.assert_array_equal(noisy.fields["wrong_label"], wrong)
    np.testing.assert_array_equal(noisy.fields["true_label"], SOURCE.labels)
    np.testing.assert_array_equal(noisy.fields["ambiguity"], SOURCE.fields["ambiguity"])
    assert noisy.class_names == SOURCE.class_names and noisy.labels.dtype == np.int32
    assert (noisy.name(5), noisy.key(5), noisy.read(5)) == ("picture 5", "picture 5", SOURCE.read(5))
    assert with_wrong_labels(SOURCE, 0.0) is SOURCE and wrong_labels_of(SOURCE) is None


def test_equal_seeds_give_equal_labels_and_a_larger_share_keeps_those_of_a_smaller():
    some, again, other = (with_wrong_labels(SOURCE, 0.3, seed=seed).labels for seed in (1, 1, 2))
    np.testing.assert_array_equal(some, again)
    assert (some != other).any()
    more = with_wrong_labels(SOURCE, 0.6, seed=1).labels
    moved = some != SOURCE.labels
    np.testing.assert_array_equal(more[moved], some[moved])


def test_uniform_labels_reach_every_other_class():
    labels = np.repeat(np.arange(3), 1000)
    noisy = with_wrong_labels(Pictures(labels), 0.5).labels
    counts = np.zeros((3, 3), int)
    np.add.at(counts, (labels, noisy), 1)
    assert (np.diag(counts) > 450).all() and (counts[~np.eye(3, dtype=bool)] > 200).all()


def test_confusable_labels_are_of_the_classes_that_look_alike():
    noisy = with_wrong_labels(SOURCE, 0.5, kind="confusable")
    assert noisy.fields["wrong_label"].sum() == 80
    means = class_means(SOURCE)
    assert means.shape == (8, 256) and np.allclose(np.linalg.norm(means, axis=1), 1, atol=1e-6)
    # Of seven other classes the five nearest; from the first class the last two are never taken.
    assert set(noisy.labels[SOURCE.labels == 0]) <= {0, 1, 2, 3, 4, 5}


def test_every_class_keeps_two_images():
    small = Pictures(np.repeat(np.arange(40), 3))
    noisy = with_wrong_labels(small, 1 / 3)
    own = np.bincount(small.labels[~noisy.fields["wrong_label"]], minlength=40)
    assert noisy.fields["wrong_label"].sum() == 40 and own.min() == 2
    with pytest.raises(UserError, match=r"means 48 of 120 .* at most 40 can have one"):
        with_wrong_labels(small, 0.4)


def test_only_training_labels_become_wrong(image_folder):
    config = small_config(image_folder, **{"data.validation_classes": 0.25})
    clean = data_of(config)
    config.data.label_noise.share = 0.25
    noisy = data_of(config)
    assert noisy.train.fields["wrong_label"].sum() == len(noisy.train) // 4
    np.testing.assert_array_equal(noisy.train.fields["true_label"], clean.train.labels)
    for part in ("test", "validation"):
        np.testing.assert_array_equal(getattr(noisy, part).labels, getattr(clean, part).labels)
    before, after = record_of(clean), record_of(noisy)
    assert after["train"]["wrong_labels"] == 18 and "labels" in after["train"]
    assert (
        after["test"] == before["test"]
        and before["train"].items() <= {**after["train"], "sizes": before["train"]["sizes"]}.items()
    )
    config.data.label_noise.seed = 1
    assert record_of(data_of(config))["train"]["labels"] != after["train"]["labels"]


def test_a_run_does_not_go_on_with_other_wrong_labels(image_folder, tmp_path):
    """An image more changes which of the others have a wrong label, although their names and classes stay."""
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    config = small_config(images, **{"data.label_noise.share": 0.25})
    remember(data_of(config), tmp_path)
    assert check(data_of(config), tmp_path) == []
    file = next(path for path in sorted((images / "train").rglob("*")) if path.is_file())
    shutil.copyfile(file, file.with_name(f"again{file.suffix}"))
    with pytest.raises(UserError, match=r"wrong labels of config.data.label_noise \(96 images then, 97 now\)"):
        check(data_of(config), tmp_path)


def test_stored_training_images_say_that_their_labels_are_wrong(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["label_noise"]["share"] = 0.25
    (run / "config.json").write_text(json.dumps(config))
    model, said = trained.load(run), []
    for split, wrong in (("train", 24), ("test", None)):
        for out, store in ((f"{split}.npz", embed_to_file), (split, embed_to_gallery)):
            store(model, split_source(model, split), tmp_path / out, labelled=True, origin="x", say=said.append)
            capsys.readouterr()
            assert read_stored(tmp_path / out).about.get("wrong_labels") == wrong
            told = "warning: " in (err := capsys.readouterr().err) and "24 labels are wrong on purpose" in err
            assert told is (split == "train")
    assert "24 of the labels are wrong on purpose (config.data.label_noise), as in training" in said


@pytest.mark.parametrize("share", [0.25, 0.0])
def test_labels_that_the_run_never_saw_are_not_stored(finished, image_folder, tmp_path, capsys, share):
    run, images = tmp_path / "run", tmp_path / "images"
    shutil.copytree(finished[0], run)
    shutil.copytree(image_folder, images)
    config = json.loads((run / "config.json").read_text())
    config["data"] |= {"root": str(images), "label_noise": config["data"]["label_noise"] | {"share": share}}
    (run / "config.json").write_text(json.dumps(config))
    (run / "data.json").unlink()
    remember(data_of(read(str(run))), run)
    model = trained.load(run)
    split_source(model, "train")
    assert not capsys.readouterr().err
    file = next(path for path in sorted((images / "train").rglob("*")) if path.is_file())
    shutil.copyfile(file, file.with_name(f"again{file.suffix}"))
    split_source(model, "test")
    assert not capsys.readouterr().err
    if share:
        with pytest.raises(UserError, match=r"wrong labels of config.data.label_noise \(96 images then, 97 now\)"):
            split_source(model, "train")
    else:
        assert len(split_source(model, "train")) == 97
        assert capsys.readouterr().err.startswith("warning: the train images are not those that the run was started")
        file.parent.rename(file.parent.with_name("another"))
        assert len(split_source(model, "train")) == 97
        told = capsys.readouterr().err
        assert "the classes of the train images are not those that the run started with" in told
        assert "another --workdir" not in told


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"share": 1.0}, r"label_noise.share = 1.0 must be a share, at least 0 and below 1"),
        ({"share": float("nan")}, r"label_noise.share = nan"),
        ({"share": 0.2, "kind": "random"}, r"label_noise.kind = 'random'; known: uniform, confusable"),
        ({"share": 0.2, "seed": -1}, r"label_noise.seed = -1 must be at least 0"),
        ({"kind": "confusable"}, r"label_noise.kind = 'confusable' is of wrong labels, and .*share is 0"),
    ],
)
def test_bad_settings(image_folder, changes, message):
    config = small_config(image_folder)
    config.data.label_noise.update(changes)
    with pytest.raises(UserError, match=message):
        validate(config)


def test_more_damage_on_the_glyphs_damages_more_of_the_same_training_pictures():
    configs = {c.name: c for c in builder.Glyphs.BUILDER_CONFIGS}
    usual = configs["default"]
    assert "train_degraded" not in usual.parameters()
    assert configs["damaged_60"].parameters() == {**usual.parameters(), "train_degraded": 0.6}
    series = lambda name, split: builder.series_of(configs[name], split, [65, 66, 67])
    damaged = lambda name, split: [examples.example(series(name, split), 1, i).ambiguity > 0 for i in range(12)]
    assert not any(damaged("damaged_0", "train")) and damaged("damaged_0", "test") == damaged("default", "test")
    some, more = damaged("default", "train"), damaged("damaged_90", "train")
    assert sum(some) < sum(more) and all(b for a, b in zip(some, more, strict=True) if a)
    with pytest.raises(ValueError, match="train_degraded"):
        builder.GlyphsConfig(name="bad", train_degraded=1.5)
