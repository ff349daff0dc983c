"""Compares the introspective softmax, its head, soft labels, Mixup and CutMix with their formulas."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idml_jax import mixing
from idml_jax.losses import softmax as classifier
from idml_jax.models import create_classifier, create_model


def reference(x, u, weights, bias, tau):
    """The formula class by class in float64."""
    x, u, weights, bias = (np.asarray(a, np.float64) for a in (x, u, weights, bias))
    plain, weakened = np.empty((2, len(x), len(weights)))
    for i in range(len(x)):
        for k in range(len(weights)):
            plain[i, k] = weights[k] @ x[i] + bias[k]
            doubt = np.sum(u[i] ** 2) / (tau * np.sum((x[i] - weights[k]) ** 2))
            weakened[i, k] = 1 - (1 - plain[i, k]) * np.exp(-doubt)
    return plain, weakened


def example(seed=0, n=5, f=6, k=4, classes=3):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return draw(n, f), np.maximum(draw(n, k), 0), draw(classes, f), draw(classes)


@pytest.mark.parametrize("tau", [0.7, 5.0])
def test_logits_match_the_formula(tau):
    x, u, weights, bias = example()
    plain, weakened = reference(x, u, weights, bias, tau)
    logits = jax.jit(classifier.introspective_logits, static_argnames="temperature")(x, u, weights, bias, tau)
    chex.assert_trees_all_close(logits, classifier.Logits(plain, weakened), rtol=2e-5, atol=2e-5)
    assert np.abs(weakened - plain).max() > 0.1


def test_a_certain_image_has_plain_logits_and_gradient():
    x, u, weights, _ = example()
    total = lambda kind, u: lambda x: jnp.sum(jnp.sin(getattr(classifier.introspective_logits(x, u, weights), kind)))
    none, zero = classifier.introspective_logits(x, None, weights), np.zeros_like(u)
    chex.assert_trees_all_equal(none.plain, none.weakened, classifier.introspective_logits(x, zero, weights).weakened)
    chex.assert_trees_all_close(jax.grad(total("weakened", zero))(x), jax.grad(total("plain", None))(x), rtol=1e-6)


def test_gradients_against_finite_differences_in_float64():
    arguments = [a.astype(np.float64) for a in example(seed=3)]
    mixture = np.random.default_rng(9).normal(size=(5, 3))
    total = lambda *a: np.sum(mixture * reference(*a, 5.0)[1])
    with jax.enable_x64(True):
        loss = lambda *a: jnp.sum(mixture * classifier.introspective_logits(*a).weakened)
        grads = jax.grad(loss, argnums=(0, 1, 2, 3))(*(jnp.asarray(a) for a in arguments))
    for which, grad in enumerate(grads):
        assert grad.dtype == jnp.float64
        for place in np.ndindex(arguments[which].shape):
            shifted = []
            for step in (1e-6, -1e-6):
                moved = [a.copy() for a in arguments]
                moved[which][place] += step
                shifted.append(total(*moved))
            if which != 1 or arguments[1][place]:
                np.testing.assert_allclose(grad[place], (shifted[0] - shifted[1]) / 2e-6, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_finite_on_a_prototype(dtype):
    @jax.jit
    @jax.value_and_grad
    def run(arguments):
        logits = classifier.introspective_logits(*arguments)
        return classifier.cross_entropy(logits.weakened, jnp.eye(2))

    # A prototype at 0, so that the offsets are not lost in rounding.
    weights = jnp.stack([jnp.zeros(4), jnp.ones(4)]).astype(dtype)
    for offset, doubt in itertools.product((0.0, 1e-30, 1e-20, 1e-10, 1e-4), (0.0, 1e-20, 1e-3, 1e4)):
        x, u = jnp.full((2, 4), offset, dtype), jnp.full((2, 3), doubt, dtype)
        chex.assert_tree_all_finite(run((x, u, weights)))
        if offset == 0:
            weakened = classifier.introspective_logits(x, u, weights).weakened
            # A length of 1e-20 has no square in float32, so it is certain.
            np.testing.assert_allclose(weakened[:, 0], 1.0 if doubt > 1e-10 else 0.0, atol=1e-6)


def test_a_broken_network_is_not_hidden():
    x, u, weights, bias = example()
    x[0, 0] = np.nan
    logits = classifier.introspective_logits(x, u, weights, bias)
    assert np.isnan(logits.weakened[0]).all() and np.isfinite(logits.weakened[1:]).all()


def test_shapes_that_do_not_fit_are_refused():
    x, u, weights, bias = example()
    for bad in ((x[:, :3], u, weights, bias), (x, u[:2], weights, bias), (x, u, weights, bias[:2])):
        with pytest.raises(ValueError, match="shape|fit"):
            classifier.introspective_logits(*bad)
    for temperature in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
            classifier.introspective_logits(x, u, weights, temperature=temperature)


@pytest.mark.parametrize("head", ["linear", "mlp", "none"])
def test_the_head_matches_the_formula_on_any_trunk(head):
    model = create_classifier(
        "resnet_tiny", num_classes=3, uncertainty_dim=8, uncertainty_head=head, uncertainty_hidden=5, temperature=2.0
    )
    images = jax.random.normal(jax.random.key(0), (4, 12, 12, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    heads = variables["params"]["heads"]
    chex.assert_shape(heads["classifier"]["kernel"], (16, 3))
    out = jax.device_get(jax.jit(model.apply)(variables, images))
    if head == "linear":
        u = np.maximum(out["features"] @ heads["uncertainty"]["kernel"] + heads["uncertainty"]["bias"][None], 0)
        np.testing.assert_allclose(out["uncertainty"], u, rtol=1e-4, atol=1e-6)
    logits = classifier.introspective_logits(
        out["features"],
        None if head == "none" else out["uncertainty"],
        heads["classifier"]["kernel"].T,
        heads["classifier"]["bias"],
        2.0,
    )
    chex.assert_trees_all_close((out["logits"], out["weakened"]), tuple(logits), rtol=1e-5, atol=1e-6)
    assert (out["uncertainty"] >= 0).all() and bool(out["uncertainty"].any()) == (head != "none")
    # What an embedding has too.
    np.testing.assert_allclose(np.linalg.norm(out["semantic"], axis=1), 1, rtol=1e-5)
    embedding = jax.eval_shape(create_model("resnet_tiny").init, jax.random.key(1), images)
    chex.assert_trees_all_equal_shapes(embedding["params"]["trunk"], variables["params"]["trunk"])


def test_soft_labels_and_their_cross_entropy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 3)).astype(np.float32)
    one, two, lam = np.array([0, 1, 2, 2]), np.array([1, 1, 0, 2]), np.array([1.0, 0.3, 0.6, 0.5], np.float32)
    targets = classifier.mixed_targets(one, two, lam, 3)
    negative = -np.log(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
    expected = np.mean([lam[i] * negative[i, one[i]] + (1 - lam[i]) * negative[i, two[i]] for i in range(4)])
    np.testing.assert_allclose(classifier.cross_entropy(logits, targets), expected, rtol=1e-5)
    smooth = classifier.mixed_targets(one, two, lam, 3, smoothing=0.3)
    np.testing.assert_allclose(smooth[0], [0.8, 0.1, 0.1], rtol=1e-5)
    np.testing.assert_allclose(smooth.sum(1), 1, rtol=1e-5)


SIZE = (7, 10)


def plans(method, count, n=8, **options):
    make = lambda key: mixing.plan(method, key, n, *SIZE, **options)
    return jax.jit(jax.vmap(make))(jax.random.split(jax.random.key(4), count))


@pytest.mark.parametrize("method", ["mixup", "cutmix"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_lam_is_exactly_the_share_of_the_first_picture(method, per_sample):
    """Ones mixed with zeros: what is left of the ones is lam, also where the box is clipped."""
    drawn = plans(method, 40, per_sample=per_sample)
    ones = jnp.ones((8, *SIZE, 3))
    mixed = jax.jit(jax.vmap(lambda p: mixing.mix(ones, 0 * ones, p.outside, p.box)))(drawn)
    np.testing.assert_allclose(mixed.mean(axis=(2, 3, 4)), drawn.lam, rtol=1e-5, atol=1e-6)
    assert (drawn.lam >= 0).all() and (drawn.lam <= 1).all()
    assert np.array_equal(np.sort(drawn.partner, axis=1), np.tile(np.arange(8), (40, 1)))
    spread = np.ptp(drawn.lam, axis=1)
    assert (spread > 0).mean() > 0.9 if per_sample else (spread == 0).all()
    assert len(np.unique(np.round(np.asarray(drawn.lam), 4))) > 15
    if method == "cutmix":
        assert set(np.unique(mixed)) == {0.0, 1.0}
        top, left, bottom, right = np.moveaxis(np.asarray(drawn.box), -1, 0)
        assert (top >= 0).all() and (top <= bottom).all() and (bottom <= SIZE[0]).all() and (right <= SIZE[1]).all()
        # Some boxes were clipped, and touch the border with the area of a cut one.
        assert ((top == 0) | (left == 0)).any() and (left > 0).any()


def test_cutmix_takes_the_partner_s_pixels_at_the_same_place():
    images = np.random.default_rng(0).normal(size=(8, *SIZE, 3)).astype(np.float32)
    plan = jax.tree.map(lambda a: np.asarray(a)[0], plans("cutmix", 40, per_sample=True))
    mixed = np.asarray(jax.jit(mixing.mix)(images, images[plan.partner], plan.outside, plan.box))
    for i, (top, left, bottom, right) in enumerate(plan.box):
        expected = images[i].copy()
        expected[top:bottom, left:right] = images[plan.partner[i], top:bottom, left:right]
        np.testing.assert_array_equal(mixed[i], expected)


def test_lam_is_of_the_beta_distribution():
    """Mean 1/2 and variance 1 / (8 alpha + 4); 4,000 draws."""
    for alpha in (1.0, 0.3):
        make = jax.jit(lambda key, alpha=alpha: mixing.plan_mixup(key, 4000, alpha=alpha, per_sample=True).lam)
        lam = make(jax.random.key(0))
        assert abs(lam.mean() - 0.5) < 0.03 and abs(lam.var() - 1 / (8 * alpha + 4)) < 0.01


def test_the_box_has_its_share_of_the_area_where_it_is_not_clipped():
    plan = mixing.plan_cutmix(jax.random.key(0), 2000, 100, 60, per_sample=True)
    top, left, bottom, right = np.asarray(plan.box).T
    free = (top > 0) & (left > 0) & (bottom < 100) & (right < 60) & (bottom > top)
    # Of the same shape as the image, up to the pixels that are lost in rounding.
    assert free.sum() > 300 and np.abs((bottom - top) / 100 - (right - left) / 60)[free].max() < 2 / 60
    # Were no box clipped, the mean share would be 1/2; of the free ones, the small, it is less.
    assert np.mean(1 - plan.lam) < 0.45 and np.mean(1 - plan.lam[free]) < np.mean(1 - plan.lam)


@pytest.mark.parametrize("method", ["mixup", "cutmix"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_the_rest_stays_as_it_is(method, per_sample, probability):
    drawn = plans(method, 300, probability=probability, per_sample=per_sample)
    always = plans(method, 300, per_sample=per_sample)
    untouched = np.asarray(drawn.lam) == 1
    expected = 1 - probability * (np.asarray(always.lam) < 1).mean()
    assert abs(untouched.mean() - expected) < (0.04 if per_sample else 0.08)
    if probability == 0:
        images = jax.random.normal(jax.random.key(0), (8, *SIZE, 3))
        plan = jax.tree.map(lambda a: a[0], drawn)
        np.testing.assert_array_equal(mixing.mix(images, images[plan.partner], plan.outside, plan.box), images)
