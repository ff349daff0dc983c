"""Runs in closed form (idml_jax.fit), cached features, and training that starts from the closed form."""

import json
import logging
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from runs_made import last_state, rows, small_config

from idml_jax import embed, evaluate, export, report, search
from idml_jax.data.samplers import ShuffledSampler
from idml_jax.errors import UserError
from idml_jax.inference import model as trained
from idml_jax.inference import store
from idml_jax.metrics.closed_form import ClosedForm, moments, statistics
from idml_jax.reporting.page import look
from idml_jax.runtime.interrupt import Stopped
from idml_jax.training import features as features_lib
from idml_jax.training import fit as fit_lib
from idml_jax.training import semantic_init, train
from idml_jax.training.build import build
from idml_jax.training.config import starts_whitened
from idml_jax.training.config_checks import validate
from idml_jax.training.features import features_of


@pytest.fixture(scope="module")
def settings(image_folder, finished):
    """Settings of small runs that start from the trunk of the session's run."""

    def make(**changes):
        defaults = {"model.init_from": str(finished[0]), "eval.cluster": False, "eval.ambiguity_images": 0}
        return small_config(image_folder, **{**defaults, **changes})

    return make


@pytest.fixture(scope="module")
def fitted(settings, tmp_path_factory):
    """Workdir and result of a run in closed form; every image goes through the trunk once, for its feature."""
    workdir, seen = tmp_path_factory.mktemp("fitted"), []
    computed = features_lib._computed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            features_lib, "_computed", lambda e, source, *more: seen.append(source) or computed(e, source, *more)
        )
        patch.setattr("idml_jax.training.embedder.jit_embed_step", lambda *a, **k: pytest.fail("embedded again"))
        result = fit_lib.fit(settings(**{"eval.ambiguity_images": 3, "eval.cluster": True}), workdir)
    assert [len(source) for source in seen] == [96, 96]
    return workdir, result


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO, logger="idml_jax")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


