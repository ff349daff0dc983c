"""One example for each row of the table in docs/design.md: what a user adds without editing the package.

The run of the fixture has a data set, a trunk and a pair loss that are defined in this file.
"""

import json
from dataclasses import replace

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from runs_made import rows, small_config

from idml_jax import ism, losses, models, report, train_and_evaluate
from idml_jax.data import datasets
from idml_jax.losses import LossSpec
from idml_jax.metrics import names, retrieval
from idml_jax.reporting import html, sections
from idml_jax.training.build import build
from idml_jax.training.tasks import TASKS

PIXELS, CLASSES, EACH = 16, 4, 8


class InMemory:
    """A ``Source``: gratings of ``CLASSES`` widths as PNG files in memory, with noise from ``seed``."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.labels = np.repeat(np.arange(CLASSES, dtype=np.int32), EACH)
        self.class_names = [f"width {2 + label}" for label in range(CLASSES)]
        self.fields: dict[str, np.ndarray] = {}
        columns = np.arange(PIXELS) // (2 + self.labels[:, None]) % 2 * 160
        images = (columns[:, None, :] + rng.integers(0, 90, (len(columns), PIXELS, PIXELS))).astype(np.uint8)
        self.files = [cv2.imencode(".png", image)[1].tobytes() for image in images]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        return self.files[index]

    def name(self, index: int) -> str:
        return f"grating {index}"


def load_gratings(**_):
    """A loader: settings of ``config.data`` to training and test images."""
    return datasets.Splits(InMemory(0), InMemory(1))


class OneConvolution(nn.Module):
    """A trunk: images ``[n, h, w, c]`` to feature maps ``[n, h2, w2, f]``; it has no BatchNorm."""

    frozen_statistics: bool = False
    dtype: jnp.dtype = jnp.float32
    has_statistics = False

    @nn.compact
    def __call__(self, images, train=False):
        return nn.relu(nn.Conv(8, (4, 4), strides=(4, 4), dtype=self.dtype)(images))


def supervised_contrastive(similarity, pairs, *, scale=10.0):
    """A pair loss: mean over anchors of -log of the softmax of their positives (Khosla et al., NeurIPS 2020, eq. 2).

    Args:
      similarity: ``[n, n]``.
      pairs: relation of rows and columns.
      scale: inverse temperature.

    Returns:
      The loss, a scalar.
    """
    known = pairs.positive | pairs.negative
    logits = jnp.where(known, scale * similarity, -jnp.inf)
    log_softmax = similarity * scale - jax.nn.logsumexp(logits, axis=1, keepdims=True)
    per_anchor = jnp.sum(jnp.where(pairs.positive, log_softmax, 0.0), axis=1)
    return -jnp.mean(per_anchor / jnp.maximum(pairs.positive.sum(axis=1), 1))


def scaled_softmax(similarity, pairs, *, scale=16.0):
    """A proxy loss: cross-entropy of the scaled similarities to the proxies (Zhai and Wu, BMVC 2019, eq. 3).

    Args:
      similarity: ``[n, m]`` of images and proxies.
      pairs: relation of rows and columns.
      scale: inverse temperature.

    Returns:
      The loss, a scalar.
    """
    log_softmax = jax.nn.log_softmax(scale * similarity, axis=1)
    return -jnp.mean(jnp.sum(jnp.where(pairs.positive, log_softmax, 0.0), axis=1))


@pytest.fixture(scope="module")
def registered():
    """The package with these parts in its registries, as a user's script would add them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(datasets.DATASETS, "gratings", load_gratings)
        patch.setitem(models.MODELS, "one_convolution", OneConvolution)
        patch.setitem(losses.LOSSES, "supervised_contrastive", LossSpec(supervised_contrastive, "similarity", "batch"))
        patch.setitem(losses.LOSSES, "scaled_softmax", LossSpec(scaled_softmax, "similarity", "proxies"))
        yield


def config_of(**changes):
    """Settings of one step with the parts of this file."""
    settings = {
        "epochs": 1,
        "max_steps": 1,
        "batch_size": 16,
        "data.name": "gratings",
        "data.image_size": PIXELS,
        "model.name": "one_convolution",
        "loss.name": "supervised_contrastive",
        "mixup.enabled": False,
        "optim.warmup_epochs": 0,
        "eval.batch_size": 16,
        "eval.untrained": False,
        "eval.cluster": False,
        "eval.ambiguity_images": 0,
    }
    return small_config("", **settings | changes)


@pytest.fixture(scope="module")
def run(registered, tmp_path_factory):
    """Workdir and result of a run of one step."""
    workdir = tmp_path_factory.mktemp("extended")
    return workdir, train_and_evaluate(config_of(**{"loss.supervised_contrastive.scale": 20.0}), workdir)


def test_pair_loss(run):
    """An entry in LOSSES; the keyword arguments of the function are its settings."""
    workdir, result = run
    assert result["final"]["R@1"] > 0 and any("train/loss" in row for row in rows(workdir))
    similarity = jnp.array([[1.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 1.0]])
    pairs = losses.pairs_from_labels(jnp.array([0, 0, 1]))
    expected = (np.log1p(np.exp(-5.0)) + np.log1p(np.exp(-3.0))) / 3  # the third row has no positive
    assert float(jax.jit(supervised_contrastive)(similarity, pairs)) == pytest.approx(expected, rel=1e-5)


