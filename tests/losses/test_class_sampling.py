"""A share of the classes as negatives: which are drawn, what they stand for, and the loss in expectation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idml_jax import losses
from idml_jax.losses import class_sampling

CLASSES, ROWS = 40, 48
LABELS = jnp.array([3, 3, 17, 39])


@pytest.mark.parametrize("groups", [1, 4])
def test_the_classes_of_the_batch_are_always_in(groups):
    draw = jax.jit(lambda key: class_sampling.sample_classes(key, LABELS, CLASSES, 0.3, rows=ROWS, groups=groups)[:3])
    table = jnp.arange(ROWS, dtype=jnp.float32)[:, None] * jnp.ones((1, 2))
    seen, total = np.zeros(CLASSES), 0.0
    for seed in range(60):
        classes, real, stands_for = map(np.asarray, draw(jax.random.key(seed)))
        assert len(classes) == (15 if groups == 1 else 4 * 6)  # the batch's size, and 0.3 of the remaining classes
        assert {3, 17, 39} <= set(classes[real]) and len(set(classes)) == len(classes)
        assert (real == (classes < CLASSES)).all()
        assert (stands_for[np.isin(classes, LABELS)] == 1).all()
        drawn = real & ~np.isin(classes, LABELS)
        # What is drawn stands for all the others, so each counts once on average.
        np.testing.assert_allclose(stands_for[drawn].sum(), CLASSES - 3, rtol=1e-6)
        np.add.at(seen, classes[drawn], stands_for[drawn])
        total += 1
        sample = class_sampling.ClassSample(jnp.asarray(classes), real, stands_for, groups)
        taken = class_sampling.take_classes(table, sample)
        np.testing.assert_array_equal(taken[:, 0], classes)
        if groups > 1:  # each group's rows come from itself
            np.testing.assert_array_equal(classes // (ROWS // groups), np.repeat(np.arange(groups), 6))
    others = np.setdiff1d(np.arange(CLASSES), LABELS)
    assert (seen[others] > 0).all() and abs(seen[others].mean() / total - 1) < 1e-5
    assert seen[others].max() / total < 2.5


@pytest.mark.parametrize("name", ["normalized_softmax", pytest.param("proxy_nca", marks=pytest.mark.slow)])
def test_the_denominator_is_that_of_all_classes_in_expectation(name):
    """exp of an image's loss is 1 + (sum over negatives) / exp(positive): its mean over draws is the full one's."""
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.uniform(0.2, 0.6, (4, CLASSES)), jnp.float32)
    function = losses.LOSSES[name].function

    @jax.jit
    def sampled(key):
        sample = class_sampling.sample_classes(key, LABELS, CLASSES, 0.3)
        pairs = losses.pairs_from_labels(LABELS, sample.classes, reference_mask=sample.real)
        return function(matrix[:, sample.classes], pairs, reduction="none", stands_for=sample.stands_for)

    full = function(matrix, losses.pairs_from_labels(LABELS, jnp.arange(CLASSES)), reduction="none")
    drawn = np.stack([np.exp(np.asarray(sampled(jax.random.key(seed)), float)) for seed in range(400)])
    error = drawn.std(0) / np.sqrt(len(drawn))
    assert (np.abs(drawn.mean(0) - np.exp(full)) < 4 * error).all()
    assert (error / np.exp(full) < 0.05).all()  # so the comparison says something


def test_some_negatives_are_drawn_however_many_classes_the_batch_has():
    labels = jnp.arange(8)
    for seed in range(5):
        sample = class_sampling.sample_classes(jax.random.key(seed), labels, CLASSES, 0.01)
        assert len(sample.classes) == 9
        np.testing.assert_allclose(sample.stands_for.sum(), CLASSES)


def test_a_group_full_of_the_batch_draws_of_the_others():
    """100 classes in a table of 3,840 rows over 8 devices: all of them are on the first."""
    labels = jnp.arange(64)
    seen = np.zeros(100)
    for seed in range(200):
        sample = class_sampling.sample_classes(jax.random.key(seed), labels, 100, 0.1, rows=3840, groups=8)
        drawn = np.asarray(sample.real) & (np.asarray(sample.classes) >= 64)
        assert drawn.sum() == 1 and set(range(64)) <= set(np.asarray(sample.classes).tolist())
        np.add.at(seen, np.asarray(sample.classes)[drawn], np.asarray(sample.stands_for)[drawn])
    assert seen.sum() == 200 * 36 and (seen[64:] > 0).all()


def test_the_number_of_classes_that_are_compared():
    for batch, groups in ((4, 1), (4, 4), (40, 4), (64, 8)):
        sample = class_sampling.sample_classes(
            jax.random.key(0), jnp.zeros(batch, int), CLASSES, 0.3, rows=ROWS, groups=groups
        )
        count = class_sampling.compared_classes(batch, CLASSES, 0.3, rows=ROWS, groups=groups)
        assert count == min(len(sample.classes), CLASSES)


def test_all_classes_are_the_plain_loss():
    sample = class_sampling.sample_classes(jax.random.key(0), LABELS, CLASSES, 1.0)
    np.testing.assert_array_equal(np.sort(sample.classes), np.arange(CLASSES))
    assert (sample.stands_for == 1).all()


def test_errors():
    with pytest.raises(ValueError, match="share of classes"):
        class_sampling.sample_classes(jax.random.key(0), LABELS, CLASSES, 0.0)
    with pytest.raises(ValueError, match="labels must be below the number of classes, 40; one is 50"):
        class_sampling.sample_classes(jax.random.key(0), jnp.array([3, 50]), CLASSES, 0.5)
    with pytest.raises(ValueError, match="do not divide"):
        class_sampling.sample_classes(jax.random.key(0), LABELS, CLASSES, 0.5, groups=7)