class TestFit:
    def test_needs_no_full_batch(self, settings, tmp_path):
        result = fit_lib.fit(settings(**{"batch_size": 200, "loss.name": "contrastive"}), tmp_path / "run")
        assert result["final"]["R@1"] > 0

    def test_a_finished_run_says_what_has_changed(self, settings, image_folder, tmp_path):
        own = tmp_path / "images"
        shutil.copytree(image_folder, own)
        config = settings(**{"data.root": str(own)})
        result = fit_lib.fit(config, tmp_path / "run")
        assert fit_lib.fit(config, tmp_path / "run")["final"] == result["final"]
        one = next(iter(sorted((own / "train").glob("*/*"))))
        shutil.copyfile(one, one.with_name(f"more{one.suffix}"))
        with pytest.raises(UserError, match=r"this run is finished, and the train images .* --overwrite"):
            fit_lib.fit(config, tmp_path / "run")
        again = fit_lib.fit(config, tmp_path / "run", overwrite=True)
        assert again["peers"] and (tmp_path / "run" / "replaced" / "0" / "result.json").exists()

    @pytest.mark.parametrize("part", ["train", "test"])
    def test_a_finished_run_notices_other_pictures_of_the_same_names(
        self, fitted, settings, image_folder, tmp_path, part
    ):
        own, workdir = tmp_path / "images", tmp_path / "run"
        shutil.copytree(image_folder, own)  # with the times of the files
        shutil.copytree(fitted[0], workdir)
        config = settings(**{"eval.cluster": True, "data.root": str(own)})
        stored = json.loads((workdir / "config.json").read_text())
        stored["data"]["root"] = str(own)
        (workdir / "config.json").write_text(json.dumps(stored))
        assert fit_lib.fit(config, workdir) == fitted[1]
        first, other = sorted((own / part).glob("*/*"))[:2]
        shutil.copyfile(other, first)
        line = f"this run is finished, and the {part} images have changed .*; use another --workdir, or --overwrite"
        with pytest.raises(UserError, match=line):
            fit_lib.fit(config, workdir)
        # Results of earlier versions hold no digests: the features tell, as long as they are there.
        old = json.loads((workdir / "result.json").read_text())
        del old["closed_form"]["image_digests"]
        (workdir / "result.json").write_text(json.dumps(old))
        with pytest.raises(UserError, match=line):
            fit_lib.fit(config, workdir)
        shutil.rmtree(workdir / "features")
        assert fit_lib.fit(config, workdir) == old

    def test_head_is_the_closed_form(self, fitted):
        workdir, result = fitted
        parts = [np.load(path) for path in sorted((workdir / "features" / "train").glob("*.npy"))]
        found = np.concatenate(parts)
        assert found.shape == (96, result["peers"][0]["width"])
        labels = np.repeat(np.arange(8), 12)
        about = result["closed_form"]
        form = ClosedForm(statistics(moments([(found, labels)], 8)))
        expected = form.whiten(about["shrinkage"], 16)(found)
        model = trained.load(workdir)
        got = model.embedder(build(model.config).splits.train)
        assert got.uncertainty is None
        np.testing.assert_allclose(got.semantic, expected, atol=2e-5)

    def test_result(self, fitted):
        workdir, result = fitted
        assert result == json.loads((workdir / "result.json").read_text())
        assert [peer["method"] for peer in result["peers"]] == ["zero_shot", "random", "pca", "lda", "whiten"]
        by_method = {peer["method"]: peer for peer in result["peers"]}
        assert by_method["whiten"]["test"]["R@1"] == pytest.approx(result["final"]["R@1"])
        assert by_method["whiten"]["test"]["NMI"] == pytest.approx(result["final"]["NMI"])
        assert by_method["random"]["test"]["R@1"] == pytest.approx(result["untrained"]["R@1"])
        assert by_method["lda"]["width"] == 7
        tried = {one["shrinkage"]: one["MAP@R"] for one in result["closed_form"]["tried"]}
        assert max(tried, key=tried.get) == result["closed_form"]["shrinkage"] and len(tried) == 5
        assert result["uncertainty"].startswith("none")
        assert "uncertainty_mean" not in result["final"]
        assert [row["step"] for row in rows(workdir)] == [0]
        stored = json.loads((workdir / "config.json").read_text())
        assert stored["fit"]["only"] and stored["model"]["uncertainty_head"] == "none" and not stored["ism"]["enabled"]

    def test_opens_in_every_command(self, fitted, image_folder, tmp_path):
        workdir, result = fitted
        out = tmp_path / "x.npz"
        embed.main([f"--workdir={workdir}", "--split=test", f"--out={out}"])
        index = store.read(out)
        assert index.embedded.uncertainty is None
        evaluate.main([f"--embeddings={out}", "--no_clustering", f"--out={tmp_path / 'm.json'}"])
        measured = json.loads((tmp_path / "m.json").read_text())
        assert measured["MAP@R"] == pytest.approx(result["final"]["MAP@R"], abs=1e-6)
        query = next((image_folder / "test").rglob("*.png"))
        search.main([f"--index={out}", f"--workdir={workdir}", f"--query={query}", f"--out={tmp_path / 'a.jsonl'}"])
        report.main([f"--workdir={workdir}", f"--out={tmp_path / 'r.html'}"])
        assert "plain within-class whitening, 16-d" in (tmp_path / "r.html").read_text()
        assert not {"uncertainty", "pair_uncertainty"} & set(look(workdir).scores)
        program = export.export_run(trained.load(workdir), ("cpu",))[1]
        assert sorted(program["outputs"]) == ["semantic", "semantic_norm"]
        again = train.evaluate_checkpoint(workdir)
        assert again["R@1"] == result["final"]["R@1"] and again["step"] == 0

    def test_evaluated_on_held_out_classes(self, settings, tmp_path):
        held_out = {"data.validation_classes": 0.25, "eval.split": "validation", "eval.untrained": False}
        result = fit_lib.fit(settings(**held_out, **{"fit.shrinkage": (1.0,)}), tmp_path / "run")
        assert result["closed_form"]["classes"] == 6
        peers = {peer["method"]: peer["validation"] for peer in result["peers"]}
        assert peers["whiten"]["MAP@R"] == pytest.approx(result["final"]["MAP@R"])
        assert train.evaluate_checkpoint(tmp_path / "run")["MAP@R"] == result["final"]["MAP@R"]
        report.main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'r.html'}"])
        page = (tmp_path / "r.html").read_text()
        assert "plain within-class whitening, 16-d" in page

    def test_called_again(self, fitted, settings, finished, tmp_path, monkeypatch, messages):
        workdir, result = fitted
        monkeypatch.setattr(fit_lib, "build", None)
        assert fit_lib.fit(settings(**{"eval.cluster": True}), workdir) == result
        with pytest.raises(UserError, match=r"holds a run with other settings: config.fit.folds"):
            fit_lib.fit(settings(**{"fit.folds": 3, "eval.cluster": True}), workdir)
        with pytest.raises(UserError, match="holds a trained run; use another --workdir, or --overwrite"):
            fit_lib.fit(settings(), finished[0])
        with pytest.raises(UserError, match=r"config.fit.only is set by python -m idml_jax.fit"):
            train.train_and_evaluate(trained.load(workdir).config, workdir)

    def test_overwrite_and_width(self, fitted, settings, tmp_path, monkeypatch, messages):
        workdir = tmp_path / "run"
        shutil.copytree(fitted[0], workdir)
        monkeypatch.setattr(features_lib, "_computed", lambda *arguments: pytest.fail("features are known"))
        changes = {"fit.widths": (1, 8), "fit.select": "R@1", "eval.untrained": False, "fit.shrinkage": (0.3,)}
        result = fit_lib.fit(settings(**changes), workdir, overwrite=True)
        assert (workdir / "replaced" / "0" / "result.json").exists()
        assert result["closed_form"]["width"] == 8 and result["untrained"] is None
        assert trained.load(workdir).config.model.embedding_dim == 8
        assert fit_lib.fit(settings(**changes), workdir) == result
        assert "features of train: 96 of 96 images are stored" in messages()

    def test_refused(self, settings, tmp_path, messages):
        with pytest.raises(UserError, match="in closed form is for retrieval"):
            fit_lib.fit(settings(task="classification"), tmp_path)
        fit_lib.settings_of(settings(**{"model.init_from": ""}))
        assert "features of random weights" in messages()
        assert "ism.enabled=False, model.uncertainty_head=none" in messages()
        bad = {
            r"config.fit.shrinkage = \(\) must be": {"fit.shrinkage": ()},
            r"config.fit.shrinkage = \(0.0,\) must be": {"fit.shrinkage": (0.0,)},
            r"config.fit.widths is for python -m idml_jax.fit": {"fit.widths": (8,)},
            r"config.fit.method is for": {"fit.method": "lda"},
            r"config.fit.folds = 1 must be at least 2": {"fit.folds": 1},
            r"would replace the head": {"model.semantic_init": "whiten", "model.init_parts": "semantic"},
            r"whitened_uncertainty = 0.0 must be above 0": {"model.whitened_uncertainty": 0.0},
            r"needs config.task = 'retrieval'": {"model.semantic_init": "whiten", "task": "classification"},
        }
        for message, changes in bad.items():
            with pytest.raises(UserError, match=message):
                validate(settings(**changes))


