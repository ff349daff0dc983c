"""Using a trained run: embedding, searching, reporting, exporting."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from runs_made import small_config

from idml_jax import embed, evaluate, export, report, search
from idml_jax.errors import UserError
from idml_jax.inference import model as trained
from idml_jax.inference import store as embeddings
from idml_jax.ism import Metric
from idml_jax.metrics import retrieval
from idml_jax.metrics.summary import Embedded
from idml_jax.metrics.uncertainty import threshold_for_precision
from idml_jax.reporting import html as pages
from idml_jax.reporting import plots
from idml_jax.reporting import sections as report_parts
from idml_jax.training import train
from idml_jax.training.embedder import Embedder


@pytest.fixture(scope="module")
def workdir(image_folder, tmp_path_factory):
    """A run of two epochs; its folder."""
    folder = tmp_path_factory.mktemp("run")
    changes = {"epochs": 2, "eval.cluster": False, "eval.ambiguity_images": 0, "data.validation_classes": 0.25}
    train.train_and_evaluate(small_config(image_folder, **changes), folder)
    return folder


@pytest.fixture(scope="module")
def index(workdir, image_folder, tmp_path_factory):
    """Embeddings of the test images."""
    out = tmp_path_factory.mktemp("index") / "x.npz"
    embed.main([f"--workdir={workdir}", f"--images={image_folder / 'test'}", f"--out={out}"])
    return out


class Stopped(Exception):
    pass


class TestEmbed:
    def test_evaluate_gives_the_metrics_of_the_run(self, workdir, index, tmp_path):
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

    def test_damaged_images_are_listed_and_skipped(self, workdir, image_folder, tmp_path, capsys):
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
        assert "2 of 12 images cannot be read" in capsys.readouterr().out

    def test_a_list_with_classes_and_a_missing_file(self, workdir, image_folder, tmp_path):
        rows = [f"{image_folder}/test/class_04/00.png\tb", f"{image_folder}/test/class_05/00.png\ta", "none.png\ta"]
        (tmp_path / "list.txt").write_text("\n".join(rows) + "\n")
        embed.main([f"--workdir={workdir}", f"--images={tmp_path / 'list.txt'}", f"--out={tmp_path / 'x.npz'}"])
        found = embeddings.read(tmp_path / "x.npz")
        assert [found.class_of(i) for i in range(2)] == ["b", "a"] and len(found.files) == 2
        assert "none.png" in (tmp_path / "x.npz.skipped.txt").read_text()

    def test_a_stopped_command_resumes(self, workdir, index, image_folder, tmp_path, monkeypatch):
        model = trained.load(workdir)
        source, labelled = embed.list_images(image_folder / "test")
        out, calls, said = tmp_path / "x.npz", [], []
        real = Embedder.images

        def stopping(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise Stopped
            return real(*arguments)

        small = model.using(batch_size=16)
        run = lambda: embed.embed_to_file(
            small, source, out, labelled=labelled, origin="x", part_batches=1, say=said.append
        )
        monkeypatch.setattr(Embedder, "images", stopping)
        with pytest.raises(Stopped):
            run()
        assert not out.exists()
        run()
        assert len(calls) == 3 + 4  # two parts of six were done, the third was begun
        assert "resuming: 32 of 96 images are done" in said
        assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npz"]
        np.testing.assert_allclose(
            embeddings.read(out).embedded.semantic, embeddings.read(index).embedded.semantic, rtol=1e-4, atol=1e-5
        )
        with pytest.raises(UserError, match="already exists"):
            run()

    def test_a_stopped_command_starts_over_if_images_have_changed(self, workdir, image_folder, tmp_path, monkeypatch):
        folder, out, said = tmp_path / "mine", tmp_path / "x.npz", []
        shutil.copytree(image_folder / "test" / "class_04", folder)
        model, real = trained.load(workdir).using(batch_size=4), Embedder.images

        def run(calls):
            left = iter(range(calls))

            def stopping(*arguments):
                if next(left, None) is None:
                    raise Stopped
                return real(*arguments)

            monkeypatch.setattr(Embedder, "images", stopping)
            how = {"labelled": False, "origin": "x", "part_batches": 1, "say": said.append}
            embed.embed_to_file(model, embed.list_images(folder)[0], out, **how)

        with pytest.raises(Stopped):
            run(1)
        # Other pictures of the same names, one of them in the part that is done.
        for name in ("00.png", "11.png"):
            shutil.copyfile(image_folder / "test" / "class_09" / name, folder / name)
        run(3)
        assert "images, run or settings are not those of the stopped command; starting over" in said
        assert not any("resuming" in line for line in said)
        monkeypatch.setattr(Embedder, "images", real)
        whole = embed.embed_to_file(
            model, embed.list_images(folder)[0], tmp_path / "y.npz", labelled=False, origin="x", say=said.append
        )
        np.testing.assert_array_equal(embeddings.read(out).embedded.semantic, embeddings.read(whole).embedded.semantic)

    def test_names_that_are_not_utf_8_are_kept_and_shown_escaped(self, workdir, image_folder, tmp_path, capsys):
        folder = os.fsencode(tmp_path / "mine")
        os.mkdir(folder)
        for i, name in enumerate((b"caf\xe9.png", b"bad\xff\n\x1b[2J.png", b"a.png")):
            data = (image_folder / "test" / "class_04" / f"0{i}.png").read_bytes()
            with open(os.path.join(folder, name), "wb") as file:
                file.write(b"nothing" if name.startswith(b"bad") else data)
        for name in ("x.parquet", "x.npz"):
            out = tmp_path / name
            embed.main([f"--workdir={workdir}", f"--images={os.fsdecode(folder)}", f"--out={out}"])
            found = embeddings.read(out)
            assert [os.fsencode(f) for f in found.files] == [
                os.path.join(folder, n) for n in (b"a.png", b"caf\xe9.png")
            ]
            listed = out.with_name(f"{name}.skipped.txt").read_text()
            assert "bad\\xff\\n\\x1b[2J.png\t" in listed and listed.count("\n") == 1
            for page in ("a.html", "a.png", "a.jsonl"):
                search.main([f"--index={out}", f"--query={os.fsdecode(folder)}", "-k", "1", f"--out={tmp_path / page}"])
            assert "caf\\xe9.png" in (tmp_path / "a.html").read_text()
            row = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
            assert os.fsencode(row["neighbours"][0]["file"]).endswith(b"caf\xe9.png")
        told = capsys.readouterr()
        assert "\x1b" not in told.out + told.err and "bad\\xff" in told.out

    def test_a_network_with_non_finite_outputs_is_refused(self, workdir, image_folder, tmp_path, monkeypatch, capsys):
        real = Embedder.images

        def broken(*arguments):
            found = real(*arguments)
            found["semantic"] = np.where(np.arange(len(found["semantic"]))[:, None] == 2, np.nan, found["semantic"])
            return found

        monkeypatch.setattr(Embedder, "images", broken)
        folder = image_folder / "test" / "class_04"
        with pytest.raises(SystemExit):
            embed.main([f"--workdir={workdir}", f"--images={folder}", f"--out={tmp_path / 'x.npz'}"])
        told = capsys.readouterr().err
        assert f"{workdir} gives NaN or infinity in semantic for 1 of 12 images, the first {folder}/02.png" in told
        assert not (tmp_path / "x.npz").exists()
        with pytest.raises(UserError, match="gives NaN"):
            embed.embed_all(trained.load(workdir), embed.list_images(folder)[0])

    def test_a_file_that_is_being_written_is_left_alone(self, workdir, image_folder, tmp_path, capsys):
        out = tmp_path / "x.npz"
        with embeddings.writing(out), pytest.raises(SystemExit):
            embed.main([f"--workdir={workdir}", f"--images={image_folder / 'test' / 'class_04'}", f"--out={out}"])
        assert f"x.npz: another process is writing it; wait for it (process {os.getpid()})" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    def test_the_runs_own_images(self, workdir, index, tmp_path):
        out = tmp_path / "x.npz"
        embed.main([f"--workdir={workdir}", "--split=test", f"--out={out}"])
        np.testing.assert_array_equal(embeddings.read(out).embedded.semantic, embeddings.read(index).embedded.semantic)

    @pytest.mark.parametrize(
        "words,message",
        [
            (["--images=none", "--out=x.npz"], "none: no such file or folder"),
            (["--images=.", "--out=x.npz"], "holds no images"),
            (["--images=.", "--out=x.csv"], "must end in .npz or .parquet"),
            (["--out=x.npz"], "either --images or --split"),
            (["--split=gallery", "--out=x.npz"], "has none"),
        ],
    )
    def test_bad_arguments_are_reported_in_one_line(self, workdir, tmp_path, monkeypatch, capsys, words, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stop:
            embed.main([f"--workdir={workdir}", *words])
        assert stop.value.code == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and message in error and "\n" not in error
        assert not list(tmp_path.iterdir())


def blobs(seed, n=160, d=6, classes=8):
    """Embeddings around shared centres; half of the images are much further out, and uncertain."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    noise = np.where(rng.random(n) < 0.5, 0.2, 2.0)
    semantic = np.random.default_rng(9).normal(size=(classes, d))[labels] + noise[:, None] * rng.normal(size=(n, d))
    uncertainty = noise[:, None] * np.abs(rng.normal(1, 0.2, (n, 3)))
    return Embedded(semantic.astype(np.float32), labels, uncertainty.astype(np.float32))


