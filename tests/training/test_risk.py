"""The risk head: its losses, its fit, its file, and that embeddings and scores have it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idml_jax import risk as door
from idml_jax.errors import UserError
from idml_jax.inference import model as trained
from idml_jax.inference import store
from idml_jax.inference.embed import embed_to_file, split_source
from idml_jax.inference.index import check_comparable, read
from idml_jax.inference.search import load_model
from idml_jax.losses.auxiliary import order_loss
from idml_jax.metrics.embedded import Embedded, joined, rows_of, scores_of
from idml_jax.metrics.uncertainty import r_auroc
from idml_jax.models import risk_head
from idml_jax.training import risk
from idml_jax.training.risk import Pictures, Settings


def test_the_order_loss_is_the_hinge_on_neighbours():
    rng = np.random.default_rng(0)
    risks, losses = rng.random(9).astype(np.float32), rng.integers(0, 4, 9).astype(np.float32)
    expected, count = 0.0, 0
    for i in range(9):
        j = (i + 1) % 9
        if losses[i] != losses[j]:
            expected += max(0.0, 0.1 - np.sign(losses[i] - losses[j]) * (risks[i] - risks[j]))
            count += 1
    np.testing.assert_allclose(order_loss(jnp.asarray(risks), jnp.asarray(losses)), expected / count, rtol=1e-5)


def test_the_loss_of_an_answer_is_the_margin_to_the_nearest_wrong_image():
    rng = np.random.default_rng(0)
    gallery = rng.normal(size=(12, 5))
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    labels, rows = np.array([0] * 4 + [1] * 4 + [2] * 3 + [3]), np.array([11, 0, 5, 5, 10])
    queries = gallery[rows] + 0.1 * rng.normal(size=(5, 5))
    found = risk.answer_losses(queries, gallery, labels, rows)
    for query, row, value in zip(queries, rows, found, strict=True):
        similar = gallery @ query
        right = [similar[i] for i in range(12) if labels[i] == labels[row] and i != row]
        wrong = [similar[i] for i in range(12) if labels[i] != labels[row]]
        np.testing.assert_allclose(value, max(wrong) - max(right) if right else np.nan, rtol=1e-9)
    assert np.isnan(found[0]) and np.isfinite(found[1:]).all()


def test_the_head_learns_an_order_that_can_be_seen_and_chooses_its_epochs_on_other_folds():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(600, 6)).astype(np.float32)
    losses = np.abs(features[:, 0]) - 0.7 + 0.1 * rng.normal(size=600)
    losses[:5] = np.nan
    pictures = Pictures(features, losses, rng.integers(0, 2, 600))
    settings = Settings(folds=2, epochs=3, batch_size=32, learning_rate=3e-3)
    head, about = risk.fit_head(pictures, 300, settings)
    values = risk.risks(head, features[5:])
    assert (values > 0).all() and r_auroc(values, losses[5:] <= 0) > 0.9
    assert 1 <= about["epochs"] <= 3 and max(about["held_out/clean"]) > 0.85
    assert about["epochs"] == 1 + int(np.argmax(about["held_out/clean"]))
    constant = risk_head.init(jax.random.key(0), jnp.zeros(6), jnp.zeros(6).at[0].set(1.0), hidden=4)
    same = risk.risks(constant, np.where(np.arange(6) > 0, features[:9] * 7, features[:1]))
    assert np.ptp(same) == 0  # features without a deviation are not read


@pytest.fixture(scope="module")
def with_risk(finished, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("risk") / "run"
    shutil.copytree(finished[0], workdir)
    return workdir, risk.fit_risk(workdir, Settings(folds=2, epochs=2, batch_size=64, learning_rate=3e-3))


def test_a_run_with_a_risk_head_gives_every_image_a_risk(with_risk, tmp_path):
    workdir, found = with_risk
    stored = json.loads((workdir / risk.RESULT).read_text())
    assert stored == found and "R-AUROC(risk)" in found["evaluation"] and found["settings"]["epochs"] == 2
    model = trained.load(workdir)
    source = split_source(model, "test")
    path = embed_to_file(
        model, source, tmp_path / "test.npz", labelled=True, origin="split:test", say=lambda line: None
    )
    index = read(path)
    assert index.about["risk"] == risk.digest(model.embedder.risk)
    assert index.embedded.risk.shape == (len(source),) and (index.embedded.risk > 0).all()
    scores = scores_of(index.embedded)
    np.testing.assert_array_equal(scores["risk"], index.embedded.risk.astype(np.float64))
    correct = found["evaluation"]["R@1"]
    assert 0 <= correct <= 1 and found["evaluation"]["queries"] == len(source)
    again = read(store.save(index, tmp_path / "again.npz"))
    np.testing.assert_array_equal(again.embedded.risk, index.embedded.risk)


def test_risks_of_two_heads_are_not_compared(with_risk, tmp_path):
    """As after ``python -m idml_jax.risk --overwrite``."""
    model, paths = trained.load(with_risk[0]), []
    for name, head in (("first", model.embedder.risk), ("second", None)):
        if head is None:
            head = jax.tree.map(lambda x: x + 1, model.embedder.risk)
        other = model._replace(embedder=dataclasses.replace(model.embedder, risk=head))
        paths.append(tmp_path / f"{name}.npz")
        embed_to_file(other, split_source(model, "test"), paths[-1], labelled=True, origin="x", say=lambda _: None)
    one, two = map(read, paths)
    check_comparable(one, one, "one", "two")
    with pytest.raises(UserError, match="one was made with risk = .* and two with .*; embed one of them again"):
        check_comparable(one, two, "one", "two")
    assert load_model(one, str(with_risk[0]), print).step == model.step
    with pytest.raises(UserError, match="risks of two heads cannot be compared; embed the index again"):
        load_model(two, str(with_risk[0]), print)


def test_images_with_several_labels_are_refused(finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    monkeypatch.setattr(risk, "sets_of", lambda source: np.zeros((len(source), 2), np.int32))
    with pytest.raises(UserError, match="its images have several labels each; a risk head is fitted on folds"):
        risk.fit_risk(run)


def test_sets_with_and_without_a_risk():
    one = Embedded(np.eye(3), np.arange(3), risk=np.arange(3.0))
    assert joined([one, one]).risk.tolist() == [0, 1, 2, 0, 1, 2]
    assert joined([one, one._replace(risk=None)]).risk is None
    assert rows_of(one, np.array([2])).risk.tolist() == [2]


def test_the_file_of_a_head(with_risk, tmp_path, caplog):
    workdir, _ = with_risk
    model = trained.load(workdir)
    with pytest.raises(UserError, match=r"risk.npz already exists; --overwrite replaces it"):
        risk.fit_risk(workdir)
    assert risk.load(tmp_path, "any") is None
    assert risk.load(workdir, "other") is None and "was fitted on other weights" in caplog.text
    risk.save(model.embedder.risk, tmp_path, "w")
    jax.tree.map(np.testing.assert_array_equal, risk.load(tmp_path, "w"), model.embedder.risk)
    damaged = tmp_path / risk.FILE
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(UserError, match=r"risk.npz: is damaged .* makes it again"):
        risk.load(tmp_path, "w")


def test_the_options_of_the_door_are_the_settings():
    assert {name: default for name, (default, _) in door.OPTIONS.items()} == dataclasses.asdict(Settings())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--folds=1"], "folds = 1 must be at least 2"),
        (["--gap=0"], "gap = 0.0 must be above 0 and finite"),
        ([], "holds no run"),
    ],
)
def test_the_door_refuses_in_one_line(tmp_path, capsys, command_line, arguments, message):
    with pytest.raises(SystemExit) as stop:
        door.main([f"--workdir={tmp_path}", *arguments])
    assert stop.value.code == 1 and message in capsys.readouterr().err