class TestFeatures:
    @pytest.fixture(scope="class")
    def run(self, settings):
        return build(settings())

    @pytest.fixture(scope="class")
    def embedder(self, run):
        return run.evaluation(run.initial_state().variables).embedder

    def test_resumed_and_stale(self, run, embedder, tmp_path, monkeypatch, messages):
        monkeypatch.setattr(features_lib, "ROWS", 40)
        source, folder = run.splits.test, tmp_path / "features" / "test"
        batches = []

        def stopping():
            batches.append(1)
            if len(batches) == 2:
                raise Stopped("SIGTERM")

        with pytest.raises(Stopped):
            features_of(replace(embedder, check=stopping), "net", source, folder)
        assert [path.name for path in sorted(folder.glob("*.npy"))] == ["000000.npy"]
        before = (folder / "000000.npy").stat().st_mtime_ns
        found = features_of(embedder, "net", source, folder)
        assert (folder / "000000.npy").stat().st_mtime_ns == before
        assert "40 of 96 images are stored" in messages()
        assert len(found.parts) == 3 and isinstance(found.parts[0], np.memmap) and len(found) == 96
        some = np.array([95, 3, 41, 40])
        whole = np.concatenate([part for part, _ in found])
        np.testing.assert_array_equal(found.rows(some), whole[some])
        (folder / "000001.npy").write_bytes(b"cut")
        np.testing.assert_array_equal(np.concatenate(features_of(embedder, "net", source, folder).parts), whole)
        # Other weights and another transform: nothing stale is used, and the reason is said.
        other = jax.tree.map(lambda x: x * 1.5, embedder.variables)
        changed = features_of(replace(embedder, variables=other), "net", source, folder)
        assert "stored ones are of other weights; computing them again" in messages()
        assert np.abs(changed.parts[0] - whole[:40]).max() > 1e-3
        features_of(features_lib.view_embedder(embedder, run.train_transform, 0, 1), "net", source, folder)
        assert "stored ones are of other weights and transform" in messages()
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("keep")
        with pytest.raises(UserError, match="is not a folder of features"):
            features_of(embedder, "net", source, tmp_path / "mine")

    def test_bad_features_are_refused(self, run, embedder, tmp_path):
        broken = jax.tree.map(lambda x: x * np.nan, embedder.variables)
        with pytest.raises(UserError, match=r"the trunk gives NaN or infinity for 96 of 96 images, the first .*00.png"):
            features_of(replace(embedder, variables=broken), "net", run.splits.test, tmp_path / "x")
        assert not list((tmp_path / "x").glob("*.npy"))

    def test_views_depend_on_seed_image_and_view(self, run):
        source, draw = run.splits.train, np.random.default_rng
        picture = lambda record: features_lib.Picture(source.read(record), 1)
        view = features_lib.SeededView(run.train_transform, 0, 1)
        np.testing.assert_array_equal(view(picture(0), draw(0)), view(picture(0), draw(1)))
        others = [replace(view, view=2)(picture(0), draw(0)), replace(view, seed=1)(picture(0), draw(0))]
        assert all((other != view(picture(0), draw(0))).any() for other in others)


