"""One device and eight: the same training step for every loss, and the same evaluation, to the rounding of float32.

Sums over the batch are taken in another order on eight devices. Of what a step changes (parameters under SGD, which
shows gradients; running statistics) the largest change may differ by 1e-3 of itself, loss and length of the gradient
by 1e-4, embeddings and metrics of an evaluation by 1e-4.
"""

from dataclasses import replace

import chex
import jax
import numpy as np
import pytest
from test_runtime import batch, fresh, objective, optimizer, setup, tiny

from idml_jax.data import datasets
from idml_jax.data.images import transforms
from idml_jax.losses import LOSSES
from idml_jax.metrics.summary import retrieval_report
from idml_jax.runtime import sharding
from idml_jax.training import steps
from idml_jax.training.embedder import Embedder, Network
from idml_jax.training.optim import Schedule

# Without moments or decay a step is the gradient; at this rate it stands out of the rounding of the parameters.
RULE = optimizer(
    name="sgd", momentum=0.0, weight_decay=0.0, clip_value=0.0, factors=(), schedule=Schedule("constant", 10.0, 100)
)
QUICK = {("multi_similarity", True)}  # reads the whole pair matrix, in both directions
CASES = [(name, introspective) for name in LOSSES for introspective in (True, False)]


def marked(case):
    return case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)


def one_step(s, devices):
    """The state before and after a step on the given devices, and its metrics."""
    mesh = sharding.data_mesh(jax.devices()[:devices])
    s = replace(s, objective=replace(s.objective, rows=mesh))  # as a run does
    state = sharding.replicate(fresh(s), mesh)
    before = jax.tree.map(np.asarray, state)
    data = {k: np.asarray(v) for k, v in batch().items()}
    data["label"] = np.repeat(np.arange(4), 4).astype(np.int32)  # 4 classes of 4, which all losses can use
    data = sharding.shard_batch(data, mesh)
    with jax.transfer_guard("disallow"):
        state, metrics = steps.jit_train_step(state, data, setup=s)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
    return before, *jax.tree.map(np.asarray, (state, metrics))


@pytest.mark.parametrize("name,introspective", [marked(case) for case in CASES])
def test_a_step_is_the_same_on_one_and_on_eight_devices(name, introspective):
    learned = "per_class" if name == "margin_distance_weighted" else "none"
    check_step(objective(loss=name, introspective=introspective, learned=learned, ranking=0.1))


@pytest.mark.slow
def test_a_step_with_a_memory_is_the_same_on_one_and_on_eight_devices():
    check_step(objective(loss="contrastive", memory_size=32, ranking=0.1))


def check_step(what):
    """The step with an objective, and what it changes, are those of one device."""
    s = setup(tiny(), objective=what, optimizer=RULE)  # live BatchNorm, Mixup
    (before, one, metrics), (start, eight, others) = one_step(s, 1), one_step(s, 8)
    chex.assert_trees_all_equal(before, start)
    chex.assert_trees_all_close(metrics, others, rtol=1e-4)
    assert metrics["loss"] > 0
    compared = {**one.params, "statistics": one.batch_stats}
    for group, expected in compared.items():
        old, got = (s.batch_stats if group == "statistics" else s.params[group] for s in (before, eight))
        move = jax.tree.map(lambda a, b: a - b, expected, old)
        size = max(np.abs(x).max() for x in jax.tree.leaves(move))
        assert size > 1e-5, f"{group} has not moved"
        chex.assert_trees_all_close(move, jax.tree.map(lambda a, b: a - b, got, old), rtol=1e-3, atol=1e-3 * size)


def test_an_evaluation_is_the_same_on_one_and_on_eight_devices(image_folder):
    source = datasets.load_dataset("folder", root=str(image_folder)).test  # 96 images: a tail in batches of 40
    _, transform = transforms.create("retrieval", size=8, resize=8)
    s, found = setup(tiny()), []
    for devices in (1, 8):
        mesh = sharding.data_mesh(jax.devices()[:devices])
        variables = sharding.replicate(fresh(s).variables, mesh)
        network = Network(s.model, s.mean, s.std)
        embedded = Embedder(network, variables, transform, mesh, batch_size=40, channels=1)(source)
        found.append((embedded, retrieval_report(embedded, (1, 2, 4), None)))
    (one, report), (eight, others) = found
    assert one.semantic.shape == (96, 8)
    chex.assert_trees_all_close(one, eight, rtol=1e-4, atol=1e-5)
    assert report.keys() == others.keys()
    chex.assert_trees_all_close(report, others, rtol=1e-4)
