"""Invariances of every loss: order, class names, padding and certainty do not matter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_helpers import of_families, one_centre

from idml_jax import ism, losses
from idml_jax.ism import Embedding

N, D, K, CLASSES = 8, 5, 3, 4


@partial(jax.jit, static_argnames=("name", "introspective"))
def value_and_gradients(name, semantic, uncertainty, proxies, labels, proxy_labels, mask, introspective=True):
    spec = losses.LOSSES[name]
    read = ism.introspective_distance if spec.reads == "distance" else ism.introspective_similarity

    def loss(semantic, proxies):
        batch = Embedding(ism.l2_normalize(semantic), uncertainty if introspective else None)
        proxied = spec.references == "proxies"
        references = Embedding(ism.l2_normalize(proxies)) if proxied else None
        pairs = losses.pairs_from_labels(labels, proxy_labels if proxied else None, mask)
        return spec.function(read(batch, references), pairs, **one_centre(name))

    return jax.value_and_grad(loss, argnums=(0, 1))(semantic, proxies)


@st.composite
def batches(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.05, 0.3, 1.0, 3.0]))
    labels = np.array(draw(st.lists(st.integers(0, CLASSES - 1), min_size=N, max_size=N)))
    proxies = rng.normal(size=(CLASSES, D))
    semantic = proxies[labels] + spread * rng.normal(size=(N, D))
    uncertainty = draw(st.sampled_from([0.0, 0.2, 1.0])) * rng.normal(size=(N, K))
    return {
        "semantic": semantic.astype(np.float32),
        "uncertainty": uncertainty.astype(np.float32),
        "proxies": proxies.astype(np.float32),
        "labels": labels,
        "proxy_labels": np.arange(CLASSES),
        "mask": np.ones(N, bool),
    }


# Derandomised: mining is discontinuous, so that once in a long while rounding alone changes what is mined.
examples = settings(deadline=None, max_examples=25, derandomize=True)


def close(value, expected):
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", of_families())
@examples
@given(batches(), st.permutations(range(N)), st.permutations(range(CLASSES)), st.permutations(range(CLASSES)))
def test_order_and_names_do_not_matter(name, batch, rows, columns, names):
    rows, columns, names = map(np.array, (rows, columns, names))
    if name == "n_pair":  # an anchor's positive is its first one, so of more than one the order matters
        batch = batch | {"labels": np.repeat(np.arange(CLASSES), N // CLASSES)}
    value, gradients = value_and_gradients(name, **batch)
    assert np.isfinite(value) and value >= -1e-6
    moved = {key: x[columns] if key.startswith("prox") else x[rows] for key, x in batch.items()}
    moved |= {"labels": names[moved["labels"]] + 7, "proxy_labels": names[moved["proxy_labels"]] + 7}
    moved_value, moved_gradients = value_and_gradients(name, **moved)
    close(moved_value, value)
    close(moved_gradients[0], np.asarray(gradients[0])[rows])
    close(moved_gradients[1], np.asarray(gradients[1])[columns])


@pytest.mark.parametrize("name", of_families())
@examples
@given(batches(), st.lists(st.booleans(), min_size=N, max_size=N))
def test_what_padding_holds_does_not_matter(name, batch, mask):
    mask = np.array(mask)
    batch = batch | {"mask": mask}
    value, (gradient, _) = value_and_gradients(name, **batch)
    assert not np.any(np.asarray(gradient)[~mask])
    other = {
        "semantic": np.where(mask[:, None], batch["semantic"], 2.0),
        "uncertainty": np.where(mask[:, None], batch["uncertainty"], -3.0),
        "labels": np.where(mask, batch["labels"], 0),
    }
    close(value_and_gradients(name, **batch | other)[0], value)


@pytest.mark.parametrize("name", of_families())
@examples
@given(batches())
def test_certain_images_give_the_plain_loss(name, batch):
    batch = batch | {"uncertainty": np.zeros((N, K), np.float32)}
    value, gradients = value_and_gradients(name, **batch)
    plain, plain_gradients = value_and_gradients(name, **batch, introspective=False)
    close(value, plain)
    jax.tree.map(close, gradients, plain_gradients)


@examples
@given(batches(), st.integers(1, 4))
def test_parts_of_a_gallery_join(batch, columns):
    """Relations of the same rows with several sets of columns can be put side by side."""
    left = losses.pairs_from_labels(jnp.asarray(batch["labels"]), jnp.arange(columns))
    right = losses.pairs_from_labels(jnp.asarray(batch["labels"]), jnp.arange(columns, CLASSES))
    whole = losses.pairs_from_labels(jnp.asarray(batch["labels"]), jnp.arange(CLASSES))
    for joined, expected in zip(losses.concatenate_pairs(left, right), whole, strict=True):
        np.testing.assert_array_equal(joined, expected)
