"""The relation of rows and columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idml_jax import losses


def test_batch_against_itself():
    positive, negative = losses.pairs_from_labels(jnp.array([3, 3, 5]))
    np.testing.assert_array_equal(positive, [[0, 1, 0], [1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(negative, [[0, 0, 1], [0, 0, 1], [1, 1, 0]])


def test_mask_covers_rows_and_the_same_columns():
    positive, negative = losses.pairs_from_labels(jnp.array([3, 3, 5]), mask=jnp.array([True, False, True]))
    np.testing.assert_array_equal(positive, np.zeros((3, 3)))
    np.testing.assert_array_equal(negative, [[0, 0, 1], [0, 0, 0], [1, 0, 0]])


def test_query_against_gallery():
    pairs = losses.pairs_from_labels(
        jnp.array([0, 1]), jnp.array([0, 1, 1]), jnp.array([True, False]), reference_mask=jnp.array([True, True, False])
    )
    np.testing.assert_array_equal(pairs.positive, [[1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(pairs.negative, [[0, 1, 0], [0, 0, 0]])


def test_several_labels_per_image():
    tags = jnp.array([[1, 1, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0]])
    positive, negative = losses.pairs_from_relation((tags @ tags.T) > 0, exclude_self=True)
    np.testing.assert_array_equal(positive, [[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(negative, ~(np.asarray(positive) | np.eye(4, dtype=bool)))


def test_errors_name_the_shapes():
    with pytest.raises(ValueError, match="labels need"):
        losses.pairs_from_labels(jnp.zeros((2, 2), int))
    with pytest.raises(ValueError, match="mask needs the labels' shape"):
        losses.pairs_from_labels(jnp.zeros(3, int), mask=jnp.ones(2, bool))
    with pytest.raises(ValueError, match="reference mask needs"):
        losses.pairs_from_labels(jnp.zeros(3, int), jnp.zeros(2, int), reference_mask=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="needs reference_labels"):
        losses.pairs_from_labels(jnp.zeros(3, int), reference_mask=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="relation needs"):
        losses.pairs_from_relation(jnp.zeros(3, bool))
    with pytest.raises(ValueError, match="mask needs the rows' shape"):
        losses.pairs_from_relation(jnp.zeros((3, 2), bool), jnp.ones(2, bool))


def test_labels_in_arrays_of_jax_stay_different():
    """As those of numpy: NaN is refused, and numbers that another type would merge are not."""
    for bad in (jnp.array([0.0, jnp.nan]), np.array([0.0, np.nan])):
        with pytest.raises(ValueError, match="labels: NaN is no label"):
            losses.pairs_from_labels(bad)
    big, small = jnp.array([4294967295], jnp.uint32), jnp.array([-1], jnp.int32)
    assert not losses.pairs_from_labels(big, small).positive.any()
    assert not losses.pairs_from_labels(jnp.array([16777217]), jnp.array([16777216.0])).positive.any()
    assert losses.pairs_from_labels(jnp.array([16777216]), jnp.array([16777216.0])).positive.all()
    traced = jax.jit(lambda labels: losses.pairs_from_labels(labels, jnp.array([2.0, 3.0])).positive)
    assert traced(jnp.array([2])).tolist() == [[True, False]]