STARTED = {
    "model.semantic_init": "whiten", "model.whitened_shrinkage": 0.0, "epochs": 2, "optim.warmup_epochs": 0,
}  # fmt: skip


class TestStart:
    @pytest.fixture(scope="class")
    def started(self, settings, tmp_path_factory):
        workdir = tmp_path_factory.mktemp("whitened")
        return workdir, train.train_and_evaluate(settings(**STARTED), workdir)

    def test_starts_from_the_head_of_fit(self, started, fitted, settings):
        workdir, result = started
        assert result["untrained"]["MAP@R"] == pytest.approx(fitted[1]["final"]["MAP@R"], abs=1e-6)
        assert result["semantic_init"]["shrinkage"] == fitted[1]["closed_form"]["shrinkage"]
        assert (workdir / "features" / "train" / "000000.npy").exists()

    def test_kernel_proxies_and_averages(self, settings, tmp_path, messages):
        changes = {"optim.ema": 0.9, "sharding.proxies": "split", "fit.views": 2, "fit.shrinkage": (5.0,)}
        run = build(settings(**{**STARTED, "model.whitened_shrinkage": 2.0, **changes}))
        fresh = run.initial_state()
        variables, _ = run.pretrained()
        fresh = run.with_variables(fresh, variables)
        state, about = semantic_init.start_whitened(run, fresh, tmp_path, lambda: None)
        assert about["shrinkage"] == 2.0 and not about["tried"]
        assert "config.fit.shrinkage = (5.0,) is not used: training starts from" in messages()
        assert (tmp_path / "features" / "train_view1").is_dir()
        kernel = np.asarray(state.params["heads"]["semantic"]["kernel"])
        assert kernel.std() == pytest.approx(float(np.std(fresh.params["heads"]["semantic"]["kernel"])), rel=1e-5)
        np.testing.assert_array_equal(kernel, state.variables["params"]["heads"]["semantic"]["kernel"])
        proxies = np.asarray(state.params["proxies"])
        assert state.params["proxies"].sharding == fresh.params["proxies"].sharding and not proxies[8:].any()
        # Each training image is nearer to its own class's proxy than chance, in the order of the classes.
        found = run.evaluation(state.latest).embedder(run.splits.train)
        unit = proxies[:8] / np.linalg.norm(proxies[:8], axis=1, keepdims=True)
        assert (np.argmax(found.semantic @ unit.T, axis=1) == found.labels).mean() > 0.5
        jax.tree.map(np.testing.assert_array_equal, state.params["trunk"], fresh.params["trunk"])
        # The uncertainty starts ten times shorter.
        before, after = fresh.params["heads"], state.params["heads"]
        np.testing.assert_allclose(after["uncertainty"]["kernel"], 0.1 * before["uncertainty"]["kernel"], rtol=1e-6)
        for layer in ("uncertainty_hidden", "uncertainty"):
            np.testing.assert_array_equal(after[layer]["bias"], before[layer]["bias"])
        np.testing.assert_array_equal(after["uncertainty_hidden"]["kernel"], before["uncertainty_hidden"]["kernel"])
        jax.tree.map(np.testing.assert_array_equal, state.opt_state["heads"], fresh.opt_state["heads"])

    def test_resumed_bit_for_bit(self, started, settings, tmp_path, monkeypatch):
        whole, _ = started
        first = settings(**{**STARTED, "max_steps": 3})
        train.train_and_evaluate(first, tmp_path)
        monkeypatch.setattr(semantic_init, "start_whitened", lambda *arguments: pytest.fail("computed again"))
        stored = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(stored | {"max_steps": 0}))
        (tmp_path / "result.json").unlink()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:-1]))
        train.train_and_evaluate(settings(**STARTED), tmp_path)
        config = settings(**STARTED)
        one, other = last_state(config, whole)[0], last_state(config, tmp_path)[0]
        jax.tree.map(np.testing.assert_array_equal, one, other)

    def test_auto(self, settings):
        auto = lambda **changes: starts_whitened(settings(**{"model.semantic_init": "auto", **changes}))
        assert auto() and not auto(**{"model.init_from": ""}) and not auto(**{"model.init_parts": "all"})
        assert not auto(task="classification") and not starts_whitened(settings())


