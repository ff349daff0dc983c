"""Evaluation of models and of stored embeddings."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from idml_jax import default_config, evaluate
from idml_jax.data import datasets, sources
from idml_jax.data.images import transforms
from idml_jax.data.images.transforms import CHANGES, Changed, ResizeCenterCrop
from idml_jax.errors import UserError
from idml_jax.ism import Metric
from idml_jax.metrics.summary import Embedded, ambiguity_report, corrupted_report, full_report
from idml_jax.models import EmbeddingModel
from idml_jax.models.convnet import ConvNet
from idml_jax.models.heads import Heads
from idml_jax.runtime import sharding
from idml_jax.training import steps
from idml_jax.training.embedder import Embedder, Network
from idml_jax.training.optim import GroupOptimizer, Schedule
from idml_jax.training.tasks.objective import Objective
from idml_jax.training.tasks.probes import partners_of_other_classes
from idml_jax.training.tasks.retrieval_summary import ambiguity
from idml_jax.training.tasks.task import Evaluation

ROOT = Path(__file__).resolve().parents[2]


def clusters(n=120, classes=6, d=8, spread=0.5, seed=0):
    """Embeddings around class centres; the farther from the centre, the more uncertain."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    noise = rng.uniform(0, 2 * spread, n)
    semantic = np.random.default_rng(99).normal(size=(classes, d))[labels] + noise[:, None] * rng.normal(size=(n, d))
    uncertainty = noise[:, None] * np.abs(rng.normal(1, 0.1, (n, 4)))
    return Embedded(semantic.astype(np.float32), labels, uncertainty.astype(np.float32))


@pytest.fixture(scope="module")
def setup():
    model = EmbeddingModel(ConvNet(depth=2, width=8), Heads(8, 4, uncertainty_hidden=16))
    rule = Objective("proxy_anchor", (), Metric(), 4, 8, 4)
    optimizer = GroupOptimizer("adamw", Schedule("constant", 1e-3, 10))
    return steps.StepSetup(model, rule, optimizer, (0.5,), (0.25,))


@pytest.fixture(scope="module")
def embedder(setup):
    variables = setup.model.init(jax.random.key(0), np.zeros((1, 12, 12, 1), np.float32))
    mesh = sharding.data_mesh()
    return Embedder(
        Network(setup.model, setup.mean, setup.std),
        sharding.replicate(variables, mesh),
        ResizeCenterCrop(12, 12),
        mesh,
        batch_size=32,
        channels=1,
    )


class TestEmbed:
    def test_every_image_once_in_order_whatever_the_batch(self, image_folder, embedder):
        source = sources.scan_folder(image_folder / "test")
        run = lambda batch_size, **options: replace(embedder, batch_size=batch_size)(source, **options)
        whole = run(batch_size=32)
        assert whole.semantic.shape == (96, 8) and whole.uncertainty.shape == (96, 4)
        np.testing.assert_array_equal(whole.labels, source.labels)
        tail = run(batch_size=40)
        np.testing.assert_allclose(tail.semantic, whole.semantic, rtol=1e-4, atol=1e-5)
        some = run(batch_size=8, order=np.asarray([90, 3, 3]))
        np.testing.assert_allclose(some.semantic, whole.semantic[[90, 3, 3]], rtol=1e-4, atol=1e-5)
        mixed = run(batch_size=40, order=np.asarray([5, 6]), partners=np.asarray([5, 60]))
        np.testing.assert_allclose(mixed.semantic[0], whole.semantic[5], rtol=1e-4, atol=1e-5)
        assert np.abs(mixed.semantic[1] - whole.semantic[6]).max() > 1e-3

        config = default_config()
        config.eval.ambiguity_images = 20
        splits = datasets.Splits(source, source)
        report = ambiguity(Evaluation(config, replace(embedder, batch_size=24), splits), whole)
        corrupted = {name for name in report if name.startswith("corrupted/")}
        assert set(report) - corrupted == {
            *(f"P(u_{k}>u)" for k in ("mixed", *CHANGES)),
            *(f"spearman(u,{k})" for k in CHANGES),
        }
        assert {"corrupted/R@1", "corrupted/R-AUROC(uncertainty)", "corrupted/R-AUROC(margin_10)"} < corrupted
        assert all(-1 <= v <= 1 for v in report.values())

    def test_a_long_work_shows_how_far_it_is(self, image_folder, embedder, monkeypatch, caplog):
        source = sources.scan_folder(image_folder / "test")
        said = lambda: [record.getMessage().split("] ")[-1].split(" images")[0] for record in caplog.records]
        with caplog.at_level("INFO", "idml_jax.training.embedder"):
            embedder(source)
            assert not said()  # it took less than ten seconds
            monkeypatch.setattr("idml_jax.training.embedder._SECONDS", 0.0)
            monkeypatch.setattr("idml_jax.runtime.progress._FIRST_SECONDS", 0.0)
            embedder(source, np.arange(80))
        assert said() == ["evaluating: 32 of 80", "evaluating: 64 of 80"]  # the rest is done at once with the end

    def test_partners_are_of_other_classes(self):
        labels = np.repeat(np.arange(5), 4)
        chosen = np.asarray([0, 7, 19])
        partners = partners_of_other_classes(labels, chosen, 0)
        assert partners.shape == (3,) and np.all(labels[partners] != labels[chosen])


