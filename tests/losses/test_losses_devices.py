"""One device and eight give the same loss and the same gradients: sharded under jit, under shard_map and pmap."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from loss_helpers import FIRST, of_families, one_centre

from idml_jax import ism, losses
from idml_jax.ism import Embedding
from idml_jax.losses import memory

DEVICES, N, FEATURES, D, K, CLASSES = 8, 24, 6, 8, 3, 5
needs_devices = pytest.mark.skipif(jax.device_count() < DEVICES, reason="needs 8 devices")


def problem():
    rng = np.random.default_rng(0)
    params = {
        "semantic": rng.normal(size=(FEATURES, D)),
        "uncertainty": 0.3 * rng.normal(size=(FEATURES, K)),
        "proxies": rng.normal(size=(CLASSES, D)),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    batch = {
        "features": jnp.asarray(rng.normal(size=(N, FEATURES)), jnp.float32),
        "labels": jnp.asarray(rng.integers(0, CLASSES, N), jnp.int32),
        # Whole devices of padding included.
        "mask": jnp.arange(N) < N - 5,
        "weights": jnp.asarray(rng.uniform(0.5, 2.0, N), jnp.float32),
    }
    return params, batch


def loss(params, batch, *, name, axis_name=None):
    """A linear network, ISM and a loss: the whole batch, or with an axis one device's rows of it."""
    spec = losses.LOSSES[name]
    embedding = Embedding(
        ism.l2_normalize(batch["features"] @ params["semantic"]), batch["features"] @ params["uncertainty"]
    )
    read = ism.introspective_distance if spec.reads == "distance" else ism.introspective_similarity
    if spec.references == "proxies":
        matrix = read(embedding, Embedding(ism.l2_normalize(params["proxies"])))
        pairs = losses.pairs_from_labels(batch["labels"], jnp.arange(CLASSES), batch["mask"])
    else:
        matrix = read(embedding, losses.gather(embedding, axis_name))
        pairs = losses.pairs_from_labels(batch["labels"], mask=batch["mask"], axis_name=axis_name)
    options = {"key": jax.random.key(5), "dimension": D} if spec.needs_key else one_centre(name)
    return spec.function(matrix, pairs, weights=batch["weights"], axis_name=axis_name, **options)


@pytest.fixture(scope="module")
def on_one_device():
    """Value and gradients of a loss by its name."""
    params, batch = problem()
    return cache(lambda name: jax.jit(jax.value_and_grad(partial(loss, name=name)))(params, batch))


def check(result, expected):
    (value, gradients), (expected_value, expected_gradients) = result, expected
    assert expected_value > 0 and np.any(expected_gradients["uncertainty"])
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected_gradients[name], rtol=1e-3, atol=2e-6, err_msg=name)


@needs_devices
@pytest.mark.parametrize("name", of_families(FIRST))
def test_jit_with_a_sharded_batch(name, on_one_device):
    params, batch = problem()
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    check(jax.jit(jax.value_and_grad(partial(loss, name=name)))(params, batch), on_one_device(name))


@needs_devices
@pytest.mark.parametrize("name", of_families())
def test_shard_map(name, on_one_device):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    local = jax.value_and_grad(partial(loss, name=name, axis_name="data"))

    def step(params, batch):
        value, gradients = local(params, batch)
        return value, jax.lax.pmean(gradients, "data")

    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))
    check(mapped(*problem()), on_one_device(name))


@needs_devices
@pytest.mark.parametrize("name", of_families(FIRST))
def test_pmap(name, on_one_device):
    local = jax.value_and_grad(partial(loss, name=name, axis_name="data"))

    def step(params, batch):
        value, gradients = local(params, batch)
        return value, jax.lax.pmean(gradients, "data")

    params, batch = problem()
    batch = jax.tree.map(lambda x: x.reshape(DEVICES, N // DEVICES, *x.shape[1:]), batch)
    value, gradients = jax.pmap(step, axis_name="data", in_axes=(None, 0))(params, batch)
    np.testing.assert_array_equal(value, value[0])
    check((value[0], jax.tree.map(lambda x: x[0], gradients)), on_one_device(name))


@needs_devices
def test_memory_over_devices():
    """Every device holds the whole memory and adds the batch of all devices to it."""
    params, batch = problem()
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    filled = memory.enqueue(
        memory.create(2 * N, D), Embedding(batch["features"] @ params["semantic"]), batch["labels"], batch["mask"]
    )

    def step(params, batch, held, axis_name=None):
        embedding = Embedding(batch["features"] @ params["semantic"])
        pairs = memory.pairs_with_batch(held, batch["labels"], batch["mask"], axis_name=axis_name)
        distance = ism.semantic_distance(
            embedding.semantic, memory.with_batch(held, embedding, axis_name=axis_name).semantic
        )
        value = losses.contrastive(distance, pairs, negative_margin=5.0, axis_name=axis_name)
        return value, memory.enqueue(held, *losses.gather((embedding, batch["labels"], batch["mask"]), axis_name))

    shard = partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P(), check_vma=False)
    value, held = jax.jit(shard(partial(step, axis_name="data")))(params, batch, filled)
    expected_value, expected = jax.jit(step)(params, batch, filled)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), held, expected)


def test_gather_without_an_axis_is_the_identity():
    tree = {"a": jnp.ones(3), "b": None}
    assert losses.gather(tree, None) is tree
