"""PRISM against a naive form with lists, and as an objective."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idml_jax import ism
from idml_jax.ism import Embedding
from idml_jax.losses import prism
from idml_jax.training.tasks.objective import Objective
from idml_jax.training.tasks.prism_objective import PrismObjective


class Naive:
    """The rule in plain Python: a list of past features, a list of past thresholds."""

    def __init__(self, size, window, share, warmup):
        self.size, self.window, self.share, self.warmup = size, window, share, warmup
        self.past, self.thresholds, self.batches = [], [], 0

    def probability(self, feature, label):
        means = {k: np.mean([f for f, own in self.past if own == k], axis=0) for k in {own for _, own in self.past}}
        if label not in means:
            return 1.0
        return np.exp(means[label] @ feature) / sum(np.exp(mean @ feature) for mean in means.values())

    def __call__(self, features, labels):
        values = np.array([self.probability(f, label) for f, label in zip(features, labels, strict=True)])
        count, kept = int(self.share * len(labels)), np.ones(len(labels), bool)
        if self.batches >= self.warmup:
            lowest = np.argsort(values, kind="stable")[:count]
            if values[lowest[-1]] < 1:
                self.thresholds = [*self.thresholds, values[lowest[-1]]][-self.window :]
            if self.thresholds:
                kept = values > np.mean(self.thresholds)
            if not self.thresholds or not kept.any():
                kept = ~np.isin(np.arange(len(labels)), lowest) | (values >= 1)
        self.past = [*self.past, *((f, k) for f, k, keep in zip(features, labels, kept, strict=True) if keep)]
        self.past, self.batches = self.past[-self.size :], self.batches + 1
        return values, kept


@pytest.mark.parametrize(("window", "warmup"), [(3, 2), pytest.param(1, 0, marks=pytest.mark.slow)])
def test_prism_equals_the_naive_form(window, warmup):
    rng = np.random.default_rng(window)
    centres = rng.normal(size=(5, 6))
    naive, state = Naive(20, window, 0.25, warmup), prism.create(20, 6, window)

    @jax.jit
    def step(state, features, labels):
        found = prism.clean_probability(state.memory, features, labels, 5)
        chosen, threshold = prism.select(state, features, labels, share=0.25, num_classes=5, warmup=warmup)
        return found, chosen, prism.update(state, features, labels, chosen, threshold)

    seen = []
    for _ in range(8):
        truth = rng.integers(0, 5, 8)
        features = centres[truth] + 0.5 * rng.normal(size=(8, 6))
        features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)
        labels = np.where(rng.random(8) < 0.25, rng.integers(0, 5, 8), truth)
        expected, kept = naive(features, labels)
        found, chosen, state = step(state, features, labels)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        np.testing.assert_array_equal(chosen, kept)
        seen.append(int(kept.sum()))
    assert seen[:warmup] == [8] * warmup and min(seen[warmup:]) < 8


@pytest.mark.parametrize("loss", ["proxy_anchor", pytest.param("contrastive", marks=pytest.mark.slow)])
def test_an_objective_with_prism_is_the_loss_of_what_is_kept(loss):
    semantic = ism.l2_normalize(jax.random.normal(jax.random.key(0), (8, 8)))
    embedding, labels = Embedding(semantic, 0.1 * semantic[:, :4]), jnp.repeat(jnp.arange(4), 2)
    common = {"options": (), "metric": ism.Metric(), "num_classes": 4, "dim": 8, "uncertainty_dim": 4}
    plain = Objective(loss, **common)
    chosen = PrismObjective(loss, **common, share=0.3, window=1, features=8, warmup=1)
    params = plain.init(jax.random.key(1))

    @jax.jit
    def two_steps(store, wrong):
        first = chosen.chosen(store, embedding, labels)
        store = chosen.remember(store, embedding, labels)
        kept = chosen.chosen(store, embedding, wrong)
        whole = plain(params, embedding, wrong, mask=first), plain(params, embedding, wrong)
        return first, kept, chosen(params, embedding, wrong, store=store, mask=kept), whole

    # The class of the first image becomes that of the fourth.
    wrong = labels.at[0].set(1)
    first, kept, value, whole = two_steps(chosen.init_memory(), wrong)
    assert first.all() and not kept.all() and kept.sum() >= 5
    some = np.flatnonzero(np.asarray(kept))
    expected = jax.jit(plain)(params, Embedding(semantic[some], embedding.uncertainty[some]), wrong[some])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(*whole, rtol=1e-6)


def test_what_prism_leaves_out_enters_no_memory():
    semantic = ism.l2_normalize(jax.random.normal(jax.random.key(0), (4, 8)))
    common = {"options": (), "metric": ism.Metric("plain"), "num_classes": 4, "dim": 8, "uncertainty_dim": 4}
    rule = PrismObjective("contrastive", **common, memory_size=16, share=0.5, window=1, features=16)
    labels, wrong = jnp.arange(4), jnp.array([0, 1, 3, 2])

    @jax.jit
    def two_steps(store):
        store = rule.remember(store, Embedding(semantic), labels)
        kept = rule.chosen(store, Embedding(semantic), wrong)
        return kept, rule.remember(store, Embedding(semantic), wrong)

    kept, store = two_steps(rule.init_memory())
    np.testing.assert_array_equal(kept, [True, True, False, False])
    np.testing.assert_array_equal(store.of_loss.labels[store.of_loss.valid], [0, 1, 2, 3, 0, 1])


def test_prism_keeps_all_while_no_class_is_known():
    semantic, labels = ism.l2_normalize(jax.random.normal(jax.random.key(0), (4, 8))), jnp.array([0, 0, 1, 1])
    state = prism.create(8, 8, 1)
    kept, _ = prism.select(state, semantic, labels, share=0.5, num_classes=2)
    assert kept.all()