def test_proxy_loss(registered):
    """An entry in LOSSES whose columns are the proxies; the run makes and trains them."""
    objective = build(config_of(**{"loss.name": "scaled_softmax"})).setup.objective
    params = objective.init(jax.random.key(0))
    assert params["proxies"].shape == (CLASSES, 16)
    embedding = ism.Embedding(np.eye(3, 16, dtype=np.float32), np.zeros((3, 16), np.float32))
    labels = np.array([0, 1, 2])
    loss, gradient = jax.jit(jax.value_and_grad(objective))(params, embedding, labels)
    proxies = np.asarray(params["proxies"])
    logits = 16.0 * (proxies / np.linalg.norm(proxies, axis=1, keepdims=True))[:, :3].T
    expected = np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(3), labels])
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert np.abs(gradient["proxies"]).max() > 0


def test_trunk(run):
    """An entry in MODELS; pooling, heads, checkpoints and loading come with it."""
    model = models.create_model("one_convolution", embedding_dim=16, uncertainty_dim=4)
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, PIXELS, PIXELS, 1), jnp.float32))
    assert variables["params"]["trunk"]["Conv_0"]["kernel"].shape == (4, 4, 1, 8)
    assert json.loads((run[0] / "config.json").read_text())["model"]["name"] == "one_convolution"


def test_data_set(run):
    """An entry in DATASETS that returns two sources; anything that has the members of ``Source`` is one."""
    assert json.loads((run[0] / "config.json").read_text())["data"]["name"] == "gratings"
    assert run[1]["final"]["queries"] == CLASSES * EACH


def hubness(semantic, k=10):
    """A metric: skewness of how often a row is among the k nearest of the others (Radovanovic et al., JMLR 2010).

    Args:
      semantic: ``[n, d]``.
      k: number of neighbours.

    Returns:
      0 where all rows are found equally often; the larger, the more a few rows are found by many.
    """
    found = retrieval.neighbours(semantic, k=k).index
    counts = np.bincount(found.ravel(), minlength=len(semantic))
    return float(np.mean((counts - counts.mean()) ** 3) / counts.std() ** 3)


def test_metric(monkeypatch):
    """A function of arrays, and its row in the table of names, which says what it means."""
    row = names.Described("hubness", "Skewness of how often an image is a nearest neighbour.", "skewness", "lower")
    monkeypatch.setattr(names, "TABLE", (*names.TABLE, row))
    assert names.describe("hubness") == row
    # Four rows around a fifth find it; it finds one of them.
    star = np.array([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], np.float32)
    assert hubness(star, k=1) == pytest.approx(4.8 / 2.4**1.5)


def test_form_of_the_metric(monkeypatch):
    """A subclass of Form in FORMS; losses and retrieval take the metric as any other."""

    class Rational(ism.Form):
        """``D = alpha / (1 + beta / tau)``."""

        def weakening(self, alpha, beta, temperature):
            return 1.0 / (1.0 + beta / temperature)

        def slope(self, alpha, beta, temperature):
            return self.weakening(alpha, beta, temperature) * jnp.ones_like(alpha)

    monkeypatch.setitem(ism.FORMS, "rational", Rational())
    metric = ism.Metric("rational", 5.0)
    embedding = ism.Embedding(jnp.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), jnp.array([[1.0], [4.0], [0.0]]))
    distance = metric.distance(embedding)
    assert float(distance[0, 1]) == pytest.approx(2**0.5 / (1.0 + 5.0 / 5.0), rel=1e-5)
    assert float(metric.similarity(embedding)[0, 1]) == pytest.approx(1.0 - 1.0 / (1.0 + 5.0 / 5.0), rel=1e-5)
    labels = np.array([0, 0, 1])
    # Distances 0.707 of the positive pair, 0.745 and 0.351 of the negative ones.
    loss = losses.contrastive(distance, losses.pairs_from_labels(labels), negative_margin=0.9)
    assert float(loss) == pytest.approx(0.7071 + (0.1546 + 0.5486) / 2, abs=1e-3)
    # By the semantic distance the first image's nearest would be the third, of another class.
    ranks = retrieval.ranks_by_distance(metric, embedding, labels)
    assert ranks.nearest_correct.tolist() == [True, False, False]


def test_report_section(run, registered, monkeypatch, tmp_path):
    """A function in SECTIONS, and its name in the sections of a task."""

    def lengths(seen, images):
        norms = np.linalg.norm(seen.embedded.semantic, axis=1)
        return html.html("<h2>Lengths</h2><p>{} lengths, the longest {:.2f}</p>", len(norms), float(norms.max()))

    monkeypatch.setitem(sections.SECTIONS, "lengths", lengths)
    monkeypatch.setitem(TASKS, "retrieval", replace(TASKS["retrieval"], sections=("training", "lengths")))
    page = report.make(run[0], tmp_path / "page.html").read_text()
    assert f"<h2>Lengths</h2><p>{CLASSES * EACH} lengths, the longest 1.00</p>" in page
    assert "<h2>Answers</h2>" not in page
