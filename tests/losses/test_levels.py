"""Several proxies of a class, hierarchies of classes, and the angle of ArcFace."""

import jax
import jax.numpy as jnp
import naive_losses as naive
import numpy as np
import pytest

from idml_jax import losses


@pytest.mark.parametrize("name", ["subcenter_arcface", "soft_triple"])
def test_several_proxies_of_a_class_are_one_class(name):
    rng = np.random.default_rng(0)
    labels, columns = rng.integers(0, 4, 6), np.repeat(np.arange(4), 3)
    matrix = rng.uniform(-0.9, 0.9, (6, 12))
    matrix[0, 1] = matrix[0, 0]
    # The last class is padding, and of the first one proxy is left out.
    real = (columns < 3) & (np.arange(12) != 2)
    pairs = losses.pairs_from_labels(labels, columns, reference_mask=real)
    arguments = matrix, np.asarray(pairs.positive), np.asarray(pairs.negative), np.ones(6)
    loss = losses.LOSSES[name].function
    with jax.enable_x64(True):
        value, gradient = jax.jit(jax.value_and_grad(lambda x: loss(x, pairs, centres=3)))(matrix)
    np.testing.assert_allclose(value, getattr(naive, name)(*arguments, centres=3), rtol=1e-12)
    assert np.any(gradient) and not np.any(np.asarray(gradient)[:, ~real])
    with pytest.raises(ValueError, match="12 columns are not 5 proxies"):
        loss(matrix, pairs, centres=5)


def test_arcface_falls_with_the_similarity_and_has_a_finite_gradient():
    """The logit of the own class rises with its similarity everywhere, also beyond an angle of pi - m."""
    pairs = losses.Pairs(jnp.array([[True, False]]), jnp.array([[False, True]]))
    similarity = jnp.concatenate([jnp.linspace(-1.0, 1.0, 201), jnp.array([-1 - 1e-6, 1 + 1e-6])])
    loss = lambda s: losses.arcface(jnp.stack([s, 0.0 * s])[None, :], pairs, scale=4.0)
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(loss)))(similarity)
    assert (np.diff(values[:201]) < 0).all()
    assert np.isfinite(slopes).all() and (np.asarray(slopes) < 0).all()


def test_ranks_need_no_cube():
    """The compiled program of the losses on ranks holds some matrices, not one for each column."""
    n = 128
    same = jnp.arange(n)[:, None] // 4 == jnp.arange(n)[None, :] // 4
    for name in ("smooth_ap", "recall_at_k"):
        loss = lambda s, name=name: losses.LOSSES[name].function(s, losses.pairs_from_relation(same))
        program = jax.jit(jax.value_and_grad(loss)).lower(jnp.zeros((n, n))).compile()
        assert program.memory_analysis().temp_size_in_bytes < 16 * 4 * n * n


def test_levels_are_summed():
    rng = np.random.default_rng(0)
    labels = np.stack([rng.integers(0, 2, 6), rng.integers(0, 2, 6)], axis=1)
    similarity = jnp.asarray(rng.uniform(-1, 1, (6, 6)), jnp.float32)
    coarse, fine = losses.pairs_from_levels(labels)
    whole = labels[:, 0] * 2 + labels[:, 1]  # the fine labels repeat under both parents
    for got, expected in ((coarse, labels[:, 0]), (fine, whole)):
        for one, other in zip(got, losses.pairs_from_labels(expected), strict=True):
            np.testing.assert_array_equal(one, other)
    value = losses.over_levels(losses.sup_con, similarity, (coarse, fine), (0.3, 0.7), temperature=0.5)
    parts = [losses.sup_con(similarity, pairs, temperature=0.5) for pairs in (coarse, fine)]
    np.testing.assert_allclose(value, 0.3 * parts[0] + 0.7 * parts[1], rtol=1e-6)
    gallery = losses.pairs_from_levels(labels[:2], labels, reference_mask=np.arange(6) < 5)
    assert gallery[1].positive.shape == (2, 6) and not np.any(gallery[0].negative[:, 5])
    with pytest.raises(ValueError, match="2 levels need as many weights"):
        losses.over_levels(losses.sup_con, similarity, (coarse, fine), (1.0,))
    with pytest.raises(ValueError, match=r"shape \[n, levels\]"):
        losses.pairs_from_levels(labels[:, 0])
