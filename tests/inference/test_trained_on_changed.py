"""Training images are those that the run was trained on, also where its images have changed since or moved."""

import json
import shutil

import pytest
from runs_made import small_config

from idml_jax import audit, compare, embed, embeddings, evaluate, search
from idml_jax.errors import UserError
from idml_jax.inference import store
from idml_jax.inference.trained_on import training_images_in
from idml_jax.training import data_record, train


@pytest.fixture(scope="module")
def photos(image_folder, tmp_path_factory):
    """A run on a folder of classes alone, which is divided by class; the folder may be changed."""
    root = tmp_path_factory.mktemp("photos")
    shutil.copytree(image_folder / "train", root / "all")
    changes = {"epochs": 1, "eval.cluster": False, "eval.ambiguity_images": 0}
    changes |= {"data.train_classes": 0.75, "data.validation_classes": 0.34}
    train.train_and_evaluate(small_config(root / "all", **changes), root / "run")
    embed.main([f"--workdir={root / 'run'}", f"--images={root / 'all'}", f"--out={root / 'all.npz'}"])
    return root


def test_the_classes_of_the_run_tell_after_its_images_have_changed(photos, tmp_path, capsys):
    root, run = photos / "all", photos / "run"
    before = training_images_in(embeddings.read(photos / "all.npz"))
    names = data_record.classes_of(run)
    assert before == 12 * len(names["train"]) and data_record.sizes_of(run)["train"] == before
    shutil.copytree(root / names["test"][0], root / "aaa")  # the division by class is another one now
    try:
        assert training_images_in(embeddings.read(photos / "all.npz")) == before
        embed.main([f"--workdir={run}", "--split=validation", f"--out={tmp_path / 'v.npz'}"])
        index = embeddings.read(tmp_path / "v.npz")
        trained = sum(name in names["train"] for name in index.labels)
        assert training_images_in(index) == trained > 0
        capsys.readouterr()
        evaluate.main([f"--embeddings={photos / 'all.npz'}", f"--held_out={tmp_path / 'v.npz'}", "--no_clustering"])
        assert f"v.npz: {trained} of {len(index)} images are training images of the run" in capsys.readouterr().err
        pictures = sorted((root / "aaa").iterdir())[:2]
        compare.main([*map(str, pictures), f"--workdir={run}", "--fmr=0.1"])
        assert f"{trained} of {len(index)} images are training images of the run" in capsys.readouterr().err
    finally:
        shutil.rmtree(root / "aaa")


