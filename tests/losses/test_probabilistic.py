"""Losses on embeddings as distributions: sampler, kernel, values against loops, gradients, certain and odd images."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from idml_jax import ism, losses
from idml_jax.ism import Embedding
from idml_jax.losses import probabilistic, vmf
from idml_jax.losses.vmf_kernel import log_kernel

NAMES = [name for name, spec in losses.LOSSES.items() if spec.reads == "embeddings"]
LABELS = np.array([0, 0, 1, 1, 0])
N, D, K = 5, 3, 2


def batch(seed=0, spread=0.5):
    rng = np.random.default_rng(seed)
    return Embedding(ism.l2_normalize(rng.normal(size=(N, D))), spread * rng.normal(size=(N, K)))


@pytest.mark.parametrize("dimension", [pytest.param(2, marks=pytest.mark.slow), 64])
def test_angles_have_the_mean_and_the_derivative_of_the_distribution(dimension):
    """The mean cosine is a ratio of Bessel functions A, and A' = 1 - A^2 - A (d - 1) / kappa."""
    ive = pytest.importorskip("scipy.special").ive
    kappa = np.array([0.05, 1.0, 7.0, 60.0, 900.0]) * (dimension - 1)
    uniform = (np.arange(4000) + 0.5) / 4000  # evenly spread, so the mean has hardly any noise

    def mean_cosine(kappa):
        every = jnp.broadcast_to(kappa, uniform.shape)
        return jnp.mean(jnp.cos(vmf.angle(jnp.asarray(uniform), every, dimension)))

    with jax.enable_x64(True):
        value, slope = jax.jit(jax.vmap(jax.value_and_grad(mean_cosine)))(jnp.asarray(kappa))
    expected = ive(dimension / 2, kappa) / ive(dimension / 2 - 1, kappa)
    np.testing.assert_allclose(value, expected, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(slope, 1 - expected**2 - expected * (dimension - 1) / kappa, rtol=2e-2, atol=1e-7)


def test_angles_in_float32_at_the_ends():
    uniform, kappa = (x.ravel() for x in np.meshgrid([0.0, 0.5, 1.0 - 2**-24], [1e-20, 1e-3, 1.0, 1e6, 1e12]))
    for dimension in (2, 512):
        found = jax.jit(vmf._angle_and_slope, static_argnums=2)(jnp.float32(uniform), jnp.float32(kappa), dimension)
        assert np.isfinite(found).all()
        assert (found[0] >= 0).all() and (found[0] <= 3.1416).all()


def shares(z, pairs, kappa):
    """For one sample of all images, the softmax of each positive among the negatives of its anchor."""
    similarity, found = np.exp(kappa * z @ z.T), np.zeros((N, N))
    for i, p in np.argwhere(np.asarray(pairs.positive)):
        found[i, p] = similarity[i, p] / (similarity[i, p] + similarity[i][np.asarray(pairs.negative)[i]].sum())
    return found


def wood(rng, mean, kappa):
    """One sample by rejection, Wood 1994."""
    d = len(mean)
    b = (d - 1) / (2 * kappa + np.sqrt(4 * kappa**2 + (d - 1) ** 2))
    x = (1 - b) / (1 + b)
    c = kappa * x + (d - 1) * np.log(1 - x**2)
    while True:
        z = rng.beta((d - 1) / 2, (d - 1) / 2)
        w = (1 - (1 + b) * z) / (1 - (1 - b) * z)
        if kappa * w + (d - 1) * np.log(1 - x * w) - c >= np.log(rng.random()):
            break
    v = rng.normal(size=d)
    v -= (v @ mean) * mean
    return w * mean + np.sqrt(1 - w**2) * v / np.linalg.norm(v)


def test_mc_info_nce_is_its_formula_on_its_samples_and_on_those_of_another_sampler():
    embedding, pairs, key = batch(), losses.pairs_from_labels(LABELS), jax.random.key(3)
    weights = np.array([1.0, 0.5, 2.0, 0.0, 1.0])
    where = np.asarray(pairs.positive)

    def expected(found):
        terms = weights[:, None] * np.where(where, -np.log(np.where(where, found, 1.0)), 0.0)
        return terms.sum() / (weights[:, None] * where).sum()

    @jax.jit
    def loss(embedding):
        options = {"kappa": 4.0, "samples": 2000, "weights": jnp.asarray(weights)}
        samples = probabilistic._on_sphere(embedding, key, jnp.arange(N), 2000)
        return losses.mc_info_nce(embedding, pairs, key, **options), samples

    value, drawn = (np.asarray(x, float) for x in loss(embedding))
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=2), 1.0, rtol=1e-5)
    np.testing.assert_allclose(value, expected(np.mean([shares(z, pairs, 4.0) for z in drawn], axis=0)), rtol=1e-4)
    rng, kappas = np.random.default_rng(0), (D - 1) / np.sum(np.asarray(embedding.uncertainty) ** 2, axis=1)
    means = np.asarray(embedding.semantic, float)
    other = [shares(np.stack([wood(rng, m, k) for m, k in zip(means, kappas, strict=True)]), pairs, 4.0)
             for _ in range(1000)]  # fmt: skip
    np.testing.assert_allclose(value, expected(np.mean(other, axis=0)), rtol=0.05)