class TestChanges:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 1), np.uint8)
    plain = staticmethod(lambda image, rng: image)

    @pytest.mark.parametrize("kind", CHANGES)
    def test_strength_zero_changes_nothing_and_more_changes_more(self, kind):
        def difference(strength):
            out = Changed(self.plain, kind, strength)(self.picture, np.random.default_rng(1))
            assert out.shape == self.picture.shape and out.dtype == np.uint8
            return np.abs(out.astype(float) - self.picture).mean()

        assert difference(0.0) == 0
        assert difference(0.25) > 0
        if kind != "crop":  # any enlarged part of noise differs alike
            assert difference(0.25) < difference(0.5) < difference(0.75)

    def test_occlusion_covers_its_share(self):
        out = Changed(self.plain, "occlusion", 0.5)(self.picture, np.random.default_rng(1))
        assert np.mean(out == round(self.picture.mean())) == pytest.approx(0.5, abs=0.05)

    def test_unknown_changes(self):
        with pytest.raises(ValueError, match="known: crop, blur, noise, occlusion"):
            Changed(self.plain, "rain", 0.5)
        with pytest.raises(ValueError, match="must be in"):
            transforms.Changed(self.plain, "blur", 1.0)


class TestReport:
    def test_an_informative_uncertainty_scores_well(self):
        data = clusters()
        truth = data.uncertainty_norm
        report, warnings = full_report(data, ambiguity=truth, held_out=clusters(seed=5), precision=0.95)
        assert warnings == []
        assert report["R-AUROC(uncertainty)"] > 0.6
        assert report["R-AUROC(uncertainty)_low"] < report["R-AUROC(uncertainty)"] < report["R-AUROC(uncertainty)_high"]
        assert report["R@1_low"] < report["R@1"] < report["R@1_high"]
        assert report["spearman(u,ambiguity)"] == pytest.approx(1.0)
        assert 0 < report["answered"] < 1 and report["answered_precision"] > report["R@1"]
        for name in ("NMI", "AMI", "F1", "MRR", "introspective/R@1", "E-AURC(margin_10)", "s-u_correlation"):
            assert name in report

    def test_without_uncertainty_there_are_only_baseline_scores(self):
        report, warnings = full_report(clusters()._replace(uncertainty=None), cluster=False)
        assert "R-AUROC(nearest_distance)" in report and warnings == []
        assert not any("uncertainty" in name or "introspective" in name or name == "NMI" for name in report)

    def test_a_collapsed_uncertainty_gives_a_warning(self):
        data = clusters()
        _, warnings = full_report(data._replace(uncertainty=data.uncertainty * 1e-6), cluster=False)
        assert any("collapsed" in warning for warning in warnings)

    def test_query_and_gallery(self):
        data = clusters()
        queries = Embedded(*(x[:20] if x is not None else None for x in data))
        gallery = Embedded(*(x[20:] if x is not None else None for x in data))
        report, _ = full_report(queries, gallery, cluster=False)
        assert report["queries"] == 20

    def test_clean_and_corrupted_queries_together(self):
        rng = np.random.default_rng(0)
        data = clusters()
        own = rng.permutation(len(data.labels))[:30]
        clean = Embedded(*(None if x is None else x[own] for x in data))
        blind = clean._replace(  # whatever the class, images of noise, and known to be
            semantic=rng.normal(size=clean.semantic.shape).astype(np.float32), uncertainty=clean.uncertainty + 100
        )
        report = corrupted_report(clean, [blind], data, own, Metric())
        # By hand: each query against all rows but its own.
        queries = np.concatenate([clean.semantic, blind.semantic])
        distance = np.linalg.norm(queries[:, None] - data.semantic[None], axis=2)
        distance[np.arange(60), np.tile(own, 2)] = np.inf
        correct = data.labels[distance.argmin(axis=1)] == np.tile(clean.labels, 2)
        assert report["corrupted/R@1"] == pytest.approx(correct.mean())
        score = np.concatenate([clean.uncertainty_norm, blind.uncertainty_norm])
        wins = (score[~correct][:, None] > score[correct][None]) + 0.5 * (score[~correct][:, None] == score[correct])
        assert report["corrupted/R-AUROC(uncertainty)"] == pytest.approx(wins.mean())
        assert report["corrupted/R-AUROC(uncertainty)"] > 0.6
        plain = corrupted_report(*(e._replace(uncertainty=None) for e in (clean,)), [blind], data, own, Metric())
        assert "corrupted/R-AUROC(margin_10)" in plain and "corrupted/R-AUROC(uncertainty)" not in plain

    def test_ambiguity_report(self):
        original = np.arange(10.0)
        report = ambiguity_report(original, {"blur": {0.5: original + 1, 0.75: original + 2}, "mixed": {0.5: original}})
        assert report["P(u_blur>u)"] == 1.0 and report["P(u_mixed>u)"] == 0.5
        assert 0 < report["spearman(u,blur)"] < 1 and "spearman(u,mixed)" not in report


