"""A confidence that is fitted on training images says so, at every door."""

import os
import shutil
import unicodedata

import numpy as np
import pytest
from runs_made import small_config

import idml_jax
from idml_jax import compare, embed, embeddings, evaluate, search
from idml_jax.errors import UserError
from idml_jax.inference.search import load_model
from idml_jax.inference.trained_on import training_images_in, warn_of_measured_training_images, warn_of_training_images
from idml_jax.training import train


@pytest.fixture(scope="module")
def workdir(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    changes = {"epochs": 1, "eval.cluster": False, "eval.ambiguity_images": 0, "data.validation_classes": 0.25}
    train.train_and_evaluate(small_config(image_folder, **changes), folder)
    return folder


@pytest.fixture(scope="module")
def indices(workdir, image_folder, tmp_path_factory):
    """Files of embeddings by name: of the folders of images, and of the splits of the run."""
    folder = tmp_path_factory.mktemp("indices")
    made = {name: f"--images={image_folder / name}" for name in ("train", "test")}
    made |= {f"split_{name}": f"--split={name}" for name in ("train", "validation", "test")}
    for name, what in made.items():
        embed.main([f"--workdir={workdir}", what, f"--out={folder / name}.npz"])
    return {name: folder / f"{name}.npz" for name in made}


def test_counts(indices):
    counts = {name: training_images_in(embeddings.read(path)) for name, path in indices.items()}
    trained = counts["split_train"]
    assert trained == len(embeddings.read(indices["split_train"])) > 0
    assert counts == {"train": trained, "test": 0, "split_train": trained, "split_validation": 0, "split_test": 0}
    assert len(embeddings.read(indices["train"])) > trained  # a quarter of its classes is held out


def test_images_by_another_way_are_the_same(workdir, image_folder, tmp_path, indices):
    os.symlink(image_folder / "train", tmp_path / "pictures")
    embed.main([f"--workdir={workdir}", f"--images={tmp_path / 'pictures'}", f"--out={tmp_path / 'x.npz'}"])
    trained = len(embeddings.read(indices["split_train"]))
    assert training_images_in(embeddings.read(tmp_path / "x.npz")) == trained
    links = tmp_path / "links"
    for file in (image_folder / "train").glob("*/*"):
        (links / file.parent.name).mkdir(parents=True, exist_ok=True)
        os.symlink(file, links / file.parent.name / f"link_{file.name}")
    embed.main([f"--workdir={workdir}", f"--images={links}", f"--out={tmp_path / 'y.npz'}"])
    assert training_images_in(embeddings.read(tmp_path / "y.npz")) == trained


def test_copies_of_training_images_in_another_place_are_said(workdir, image_folder, tmp_path):
    for part in ("train", "test"):
        shutil.copytree(image_folder / part, tmp_path / "copied" / part)
        embed.main([f"--workdir={workdir}", f"--images={tmp_path / 'copied' / part}", f"--out={tmp_path / part}.npz"])
    with pytest.raises(
        UserError, match="copies of training images in another place are among them, the first .*copied"
    ):
        training_images_in(embeddings.read(tmp_path / "train.npz"))
    # Those of the other split have the same names of files.
    assert training_images_in(embeddings.read(tmp_path / "test.npz")) == 0


def test_what_cannot_be_checked_is_said(workdir, image_folder, indices, tmp_path, capsys):
    index = embeddings.read(indices["train"])
    index.about["workdir"] = "/nowhere"
    with pytest.raises(UserError, match="/nowhere holds no run"):
        training_images_in(index)
    warn_of_training_images(index, "the index")
    assert "the index: whether it holds training images of the run cannot be checked" in capsys.readouterr().err
    warn_of_measured_training_images(index, "x.npz")
    assert "x.npz: whether it holds training images of the run cannot be checked" in capsys.readouterr().err
    moved = embeddings.read(indices["train"])
    moved.files[:] = [name.replace(str(image_folder), "/moved") for name in moved.files.tolist()]
    with pytest.raises(UserError, match="/moved/.*: no such file"):
        training_images_in(moved)
    foreign = embeddings.read(indices["train"])
    del foreign.about["workdir"]
    assert training_images_in(foreign) == 0


def test_a_table_with_splits_is_measured_whole_and_says_so(workdir, image_folder, tmp_path, capsys):
    rows = [f"{file},{file.parent.name},{split}" for split in ("train", "test")
            for file in sorted((image_folder / split).rglob("*.png"))]  # fmt: skip
    (tmp_path / "photos.csv").write_text("\n".join(["path,label,split", *rows]))
    embed.main([f"--workdir={workdir}", f"--images={tmp_path / 'photos.csv'}", f"--out={tmp_path / 'photos.npz'}"])
    assert "its column of splits is for training; here all of its images are read" in capsys.readouterr().err
    evaluate.main([f"--embeddings={tmp_path / 'photos.npz'}", "--no_clustering"])
    assert f"of {len(rows)} images are training images of the run, so metrics of all" in capsys.readouterr().err


def test_a_gallery_of_other_names_of_the_same_classes(indices, tmp_path, capsys):
    two = {form: tmp_path / f"{form}.npz" for form in ("NFC", "NFD")}
    with np.load(indices["test"]) as file:
        stored = dict(file)
    for form, path in two.items():
        names = [unicodedata.normalize(form, f"caf\u00e9 {name}") for name in stored["class_names"]]
        files = [f"/{form}/{file}" for file in stored["files"]]
        np.savez(path, **{**stored, "class_names": np.asarray(names), "files": np.asarray(files)})
    evaluate.main([f"--embeddings={two['NFC']}", f"--gallery={two['NFD']}", "--no_clustering"])
    said = capsys.readouterr().err
    assert "NFD.npz: all answers are wrong" in said and r"caf\xe9" in said and r"cafe\u0301" in said


class TestDoors:
    """Each door warns on training images, and is silent on others."""

    def asked(self, capsys, door, *words):
        capsys.readouterr()
        door.main([str(word) for word in words])
        return "training images of the run" in capsys.readouterr().err

    def test_search(self, image_folder, indices, capsys):
        train_, test = indices["train"], indices["test"]
        assert self.asked(capsys, search, f"--index={train_}", f"--query={test}")
        assert not self.asked(capsys, search, f"--index={test}", f"--query={train_}")
        assert self.asked(capsys, search, f"--index={test}", f"--query={test}", f"--held_out={train_}")
        assert self.asked(capsys, search, f"--index={test}", f"--query={test}", f"--held_out={image_folder / 'train'}")
        held_out = f"--held_out={indices['split_validation']}"
        assert not self.asked(capsys, search, f"--index={train_}", f"--query={test}", held_out)

    def test_a_gallery_that_is_not_read_whole(self, workdir, indices, tmp_path, capsys):
        for gallery, held_out, warned in (("validation", "train", True), ("train", "validation", False)):
            out = tmp_path / gallery
            embed.main([f"--workdir={workdir}", f"--split={gallery}", f"--out={out}", "--shard=1/1"])
            words = f"--index={out}", f"--query={indices['test']}", "--memory=0"
            assert self.asked(capsys, search, *words, f"--held_out={indices[f'split_{held_out}']}") == warned

    def test_evaluate(self, indices, capsys):
        words = f"--embeddings={indices['test']}", "--no_clustering"
        assert self.asked(capsys, evaluate, *words, f"--held_out={indices['train']}")
        assert not self.asked(capsys, evaluate, *words, f"--held_out={indices['split_validation']}")
        assert self.asked(capsys, evaluate, f"--embeddings={indices['train']}", "--no_clustering")
        assert not self.asked(capsys, evaluate, f"--embeddings={indices['split_train']}", "--no_clustering")

    def test_compare(self, workdir, image_folder, indices, capsys):
        one, two = sorted((image_folder / "test").rglob("*.png"))[:2]
        words = one, two, f"--workdir={workdir}", "--fmr=0.1"
        assert self.asked(capsys, compare, *words, f"--held_out={indices['train']}")
        assert not self.asked(capsys, compare, *words, f"--held_out={indices['split_test']}")

    def test_python(self, workdir, image_folder, capsys):
        model = idml_jax.load(workdir)
        known, new = (model.embed(image_folder / name) for name in ("train", "test"))
        for index, held_out, warned in ((known, None, True), (new, None, False), (new, known, True)):
            capsys.readouterr()
            model.search(new, index, 2, held_out=held_out)
            assert ("training images of the run" in capsys.readouterr().err) == warned


def test_a_run_that_has_moved_is_asked_at_its_new_place(workdir, indices, tmp_path):
    shutil.copytree(workdir, tmp_path / "moved")
    index = embeddings.read(indices["train"])
    index.about["workdir"] = "/nowhere"
    with pytest.raises(
        UserError, match="/nowhere, the run that the index names, is not there; if it has moved: --workdir"
    ):
        load_model(index, "", print)
    load_model(index, str(tmp_path / "moved"), print)
    assert training_images_in(index) == training_images_in(embeddings.read(indices["train"]))
