"""Edge cases of the textbook formulas: values and gradients stay finite and correct."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_helpers import FIRST, NAMES, of_families, one_centre, value_and_gradient

from idml_jax import ism, losses
from idml_jax.ism import Embedding
from idml_jax.losses import Pairs

N, D, K = 6, 8, 3


@partial(jax.jit, static_argnames=("name", "introspective"))
def embedding_gradients(name, semantic, uncertainty, references, labels, classes, mask, introspective):
    """Value and gradients with respect to all the embeddings; references None: the batch itself."""
    spec = losses.LOSSES[name]

    def loss(semantic, uncertainty, references):
        batch = Embedding(ism.l2_normalize(semantic), uncertainty if introspective else None)
        others = None if references is None else Embedding(ism.l2_normalize(references), None)
        read = ism.introspective_distance if spec.reads == "distance" else ism.introspective_similarity
        pairs = losses.pairs_from_labels(labels, classes, mask)
        options = {"key": jax.random.key(0)} if spec.needs_key else {}
        options |= {"dimension": D} if spec.needs_dimension else {}
        return spec.function(read(batch, others), pairs, **options, **one_centre(name))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(semantic, uncertainty, references)


def evaluate(name, semantic, uncertainty, labels, *, introspective, mask=None, proxies=None, case=""):
    semantic = jnp.asarray(semantic)
    proxied = losses.LOSSES[name].references == "proxies"
    references = classes = None
    if proxied:
        references = proxies if proxies is not None else np.random.default_rng(1).normal(size=(5, D))
        references = jnp.asarray(references, jnp.float32)
        classes = jnp.arange(len(references))
    mask = jnp.ones(len(semantic), bool) if mask is None else jnp.asarray(mask)
    labels = jnp.asarray(labels, jnp.int32)
    value, gradients = embedding_gradients(
        name, semantic, jnp.asarray(uncertainty), references, labels, classes, mask, introspective
    )
    assert value.shape == () and value.dtype == jnp.float32
    assert np.isfinite(value), f"{name}, {case}: {value}"
    for gradient in jax.tree.leaves(gradients):
        assert np.isfinite(np.asarray(gradient, np.float32)).all(), f"{name}, {case}: gradient {gradient}"
    return float(value), gradients


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, D)).astype(np.float32), rng.normal(size=(N, K)).astype(np.float32) * 0.3


def edge_cases():
    s, u = batch()
    within, across = s.copy(), s.copy()
    within[1], across[3] = s[0], s[0]
    zero, twice_zero = s.copy(), s.copy()
    zero[2] = 0
    twice_zero[:2] = 0
    same = np.broadcast_to(s[:1], s.shape)
    labels = [0, 0, 1, 1, 2, 2]
    yield "ordinary", s, u, labels, None
    yield "one class: no negative pair", s, u, [0] * N, None
    yield "all classes different: no positive pair", s, u, range(N), None
    yield "duplicates within a class", within, u, labels, None
    yield "duplicates across classes", across, u, labels, None
    yield "duplicates with no uncertainty", within, 0 * u, labels, None
    yield "all the same point", same, u, labels, None
    yield "all the same certain point", same, 0 * u, labels, None
    yield "a zero embedding", zero, u, labels, None
    yield "two zero embeddings", twice_zero, 0 * u, labels, None
    yield "nothing but zeros", 0 * s, 0 * u, labels, None
    yield "opposite vectors", np.concatenate([s[:3], -s[:3]]), u, [0, 1, 2, 0, 1, 2], None
    yield "very large norms", s * 1e18, u * 1e18, labels, None
    yield "very small norms", s * 1e-18, u * 1e-18, labels, None
    yield "uncertainty that overwhelms", s, u * 1e6, labels, None
    yield "some rows are padding", s, u, labels, [True, True, True, False, True, False]
    yield "one row left", s, u, labels, [True] + [False] * (N - 1)
    yield "everything is padding", s, u, labels, [False] * N


@pytest.mark.parametrize("introspective", [False, True], ids=["plain", "introspective"])
@pytest.mark.parametrize("name", of_families())
def test_finite_everywhere(name, introspective):
    for case, semantic, uncertainty, labels, mask in edge_cases():
        evaluate(name, semantic, uncertainty, list(labels), introspective=introspective, mask=mask, case=case)


@pytest.mark.parametrize("name", NAMES)
def test_finite_at_any_scale_of_the_matrix(name):
    """Distances of vectors that were not normalised, and entries that are all equal."""
    pairs = losses.pairs_from_labels(jnp.array([0, 0, 1, 1, 2, 2, 0]))
    matrix = np.random.default_rng(0).uniform(0.1, 1.5, (7, 7)).astype(np.float32)
    for scaled in (1e-30 * matrix, 1e-6 * matrix, 1e4 * matrix, 1e15 * matrix, 0 * matrix, np.ones_like(matrix)):
        value, gradient = value_and_gradient(name, scaled, pairs)
        assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", of_families(FIRST))
def test_batches_of_one_and_two(name):
    s, u = batch()
    value, _ = evaluate(name, s[:1], u[:1], [0], introspective=True)
    if losses.LOSSES[name].references == "batch":
        assert value == 0
    for labels in ([0, 0], [0, 1]):
        evaluate(name, s[:2], u[:2], labels, introspective=True)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["proxy_nca", "proxy_anchor", "normalized_softmax"])
def test_one_and_two_proxies(name, count):
    s, u = batch()
    proxies = np.eye(count, D)
    value, (_, _, gradient) = evaluate(name, s, u, [i % count for i in range(N)], introspective=True, proxies=proxies)
    assert gradient.shape == (count, D)
    if name != "proxy_anchor" and count == 1:
        assert value == 0  # the only proxy is always the nearest
    else:
        assert value > 0


@pytest.mark.parametrize("name", ["contrastive", "proxy_anchor"])
def test_bfloat16_embeddings(name):
    s, u = batch()
    labels = [0, 0, 1, 1, 2, 2]
    low = lambda x: jnp.asarray(x, jnp.bfloat16)
    value, gradients = evaluate(name, low(s), low(u), labels, introspective=True)
    assert gradients[0].dtype == jnp.bfloat16
    exact, _ = evaluate(name, low(s).astype(jnp.float32), low(u).astype(jnp.float32), labels, introspective=True)
    # Normalised and compared in float32: only the rounding of the embeddings themselves is left.
    np.testing.assert_allclose(value, exact, rtol=1e-5)


@pytest.mark.parametrize("name", of_families(FIRST))
def test_bfloat16_matrix_is_promoted(name):
    pairs = losses.pairs_from_labels(jnp.array([0, 0, 1, 1, 2, 2, 0]))
    matrix = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1.5, (7, 7)), jnp.bfloat16)
    value, gradient = value_and_gradient(name, matrix, pairs)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    assert np.isfinite(np.asarray(gradient, np.float32)).all()
    np.testing.assert_allclose(value, value_and_gradient(name, matrix.astype(jnp.float32), pairs)[0], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_ignored_entries_may_hold_anything(name):
    rng = np.random.default_rng(0)
    matrix = rng.uniform(0.1, 1.5, (7, 7)).astype(np.float32)
    pairs = losses.pairs_from_labels(jnp.array([0, 0, 1, 1, 2, 2, 0]), mask=jnp.array([True] * 6 + [False]))
    value, gradient = value_and_gradient(name, matrix, pairs)
    for poison in (np.nan, np.inf, -1e30):
        spoilt = np.where(np.asarray(pairs.positive | pairs.negative), matrix, poison)
        spoilt_value, spoilt_gradient = value_and_gradient(name, spoilt, pairs)
        np.testing.assert_array_equal(spoilt_value, value)
        np.testing.assert_array_equal(spoilt_gradient, gradient)
    # Entries that are compared do not: a broken network has no loss of 0.
    for entries in (pairs.positive | pairs.negative, np.eye(7, k=1, dtype=bool) & np.asarray(pairs.positive)):
        assert np.isnan(value_and_gradient(name, np.where(entries, np.nan, matrix), pairs)[0])


@pytest.mark.parametrize("name", NAMES)
def test_empty_relation_is_zero_without_gradient(name):
    nothing = Pairs(jnp.zeros((7, 7), bool), jnp.zeros((7, 7), bool))
    value, gradient = value_and_gradient(name, jnp.full((7, 7), 0.7), nothing)
    assert value == 0
    assert (np.asarray(gradient) == 0).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
@pytest.mark.parametrize("name", of_families())
def test_no_rows_or_no_columns(name, shape):
    matrix = jnp.zeros(shape)
    nothing = Pairs(jnp.zeros(shape, bool), jnp.zeros(shape, bool))
    value, gradient = value_and_gradient(name, matrix, nothing)
    assert value == 0 and gradient.shape == shape


def test_duplicates_are_at_rest():
    """Two copies of an image pull neither each other nor NaN into the gradient."""
    s, u = batch()
    s[1] = s[0]
    for name in ("contrastive", "fast_ap"):
        _, (gradient, _, _) = evaluate(name, s[:2], u[:2], [0, 0], introspective=False)
        assert (np.asarray(gradient) == 0).all()


def test_squared_distance_has_the_right_gradient_at_zero():
    """The losses on squared distances see 2 (x - p), which vanishes at x = p, through sqrt and square."""

    def loss(x, p):
        distance = ism.semantic_distance(x, p)
        return losses.proxy_nca(distance, losses.pairs_from_labels(jnp.array([0]), jnp.arange(2)), scale=1.0)

    x, p = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
    push = jax.nn.softmax(-jnp.array([0.0, 2.0]))[1]
    expected = -push * 2 * (x - p[1:])
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x, p), expected, rtol=1e-5)


def test_proxy_nca_keeps_the_images_that_underflow():
    """An image at distance 2 from its proxy and on top of another: softmax first gives exp(-128) = 0 in float32."""
    distance = jnp.array([[2.0, 0.0], [0.1, 1.0]])
    pairs = losses.pairs_from_labels(jnp.array([0, 0]), jnp.arange(2))
    value, gradient = value_and_gradient("proxy_nca", distance, pairs)
    np.testing.assert_allclose(losses.proxy_nca(distance, pairs, reduction="none")[0], 128.0)
    np.testing.assert_allclose(value, 64.0, rtol=1e-5)
    np.testing.assert_allclose(gradient[0, 0], 64.0)  # 32 * 2 d / 2 images


def test_multi_similarity_without_positives_still_separates():
    similarity = jnp.array([[1.0, 0.9], [0.9, 1.0]])
    pairs = losses.pairs_from_labels(jnp.array([0, 1]))
    value, gradient = value_and_gradient("multi_similarity", similarity, pairs)
    np.testing.assert_allclose(value, np.log1p(np.exp(50 * 0.4)) / 50, rtol=1e-6)
    assert gradient[0, 1] > 0 and gradient[1, 0] > 0


def test_margin_without_near_negatives_keeps_its_positives():
    distance = jnp.array([[0.0, 1.3, 1.9], [1.3, 0.0, 1.9], [1.9, 1.9, 0.0]])
    pairs = losses.pairs_from_labels(jnp.array([0, 0, 1]))
    for key in (None, jax.random.key(0)):
        value = jax.jit(losses.margin_distance_weighted)(distance, pairs, key)
        np.testing.assert_allclose(value, 1.3 - 1.2 + 0.2, rtol=1e-5)


def test_equal_distances_are_not_semihard():
    """d_an = d_ap and d_an = d_ap + margin both lie outside (exact in binary: eighths)."""
    distance = jnp.array([[0.0, 0.5, 0.5, 0.625, 0.5625]])
    pairs = Pairs(jnp.array([[False, True, False, False, False]]), jnp.array([[False, False, True, True, True]]))
    assert float(jax.jit(losses.triplet_semihard)(distance, pairs, margin=0.125)) == 0.0625


def test_proxy_nca_of_distances_whose_squares_overflow():
    pairs = losses.pairs_from_labels(jnp.arange(3), jnp.arange(3))
    near = jnp.full((3, 3), 0.5)
    for far in (1e13, 1e19, 3e38):
        for where in ((0, 0), (0, 1), slice(None)):
            value, gradient = jax.value_and_grad(losses.proxy_nca)(near.at[where].set(far), pairs)
            assert np.isfinite(value) and np.isfinite(gradient).all()
    assert losses.proxy_nca(near.at[0, 0].set(1e19), pairs) > 1e20
