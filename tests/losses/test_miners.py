"""Miners against loops, their distributions, and that nothing is differentiated through them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idml_jax.losses import miners
from idml_jax.losses.pairs import Pairs, pairs_from_labels

SHAPE = (5, 8)


@st.composite
def tied_cases(draw):
    """Few values, so that many distances are equal, and any relation."""
    values = draw(st.lists(st.integers(0, 8), min_size=40, max_size=40))
    kinds = draw(st.lists(st.integers(0, 2), min_size=40, max_size=40))
    kinds = np.array(kinds).reshape(SHAPE)
    return np.array(values, np.float32).reshape(SHAPE) / 8, Pairs(jnp.asarray(kinds == 0), jnp.asarray(kinds == 1))


in_passes = jax.jit(miners._count_in_passes)
by_sorting = jax.jit(miners._count_by_sorting)
mine_similar = jax.jit(miners.multi_similarity_pairs)


@settings(deadline=None, max_examples=60)
@given(tied_cases(), st.sampled_from([0.125, 0.25, 0.3]))
def test_semihard_counts_with_ties(case, margin):
    distance, pairs = case
    positive, negative = np.zeros(SHAPE, int), np.zeros(SHAPE, int)
    for a in range(SHAPE[0]):
        for p in range(SHAPE[1]):
            for n in range(SHAPE[1]):
                limit = distance[a, p] + np.float32(margin)
                if pairs.positive[a, p] and pairs.negative[a, n] and distance[a, p] < distance[a, n] < limit:
                    positive[a, p] += 1
                    negative[a, n] += 1
    for count in (in_passes, by_sorting):
        counted = count(distance, pairs, np.float32(margin))
        np.testing.assert_array_equal(counted.positive, positive)
        np.testing.assert_array_equal(counted.negative, negative)


@settings(deadline=None, max_examples=60)
@given(tied_cases())
def test_multi_similarity_pairs(case):
    similarity, (positive, negative) = case
    mined = mine_similar(similarity, Pairs(positive, negative), 0.25)
    for i in range(SHAPE[0]):
        near = [similarity[i, j] for j in range(SHAPE[1]) if positive[i, j]]
        far = [similarity[i, j] for j in range(SHAPE[1]) if negative[i, j]]
        for j in range(SHAPE[1]):
            hard = positive[i, j] and (not far or similarity[i, j] - 0.25 < max(far))
            assert mined.positive[i, j] == hard
            hard = negative[i, j] and (not near or similarity[i, j] + 0.25 > min(near))
            assert mined.negative[i, j] == hard


def test_probabilities_follow_the_inverse_density():
    """Against the formula in float64, at dimensions where the weights themselves overflow float32."""
    rng = np.random.default_rng(0)
    distance = rng.uniform(0.3, 1.6, (6, 9))
    negative = rng.random((6, 9)) < 0.7
    pairs = Pairs(jnp.asarray(~negative), jnp.asarray(negative))
    for dimension in (3, 64, 512, 2048):
        got = miners.distance_weighted_probabilities(jnp.asarray(distance, jnp.float32), pairs, dimension=dimension)
        for i in range(6):
            eligible = negative[i] & (distance[i] < 1.4)
            x = np.maximum(distance[i], 0.5)
            logs = -(dimension - 2) * np.log(x) - (dimension - 3) / 2 * np.log(1 - x**2 / 4)
            weights = np.exp(np.where(eligible, logs, -np.inf) - logs[eligible].max(initial=-1e300))
            np.testing.assert_allclose(got[i], weights / max(weights.sum(), 1e-300), rtol=5e-3, atol=1e-6)


def test_no_row_underflows_because_of_another():
    """One anchor has a near negative, the other only far ones: 280 orders of magnitude apart, both draw."""
    distance = jnp.array([[0.5, 1.3], [1.3, 1.35]])
    pairs = Pairs(jnp.zeros((2, 2), bool), jnp.ones((2, 2), bool))
    probabilities = miners.distance_weighted_probabilities(distance, pairs, dimension=2048)
    np.testing.assert_allclose(jnp.sum(probabilities, axis=1), [1, 1], rtol=1e-6)
    assert probabilities[1, 0] > probabilities[1, 1]


def test_distances_beyond_the_sphere_are_harmless():
    distance = jnp.array([[2.0, 2.5, 1e6, 0.0, 1.0]])
    pairs = Pairs(jnp.zeros((1, 5), bool), jnp.ones((1, 5), bool))
    probabilities = miners.distance_weighted_probabilities(distance, pairs, dimension=8)
    assert np.all(np.isfinite(probabilities))
    np.testing.assert_array_equal(probabilities[0, :3], 0)
    assert not np.any(miners.distance_weighted_probabilities(distance[:, :3], Pairs(*(p[:, :3] for p in pairs))))


def test_cutoffs_are_checked():
    pairs = pairs_from_labels(jnp.array([0, 1]))
    for cutoff, nonzero in ((0.0, 1.4), (1.4, 1.4), (0.5, 2.1)):
        with pytest.raises(ValueError, match="cutoff"):
            miners.distance_weighted_probabilities(jnp.ones((2, 2)), pairs, cutoff=cutoff, nonzero_cutoff=nonzero)


draw = jax.jit(miners.draw_negatives)


def test_draws_follow_the_probabilities():
    """Pearson's chi-squared over 20,000 draws a row, below the 0.9999 quantile; what has no probability never comes."""
    weights = np.array([[1, 2, 0, 3, 4, 0], [0, 0, 1, 0, 0, 1], [5, 1, 1, 1, 1, 1]], np.float32)
    probabilities = weights / weights.sum(1, keepdims=True)
    wanted = 20_000
    counts = np.asarray(draw(jax.random.key(1), probabilities, jnp.full(3, wanted)))
    np.testing.assert_array_equal(counts.sum(1), wanted)
    assert not counts[probabilities == 0].any()
    for row, p, limit in zip(counts, probabilities, (21.1, 15.2, 25.8), strict=True):
        expected = wanted * p[p > 0]
        assert np.sum((row[p > 0] - expected) ** 2 / expected) < limit


