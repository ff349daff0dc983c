"""Complete classification runs: training, stopping, evaluating, reusing the trunk, and refused settings."""

import importlib.util
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_train import assert_same_run, rows, small_config, train_killed_at

from idml_jax import embed, pretrained, report
from idml_jax.data import pipeline
from idml_jax.errors import UserError
from idml_jax.inference import store as embeddings
from idml_jax.metrics.classification import classification_metrics
from idml_jax.runtime import interrupt
from idml_jax.training import train
from idml_jax.training.config_checks import validate
from idml_jax.training.optim import Schedule
from idml_jax.training.steps import averaged
from idml_jax.training.tasks import classification_summary as classify

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def cls_config(folder, **changes):
    settings = {
        "task": "classification", "epochs": 2, "mixup.enabled": False, "classification.mixing": "cutmix",
        "classification.per_sample": True, "model.uncertainty_head": "linear", "model.pooling": "avg",
        "optim.name": "sgd", "optim.learning_rate": 0.05, "optim.warmup_epochs": 0, "optim.clip_value": 0.0,
        "optim.step_factor": 0.1, "optim.step_at": (1,), "optim.ema": 0.9, "eval.best_metric": "top1",
        "eval.ambiguity_images": 30, "eval.untrained": False,
    }  # fmt: skip
    return small_config(folder, **(settings | changes))


@pytest.fixture(scope="module")
def folder(image_folder, tmp_path_factory):
    """Eight classes of nine images to train and three to test, and a fourth of the first class."""
    root = tmp_path_factory.mktemp("shared_classes")
    for source in sorted((image_folder / "train").iterdir()):
        for i, path in enumerate(sorted(source.iterdir())):
            target = root / ("test" if i < 3 else "train") / source.name
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    shutil.copy(root / "train" / "class_00" / "05.png", root / "test" / "class_00")
    return root


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("classified")
    return workdir, train.train_and_evaluate(cls_config(folder), workdir)


def test_a_classifier_embeds(finished, folder, tmp_path):
    workdir, result = finished
    embed.main([f"--workdir={workdir}", f"--images={folder / 'test'}", f"--out={tmp_path / 'x.npz'}"])
    stored = embeddings.read(tmp_path / "x.npz").embedded
    assert stored.uncertainty_norm.mean() == pytest.approx(result["best"]["mean_u"], rel=1e-3)
    np.testing.assert_allclose(np.linalg.norm(stored.semantic, axis=1), 1, rtol=1e-5)


@pytest.mark.slow
def test_a_classifier_has_its_report(finished, tmp_path):
    workdir, result = finished
    page = report.make(workdir, tmp_path / "page.html", compare=str(workdir)).read_text()
    best = result["best"]
    for text in (f"{100 * best['top1']:.1f} %", f"{best['nll']:.3f}", f"{100 * best['AUROC_error(entropy)']:.1f} %"):
        assert text in page
    assert "Does it know which predictions are wrong?" in page


def test_a_run_reports_the_last_and_the_best_epoch(finished):
    workdir, result = finished
    for when in ("final", "best"):
        figures = result[when]
        assert figures["count"] == 25 and 0 <= figures["top1"] <= figures["top5"] <= 1 and figures["nll"] > 0
        assert 0 <= figures["ece"] <= 1 and figures["mean_u"] > 0 and 0 <= figures["share_u_zero"] <= 1
        for kind in ("mixed", "cutmix", "crop", "blur", "noise", "occlusion"):
            assert 0 <= figures[f"P(u_{kind}>u)"] <= 1
        for score in ("u", "max_softmax", "entropy"):
            assert 0 <= figures[f"AUROC_error({score})"] <= 1
    assert result["best"]["top1"] == max(row["top1"] for row in result["history"])
    assert [row["step"] for row in result["history"]] == [2, 4]
    written = rows(workdir)
    assert {"train/lam", "train/uncertainty", "train/weakening"} <= set(written[0])
    # The rate falls once, after the first epoch.
    rates = {row["step"]: row["train/learning_rate"] for row in written if "train/learning_rate" in row}
    assert rates[2] == pytest.approx(0.05) and rates[4] == pytest.approx(0.005)