def save(path, data, **more):
    arrays = {k: v for k, v in data._asdict().items() if v is not None}
    np.savez(path, **{**arrays, **more})
    return str(path)


class TestCommand:
    def test_metrics_of_a_file(self, tmp_path, capsys):
        data = clusters()
        path = save(tmp_path / "x.npz", data)
        out = tmp_path / "m.json"
        evaluate.main([f"--embeddings={path}", "--ks=1,5", f"--out={out}", f"--held_out={path}", "--precision=0.5"])
        report = json.loads(out.read_text())
        expected, _ = full_report(data, ks=(1, 5), held_out=data, precision=0.5)
        assert report == pytest.approx(expected, nan_ok=True)
        shown = capsys.readouterr().out
        assert "R@5" in shown and "120 queries in" in shown

    def test_as_a_user_starts_it(self, tmp_path):
        path = tmp_path / "x.npz"
        np.savez(path, embeddings=clusters().semantic, labels=clusters().labels)
        done = subprocess.run(
            [sys.executable, "-m", "idml_jax.evaluate", f"--embeddings={path}", "--no_clustering"],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert done.returncode == 0 and "MAP@R" in done.stdout, done.stderr

    @pytest.mark.parametrize(
        "arrays,message",
        [
            ({"labels": np.arange(4)}, r"needs the arrays semantic .*; it holds labels"),
            ({"semantic": np.ones((4, 2))}, "needs the arrays"),
            ({"semantic": np.ones((4, 2)), "labels": np.arange(5)}, r"labels has the shape \(5,\)"),
            ({"semantic": np.ones(4), "labels": np.arange(4)}, "shape"),
            ({"semantic": np.full((4, 2), np.nan), "labels": np.arange(4)}, "finite|NaN"),
            ({"semantic": np.ones((1, 2)), "labels": np.arange(1)}, "single row"),
            ({"semantic": np.ones((0, 2)), "labels": np.arange(0)}, "no rows"),
            ({"semantic": np.asarray([[object()]] * 2), "labels": np.arange(2)}, "not an .npz file of plain arrays"),
        ],
    )
    def test_bad_files_are_refused_in_one_line(self, tmp_path, capsys, arrays, message):
        import re

        path = tmp_path / "x.npz"
        np.savez(path, **arrays)
        with pytest.raises(SystemExit) as stop:
            evaluate.main([f"--embeddings={path}", f"--out={tmp_path / 'm.json'}"])
        assert stop.value.code == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error and re.search(message, error), error
        assert not (tmp_path / "m.json").exists()

    def test_missing_and_foreign_files(self, tmp_path):
        with pytest.raises(UserError, match="no such file"):
            evaluate.load_embeddings(tmp_path / "none.npz")
        (tmp_path / "text.npz").write_text("hello")
        with pytest.raises(UserError, match="not an .npz file"):
            evaluate.load_embeddings(tmp_path / "text.npz")
