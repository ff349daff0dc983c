"""One compiled function per loss and shape, shared by the tests, and the names of the losses."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from idml_jax.losses import LOSSES

# The losses that read a matrix; those that read embeddings have tests of their own (test_probabilistic.py).
NAMES = [name for name, spec in LOSSES.items() if spec.reads != "embeddings"]
# Losses whose code differs most; the others are functions of a row's softmax or extremes, on the same helpers.
FIRST = (
    "contrastive", "triplet_semihard", "margin_distance_weighted", "multi_similarity", "fast_ap", "proxy_nca",
    "proxy_anchor",
)  # fmt: skip
FAMILIES = (*FIRST, "smooth_ap")


def of_families(families=FAMILIES):
    """Every loss as a parameter of a test; those of the other names are slow."""
    return [name if name in families else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


def one_centre(name):
    """Options for matrices with a column for each class, also for the losses with several proxies per class."""
    return {"centres": 1} if LOSSES[name].centres > 1 else {}


def call(name, matrix, pairs, weights=None, **options):
    """Any loss, with a fixed key for one that draws."""
    if LOSSES[name].needs_key:
        options = {"key": jax.random.key(0), "dimension": 16} | options
    options = one_centre(name) | options
    return LOSSES[name].function(matrix, pairs, weights=weights, **options)


@partial(jax.jit, static_argnames="name")
def _value_and_gradient(name, matrix, pairs, weights):
    return jax.value_and_grad(lambda x: call(name, x, pairs, weights))(matrix)


def value_and_gradient(name, matrix, pairs, weights=None):
    """The loss of a matrix and its gradient; compiled once per name, shape and type."""
    matrix = jnp.asarray(matrix)
    weights = jnp.ones(matrix.shape[0], matrix.dtype) if weights is None else jnp.asarray(weights, matrix.dtype)
    return _value_and_gradient(name, matrix, pairs, weights)