class TestHeadsOnStoredFeatures:
    @pytest.fixture
    def changes(self):
        return {
            "optim.trunk": "none", "optim.cached_features": True, "mixup.enabled": False, "fit.views": 2, "epochs": 2,
            "model.semantic_init": "whiten", "optim.warmup_epochs": 0,
        }  # fmt: skip

    def test_images_go_through_the_trunk_once(self, changes, settings, tmp_path, monkeypatch):
        config = settings(**changes)
        # No image is read for a step.
        monkeypatch.setattr("idml_jax.data.pipeline.train_batches", lambda *a, **k: pytest.fail("images are read"))
        train.train_and_evaluate(config, tmp_path / "run")
        stored = sorted(path.name for path in (tmp_path / "run" / "features").iterdir())
        assert stored == ["train", "train_view1"]
        first = build(config).initial_state()
        state, _ = last_state(config, tmp_path / "run")
        assert not np.allclose(state.params["heads"]["semantic"]["kernel"], first.params["heads"]["semantic"]["kernel"])
        pretrained = build(config).pretrained()[0]["params"]["trunk"]
        jax.tree.map(np.testing.assert_array_equal, state.params["trunk"], jax.tree.map(np.asarray, pretrained))
        losses = [row["train/loss"] for row in rows(tmp_path / "run") if "train/loss" in row]
        assert losses[-1] < losses[0]

    def test_batches(self):
        labels = np.arange(10) // 2
        of = [features_lib.Features((np.full((10, 3), v) + np.arange(10)[:, None],), labels) for v in (0.0, 100.0)]
        sampler = ShuffledSampler(10, 4, seed=0)
        views = features_lib.Views(tuple(of))
        batches = list(views.batches(sampler, seed=0, start=0, stop=4))
        for batch in batches:
            np.testing.assert_array_equal(batch["image"][:, 0] % 100, batch["index"])
            np.testing.assert_array_equal(batch["label"], labels[batch["index"]])
        assert {bool(value) for batch in batches for value in batch["image"][:, 0] >= 100} == {False, True}
        later = next(views.batches(sampler, seed=0, start=3, stop=4))
        np.testing.assert_array_equal(later["image"], batches[3]["image"])

    def test_refused(self, changes, settings):
        for name, value, text in (
            ("optim.trunk", "all", "optim.trunk=none"),
            ("mixup.enabled", True, "no stored features"),
            ("optim.accumulate", 2, "optim.accumulate"),
        ):
            with pytest.raises(UserError, match=text):
                validate(settings(**{**changes, name: value}))
