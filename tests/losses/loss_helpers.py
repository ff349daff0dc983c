"""One compiled function per loss and shape, shared by the tests."""

from functools import partial

import jax
import jax.numpy as jnp

from idml_jax.losses import LOSSES


def call(name, matrix, pairs, weights=None, **options):
    """Any loss, with a fixed key for one that draws."""
    if LOSSES[name].needs_key:
        options = {"key": jax.random.key(0), "dimension": 16} | options
    return LOSSES[name].function(matrix, pairs, weights=weights, **options)


@partial(jax.jit, static_argnames="name")
def _value_and_gradient(name, matrix, pairs, weights):
    return jax.value_and_grad(lambda x: call(name, x, pairs, weights))(matrix)


def value_and_gradient(name, matrix, pairs, weights=None):
    """The loss of a matrix and its gradient; compiled once per name, shape and type."""
    matrix = jnp.asarray(matrix)
    weights = jnp.ones(matrix.shape[0], matrix.dtype) if weights is None else jnp.asarray(weights, matrix.dtype)
    return _value_and_gradient(name, matrix, pairs, weights)