def test_metrics_count_every_image_once(folder, finished):
    """Compares batches of 40 with 15 padding rows with the network's outputs image by image."""
    workdir, result = finished
    run = train.build(cls_config(folder))
    checkpoints = train.Checkpoints(workdir / "checkpoints", "top1", read_only=True)
    state, _ = checkpoints.restore(checkpoints.latest, run.initial_state())
    checkpoints.close()
    source = run.eval_source
    images = np.stack([run.test_transform(pipeline.Picture(source.read(i), 1), None) for i in range(len(source))])
    pictures = (images.astype(np.float32) / 255 - 0.5) / 0.25
    out = jax.jit(run.setup.model.apply)(state.variables, pictures)
    expected = classification_metrics(out["logits"], source.labels)
    for name, value in expected.items():
        assert result["final"][name] == pytest.approx(value, abs=1e-4), name
    assert result["final"]["mean_u"] == pytest.approx(np.linalg.norm(out["uncertainty"], axis=1).mean(), rel=1e-3)
    # The averages are what is evaluated, and they are not the latest weights.
    kernel = lambda variables: np.asarray(variables["params"]["heads"]["classifier"]["kernel"])
    assert np.abs(kernel(state.variables) - kernel(state.latest)).max() > 1e-5


def test_stopped_and_resumed_equals_uninterrupted(folder, finished, tmp_path, monkeypatch):
    config = cls_config(folder)
    train_killed_at(config, tmp_path, 4, monkeypatch)
    reference, _ = finished
    for workdir in (reference, tmp_path):
        assert len(rows(workdir)) > 2
    assert_same_run(config, reference, tmp_path)


def test_the_trunk_starts_a_retrieval_run(folder, image_folder, finished, tmp_path):
    workdir, result = finished
    config = small_config(image_folder, **{"model.init_from": str(workdir), "model.pooling": "avg"})
    run = train.build(config)
    variables, told = run.pretrained()
    state = run.with_variables(run.initial_state(), variables)
    checkpoints = train.Checkpoints(workdir / "checkpoints", "top1", read_only=True)
    stored, _ = checkpoints.restore(result["best"]["step"], train.build(cls_config(folder)).initial_state())
    checkpoints.close()
    # Of a run that keeps averages those, by which its best was chosen.
    jax.tree.map(np.testing.assert_array_equal, state.params["trunk"], stored.variables["params"]["trunk"])
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, stored.variables["batch_stats"])
    assert "trunk" in told and state.params["heads"]["semantic"]["kernel"].shape == (16, 16)


def test_a_finished_run_is_evaluated_again_and_exported(finished, tmp_path):
    workdir, result = finished
    again = train.evaluate_checkpoint(workdir)
    assert again == pytest.approx(result["best"], rel=1e-5)
    pretrained.convert(workdir, tmp_path / "weights.safetensors")
    named = safetensors.numpy.load_file(tmp_path / "weights.safetensors")
    assert named["fc.weight"].shape == (8, 16) and named["uncertainty.weight"].shape == (16, 16)


@pytest.mark.parametrize("step", ["jit_predict_step", "jit_predict_mixed_step"])
def test_a_signal_stops_an_evaluation_before_its_next_batch(finished, monkeypatch, step):
    workdir, _ = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    calls = []
    for name in ("jit_predict_step", "jit_predict_mixed_step"):
        real = getattr(classify, name)

        def counting(*args, name=name, real=real, **kwargs):
            calls.append(name)
            if name == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)

        monkeypatch.setattr(classify, name, counting)
    with pytest.raises(
        interrupt.Stopped, match="stopped by SIGTERM; nothing was written; rerun the same command to start"
    ):
        train.evaluate_checkpoint(workdir)
    assert calls.count(step) == 1 and calls[-1] == step
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


