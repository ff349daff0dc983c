"""A GPU or TPU computes what the CPU computes. On a machine with one, run

    JAX_PLATFORMS=cuda,cpu python -m pytest tests/test_accelerator.py        # or tpu,cpu

The suite runs on the CPU (conftest.py), where all of these tests are skipped; no other test uses an accelerator.
"""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idml_jax import ism, losses
from idml_jax.metrics.clustering import kmeans
from idml_jax.metrics.nearest import nearest
from idml_jax.metrics.retrieval import retrieval_metrics
from idml_jax.models import create_model

ACCELERATORS = [device for device in jax.devices() if device.platform != "cpu"]
pytestmark = pytest.mark.skipif(not ACCELERATORS, reason="needs a GPU or TPU, and JAX_PLATFORMS=cuda,cpu or tpu,cpu")
ROWS, WIDTH, PER_CLASS = 96, 64, 4


def relative_error(found, expected):
    """Of two trees, the norm of the difference as a share of the norm of the second, at its largest leaf."""
    norm = lambda x: np.linalg.norm(np.asarray(x, np.float64))
    errors = jax.tree.map(lambda x, y: norm(np.float64(x) - np.float64(y)) / max(norm(y), 1e-30), found, expected)
    return max(jax.tree.leaves(errors))


def layers_of(device):
    """Layers choose what they choose where such a device is the only one."""
    return mock.patch.object(jax, "default_backend", lambda: device.platform)


def on(device, function, *arguments):
    """The function compiled for a device, of the same arguments there; as numpy arrays.

    Layers choose by ``jax.default_backend()``, which is the accelerator also where the CPU computes.
    """
    with jax.default_device(device), layers_of(device):
        return jax.tree.map(np.asarray, jax.jit(function)(*jax.device_put(arguments, device)))


def on_both(function, *arguments):
    """Results on the accelerator and on the CPU."""
    return (on(device, function, *arguments) for device in (ACCELERATORS[0], jax.devices("cpu")[0]))