class TestSearch:
    def test_answers_are_those_of_a_full_sort(self):
        queries, gallery = blobs(0), blobs(1)
        own = np.where(np.arange(160) % 3 == 0, np.arange(160), -1)
        found = search.search(queries, gallery, 7, own=own, metric=Metric("relative", 3.0))
        distance = np.linalg.norm(queries.semantic[:, None] - gallery.semantic[None], axis=2)
        masked = np.where(own[:, None] == np.arange(160)[None], np.inf, distance)
        np.testing.assert_array_equal(found.index, np.argsort(masked, axis=1)[:, :7])
        np.testing.assert_allclose(found.distance, np.sort(masked, axis=1)[:, :7], rtol=1e-5)
        beta = np.linalg.norm(queries.uncertainty[:, None] + gallery.uncertainty[found.index], axis=2)
        by_hand = found.distance * np.exp(-beta / found.distance / 3.0)
        np.testing.assert_allclose(found.introspective, by_hand, rtol=1e-4)
        assert found.sure is None and found.answered.all()

    def test_the_threshold_of_held_out_classes_keeps_its_promise_on_others(self):
        calibration = search.calibrate(blobs(3, n=800), Metric())
        wanted = 0.85
        threshold = threshold_for_precision(calibration.doubt, calibration.correct, wanted, groups=calibration.labels)
        assert threshold.reached and calibration.correct.mean() < wanted
        queries, gallery = blobs(4, n=800), blobs(5, n=800)
        found = search.search(queries, gallery, 10, calibrated=calibration, threshold=threshold)
        right = gallery.labels[found.index[:, 0]] == queries.labels
        assert 0.2 < found.answered.mean() < 0.95
        assert right[found.answered].mean() > wanted - 0.03 and right.mean() < wanted
        # The probability means what it says.
        for low, high in ((0.0, 0.6), (0.8, 1.0)):
            some = (found.sure >= low) & (found.sure < high)
            assert abs(found.sure[some].mean() - right[some].mean()) < 0.1

    def test_one_class_tells_nothing(self):
        data = blobs(0)
        with pytest.raises(UserError, match="of one class"):
            search.calibrate(data._replace(labels=np.zeros(160, int)), Metric())

    def test_an_index_of_one_class_is_searched(self, finished, image_folder, tmp_path, capsys):
        """How sure the answers are is then unknown."""
        shutil.copytree(image_folder / "test" / "class_05", tmp_path / "one" / "class_05")
        embed.main([f"--workdir={finished[0]}", f"--images={tmp_path / 'one'}", f"--out={tmp_path / 'one.npz'}"])
        query = next((tmp_path / "one" / "class_05").iterdir())
        capsys.readouterr()
        words = [f"--index={tmp_path / 'one.npz'}", f"--query={query}", "-k", "2"]
        search.main(words)
        assert "how sure answers are is unknown: the images are of one class" in capsys.readouterr().out
        with pytest.raises(SystemExit):
            search.main([*words, "--abstain=0.9"])
        assert "one.npz: its images are of one class; at least 2 are needed" in capsys.readouterr().err

    def test_rows_of_the_command(self, index, image_folder, tmp_path):
        out = tmp_path / "a.jsonl"
        folder = image_folder / "test" / "class_05"
        search.main([f"--index={index}", f"--query={folder}", "-k", "3", f"--out={out}"])
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["query"] for row in rows] == sorted(str(p) for p in folder.iterdir())
        stored = embeddings.read(index)
        for i, row in enumerate(rows):
            assert row["class"] == "class_05" and 0 < row["sure"] < 1 and row["answered"]
            assert row["query"] not in [near["file"] for near in row["neighbours"]]
            distance = np.linalg.norm(stored.embedded.semantic - stored.embedded.semantic[12 + i], axis=1)
            nearest = np.argsort(distance)[1:4]  # 0 is the image itself
            assert [near["file"] for near in row["neighbours"]] == stored.files[nearest].tolist()
            assert row["neighbours"][0]["introspective_distance"] < row["neighbours"][0]["distance"]

    def test_pages_and_sheets(self, index, image_folder, tmp_path, capsys):
        query = image_folder / "test" / "class_05" / "03.png"
        for name in ("a.html", "a.png"):
            search.main([f"--index={index}", f"--query={query}", "-k", "4", f"--out={tmp_path / name}"])
        page = (tmp_path / "a.html").read_text()
        assert page.count("<figure") == 5 and page.count("data:image/png;base64,") == 5
        assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
        search.main([f"--index={index}", f"--query={query}", "-k", "200", "--keep_same"])
        shown = capsys.readouterr().out
        assert f"    1  distance 0.000  D 0.000  class_05  {query}" in shown and "   96  distance" in shown

    def test_an_unreachable_precision_gives_no_answers(self, index, image_folder, capsys):
        search.main([f"--index={index}", f"--query={image_folder / 'test' / 'class_05'}", "--abstain=0.999"])
        shown = capsys.readouterr().out
        assert shown.count("no answer") == 12 and "not 100% right answers: nothing is answered" in shown

    def test_refusals(self, index, workdir, image_folder, tmp_path, capsys):
        query = f"--query={image_folder / 'test' / 'class_05'}"
        flat = tmp_path / "flat.npz"
        embed.main([f"--workdir={workdir}", f"--images={image_folder / 'test'}", "--no_labels", f"--out={flat}"])
        stale, other, moved = (tmp_path / f"{name}.npz" for name in ("stale", "other", "moved"))
        with np.load(index) as file:
            about = json.loads(str(file["about"]))
            old = {k: v for k, v in about.items() if k != "weights"}  # as written before weights had a digest
            for path, changed in (
                (stale, {**old, "step": 1}),
                (other, {**about, "weights": "0" * 16}),
                (moved, {**about, "workdir": "/gone", "step": 1}),
            ):
                np.savez(path, **{**file, "about": np.asarray(json.dumps(changed))})
        for words, message in (
            ([f"--index={tmp_path}/no.npz", query], "no such file (--index)"),
            ([f"--index={flat}", query, "--abstain=0.9"], "classes are unknown"),
            ([f"--index={index}", query, "--abstain=90"], "a share of right answers"),
            ([f"--index={index}", query, "--out=x.pdf"], "must end in"),
            ([f"--index={index}", f"--query={tmp_path}"], "holds no images"),
            ([f"--index={stale}", query], "cannot be compared; embed the index again"),
            ([f"--index={other}", query], "cannot be compared; embed the index again"),
            (
                [f"--index={moved}", query],
                "/gone, the run that the index names, is not there; if it has moved: --workdir=",
            ),
        ):
            capsys.readouterr()
            with pytest.raises(SystemExit):
                search.main(words)
            error = capsys.readouterr().err.strip()
            assert error.startswith("error: ") and message in error and "\n" not in error
        search.main([f"--index={flat}", query, "-k", "1"])
        assert "how sure answers are is unknown" in capsys.readouterr().out
        # The same weights are the same network, wherever they lie.
        search.main([f"--index={moved}", query, "-k", "1", f"--workdir={workdir}"])
        assert "96 images searched for 12" in capsys.readouterr().out

    def test_a_small_index_has_fewer_margins_than_held_out_images(self, index, workdir, image_folder, tmp_path):
        small = tmp_path / "small.npz"
        folder = image_folder / "test" / "class_04"
        embed.main([f"--workdir={workdir}", f"--images={folder}", f"--out={small}"])
        search.main(
            [f"--index={small}", f"--query={folder / '00.png'}", f"--held_out={index}", f"--out={tmp_path / 'a.jsonl'}"]
        )
        (row,) = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
        assert 0 < row["sure"] < 1 and len(row["neighbours"]) == 10

    def test_names_cannot_break_a_page(self):
        assert "<script" not in pages.tile(None, ["<script>"], "", '"><script>')