def test_number_of_draws_is_each_rows_own():
    probabilities = jnp.array([[0.5, 0.5], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    counts = draw(jax.random.key(0), probabilities, jnp.array([40, 3, 17, 0]))
    np.testing.assert_array_equal(jnp.sum(counts, axis=1), [40, 0, 17, 0])


def test_draws_depend_on_the_key_and_the_row_alone():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(9), 6).astype(np.float32)
    draws = jnp.array([5, 20, 1, 40, 3, 3])
    whole = draw(jax.random.key(7), probabilities, draws, 0)
    np.testing.assert_array_equal(whole, draw(jax.random.key(7), probabilities, draws, 0))
    assert np.any(whole != draw(jax.random.key(8), probabilities, draws, 0))
    parts = [draw(jax.random.key(7), probabilities[i : i + 2], draws[i : i + 2], i) for i in (0, 2, 4)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_average_of_draws_is_the_expectation():
    """What ``key=None`` of the margin loss relies on."""
    probabilities = np.random.default_rng(1).dirichlet(np.ones(5), 3).astype(np.float32)
    draws = jnp.array([4, 8, 2])
    keys = jax.random.split(jax.random.key(0), 4000)
    mean = np.mean(jax.jit(jax.vmap(lambda key: miners.draw_negatives(key, probabilities, draws)))(keys), axis=0)
    np.testing.assert_allclose(mean, np.asarray(draws)[:, None] * probabilities, atol=0.15)


def test_nothing_is_differentiated():
    matrix = jnp.asarray(np.random.default_rng(0).uniform(0.3, 1.3, (6, 6)), jnp.float32)
    pairs = pairs_from_labels(jnp.array([0, 0, 0, 1, 1, 1]))

    def everything(x):
        counts = miners.semihard_counts(x, pairs, 0.3)
        probabilities = miners.distance_weighted_probabilities(x, pairs, dimension=8)
        drawn = miners.draw_negatives(jax.random.key(0), probabilities, jnp.full(6, 3))
        mined = miners.multi_similarity_pairs(x, pairs)
        return sum(jnp.sum(jnp.asarray(y, jnp.float32)) for y in (*counts, probabilities, drawn, *mined))

    value, gradient = jax.jit(jax.value_and_grad(everything))(matrix)
    assert value > 0 and not np.any(gradient)