def test_a_plain_run_has_no_uncertainty_and_learns(folder, tmp_path):
    changes = {
        "ism.enabled": False, "classification.mixing": "none", "optim.ema": 0.0, "optim.step_at": (),
        "optim.schedule": "cosine", "epochs": 12, "eval.every_epochs": 12, "checkpoint.every_epochs": 12,
    }  # fmt: skip
    config = cls_config(folder, **changes)
    result = train.train_and_evaluate(config, tmp_path)
    assert not any("u_" in name or "(u)" in name or "mean_u" in name for name in result["final"])
    assert 0 <= result["final"]["AUROC_error(max_softmax)"] <= 1
    assert result["final"]["top1"] > 0.35  # by chance 0.125


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"task": "sorting"}, "known: retrieval, classification"),
        ({"classification.mixing": "blend"}, "known: none, mixup, cutmix"),
        ({"classification.alpha": 0.0}, "classification.alpha = 0.0 must be above 0"),
        ({"classification.alpha": float("inf")}, "classification.alpha = inf must be above 0 and finite"),
        ({"ism.temperature": float("inf")}, "ism.temperature = inf must be above 0 and finite"),
        ({"classification.probability": 1.5}, r"must be in \[0, 1\]"),
        ({"classification.label_smoothing": 1.0}, "label_smoothing"),
        ({"eval.best_metric": "R@1"}, "known: top1, top5"),
        ({"ism.variant": "absolute"}, "known: relative"),
        ({"optim.ema": 1.0}, "optim.ema = 1.0"),
        ({"optim.step_at": (0,)}, "step_at"),
        ({"model.init_parts": "semantic"}, "known: trunk, all"),
        ({"loss.embedding_norm": 0.5}, "embedding_norm = 0.5 is for config.task = 'retrieval'"),
        ({"loss.learned": "shared"}, "learned = 'shared' is for config.task = 'retrieval'"),
    ],
)
def test_impossible_settings_are_refused(folder, changes, words):
    with pytest.raises(UserError, match=words):
        train.build(cls_config(folder, **changes))


def test_other_classes_at_test_are_refused(image_folder):
    with pytest.raises(UserError, match="same classes in training and test; 8 are in only one of them, the first: cl"):
        train.build(cls_config(image_folder))


def test_the_rate_falls_at_the_given_steps():
    schedule = Schedule("step", 0.25, 300, 75, 0.1, (150, 225))
    rates = [float(schedule(jnp.asarray(step))) for step in (0, 149, 150, 224, 225, 299)]
    np.testing.assert_allclose(rates, [0.25, 0.25, 0.025, 0.025, 0.0025, 0.0025], rtol=1e-5)


def test_moving_averages_are_of_what_was_seen():
    average, values = {"params": {"a": jnp.zeros(())}}, {"params": {"a": jnp.ones(()), "b": jnp.ones(())}}
    expected = 0.0
    for step in range(30):
        average = averaged(average, values, jnp.asarray(step), 0.6)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + 1 - decay
        np.testing.assert_allclose(average["params"]["a"], expected, rtol=1e-5)


def read_config(name, arg):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def test_the_recipes_are_the_protocol_s():
    for name in ("cifar10", "cifar100", "imagenet"):
        for mixing in ("baseline", "mixup", "cutmix"):
            for ism in ("", ",ism"):
                config = read_config(name, mixing + ism)
                validate(config)
                assert config.ism.enabled == bool(ism) and config.data.name == name
                assert config.classification.mixing == mixing.replace("baseline", "none")
                assert (config.optim.name, config.optim.weight_decay, config.epochs) == ("sgd", 1e-4, 300)
                assert config.classification.probability == (0.5 if (mixing, name[:5]) == ("cutmix", "cifar") else 1)
    cifar, imagenet = read_config("cifar100", "cutmix,ism"), read_config("imagenet", "cutmix,ism")
    assert (cifar.model.name, cifar.batch_size, cifar.optim.learning_rate) == ("pyramidnet200", 64, 0.25)
    assert cifar.optim.step_at == (150, 225) and cifar.model.uncertainty_dim == 128
    assert (imagenet.model.name, imagenet.batch_size, imagenet.optim.learning_rate) == ("resnet50", 256, 0.1)
    assert (imagenet.optim.step_epochs, imagenet.model.uncertainty_dim) == (75, 512)
    assert imagenet.data.color_jitter == 0.4 and imagenet.data.lighting == 0.1
    short = read_config("imagenet", "epochs90")
    assert (short.epochs, short.optim.step_epochs) == (90, 30) and not short.ism.enabled
    assert read_config("cifar10", "mixup,resnet").model.name == "cifar_resnet110"
    for arg in ("cutmix,mixup", "epochs90", "resnet,quick", "cutmx"):
        with pytest.raises(ValueError, match="exclude|known"):
            read_config("cifar10", arg)


def test_one_line_describes_a_classifier():
    line = classify.describe({"top1": 0.763, "top5": 0.929, "nll": 0.95, "ece": 0.031})
    assert line == "top-1 76.3  top-5 92.9  NLL 0.950  ECE 3.1"