def test_hedged_instance_is_its_formula_on_its_samples():
    embedding, pairs, key = batch(), losses.pairs_from_labels(LABELS), jax.random.key(3)

    @jax.jit
    def loss(embedding):
        options = {"slope": 3.0, "offset": 2.0, "prior": 0.01, "samples": 4}
        samples = probabilistic._in_space(embedding, key, jnp.arange(N), 4)
        return losses.hedged_instance(embedding, pairs, key, **options), samples

    value, drawn = (np.asarray(x, float) for x in loss(embedding))
    square = np.sum(np.asarray(embedding.uncertainty, float) ** 2, axis=1)
    means = {}
    for kind, where in (("positive", pairs.positive), ("negative", pairs.negative)):
        terms = []
        for i, j in np.argwhere(np.asarray(where)):
            apart = np.linalg.norm(drawn[:, None, i] - drawn[None, :, j], axis=2)
            p = np.mean(1 / (1 + np.exp(3.0 * apart - 2.0)))
            terms.append(-np.log(p if kind == "positive" else 1 - p))
        means[kind] = np.mean(terms)
    variance = square / D  # of the normal distributions; that of the prior is 1 / D
    divergence = 0.5 * np.sum(
        np.stack([variance * D - 1 - np.log(variance * D)] * D, axis=1) + D * np.asarray(embedding.semantic) ** 2,
        axis=1,
    )
    expected = 0.5 * (means["positive"] + means["negative"]) + 0.01 * divergence.mean()
    np.testing.assert_allclose(value, expected, rtol=1e-4)


@pytest.mark.parametrize("dimension", [3, pytest.param(64, marks=pytest.mark.slow)])
def test_the_kernel_and_its_derivatives_are_those_of_bessel_functions(dimension):
    """It is g(|sum|) - g(a) - g(b), g(k) = log I(d / 2 - 1)(k) / k^(d / 2 - 1), and g' is I(d / 2) / I(d / 2 - 1)."""
    special = pytest.importorskip("scipy.special")
    order = dimension / 2 - 1
    a, b, cosine = np.meshgrid([1.5, 40.0, 3e3], [0.7, 1.5, 5e4], [-1.0, -0.3, 0.0, 0.9, 1.0], indexing="ij")

    def g(a):
        scale = special.gammaln(order + 1) + order * np.log(2)
        return np.log(special.ive(order, a)) + a - order * np.log(a) + scale

    def value_and_slopes(a, b, cosine):
        kernel = lambda a, b, c: log_kernel(c[None, None], a[None], b[None], dimension)[0, 0]
        return jax.value_and_grad(kernel, (0, 1, 2))(a, b, cosine)

    with jax.enable_x64(True):
        value, slopes = jax.jit(jax.vmap(value_and_slopes))(*(jnp.asarray(x.ravel()) for x in (a, b, cosine)))
    n = np.maximum(np.sqrt(a**2 + b**2 + 2 * a * b * cosine), 1e-3)  # a = b at an angle of pi: 0
    slope = lambda a: special.ive(order + 1, a) / special.ive(order, a)
    away = np.abs(n - 1e-3) > 1e-6
    expected = np.where(away, g(np.where(away, n, 1.0)), 0.0) - g(a) - g(b)
    # 1e-8 is the error of the expansion; of g and of its slope at 5e4, SciPy leaves 1e-11.
    np.testing.assert_allclose(value, expected.ravel(), rtol=1e-8, atol=1e-8)
    ratio = np.where(away, slope(n) / n, 1 / dimension)
    for got, wanted in zip(
        slopes,
        (ratio * (a + b * cosine) - slope(a), ratio * (b + a * cosine) - slope(b), ratio * a * b),
        strict=True,
    ):
        np.testing.assert_allclose(got, wanted.ravel(), rtol=1e-8, atol=1e-8)