def value_and_gradients(name, params):
    spec, labels = losses.LOSSES[name], jnp.arange(ROWS) // PER_CLASS
    read = ism.introspective_distance if spec.reads == "distance" else ism.introspective_similarity

    def value(params):
        batch = ism.Embedding(ism.l2_normalize(params["semantic"]), params.get("uncertainty"))
        references = classes = None
        if "proxies" in params:
            references = ism.Embedding(ism.l2_normalize(params["proxies"]))
            classes = jnp.repeat(jnp.arange(ROWS // PER_CLASS), spec.centres)
        compared = batch if spec.reads == "embeddings" else read(batch, references)
        options = {"key": jax.random.key(0)} if spec.needs_key else {}
        return spec.function(compared, losses.pairs_from_labels(labels, classes), **options)

    return jax.value_and_grad(value)(params)


class TestNumbers:
    @pytest.mark.parametrize("introspective", [False, True], ids=["plain", "introspective"])
    @pytest.mark.parametrize("name", losses.LOSSES)
    def test_losses_and_gradients(self, name, introspective):
        # Products in TF32 or bfloat16, an accelerator's defaults, would be wrong by 1e-3 and more.
        rng = np.random.default_rng(0)
        centres = np.repeat(rng.normal(size=(ROWS // PER_CLASS, WIDTH)), PER_CLASS, axis=0)
        draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
        params = {"semantic": centres.astype(np.float32) + draw(ROWS, WIDTH)}
        if introspective:
            params["uncertainty"] = 0.1 * draw(ROWS, WIDTH)
        if losses.LOSSES[name].references == "proxies":
            params["proxies"] = draw(ROWS // PER_CLASS * losses.LOSSES[name].centres, WIDTH)
        (value, gradients), (expected, expected_gradients) = on_both(partial(value_and_gradients, name), params)
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-6)
        assert relative_error(gradients, expected_gradients) < 2e-4

    def test_retrieval(self):
        rng = np.random.default_rng(0)
        labels = np.arange(3000) % 100
        rows = (rng.normal(size=(100, WIDTH))[labels] + 1.5 * rng.normal(size=(3000, WIDTH))).astype(np.float32)
        cpu = jax.devices("cpu")[:1]
        # Tie-breaks are in float64, so the ranks are the same and not only nearly so.
        assert retrieval_metrics(rows, labels) == retrieval_metrics(rows, labels, devices=cpu)
        none = np.full(3000, -2)
        for found, expected in zip(
            nearest(rows, rows[:1000], 20, none, ACCELERATORS), nearest(rows, rows[:1000], 20, none, cpu), strict=True
        ):
            np.testing.assert_array_equal(found, expected)

    def test_clusters(self):
        rng = np.random.default_rng(1)
        labels = np.arange(2000) % 20
        rows = (3 * rng.normal(size=(20, WIDTH))[labels] + rng.normal(size=(2000, WIDTH))).astype(np.float32)
        found, expected = kmeans(rows, 20, 0), kmeans(rows, 20, 0, devices=jax.devices("cpu")[:1])
        np.testing.assert_array_equal(found.labels, expected.labels)
        np.testing.assert_allclose(found.inertia, expected.inertia, rtol=1e-5)

    @pytest.mark.parametrize("name", ["resnet50", "efficientnet_lite0", "convnext_tiny", "resnet18_small", "vit_s16"])
    def test_trunks(self, name):
        model = create_model(name, frozen_statistics=True)
        images = np.random.default_rng(2).normal(size=(4, 64, 64, 3)).astype(np.float32)
        variables = on(jax.devices("cpu")[0], model.init, jax.random.key(0), images)

        def value(params):
            found = model.apply({**variables, "params": params}, images)
            return sum(jnp.sum(part**2) for part in jax.tree.leaves(found)), found

        with jax.default_matmul_precision("highest"):
            (found, expected) = on_both(jax.grad(value, has_aux=True), variables["params"])
        assert relative_error(found[1], expected[1]) < 1e-3
        whole = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
        assert relative_error(whole(found[0]), whole(expected[0])) < 5e-3


class TestTraining:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_run_learns_and_its_embeddings_are_those_of_the_cpu(self, dtype, image_folder, tmp_path):
        from runs_made import small_config

        import idml_jax
        from idml_jax.training import train

        config = small_config(image_folder, epochs=6, **{"model.dtype": dtype})
        result = train.train_and_evaluate(config, tmp_path / "run")
        assert result["final"]["R@1"] > result["untrained"]["R@1"] + 0.05
        images = sorted((image_folder / "test").rglob("*.png"))[:40]
        found = idml_jax.load(tmp_path / "run").embed(images)
        cpu = jax.devices("cpu")[:1]
        with layers_of(cpu[0]):
            jax.clear_caches()  # programs are not kept by what the layers chose
            expected = idml_jax.load(tmp_path / "run", cpu).embed(images)
        jax.clear_caches()
        for part in ("semantic", "uncertainty"):
            error = relative_error(getattr(found, part), getattr(expected, part))
            assert error < (3e-3 if dtype == "float32" else 3e-2), part

    def test_a_resumed_run_goes_on(self, image_folder, tmp_path):
        from runs_made import last_state, small_config

        from idml_jax.training import train

        whole = train.train_and_evaluate(small_config(image_folder), tmp_path / "whole")
        train.train_and_evaluate(small_config(image_folder, epochs=2), tmp_path / "parts")
        parts = train.train_and_evaluate(small_config(image_folder), tmp_path / "parts", resume="longer")
        assert parts["final"]["R@1"] == pytest.approx(whole["final"]["R@1"], abs=0.05)
        (expected, _), (found, _) = (
            last_state(small_config(image_folder), tmp_path / name) for name in ("whole", "parts")
        )
        # An accelerator may add in another order each time, and six steps of AdamW carry that on.
        assert relative_error(found.params, expected.params) < 0.02
