"""Ordering images by difficulty: the losses, their edge cases, and a training step with them."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idml_jax import ism, losses
from idml_jax.data.images.transforms import SometimesChanged
from idml_jax.ism import Embedding
from idml_jax.losses import auxiliary as difficulty
from idml_jax.training.tasks.objective import Objective


def test_confusion_is_the_best_wrong_reference_less_the_best_right_one():
    similarity = jnp.array([[0.9, 0.2, 0.5], [0.1, 0.3, 0.8], [0.0, 0.0, 0.0]])
    pairs = losses.pairs_from_labels(jnp.array([0, 1, 7]), jnp.array([0, 1, 0]))
    found = difficulty.confusion(similarity, pairs)
    np.testing.assert_allclose(found[:2], [0.2 - 0.9, 0.8 - 0.3], rtol=1e-6)
    assert np.isnan(found[2])  # no positive
    slope = jax.grad(lambda s: jnp.sum(difficulty.confusion(s, pairs)[:2]))(similarity)
    chex.assert_trees_all_equal(slope, jnp.zeros((3, 3)))


def naive(uncertainty, confusions):
    lengths, value, weight = np.linalg.norm(uncertainty, axis=1), 0.0, 0.0
    for i, j in np.ndindex(len(lengths), len(lengths)):
        if confusions[i] > confusions[j]:
            value += (confusions[i] - confusions[j]) * np.log1p((lengths[j] / lengths[i]) ** 5)
            weight += confusions[i] - confusions[j]
    return value / weight


def test_ranking_loss_is_the_formula_and_leaves_unknown_images_out():
    rng = np.random.default_rng(0)
    uncertainty, confusions = rng.normal(size=(9, 4)), rng.normal(size=9)
    expected = naive(uncertainty, confusions)
    found = difficulty.ranking_loss(jnp.asarray(uncertainty), jnp.asarray(confusions))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    more = jnp.asarray(np.r_[uncertainty, rng.normal(size=(2, 4))]), jnp.asarray(np.r_[confusions, np.nan, np.nan])
    np.testing.assert_allclose(difficulty.ranking_loss(*more), expected, rtol=1e-5)
    np.testing.assert_allclose(difficulty.ranking_loss(3 * more[0], more[1]), expected, rtol=1e-5)  # only the order
    assert np.isclose(difficulty.ranking_loss(jnp.ones((9, 4)), jnp.asarray(confusions)), np.log(2))


@pytest.mark.parametrize("confusions", [[np.nan] * 3, [0.5, np.nan, np.nan], [0.2, 0.2, 0.2], [0.1, 0.2, 0.3]])
def test_ranking_loss_is_finite_at_the_edges(confusions):
    value, slope = jax.value_and_grad(difficulty.ranking_loss)(jnp.zeros((3, 2)), jnp.asarray(confusions))
    chex.assert_tree_all_finite((value, slope))
    assert value == 0 or confusions[0] == 0.1


def test_descent_orders_the_lengths():
    confusions = jnp.linspace(-1, 1, 8)
    u = jax.random.normal(jax.random.key(0), (8, 3))
    step = jax.jit(lambda u: u - 0.3 * jax.grad(difficulty.ranking_loss)(u, confusions))
    for _ in range(300):
        u = step(u)
    lengths = np.linalg.norm(u, axis=1)
    assert (np.diff(lengths) > 0).all()


def test_length_prior_is_the_formula_and_finite_at_nothing():
    u = np.random.default_rng(0).normal(size=(9, 4))
    expected = np.mean(np.log(np.linalg.norm(u, axis=1)) ** 2)
    np.testing.assert_allclose(difficulty.length_prior(jnp.asarray(u)), expected, rtol=1e-5)
    assert np.isclose(difficulty.length_prior(jnp.eye(3)), 0)
    chex.assert_tree_all_finite(jax.value_and_grad(difficulty.length_prior)(jnp.zeros((3, 2))))
    lengths = lambda u: np.linalg.norm(u, axis=1)
    short, long = jnp.asarray(u / 50 / lengths(u)[:, None]), jnp.asarray(u * 50 / lengths(u)[:, None])
    for start in (short, long):
        step = start - 0.01 * jax.grad(difficulty.length_prior)(start)
        assert (np.abs(np.log(lengths(step))) < np.abs(np.log(lengths(start)))).all()


def test_the_objective_adds_the_prior():
    keys = jax.random.split(jax.random.key(0))
    embedding = Embedding(
        ism.l2_normalize(jax.random.normal(keys[0], (16, 8))), 0.01 * jax.random.normal(keys[1], (16, 4))
    )
    labels = jnp.repeat(jnp.arange(4), 4)
    without = Objective(
        loss="multi_similarity",
        options=(),
        metric=ism.Metric(),
        num_classes=4,
        dim=8,
        uncertainty_dim=4,
    )
    objective = dataclasses.replace(without, prior=0.1)
    expected = without({}, embedding, labels) + 0.1 * difficulty.length_prior(embedding.uncertainty)
    np.testing.assert_allclose(jax.jit(objective)({}, embedding, labels), expected, rtol=1e-6)
    slope = jax.grad(lambda u: objective({}, embedding._replace(uncertainty=u), labels))(embedding.uncertainty)
    assert (jnp.sum(slope * embedding.uncertainty, axis=1) < 0).all()  # all become longer


def test_some_training_pictures_are_changed():
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 1), np.uint8)
    same = lambda image, rng: image
    some = SometimesChanged(same, 0.5, ("noise", "occlusion"))
    outs = [some(picture, np.random.default_rng(seed)) for seed in range(60)]
    changed = [not np.array_equal(out, picture) for out in outs]
    assert 15 < sum(changed) < 45
    chex.assert_trees_all_equal(outs[3], some(picture, np.random.default_rng(3)))
    never = SometimesChanged(same, 0.0)
    assert all(np.array_equal(never(picture, np.random.default_rng(seed)), picture) for seed in range(9))