def test_elk_is_its_formula_and_does_not_know_the_order_of_the_images():
    """In 3 dimensions C(k) is k / sinh(k) up to a constant."""
    embedding, weights = batch(), np.array([1.0, 0.5, 2.0, 0.0, 1.0])
    loss = jax.jit(lambda e, labels, w: loss_of("elk", e, None, labels, weights=w, spread=0.8, temperature=0.2))
    mean, u = (np.asarray(x, float) for x in embedding)
    kappa = (D - 1) / (np.sum(u**2, axis=1) + 0.8**2)
    log_c = lambda k: np.log(k / np.sinh(k))
    terms, counted = 0.0, 0.0
    for i in range(N):
        score = np.zeros(N)
        for j in range(N):
            joint = log_c(np.linalg.norm(kappa[i] * mean[i] + kappa[j] * mean[j]))
            score[j] = np.exp((log_c(kappa[i]) + log_c(kappa[j]) - joint) / (D - 1) / 0.2)
        for p in range(N):
            if p != i and LABELS[p] == LABELS[i]:
                terms -= weights[i] * np.log(score[p] / (score[p] + score[LABELS[i] != LABELS].sum()))
                counted += weights[i]
    np.testing.assert_allclose(loss(embedding, LABELS, weights), terms / counted, rtol=2e-5)
    order = np.array([3, 0, 4, 2, 1])
    moved = loss(jax.tree.map(lambda x: x[order], embedding), 7 - LABELS[order], weights[order])
    np.testing.assert_allclose(moved, terms / counted, rtol=2e-5)
    # Overwhelming uncertainty leaves no difference between the images.
    nothing = loss(Embedding(mean, 1e9 * u), LABELS, np.ones(N))
    np.testing.assert_allclose(nothing, (6 * np.log(1 + 2) + 2 * np.log(1 + 3)) / 8, rtol=1e-6)


def loss_of(name, embedding, key, labels=LABELS, mask=None, axis_name=None, **options):
    """As in a step: with an axis, the references are those of all devices."""
    references = None if axis_name is None else losses.gather(embedding, axis_name)
    pairs = losses.pairs_from_labels(labels, mask=mask, axis_name=axis_name)
    spec = losses.LOSSES[name]
    options |= {"key": key, "samples": 3} if spec.needs_key else {}
    return spec.function(embedding, pairs, references=references, axis_name=axis_name, **options)