def sections(page):
    """Body of a page by its second-level titles."""
    parts = re.split(r"<h2>(.*?)</h2>", page)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.slow
class TestReport:
    @pytest.fixture(scope="class")
    def page(self, workdir, tmp_path_factory):
        out = tmp_path_factory.mktemp("report") / "page.html"
        report.main([f"--workdir={workdir}", f"--out={out}", f"--compare={workdir}"])
        return out.read_text()

    def test_the_page_is_self_contained(self, page):
        addresses = re.findall(r'(?:src|href)="(.{12})', page)
        assert len(addresses) > 50 and all(a.startswith("data:image/") for a in addresses)
        assert "<script" not in page

    def test_every_section_is_there_with_the_metrics_of_the_run(self, page, workdir):
        best = json.loads((workdir / "result.json").read_text())["best"]
        found = sections(page)
        assert f"{100 * best['R@1']:.1f} %" in page and f"{100 * best['MAP@R']:.1f} %" in page
        for title in ("Training", "Does it know when it is wrong?", "Answers", "Map of the embeddings"):
            assert title in found
        for name in ("uncertainty", "margin_10", "confidence"):
            shown = report_parts.SCORE_NAMES[name]
            assert f"<td>{shown}</td>" in found["Does it know when it is wrong?"]
            cells = found["Does it know when it is wrong?"].split(f"<td>{shown}</td>")[1]
            assert float(re.search(r">([0-9.]+) %<", cells)[1]) == pytest.approx(
                100 * best[f"R-AUROC({name})"], abs=0.2
            )
        assert page.count(f"{100 * best['MAP@R']:.1f} %") >= 3  # on the card, and of both runs, which are one here

    def test_right_and_wrong_answers_are_what_their_frames_say(self, page):
        answers = sections(page)["Answers"]
        parts = re.split(r"<h3>(.*?)</h3>", answers)
        folder = lambda title: title.split("/")[-2]
        seen = 0
        for title, body in zip(parts[1::2], parts[2::2], strict=True):
            for row in body.split('<div class="row">')[1:]:
                tiles = re.findall(r'<figure class="(\w+)" title="([^"]+)"', row)
                query = folder(tiles[0][1])
                for kind, name in tiles[1:]:
                    assert kind == ("right" if folder(name) == query else "wrong")
                assert tiles[0][0] == "query" and tiles[1][0] == title[:5].lower()
                seen += 1
        assert seen >= 10

    def test_most_uncertain_first(self, page):
        most, least = sections(page)["The most and the least uncertain images"].split("Least uncertain")
        numbers = lambda text: [float(x) for x in re.findall(r"\|u\| ([0-9.]+)<br>", text)]
        assert len(numbers(most)) == 20
        assert numbers(most) == sorted(numbers(most), reverse=True) and numbers(least) == sorted(numbers(least))
        assert min(numbers(most)) >= max(numbers(least))

    def test_other_runs_must_be_finished(self, workdir, tmp_path, capsys):
        shutil.copy(workdir / "config.json", tmp_path)
        for other, message in ((tmp_path, "not finished"), (tmp_path / "none", "holds no run")):
            with pytest.raises(SystemExit):
                report.main([f"--workdir={workdir}", f"--compare={other}", f"--out={tmp_path / 'page.html'}"])
            assert message in capsys.readouterr().err
        assert not (tmp_path / "page.html").exists()

    def test_without_scikit_learn_the_map_is_of_principal_components(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
        rng = np.random.default_rng(0)
        data = rng.normal(size=(50, 6)) * np.asarray([9, 5, 1, 1, 1, 1])
        places, how = plots.flatten_to_plane(data)
        assert "principal components" in how
        np.testing.assert_allclose(places.var(axis=0).sum(), np.linalg.eigvalsh(np.cov(data.T, bias=True))[-2:].sum())


class TestExport:
    @pytest.fixture(scope="class")
    def exported(self, workdir, tmp_path_factory):
        out = tmp_path_factory.mktemp("export") / "model"
        export.main([f"--workdir={workdir}", f"--out={out}"])
        return out

    def test_the_exported_model_gives_the_same_vectors_at_any_batch_size(self, exported, workdir):
        from jax import export as jax_export

        called = jax_export.deserialize((exported / "model.stablehlo").read_bytes())
        assert called.platforms == ("cpu", "cuda", "tpu")
        model = trained.load(workdir)
        images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 1), np.uint8)
        expected = model.embedder.images(images)
        for size in (1, 5, 16):
            found = called.call(images[:size])
            assert set(found) == set(expected)
            for name, value in expected.items():
                np.testing.assert_allclose(found[name], value[:size], rtol=1e-4, atol=1e-5)

    def test_its_example_loads_it_without_this_package(self, exported, index, image_folder, tmp_path):
        stored = embeddings.read(index)
        code = (exported / "example.py").read_text()
        assert "idml_jax" not in code and len(code.splitlines()) <= 32
        files = [str(image_folder / "test" / f"class_{c:02d}" / "00.png") for c in (4, 5, 6)]
        code = code.replace("sys.argv[1:]", "sys.argv[2:]")
        code += "\nassert 'idml_jax' not in sys.modules\nnp.save(sys.argv[1], found['semantic'])\n"
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "x.npy"), *files], cwd=exported, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        cosine = (np.load(tmp_path / "x.npy") * stored.embedded.semantic[[0, 12, 24]]).sum(axis=1)
        assert (cosine > 0.999).all(), cosine

    def test_an_index_for_faiss_gives_the_same_neighbours(self, index, tmp_path, capsys):
        faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed (extra 'faiss')")
        stored = embeddings.read(index).embedded.semantic
        expected = retrieval.neighbours(stored, stored, 6)
        for kind in ("Flat", "HNSW16"):
            out = tmp_path / f"{kind}.faiss"
            export.main([f"--index={index}", f"--faiss={out}", f"--faiss_kind={kind}"])
            assert "96 rows of 16 dimensions" in capsys.readouterr().out
            squares, rows = faiss.read_index(str(out)).search(stored, 6)
            np.testing.assert_allclose(np.sqrt(np.maximum(squares, 0)), expected.distance, atol=2e-3)
            assert (rows == expected.index).mean() > 0.99  # equal distances may come in another order
        for words, message in (
            ([f"--faiss={tmp_path / 'x'}", "--faiss_kind=Nothing"], "--faiss_kind=Nothing: faiss cannot make it"),
            ([f"--faiss={tmp_path / 'x'}", "--faiss_kind=IVF4096,Flat"], "of 96 rows"),
            ([], "--faiss is missing"),
        ):
            with pytest.raises(SystemExit):
                export.main([f"--index={index}", *words])
            error = capsys.readouterr().err
            assert message in error and error.count("\n") == 1
        assert sorted(p.name for p in tmp_path.iterdir()) == ["Flat.faiss", "HNSW16.faiss"]

    def test_without_faiss_that_is_said(self, index, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "faiss", None)
        with pytest.raises(SystemExit):
            export.main([f"--index={index}", f"--faiss={tmp_path / 'x.faiss'}"])
        assert "pip install faiss-cpu" in capsys.readouterr().err and not list(tmp_path.iterdir())

    def test_refusals(self, exported, workdir, capsys):
        for words, message in ((["--platforms=gpu"], "known: cpu, cuda, tpu, rocm"), ([], "already exists")):
            with pytest.raises(SystemExit):
                export.main([f"--workdir={workdir}", f"--out={exported}", *words])
            assert message in capsys.readouterr().err
