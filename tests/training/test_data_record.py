"""A run keeps a record of its data: other labels are refused, other images are reported."""

import json
import re
import shutil

import numpy as np
import pytest

from idml_jax.data.datasets import Splits, load_dataset
from idml_jax.data.sources import FolderSource, Subset
from idml_jax.errors import UserError
from idml_jax.training import data_record


def folder(root, classes=("a", "b", "c"), each=3):
    for split, prefix in (("train", ""), ("test", "t_")):
        for name in classes:
            target = root / split / (prefix + name)
            target.mkdir(parents=True)
            for i in range(each):
                (target / f"{i}.jpg").write_bytes(b"x")
    return root


def splits(root):
    parts = []
    for split in ("train", "test"):
        names = sorted(p.name for p in (root / split).iterdir())
        files = sorted((root / split).rglob("*.jpg"))
        labels = np.array([names.index(p.parent.name) for p in files])
        parts.append(FolderSource([str(p) for p in files], labels, names))
    return Splits(*parts)


@pytest.fixture
def run(tmp_path):
    root, workdir = folder(tmp_path / "images"), tmp_path / "run"
    data_record.remember(splits(root), workdir)
    return root, workdir


def test_the_same_data_at_another_place_passes(run, tmp_path):
    root, workdir = run
    assert data_record.check(splits(root), workdir) == []
    shutil.move(root, tmp_path / "elsewhere")
    assert data_record.check(splits(tmp_path / "elsewhere"), workdir) == []
    # The record of a run is that of its start.
    (tmp_path / "elsewhere/train/a/0.jpg").unlink()
    data_record.remember(splits(tmp_path / "elsewhere"), workdir)
    assert len(data_record.check(splits(tmp_path / "elsewhere"), workdir)) == 1


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda root: (root / "train/b").rename(root / "train/d"), r"1 gone, such as b; 1 new, such as d"),
        (lambda root: shutil.rmtree(root / "train/a"), r"1 gone, such as a"),
        (lambda root: shutil.copytree(root / "train/a", root / "train/A"), r"1 new, such as A"),
    ],
)
def test_other_training_classes_are_refused(run, change, message):
    root, workdir = run
    change(root)
    with pytest.raises(UserError, match=rf"the classes of the train images .*{message}.*labels would mean other"):
        data_record.check(splits(root), workdir)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda root: (root / "train/b/1.jpg").unlink(), "train images are not those .*renamed; 9 then, 8 now"),
        (lambda root: (root / "train/b/9.jpg").write_bytes(b"x"), "train images .*9 then, 10 now"),
        (lambda root: (root / "train/b/1.jpg").rename(root / "train/b/7.jpg"), "added, removed or renamed; 9 then, 9"),
        (lambda root: (root / "test/t_b").rename(root / "test/t_d"), "the classes of the test images .*such as t_b"),
    ],
)
def test_other_images_are_reported(run, change, message):
    root, workdir = run
    change(root)
    (warning,) = data_record.check(splits(root), workdir)
    assert re.search(message, warning), warning


def test_order_of_classes_and_labels_count(run):
    root, workdir = run
    train, test, *_ = splits(root)
    train.class_names = train.class_names[::-1]
    with pytest.raises(UserError, match="their order differs"):
        data_record.check(Splits(train, test), workdir)
    train, test, *_ = splits(root)
    train.labels = np.where(train.labels == 0, 1, train.labels)
    (warning,) = data_record.check(Splits(train, test), workdir)
    assert "labels changed" in warning


def test_old_runs_pass_and_damaged_records_are_named(run, tmp_path):
    root, workdir = run
    assert data_record.check(splits(root), tmp_path / "old") == []
    for content in ("{", "[]", json.dumps({"train": 3})):
        (workdir / "data.json").write_text(content)
        with pytest.raises(UserError, match=r"data\.json: cannot be read"):
            data_record.check(splits(root), workdir)


def test_subsets_are_identified_without_reading(tmp_path):
    class Unread(FolderSource):
        def read(self, index):
            raise AssertionError("an image was read")

    source = Unread(["/x/a/1.jpg", "/x/b/2.jpg", "/x/b/3.jpg"], np.array([0, 1, 1]), ["a", "b"])
    record = data_record.record_of(Splits(Subset(source, np.array([0, 2])), source))
    assert record["train"]["images"] == 2 and record["train"]["files"] != record["test"]["files"]


def test_a_run_is_not_resumed_with_other_labels(tmp_path, image_folder, finished):
    """Through the door: the data of a finished run with one class renamed."""
    from runs_made import small_config

    from idml_jax import train_and_evaluate

    shutil.copytree(image_folder, tmp_path / "images")
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    assert (tmp_path / "run" / "data.json").is_file()
    moved = load_dataset("folder", root=str(tmp_path / "images"))
    assert data_record.check(moved, tmp_path / "run") == []
    (tmp_path / "images/train/class_03").rename(tmp_path / "images/train/class_99")
    with pytest.raises(UserError, match="1 gone, such as class_03; 1 new, such as class_99"):
        train_and_evaluate(small_config(tmp_path / "images"), tmp_path / "run")
