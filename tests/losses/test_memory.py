"""The cross-batch memory against a deque, and as part of a loss."""

from collections import deque

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idml_jax import ism, losses
from idml_jax.ism import Embedding
from idml_jax.losses import memory

SIZE, N, D, K = 7, 3, 4, 2

enqueue = jax.jit(memory.enqueue)


def batch(seed):
    rng = np.random.default_rng(seed)
    embedding = Embedding(
        jnp.asarray(rng.normal(size=(N, D)), jnp.float32), jnp.asarray(rng.normal(size=(N, K)), jnp.float32)
    )
    return embedding, jnp.asarray(rng.integers(0, 5, N), jnp.int32)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.booleans(), min_size=N, max_size=N), max_size=8))
def test_keeps_the_latest_rows_that_are_not_padding(masks):
    held, expected = memory.create(SIZE, D, K), deque(maxlen=SIZE)
    for step, mask in enumerate(masks):
        embedding, labels = batch(step)
        held = enqueue(held, embedding, labels, jnp.array(mask))
        for i in np.flatnonzero(mask):
            expected.append((*np.asarray(embedding.semantic[i]), *np.asarray(embedding.uncertainty[i]), int(labels[i])))
    columns = [held.embedding.semantic, held.embedding.uncertainty, held.labels[:, None]]
    rows = np.concatenate([np.asarray(c, np.float32) for c in columns], axis=1)[np.asarray(held.valid)]
    assert sorted(map(tuple, rows.tolist())) == sorted(tuple(np.float32(row).tolist()) for row in expected)


def test_shapes_never_change():
    held = memory.create(SIZE, D, K)
    chex.assert_trees_all_equal_shapes_and_dtypes(held, enqueue(held, *batch(0), jnp.ones(N, bool)))
    low = memory.create(SIZE, D, dtype=jnp.bfloat16)
    chex.assert_trees_all_equal_shapes_and_dtypes(low, memory.enqueue(low, *batch(0)))


def test_saved_and_restored_in_between():
    """A memory restored from a checkpoint continues as if uninterrupted."""
    held = memory.create(SIZE, D, K)
    for step in range(3):
        held = enqueue(held, *batch(step), jnp.ones(N, bool))
    leaves, structure = jax.tree.flatten(held)
    restored = jax.tree.unflatten(structure, [jnp.asarray(np.array(leaf)) for leaf in leaves])
    for step in range(3, 6):
        held, restored = (enqueue(m, *batch(step), jnp.ones(N, bool)) for m in (held, restored))
    chex.assert_trees_all_equal(held, restored)


def test_pairs_with_what_is_held():
    held = memory.create(SIZE, D)
    embedding, _ = batch(0)
    held = memory.enqueue(held, embedding, jnp.array([0, 1, 2]), jnp.array([True, True, False]))
    positive, negative = memory.pairs(held, jnp.array([1, 5, 1]), jnp.array([True, True, False]))
    np.testing.assert_array_equal(positive[:, :3], [[False, True, False], [False] * 3, [False] * 3])
    np.testing.assert_array_equal(negative[:, :3], [[True, False, False], [True, True, False], [False] * 3])
    assert not np.any(positive[:, 3:]) and not np.any(negative[:, 3:])
    assert not np.any(memory.pairs(held, jnp.array([0, 1, 2]), active=jnp.array(False)).positive)


def test_loss_over_batch_and_memory():
    """One matrix over both is the loss over the concatenation; nothing flows into the memory; warm-up leaves it out."""
    held = memory.create(SIZE, D, K)
    held = memory.enqueue(held, *batch(0))
    embedding, labels = batch(1)

    @jax.jit
    def loss(embedding, held, active):
        references = memory.with_batch(held, embedding)
        pairs = memory.pairs_with_batch(held, labels, active=active)
        return losses.triplet_semihard(ism.introspective_distance(embedding, references), pairs, margin=5.0)

    references = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), embedding, batch(0)[0])
    all_labels = jnp.concatenate([labels, batch(0)[1]])
    own = jnp.arange(N)[:, None] == jnp.arange(2 * N)[None, :]
    same = labels[:, None] == all_labels[None, :]
    pairs = losses.Pairs(same & ~own, ~same)
    direct = jax.jit(lambda a, b, pairs: losses.triplet_semihard(ism.introspective_distance(a, b), pairs, margin=5.0))
    expected = direct(embedding, references, pairs)
    np.testing.assert_allclose(loss(embedding, held, True), expected, rtol=1e-5)
    alone = losses.triplet_semihard(ism.introspective_distance(embedding), losses.pairs_from_labels(labels), margin=5.0)
    np.testing.assert_allclose(loss(embedding, held, False), alone, rtol=1e-5)
    assert np.any(jax.jit(jax.grad(loss))(embedding, held, True).semantic)

    def through(embedding):
        return jnp.sum(memory.enqueue(held, embedding, labels).embedding.semantic)

    assert not np.any(jax.grad(through)(embedding).semantic)


def test_batch_with_plain_memory_or_plain_batch():
    embedding, _ = batch(0)
    assert memory.with_batch(memory.create(SIZE, D), embedding).uncertainty is None
    assert memory.with_batch(memory.create(SIZE, D, K), Embedding(embedding.semantic, None)).uncertainty is None
    assert memory.with_batch(memory.create(SIZE, D, K), embedding).uncertainty.shape == (N + SIZE, K)


def test_errors():
    embedding, labels = batch(0)
    with pytest.raises(ValueError, match="at least 1"):
        memory.create(0, D)
    with pytest.raises(ValueError, match="does not fit into"):
        memory.enqueue(memory.create(2, D, K), embedding, labels)
    with pytest.raises(ValueError, match="has none"):
        memory.enqueue(memory.create(SIZE, D, K), Embedding(embedding.semantic, None), labels)
    with pytest.raises(ValueError, match="length 5"):
        memory.enqueue(memory.create(SIZE, 5, K), embedding, labels)
    with pytest.raises(ValueError, match="labels and mask"):
        memory.enqueue(memory.create(SIZE, D, K), embedding, labels[:2])
