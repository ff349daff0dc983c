"""Every loss against loops over its formula, value and gradient, in float64 and float32, over many relations."""

import jax
import jax.numpy as jnp
import naive_losses as naive
import numpy as np
import pytest
from loss_helpers import NAMES as ALL
from loss_helpers import value_and_gradient

from idml_jax import losses
from idml_jax.losses import Pairs, miners

NAMES = [name for name in ALL if name != "margin_distance_weighted"]
# Losses whose loops are over triplets or ranks, or whose relation decides what is mined, meet more cases.
MANY = ("contrastive", "triplet_semihard", "multi_similarity", "fast_ap", "proxy_nca", "proxy_anchor")
RELATIONS = ("classes", "query x gallery", "multi-label", "with ignored entries", "padded", "no rule at all")
N, M = 9, 7


def random_case(seed, square=False):
    """A matrix that a metric could give, a relation, and weights some of which are 0."""
    rng = np.random.default_rng(seed)
    relation = RELATIONS[seed % len(RELATIONS)]
    n, m = (N, N) if square else (N, M)
    matrix = rng.uniform(0.05, 1.9, (n, m))
    labels, others = rng.integers(0, 3, n), rng.integers(0, 3, m)
    if relation == "classes" and square:
        pairs = losses.pairs_from_labels(labels)
    elif relation == "multi-label":
        a, b = rng.random((n, 4)) < 0.4, rng.random((m, 4)) < 0.4
        pairs = losses.pairs_from_relation((a.astype(int) @ b.T.astype(int)) > 0)
    elif relation == "with ignored entries":
        kind = rng.integers(0, 3, (n, m))
        pairs = Pairs(jnp.asarray(kind == 0), jnp.asarray(kind == 1))
    elif relation == "padded":
        pairs = losses.pairs_from_labels(labels, others, rng.random(n) < 0.7, reference_mask=rng.random(m) < 0.7)
    elif relation == "no rule at all":
        pairs = losses.pairs_from_relation(rng.random((n, m)) < 0.3)
    else:
        pairs = losses.pairs_from_labels(labels, others)
    weights = np.ones(n) if seed % 2 else rng.choice([0.0, 0.3, 1.0, 2.5], n)
    return matrix, pairs, weights


def as_similarity(name, matrix):
    return 1 - matrix if losses.LOSSES[name].reads == "similarity" else matrix


# The peer's values cover these quickly (test_losses_torch.py).
WITH_PEER = ("normalized_softmax", "cosface", "arcface", "info_nce", "sup_con", "lifted_structure", "triplet_hard")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in WITH_PEER else n for n in NAMES])
def test_value_and_gradient_in_float64(name):
    reference = getattr(naive, name)
    with jax.enable_x64(True):
        for seed in range(24 if name in MANY else len(RELATIONS)):
            matrix, pairs, weights = random_case(seed)
            matrix = as_similarity(name, matrix)
            positive, negative = np.asarray(pairs.positive), np.asarray(pairs.negative)
            value, gradient = value_and_gradient(name, matrix, pairs, weights)
            assert value.dtype == gradient.dtype == jnp.float64
            more = {"fixed": matrix} if name == "circle" else {}
            plain = lambda x: reference(x, positive, negative, weights, **more)  # noqa: B023
            np.testing.assert_allclose(value, plain(matrix), rtol=1e-12, atol=1e-14, err_msg=f"seed {seed}")
            expected = naive.numerical_gradient(plain, matrix)
            np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=2e-8, err_msg=f"seed {seed}")


@pytest.mark.parametrize("name", [n if n in MANY else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_float32_agrees_with_the_loops(name):
    reference = getattr(naive, name)
    for seed in range(12):
        matrix, pairs, weights = random_case(seed)
        matrix = as_similarity(name, matrix).astype(np.float32)
        positive, negative = np.asarray(pairs.positive), np.asarray(pairs.negative)
        value, gradient = value_and_gradient(name, matrix, pairs, weights)
        assert value.dtype == gradient.dtype == jnp.float32
        expected = reference(matrix.astype(np.float64), positive, negative, weights)
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-6, err_msg=f"seed {seed}")


def test_margin_loss_given_its_draws_in_float64():
    def function(matrix, pairs, weights, key, beta):
        return losses.margin_distance_weighted(matrix, pairs, key, beta=beta, dimension=16, weights=weights)

    differentiated = jax.jit(jax.value_and_grad(function, argnums=(0, 4)))
    draw = jax.jit(
        lambda matrix, pairs, key: miners.draw_negatives(
            key,
            miners.distance_weighted_probabilities(matrix, pairs, dimension=16),
            jnp.sum(pairs.positive, axis=1),
        )
    )
    with jax.enable_x64(True):
        for seed in range(12):
            matrix, pairs, weights = random_case(seed)
            positive, negative = np.asarray(pairs.positive), np.asarray(pairs.negative)
            key = jax.random.key(seed)
            beta = np.random.default_rng(seed).uniform(0.9, 1.4, N)
            drawn = np.asarray(draw(jnp.where(pairs.positive | pairs.negative, matrix, 0), pairs, key))
            value, (gradient, beta_gradient) = differentiated(matrix, pairs, weights, key, beta)
            plain = lambda x, b: naive.margin_given_draws(x, positive, negative, weights, drawn, beta=b)  # noqa: B023
            np.testing.assert_allclose(value, plain(matrix, beta), rtol=1e-12, atol=1e-14, err_msg=f"seed {seed}")
            expected = naive.numerical_gradient(lambda x: plain(x, beta), matrix)  # noqa: B023
            np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=2e-8, err_msg=f"seed {seed}")
            expected = naive.numerical_gradient(lambda b: plain(matrix, b), beta)  # noqa: B023
            np.testing.assert_allclose(beta_gradient, expected, rtol=1e-6, atol=2e-8, err_msg=f"seed {seed}")


def test_expected_margin_loss_is_the_mean_of_numerator_and_denominator():
    matrix, pairs, weights = random_case(0, square=True)
    probabilities = naive.sampling_probabilities(matrix, np.asarray(pairs.negative), dimension=8)
    drawn = np.asarray(pairs.positive).sum(1, keepdims=True) * probabilities
    expected = naive.margin_given_draws(matrix, np.asarray(pairs.positive), np.asarray(pairs.negative), weights, drawn)
    value = jax.jit(lambda x: losses.margin_distance_weighted(x, pairs, dimension=8, weights=weights))(matrix)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("most_passes", [0, 10_000])
def test_both_ways_of_counting_semihard_triplets(most_passes, monkeypatch):
    monkeypatch.setattr(miners, "_MOST_PASSES", most_passes)
    function = jax.jit(jax.value_and_grad(losses.triplet_semihard))
    with jax.enable_x64(True):
        for seed in range(12):
            matrix, pairs, _ = random_case(seed)
            positive, negative = np.asarray(pairs.positive), np.asarray(pairs.negative)
            plain = lambda x: naive.triplet_semihard(x, positive, negative, np.ones(N))  # noqa: B023
            value, gradient = function(matrix, pairs)
            np.testing.assert_allclose(value, plain(matrix), rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(gradient, naive.numerical_gradient(plain, matrix), rtol=1e-6, atol=2e-8)
