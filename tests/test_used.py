"""What a trained run is used for: embedding, searching, reporting, exporting."""

import json
import shutil

import numpy as np
import pytest
from test_train import small_config

from idml_jax import embed, embeddings, evaluate, train, trained
from idml_jax.errors import UserError


@pytest.fixture(scope="module")
def workdir(image_folder, tmp_path_factory):
    """A run of two epochs; its folder."""
    folder = tmp_path_factory.mktemp("run")
    changes = {"epochs": 2, "eval.cluster": False, "eval.ambiguity_images": 0, "data.validation_classes": 0.25}
    train.train_and_evaluate(small_config(image_folder, **changes), folder)
    return folder


@pytest.fixture(scope="module")
def index(workdir, image_folder, tmp_path_factory):
    """Embeddings of the test pictures."""
    out = tmp_path_factory.mktemp("index") / "x.npz"
    embed.main([f"--workdir={workdir}", f"--images={image_folder / 'test'}", f"--out={out}"])
    return out


class Stopped(Exception):
    pass


class TestEmbed:
    def test_evaluate_gives_the_figures_of_the_run(self, workdir, index, tmp_path):
        evaluate.main([f"--embeddings={index}", "--no_clustering", f"--out={tmp_path / 'm.json'}"])
        measured = json.loads((tmp_path / "m.json").read_text())
        stored = json.loads((workdir / "result.json").read_text())["best"]
        for name in ("R@1", "MAP@R", "uncertainty_mean", "introspective/R@1"):
            assert measured[name] == pytest.approx(stored[name], rel=1e-4), name

    def test_what_is_stored(self, index, image_folder, workdir):
        found = embeddings.read(index)
        files = sorted(str(p) for p in (image_folder / "test").rglob("*.png"))
        assert found.files.tolist() == files
        assert found.class_of(0) == "class_04" and found.class_of(95) == "class_11"
        assert found.about["workdir"] == str(workdir) and found.about["step"] > 0
        with np.load(index) as file:
            np.testing.assert_allclose(file["uncertainty_norm"], np.linalg.norm(file["uncertainty"], axis=1), rtol=1e-6)
            assert file["semantic_norm"].shape == (96,)

    def test_parquet_holds_the_same(self, index, image_folder, workdir, tmp_path):
        out = tmp_path / "x.parquet"
        embed.main([f"--workdir={workdir}", f"--images={image_folder / 'test'}", f"--out={out}", "--batch_size=40"])
        a, b = embeddings.read(index), embeddings.read(out)
        np.testing.assert_allclose(a.embedded.semantic, b.embedded.semantic, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(a.embedded.uncertainty, b.embedded.uncertainty, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(a.embedded.labels, b.embedded.labels)
        assert a.files.tolist() == b.files.tolist() and a.class_names == b.class_names

    def test_damaged_pictures_are_listed_and_left_out(self, workdir, image_folder, tmp_path, capsys):
        folder = tmp_path / "mine"
        shutil.copytree(image_folder / "test" / "class_04", folder)
        (folder / "00.png").write_bytes(b"nothing")
        (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:100])
        out = tmp_path / "x.npz"
        embed.main([f"--workdir={workdir}", f"--images={folder}", f"--out={out}"])
        found = embeddings.read(out)
        assert [f[-6:] for f in found.files] == [f"{i:02d}.png" for i in range(12) if i not in (0, 5)]
        assert found.class_names is None  # a flat folder says nothing about classes
        listed = (tmp_path / "x.npz.skipped.txt").read_text().splitlines()
        assert [line.split("\t")[0] for line in listed] == [str(folder / "00.png"), str(folder / "05.png")]
        assert "2 of 12 pictures cannot be read" in capsys.readouterr().out

    def test_a_list_with_classes_and_a_missing_file(self, workdir, image_folder, tmp_path):
        rows = [f"{image_folder}/test/class_04/00.png\tb", f"{image_folder}/test/class_05/00.png\ta", "none.png\ta"]
        (tmp_path / "list.txt").write_text("\n".join(rows) + "\n")
        embed.main([f"--workdir={workdir}", f"--images={tmp_path / 'list.txt'}", f"--out={tmp_path / 'x.npz'}"])
        found = embeddings.read(tmp_path / "x.npz")
        assert [found.class_of(i) for i in range(2)] == ["b", "a"] and len(found.files) == 2
        assert "none.png" in (tmp_path / "x.npz.skipped.txt").read_text()

    def test_a_stopped_command_goes_on(self, workdir, index, image_folder, tmp_path, monkeypatch):
        model = trained.load(workdir)
        source, labelled = embed.list_images(image_folder / "test")
        out, calls, said = tmp_path / "x.npz", [], []
        real = trained.embed_pictures

        def stopping(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise Stopped
            return real(*arguments)

        run = lambda: embed.embed_to_file(
            model, source, out, labelled=labelled, origin="x", batch_size=16, part_batches=1, say=said.append
        )
        monkeypatch.setattr(trained, "embed_pictures", stopping)
        with pytest.raises(Stopped):
            run()
        assert not out.exists()
        run()
        assert len(calls) == 3 + 4  # two parts of six were done, the third was begun
        assert "going on: 32 of 96 pictures are done" in said
        assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npz"]
        np.testing.assert_allclose(
            embeddings.read(out).embedded.semantic, embeddings.read(index).embedded.semantic, rtol=1e-4, atol=1e-5
        )
        with pytest.raises(UserError, match="already there"):
            run()

    def test_the_runs_own_pictures(self, workdir, index, tmp_path):
        out = tmp_path / "x.npz"
        embed.main([f"--workdir={workdir}", "--split=test", f"--out={out}"])
        np.testing.assert_array_equal(
            embeddings.read(out).embedded.semantic, embeddings.read(index).embedded.semantic
        )

    @pytest.mark.parametrize(
        "words,message",
        [
            (["--images=none", "--out=x.npz"], "none: no such file or folder"),
            (["--images=.", "--out=x.npz"], "holds no pictures"),
            (["--images=.", "--out=x.csv"], "must end in .npz or .parquet"),
            (["--out=x.npz"], "either --images or --split"),
            (["--split=gallery", "--out=x.npz"], "has none"),
        ],
    )
    def test_what_cannot_work_is_said_in_one_line(self, workdir, tmp_path, monkeypatch, capsys, words, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            embed.main([f"--workdir={workdir}", *words])
        assert stop.value.code == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and message in error and "\n" not in error
        assert not list(tmp_path.iterdir())
