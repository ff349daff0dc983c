"""Reductions with derivatives of their own: equal to those of jnp, ties, empty rows and second derivatives included."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from idml_jax import geometry
from idml_jax.losses import reductions

MATRIX = jnp.asarray(np.random.default_rng(0).normal(size=(5, 7)), jnp.float32)
TIES = jnp.array([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0], [0.0, -1.0, 0.5, -jnp.inf]])


def test_sums_and_counts():
    terms = jnp.maximum(MATRIX, 0.0)
    sums, counts = reductions.sums_and_counts(terms)
    chex.assert_trees_all_close((sums, counts), (terms.sum(1), (terms > 0).sum(1).astype(jnp.float32)), rtol=1e-6)
    weighted = lambda summed: lambda x: jnp.sum(jnp.sin(summed(x)))
    ours, plain = weighted(lambda x: reductions.sums_and_counts(x)[0]), weighted(lambda x: x.sum(1))
    chex.assert_trees_all_close(jax.grad(ours)(terms), jax.grad(plain)(terms), rtol=1e-6)
    chex.assert_trees_all_close(jax.hessian(ours)(terms), jax.hessian(plain)(terms), atol=1e-6)
    assert not jax.grad(lambda x: jnp.sum(reductions.sums_and_counts(x)[1]))(terms).any()


@pytest.mark.parametrize("x", [MATRIX, TIES, jnp.stack([TIES, 2 * TIES])], ids=["distinct", "ties", "3-d"])
def test_max_over_last_is_the_maximum(x):
    expected = lambda x: jnp.max(x, axis=-1)
    of_sine = lambda f: lambda x: jnp.sum(jnp.sin(f(x)))
    chex.assert_trees_all_equal(reductions.max_over_last(x), expected(x))
    ours, theirs = jax.grad(of_sine(reductions.max_over_last))(x), jax.grad(of_sine(expected))(x)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)
    ours, theirs = jax.hessian(of_sine(reductions.max_over_last))(x), jax.hessian(of_sine(expected))(x)
    chex.assert_trees_all_close(ours, theirs, atol=1e-6)


def test_max_over_last_of_nothing_and_of_nan():
    assert reductions.max_over_last(jnp.zeros((2, 0))).tolist() == [-np.inf, -np.inf]
    for row in ([np.nan, 1.0, 2.0], [1.0, np.nan, 2.0], [1.0, 2.0, np.nan]):
        assert jnp.isnan(reductions.max_over_last(jnp.array([row]))).all()


def test_softmax_mean():
    x = 30.0 * jax.random.normal(jax.random.key(0), (2, 3, 4))
    known = jnp.ones(x.shape, bool).at[0, 0].set(False).at[1, 2, 1:].set(False)
    shares = lambda x: jax.nn.softmax(jnp.where(known, x, -1e9), axis=2)
    plain = lambda x: jnp.sum(jnp.where(known, shares(x) * x, 0.0), axis=2)
    ours = lambda x: reductions.softmax_mean(x, known)
    of_sine = lambda f: lambda x: jnp.sum(jnp.sin(f(x)))
    chex.assert_trees_all_close(ours(x), plain(x), rtol=1e-5)
    assert ours(x)[0, 0] == 0 and ours(x)[1, 2] == x[1, 2, 0]
    chex.assert_trees_all_close(jax.grad(of_sine(ours))(x), jax.grad(of_sine(plain))(x), atol=1e-4)
    chex.assert_trees_all_close(jax.hessian(of_sine(ours))(x), jax.hessian(of_sine(plain))(x), atol=1e-3)
    assert jnp.isnan(ours(x.at[1, 0, 0].set(jnp.nan))).tolist() == [[False] * 3, [True, False, False]]


def test_safe_root():
    root = lambda x: geometry.safe_sqrt(x, 1e-6)
    x = jnp.array([-1.0, 0.0, 1e-7, 4.0, jnp.nan])
    np.testing.assert_array_equal(root(x), [0.0, 0.0, 0.0, 2.0, np.nan])
    np.testing.assert_array_equal(jax.vmap(jax.grad(root))(x), [0.0, 0.0, 0.0, 0.25, np.nan])
    np.testing.assert_array_equal(jax.vmap(jax.grad(jax.grad(root)))(x[:4]), [0.0, 0.0, 0.0, -1 / 32])


@pytest.mark.parametrize("factor", [1.0, -2.0])
def test_products_of_a_set_with_itself(factor):
    plain = lambda a: factor * jnp.matmul(a, a.T, precision="highest")
    ours = lambda a: geometry._gram(a, factor)
    weights = jax.random.normal(jax.random.key(1), (5, 5))
    of_sine = lambda f: lambda a: jnp.sum(weights * jnp.sin(f(a)))
    chex.assert_trees_all_equal(ours(MATRIX), plain(MATRIX))
    chex.assert_trees_all_close(jax.grad(of_sine(ours))(MATRIX), jax.grad(of_sine(plain))(MATRIX), atol=1e-5)
    check_grads(ours, (MATRIX,), order=2, modes=["fwd", "rev"], rtol=1e-2)
