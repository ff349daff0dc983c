"""The introspective similarity metric against its closed forms and at its edges."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from idml_jax import ism
from idml_jax.ism import Embedding

VARIANTS = [True, False]
TAU = 5.0


def embeddings(n, d=16, k=6, seed=0, dtype=np.float32, scale=1.0):
    rng = np.random.default_rng(seed)
    semantic = rng.normal(size=(n, d))
    semantic /= np.linalg.norm(semantic, axis=1, keepdims=True)
    uncertainty = rng.normal(size=(n, k))
    return Embedding(jnp.asarray(semantic * scale, dtype), jnp.asarray(uncertainty, dtype))


def naive_distance(a, b, tau, relative):
    """The formula pair by pair in float64, as a plain reference."""
    out = np.zeros((len(a.semantic), len(b.semantic)))
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            alpha = np.linalg.norm(np.float64(a.semantic[i]) - np.float64(b.semantic[j]))
            ub = 0 if b.uncertainty is None else np.float64(b.uncertainty[j])
            beta = np.linalg.norm(np.float64(a.uncertainty[i]) + ub)
            if alpha > 0:
                out[i, j] = alpha * np.exp(-(beta / alpha if relative else beta) / tau)
    return out


class FormulaTest(chex.TestCase):
    @chex.all_variants
    @parameterized.product(relative=VARIANTS, certain=[False, True])
    def test_distance_is_the_formula(self, relative, certain):
        a, b = embeddings(5, seed=1), embeddings(7, seed=2)
        if certain:
            b = b._replace(uncertainty=None)

        def function(a, b):
            return ism.introspective_distance(a, b, temperature=TAU, relative=relative)

        # pmap maps over a leading axis, so every variant gets one.
        mapped = self.variant(lambda a, b: function(jax.tree.map(lambda x: x[0], a), jax.tree.map(lambda x: x[0], b)))
        lead = lambda tree: jax.tree.map(lambda x: x[None], tree)
        got = mapped(lead(a), lead(b))
        chex.assert_shape(got, (5, 7))
        chex.assert_trees_all_close(got, naive_distance(a, b, TAU, relative).astype(np.float32), rtol=2e-5, atol=2e-6)

    @chex.all_variants
    @parameterized.product(relative=VARIANTS)
    def test_similarity_weakens_the_discrepancy(self, relative):
        a, b = embeddings(5, seed=1), embeddings(7, seed=2)

        def function(a, b):
            a, b = (jax.tree.map(lambda x: x[0], t) for t in (a, b))
            return ism.introspective_similarity(a, b, temperature=2.0, relative=relative)

        got = self.variant(function)(*(jax.tree.map(lambda x: x[None], t) for t in (a, b)))
        c = np.float64(a.semantic) @ np.float64(b.semantic).T
        alpha = np.sqrt(2 - 2 * c)
        beta = np.linalg.norm(np.float64(a.uncertainty)[:, None] + np.float64(b.uncertainty)[None], axis=-1)
        expected = 1 - (1 - c) * np.exp(-(beta / alpha if relative else beta) / 2.0)
        chex.assert_trees_all_close(got, expected.astype(np.float32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("relative", VARIANTS)
def test_no_uncertainty_is_the_plain_metric_in_value_and_gradient(relative):
    a, b = embeddings(6, seed=3), embeddings(4, seed=4)
    for uncertainty in (jnp.zeros_like(a.uncertainty), None):
        for b_uncertainty in (jnp.zeros_like(b.uncertainty), None):
            weights = jnp.asarray(np.random.default_rng(5).normal(size=(6, 4)), jnp.float32)

            def value(s, f, u=uncertainty, v=b_uncertainty, weights=weights):
                return jnp.sum(weights * f(Embedding(s, u), Embedding(b.semantic, v)))

            for introspective, plain in (
                (ism.introspective_distance, lambda x, y: ism.semantic_distance(x.semantic, y.semantic)),
                (ism.introspective_similarity, lambda x, y: ism.cosine_similarity(x.semantic, y.semantic)),
            ):
                f = lambda x, y, g=introspective: g(x, y, relative=relative)
                chex.assert_trees_all_equal(
                    f(Embedding(a.semantic, uncertainty), Embedding(b.semantic, b_uncertainty)),
                    plain(a, b),
                )
                chex.assert_trees_all_close(
                    jax.grad(value)(a.semantic, f), jax.grad(value)(a.semantic, plain), rtol=1e-5, atol=1e-6
                )


@pytest.mark.parametrize("relative", VARIANTS)
def test_gradient_factor_is_the_derivative_and_falls_with_uncertainty(relative):
    # One pair on a line: alpha = x, beta = |u|.
    def distance(x, u):
        a, b = Embedding(x[None, None], u[None, None]), Embedding(jnp.zeros((1, 1)), jnp.zeros((1, 1)))
        return ism.introspective_distance(a, b, temperature=TAU, relative=relative)[0, 0]

    last = 1.1
    for beta in (0.0, 0.3, 1.0, 4.0, 20.0):
        x = jnp.float32(0.8)
        derivative = jax.grad(distance)(x, jnp.float32(beta))
        factor = ism.gradient_factor(x, jnp.float32(beta), temperature=TAU, relative=relative)
        q = (beta / 0.8 if relative else beta) / TAU
        closed = (1 + q) * np.exp(-q) if relative else np.exp(-q)
        np.testing.assert_allclose(derivative, factor, rtol=1e-5)
        np.testing.assert_allclose(factor, closed, rtol=1e-5)
        assert 0 < float(factor) <= 1 and float(factor) < last
        last = float(factor)


def test_gradient_factor_at_distance_zero():
    zero = jnp.zeros(())
    assert float(ism.gradient_factor(zero, zero)) == 1.0
    assert float(ism.gradient_factor(zero, jnp.ones(()))) == 0.0
    assert float(ism.gradient_factor(zero, jnp.ones(()), relative=False)) == pytest.approx(np.exp(-1 / TAU))


@pytest.mark.parametrize("relative", VARIANTS)
def test_bounds_symmetry_and_identity(relative):
    a = embeddings(20, seed=6)
    d = ism.introspective_distance(a, temperature=TAU, relative=relative)
    alpha = ism.semantic_distance(a.semantic)
    assert bool(jnp.all(d <= alpha)) and bool(jnp.all(d >= 0))
    chex.assert_trees_all_close(d, d.T, rtol=1e-6)
    chex.assert_trees_all_equal(jnp.diag(d), jnp.zeros(20))
    s = ism.introspective_similarity(a, temperature=TAU, relative=relative)
    assert bool(jnp.all(s >= ism.cosine_similarity(a.semantic))) and bool(jnp.all(s <= 1.0 + 1e-6))
    # More uncertainty, less discrepancy.
    more = ism.introspective_distance(a._replace(uncertainty=2 * a.uncertainty), temperature=TAU, relative=relative)
    off = ~np.eye(20, dtype=bool)
    assert bool(jnp.all((more < d)[off]))


def test_pair_uncertainty_adds_vectors_before_the_norm():
    u = jnp.asarray([[3.0, 4.0], [-3.0, -4.0], [0.0, 0.0]])
    chex.assert_trees_all_close(
        ism.pair_uncertainty(u, u), jnp.asarray([[10.0, 0.0, 5.0], [0.0, 10.0, 5.0], [5.0, 5.0, 0.0]]), atol=1e-6
    )
    chex.assert_trees_all_close(ism.pair_uncertainty(u, None), jnp.asarray([[5.0], [5.0], [0.0]]))


def test_certain_references_equal_zero_uncertainty():
    a, p = embeddings(5, seed=1), embeddings(3, seed=2)
    zero = p._replace(uncertainty=jnp.zeros_like(p.uncertainty))
    certain = p._replace(uncertainty=None)
    for f in (ism.introspective_distance, ism.introspective_similarity):
        chex.assert_trees_all_close(f(a, certain), f(a, zero), rtol=1e-6)
        # And the certain side may be the first.
        chex.assert_trees_all_close(f(certain, a), f(a, certain).T, rtol=1e-6)


def test_uncertainty_and_temperature_receive_a_gradient():
    a, p = embeddings(5, seed=1), embeddings(3, seed=2)._replace(uncertainty=None)
    for relative in VARIANTS:
        for f in (ism.introspective_distance, ism.introspective_similarity):
            du, dt = jax.grad(
                lambda u, t, f=f, r=relative: jnp.sum(f(Embedding(a.semantic, u), p, temperature=t, relative=r)), (0, 1)
            )(a.uncertainty, jnp.float32(TAU))
            assert float(jnp.min(jnp.linalg.norm(du, axis=1))) > 1e-3
            assert abs(float(dt)) > 1e-3


@pytest.mark.parametrize("relative", VARIANTS)
@pytest.mark.parametrize("function", [ism.introspective_distance, ism.introspective_similarity])
def test_gradients_against_finite_differences_in_float64(function, relative):
    with jax.enable_x64(True):
        rng = np.random.default_rng(7)
        s, u, weights = rng.normal(size=(4, 5)), rng.normal(size=(4, 3)), rng.normal(size=(4, 4))
        # A row against itself is an edge where the distance is not differentiable.
        weights[np.diag_indices(4)] = 0

        def value(s, u, t):
            e = Embedding(jnp.asarray(s), jnp.asarray(u))
            return jnp.sum(weights * function(e, temperature=t, relative=relative))

        grads = jax.grad(value, (0, 1, 2))(jnp.asarray(s), jnp.asarray(u), jnp.asarray(TAU))
        assert grads[0].dtype == jnp.float64
        step = 1e-6
        for which, array in ((0, s), (1, u)):
            for index in np.ndindex(array.shape):
                moved = [s.copy(), u.copy()]
                moved[which][index] += step
                up = float(value(*moved, TAU))
                moved[which][index] -= 2 * step
                down = float(value(*moved, TAU))
                np.testing.assert_allclose(float(grads[which][index]), (up - down) / (2 * step), rtol=1e-5, atol=1e-7)
        up, down = float(value(s, u, TAU + step)), float(value(s, u, TAU - step))
        np.testing.assert_allclose(float(grads[2]), (up - down) / (2 * step), rtol=1e-5, atol=1e-8)


def edge_cases():
    a = embeddings(6, seed=8)
    yield "duplicates", a._replace(semantic=a.semantic.at[1].set(a.semantic[0]))
    yield "whole duplicates", jax.tree.map(lambda x: x.at[1].set(x[0]), a)
    yield "zero semantic", a._replace(semantic=a.semantic.at[2].set(0.0))
    yield "zero uncertainty", a._replace(uncertainty=a.uncertainty.at[2].set(0.0))
    yield "all zero", jax.tree.map(jnp.zeros_like, a)
    yield "opposite uncertainties", a._replace(uncertainty=a.uncertainty.at[1].set(-a.uncertainty[0]))
    for scale in (1e30, 1e18, 1e-18, 1e-30):
        yield f"semantic times {scale}", a._replace(semantic=a.semantic * scale)
        yield f"uncertainty times {scale}", a._replace(uncertainty=a.uncertainty * scale)
        yield f"both times {scale}", jax.tree.map(lambda x, s=scale: x * s, a)
    yield "nearly equal", a._replace(semantic=a.semantic.at[1].set(a.semantic[0] * (1 + 1e-7)))
    yield "one row", jax.tree.map(lambda x: x[:1], a)


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def everything(case, proxies):
    """One number that depends on every function; compiled once for all cases of a type."""
    total = jnp.zeros(())
    for relative in VARIANTS:
        for b in (None, Embedding(proxies, None)):
            d = ism.introspective_distance(case, b, relative=relative)
            s = ism.introspective_similarity(case, b, relative=relative)
            # Scaled back, so that summing huge but finite distances does not overflow.
            total += jnp.sum(d / jnp.maximum(jax.lax.stop_gradient(jnp.max(d)), 1.0)) + jnp.sum(s)
    return total + jnp.sum(ism.released_similarity(case, proxies))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name,case", list(edge_cases()), ids=[n for n, _ in edge_cases()])
def test_finite_values_and_gradients_at_the_edges(name, case, dtype):
    case = jax.tree.map(lambda x: x.astype(dtype), case)
    proxies = jnp.concatenate([case.semantic[:1].astype(jnp.float32), jnp.ones((2, case.semantic.shape[1]))])

    value, grads = everything(case, proxies)
    assert np.isfinite(float(value)), name
    for leaf in jax.tree.leaves(grads):
        assert bool(jnp.all(jnp.isfinite(leaf.astype(jnp.float32)))), name


@pytest.mark.parametrize("seed", range(12))
def test_finite_gradients_of_rows_of_very_different_lengths(seed):
    rng = np.random.default_rng(seed)
    lengths = lambda rows: jnp.asarray(rng.choice([0.0, 1e-12, 1e-6, 1.0, 1e6, 1e12], (rows, 1)), jnp.float32)
    case = jax.tree.map(lambda x: x * lengths(len(x)), embeddings(6, seed=seed))
    proxies = jax.random.normal(jax.random.key(seed), (3, case.semantic.shape[1])) * lengths(3)
    value, grads = everything(case, proxies)
    assert np.isfinite(float(value))
    chex.assert_tree_all_finite(grads)


def test_low_precision_inputs_are_promoted():
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), embeddings(6, seed=9))
    high = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    for f in (ism.introspective_distance, ism.introspective_similarity):
        assert f(low).dtype == jnp.float32
        chex.assert_trees_all_equal(f(low), f(high))


def test_released_variant_is_its_formula_and_leaves_uncertainty_without_gradient():
    a = embeddings(5, seed=10)
    proxies = jnp.asarray(np.random.default_rng(11).normal(size=(3, 16)), jnp.float32)
    got = ism.released_similarity(a, proxies)
    p = np.float64(proxies)
    c = np.float64(a.semantic) @ (p / np.linalg.norm(p, axis=1, keepdims=True)).T
    square = ((np.float64(a.semantic)[:, None] - p[None]) ** 2).sum(-1)
    np.testing.assert_allclose(got, 1 - (1 - c) * np.exp(-(1 + 4) / (5 * square)), rtol=1e-5, atol=1e-6)

    size = lambda g: float(jnp.max(jnp.abs(g)))
    released = jax.grad(lambda u: jnp.sum(ism.released_similarity(Embedding(a.semantic, u), proxies)))(a.uncertainty)
    ours = jax.grad(lambda u: jnp.sum(ism.introspective_similarity(Embedding(a.semantic, u), Embedding(proxies))))(
        a.uncertainty
    )
    assert size(released) < 1e-6 < 1e-2 < size(ours)


def test_l2_normalize():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0], [3e25, 4e25]])
    chex.assert_trees_all_close(ism.l2_normalize(x), jnp.asarray([[0.6, 0.8], [0.0, 0.0], [0.6, 0.8]]), atol=1e-6)
    chex.assert_tree_all_finite(jax.grad(lambda x: jnp.sum(ism.l2_normalize(x) ** 3))(x))


def test_wrong_shapes_are_refused():
    a = embeddings(4)
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        ism.semantic_distance(a.semantic, a.semantic[:, :3])
    with pytest.raises(ValueError, match=r"\[n, d\]"):
        ism.pair_uncertainty(a.uncertainty[0], None)
    with pytest.raises(ValueError, match="needs embeddings with an uncertainty"):
        ism.released_similarity(Embedding(a.semantic), a.semantic)


def test_nan_is_passed_on():
    """A loss of a broken network must be NaN, so that the run stops."""
    for field in ("semantic", "uncertainty"):
        a = embeddings(4)
        a = a._replace(**{field: getattr(a, field).at[1, 0].set(jnp.nan)})
        for relative in VARIANTS:
            for f in (ism.introspective_distance, ism.introspective_similarity):
                bad = np.isnan(f(a, relative=relative))
                assert bad[1, 2:].all() and not bad[2:, 2:].any()
                assert np.isnan(f(a, Embedding(a.semantic[2:]), relative=relative))[1].all()


class TestMetric:
    a, b = embeddings(5, seed=12), embeddings(4, seed=13)

    @pytest.mark.parametrize("form", ["relative", "absolute"])
    def test_it_is_the_functions_of_the_module(self, form):
        metric, settings = ism.Metric(form, 2.0), {"temperature": 2.0, "relative": form == "relative"}
        for b in (None, self.b, Embedding(self.b.semantic)):
            chex.assert_trees_all_equal(metric(self.a, b), ism.introspective_distance(self.a, b, **settings))
            chex.assert_trees_all_equal(metric.distance(self.a, b), metric(self.a, b))
            expected = ism.introspective_similarity(self.a, b, **settings)
            chex.assert_trees_all_equal(metric.similarity(self.a, b), expected)
        alpha = ism.semantic_distance(self.a.semantic, self.b.semantic)
        beta = ism.pair_uncertainty(self.a.uncertainty, self.b.uncertainty)
        np.testing.assert_allclose(alpha * metric.weakening(alpha, beta), metric(self.a, self.b), rtol=1e-6)

    def test_plain_ignores_the_uncertainty(self):
        metric = ism.Metric("plain")
        assert not metric.introspective and ism.Metric().introspective
        chex.assert_trees_all_equal(metric(self.a, self.b), ism.semantic_distance(self.a.semantic, self.b.semantic))
        chex.assert_trees_all_equal(metric.similarity(self.a), ism.cosine_similarity(self.a.semantic))
        assert (metric.weakening(jnp.ones((2, 3)), jnp.ones((2, 1))) == 1).all()

    def test_released_is_a_similarity_to_raw_proxies_and_ranks_as_relative(self):
        metric, proxies = ism.Metric("released", 3.0), 2.0 * self.b.semantic
        got = metric.similarity(self.a, Embedding(proxies))
        chex.assert_trees_all_equal(got, ism.released_similarity(self.a, proxies))
        assert metric.raw_proxies and metric.for_ranking() == ism.Metric("relative", 3.0)
        alone = lambda: metric.similarity(self.a)
        for call in (alone, lambda: metric(self.a, self.b), lambda: metric.weakening(jnp.ones(2), jnp.ones(2))):
            with pytest.raises(ValueError, match="raw proxies alone"):
                call()

    def test_equal_metrics_share_one_program_and_a_traced_temperature_is_taken(self):
        assert ism.Metric("absolute", 2) == ism.Metric("absolute", 2.0)
        assert hash(ism.Metric("absolute", 2)) == hash(ism.Metric("absolute", 2.0))
        compiled = jax.jit(lambda a, metric: metric(a), static_argnums=1)
        for _ in range(2):
            compiled(self.a, ism.Metric("absolute", 2.0))
        assert compiled._cache_size() == 1
        slope = jax.grad(lambda t: jnp.sum(ism.Metric("relative", t)(self.a)))(2.0)
        assert slope > 0

    @pytest.mark.parametrize("bad", [0, 0.0, -1.0, float("nan"), float("inf"), "5", None, "warm", True, (5.0, -5.0)])
    def test_bad_temperatures_are_refused(self, bad):
        with pytest.raises(ValueError, match="temperature is .*; it must be a finite number above 0"):
            ism.Metric("relative", bad)

    @pytest.mark.parametrize("bad", ["squared", "", None, ["relative"]])
    def test_unknown_forms_are_refused(self, bad):
        with pytest.raises(ValueError, match="form is .*; known: relative, absolute, released, plain"):
            ism.Metric(bad)

    def test_files_remember_it(self):
        for metric in (ism.Metric(), ism.Metric("absolute", 2.0), ism.Metric("plain")):
            assert ism.Metric.from_about({"step": 3, **metric.about()}) == metric
        assert ism.Metric.from_about({}) == ism.Metric()
        assert ism.Metric.from_about({"temperature": 3.0, "relative": False}) == ism.Metric("absolute", 3.0)
        with pytest.raises(ValueError, match="known: relative"):
            ism.Metric.from_about({"form": "cubic"})