SLOWLY = [pytest.param(name, marks=() if name == "mc_info_nce" else pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("name", SLOWLY)
def test_gradient_is_that_of_the_samples(name):
    """Finite differences at the same key: the samples move with the parameters."""
    with jax.enable_x64(True):
        embedding = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), batch())
        function = jax.jit(jax.value_and_grad(lambda e: loss_of(name, e, jax.random.key(1))))
        _, gradient = function(embedding)
        for part in ("semantic", "uncertainty"):
            for index in ((0, 0), (3, 1)):
                ends = []
                for step in (1e-5, -1e-5):
                    moved = getattr(embedding, part).at[index].add(step)
                    ends.append(float(function(embedding._replace(**{part: moved}))[0]))
                expected = (ends[0] - ends[1]) / 2e-5
                # The angle's derivative is that of the distribution, of which the grid is an approximation.
                np.testing.assert_allclose(getattr(gradient, part)[index], expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_finite_everywhere_and_plain_where_certain(name):
    loss = lambda e, labels, mask, weights: loss_of(name, e, jax.random.key(0), labels, mask, weights=weights)
    function = jax.jit(jax.value_and_grad(loss))
    s, u = map(np.asarray, batch())
    every = np.ones(N, bool)
    duplicate = s.copy()
    duplicate[1] = s[0]
    for case, e, labels, mask in (
        ("certain", (s, 0 * u), LABELS, every),
        ("one class", (s, u), np.zeros(N, int), every),
        ("no positive", (s, u), np.arange(N), every),
        ("duplicates", (duplicate, u), LABELS, every),
        ("certain duplicates", (duplicate, 0 * u), LABELS, every),
        ("zeros", (0 * s, u), LABELS, every),
        ("overwhelming uncertainty", (s, 1e6 * u), LABELS, every),
        ("uncertainty whose square overflows", (s, 1e37 * u), LABELS, every),
        ("tiny uncertainty", (s, 1e-5 * u), LABELS, every),
        ("huge", (1e15 * s, 1e18 * u), LABELS, every),
        ("tiny", (1e-18 * s, 1e-18 * u), LABELS, every),
        ("two of a class", (s, u), LABELS, np.arange(N) < 2),
        ("one image", (s, u), LABELS, np.arange(N) < 1),
        ("no weight", (s, u), LABELS, every),
        ("padding", (s, u), LABELS, every & (LABELS == 0)),
        ("nothing", (s, u), LABELS, ~every),
    ):
        e = Embedding(*(jnp.asarray(x, jnp.float32) for x in e))
        value, gradient = function(e, labels, mask, np.full(N, case != "no weight", np.float32))
        assert np.isfinite(value), case
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient)), case
        if case in ("nothing", "one image", "no weight"):
            assert value == 0 and not any(np.any(x) for x in jax.tree.leaves(gradient)), case
        if case == "certain":
            plain = jax.jit(lambda s: loss_of(name, Embedding(s), jax.random.key(0)))(e.semantic)
            np.testing.assert_allclose(value, plain, rtol=1e-6)
            assert not np.any(gradient.uncertainty)
            if name == "mc_info_nce":
                cosines, pairs = ism.cosine_similarity(e.semantic), losses.pairs_from_labels(LABELS)
                np.testing.assert_allclose(plain, losses.info_nce(cosines, pairs, temperature=1 / 14), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_embeddings_and_rows_of_padding(name):
    """Computed in float32, also the rows' gradient; what padding holds reaches neither."""
    embedding = Embedding(*(jnp.asarray(x, jnp.bfloat16) for x in batch()))
    function = jax.jit(jax.value_and_grad(lambda e, labels, mask: loss_of(name, e, jax.random.key(0), labels, mask)))
    value, gradient = function(embedding, LABELS, np.ones(N, bool))
    whole, of_whole = function(jax.tree.map(lambda x: x.astype(jnp.float32), embedding), LABELS, np.ones(N, bool))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(a), b, rtol=1e-2, atol=1e-4), gradient, of_whole)
    padded = jax.tree.map(lambda x: jnp.concatenate([x, 7 * x[:2]]).astype(jnp.float32), embedding)
    value, gradient = function(padded, np.concatenate([LABELS, LABELS[:2]]), np.arange(N + 2) < N)
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    for got, expected in zip(gradient, of_whole, strict=True):
        np.testing.assert_allclose(got[:N], expected, rtol=1e-4, atol=1e-6)
        assert not np.any(got[N:])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_draw_the_samples_of_one(name):
    rng = np.random.default_rng(0)
    embedding = Embedding(*(jnp.asarray(rng.normal(size=(16, k)), jnp.float32) for k in (D, K)))
    labels, weights = jnp.asarray(np.arange(16) % 3), jnp.asarray(rng.uniform(0.5, 2, 16), jnp.float32)
    one = jax.jit(jax.value_and_grad(lambda e: loss_of(name, e, jax.random.key(0), labels, weights=weights)))
    expected, expected_gradient = one(embedding)
    local = jax.value_and_grad(
        lambda e, labels, weights: loss_of(name, e, jax.random.key(0), labels, axis_name="data", weights=weights)
    )
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shard = partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=(P(), P("data")), check_vma=False)
    value, gradient = jax.jit(shard(local))(embedding, labels, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    # Each of the eight devices differentiates its copy of the loss, and a row's gradients are summed where it is.
    gradient = jax.tree.map(lambda x: x / 8, gradient)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), gradient, expected_gradient)


@pytest.mark.parametrize("name", ["mc_info_nce", "hedged_instance"])
def test_samples_of_a_gallery_are_its_own(name):
    """An image of the gallery is another one than the query at its place, so the gallery's order changes nothing."""
    embedding = Embedding(jnp.eye(4, 6), jnp.ones((4, 6)))
    keys = jax.random.split(jax.random.key(3), 400)

    def values(order, **options):
        others = jax.tree.map(lambda x: x[order], embedding)
        pairs = losses.pairs_from_labels(jnp.arange(4), jnp.asarray(order))
        call = lambda key: losses.LOSSES[name].function(embedding, pairs, key, references=others, **options)
        return np.asarray(jax.jit(jax.vmap(call))(keys))

    here, there = values(np.arange(4)), values(np.array([1, 2, 3, 0]))
    error = np.hypot(here.std(), there.std()) / 20
    assert abs(here.mean() - there.mean()) < 4 * error
    # Where the gallery is the batch itself, an image is at distance 0 from itself in every sample.
    same = values(np.arange(4), anchors_first=True)
    assert abs(same.mean() - here.mean()) > 20 * error


def test_errors():
    with pytest.raises(ValueError, match="samples must be at least 1"):
        losses.mc_info_nce(batch(), losses.pairs_from_labels(LABELS), jax.random.key(0), samples=0)
    with pytest.raises(ValueError, match="same shape"):
        jax.eval_shape(lambda: losses.mc_info_nce(batch(), losses.pairs_from_labels(LABELS[:3]), jax.random.key(0)))