def test_what_is_not_known_after_a_change_is_said(photos, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(photos / "run", run)
    index = embeddings.read(photos / "all.npz")
    index.about["workdir"] = str(run)
    record = json.loads((run / "data.json").read_text())
    train_, test = record["train"], record["test"]
    train_ |= {"classes": ["another", *train_["classes"][1:]], "class_digest": "another"}
    (run / "data.json").write_text(json.dumps(record))
    assert training_images_in(index) == 12 * (len(train_["classes"]) - 1)  # those of "another" are not there
    test["classes"][0] = "another"
    (run / "data.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="the run's images have changed since it was started"):
        training_images_in(index)


def test_an_audit_of_learned_labels_says_so(photos, tmp_path, capsys):
    count = training_images_in(embeddings.read(photos / "all.npz"))
    audit.main([f"--index={photos / 'all.npz'}", f"--out={tmp_path / 'one'}"])
    assert f"{count} of 96 images are training images of the run, and a network finds few" in capsys.readouterr().err
    embed.main([f"--workdir={photos / 'run'}", "--split=test", f"--out={tmp_path / 'test.npz'}"])
    capsys.readouterr()
    audit.main([f"--index={tmp_path / 'test.npz'}", f"--out={tmp_path / 'two'}"])
    assert "training images" not in capsys.readouterr().err


def test_a_run_that_has_moved(photos, tmp_path, capsys):
    """Held-out embeddings of the run are asked at the place of the network in use; audit tells how to name it."""
    moved = tmp_path / "moved"
    shutil.copytree(photos / "run", moved)
    for name, what in (("test", "--split=test"), ("all", f"--images={photos / 'all'}")):
        embed.main([f"--workdir={moved}", what, f"--out={tmp_path / name}.npz"])
    for name in ("test", "all"):
        index = embeddings.read(tmp_path / f"{name}.npz")
        index.about["workdir"] = "/nowhere"
        store.save(index, tmp_path / f"{name}_old.npz")
    words = f"--index={tmp_path / 'test_old.npz'}", f"--query={photos / 'all'}", f"--workdir={moved}"
    capsys.readouterr()
    search.main([*words, f"--held_out={tmp_path / 'all_old.npz'}"])
    told = capsys.readouterr().err
    assert "all_old.npz: 48 of 96 images are training images of the run" in told and "cannot be checked" not in told
    with pytest.raises(SystemExit):
        audit.main([f"--index={tmp_path / 'test_old.npz'}", f"--out={tmp_path / 'audited'}"])
    assert "/nowhere, the run that the index names, is not there; if it has moved: --workdir" in capsys.readouterr().err
    audit.main([f"--index={tmp_path / 'test_old.npz'}", f"--out={tmp_path / 'audited'}", f"--workdir={moved}"])


def test_a_confidence_fitted_on_what_is_asked(photos, tmp_path, capsys):
    path = photos / "all.npz"
    index = embeddings.read(path)
    capsys.readouterr()
    evaluate.main([f"--embeddings={path}", f"--held_out={path}", "--no_clustering"])
    assert f"{path}: 96 of the 96 measured images are among these images" in capsys.readouterr().err
    picture = next((photos / "all" / index.labels[0]).iterdir())
    search.main([f"--index={path}", f"--query={picture}", f"--held_out={path}"])
    assert "1 of the 1 queries is among these images, on which the confidence is fitted" in capsys.readouterr().err
    search.main([f"--index={path}", f"--query={picture}"])
    assert "among these images" not in capsys.readouterr().err


def test_queries_of_a_run_with_a_gallery(image_folder, tmp_path, capsys):
    """The documented way from a table of splits to metrics gives those of the run, or says that it does not."""
    rows = ["path,label,split"]
    for label in range(8):
        rows += [f"train/class_{label:02d}/{i:02d}.png,class_{label:02d},train" for i in range(12)]
    for label in range(8, 12):
        for i in range(12):
            split = "query" if i < 2 else "gallery"
            rows.append(f"test/class_{label:02d}/{i:02d}.png,class_{label:02d},{split}")
    table = tmp_path / "t.csv"
    table.write_text("\n".join(rows))
    config = small_config(table, **{"epochs": 1, "data.image_root": str(image_folder)})
    result = train.train_and_evaluate(config, tmp_path / "run")
    capsys.readouterr()
    for split in ("test", "gallery"):
        embed.main([f"--workdir={tmp_path / 'run'}", f"--split={split}", f"--out={tmp_path / split}.npz"])
        note = "these are the queries of the run; the 40 images that they search: --split=gallery"
        assert (note in capsys.readouterr().out) == (split == "test")
    evaluate.main([f"--embeddings={tmp_path / 'test.npz'}", "--no_clustering"])
    assert (
        "the test images of this run search its 40 gallery images; here they search each other"
        in capsys.readouterr().err
    )
    both = [f"--embeddings={tmp_path / 'test.npz'}", f"--gallery={tmp_path / 'gallery.npz'}", "--no_clustering"]
    evaluate.main([*both, f"--out={tmp_path / 'm.json'}"])
    told = capsys.readouterr()
    assert "search each other" not in told.err
    assert f"{100 * result['best']['R@1']:.1f}" in told.out or f"{result['best']['R@1']:.3f}" in told.out
