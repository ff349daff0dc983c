"""Settings that keep u alive: values, who teaches u, and that the plain case stays plain."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs_made import small_config

from idml_jax import ism, losses
from idml_jax.errors import UserError
from idml_jax.ism import Embedding, Metric
from idml_jax.losses import auxiliary
from idml_jax.models.heads import Heads
from idml_jax.training.config_checks import validate
from idml_jax.training.tasks.matrices import Compared, log_term, matrix_of
from idml_jax.training.tasks.objective import Objective

LABELS = jnp.repeat(jnp.arange(3), 3)


def embedding(scale=0.3):
    keys = jax.random.split(jax.random.key(3))
    semantic = ism.l2_normalize(jax.random.normal(keys[0], (9, 8)))
    return Embedding(semantic, scale * jax.random.normal(keys[1], (9, 4)))


def objective(loss="multi_similarity", **changes):
    return Objective(loss, (), Metric(), num_classes=3, dim=8, uncertainty_dim=4, **changes)


@pytest.mark.parametrize("reads", ["similarity", pytest.param("distance", marks=pytest.mark.slow)])
def test_stopped_negatives_have_the_same_values_and_do_not_teach_u(reads):
    images, pairs = embedding(), losses.pairs_from_labels(LABELS)

    @jax.jit
    def both(images, where):
        def sums(images, negatives):
            return jnp.sum(jnp.where(where, matrix_of(Metric(), reads, Compared(images, None, pairs), negatives), 0.0))

        return [jax.value_and_grad(sums)(images, how) for how in ("learn", "stop")]

    for where in pairs:
        learned, stopped = both(images, where)
        np.testing.assert_allclose(stopped[0], learned[0], rtol=1e-6)
        np.testing.assert_allclose(stopped[1].semantic, learned[1].semantic, rtol=1e-5, atol=1e-6)
        expected = np.asarray(learned[1].uncertainty) if where is pairs.positive else np.zeros((9, 4))
        np.testing.assert_allclose(stopped[1].uncertainty, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["relative", pytest.param("absolute", marks=pytest.mark.slow)])
def test_the_log_term_is_the_mean_over_positive_pairs_and_pulls_u_down(form):
    images, pairs, metric = embedding(), losses.pairs_from_labels(LABELS), Metric(form, 2.0)
    s, u = np.asarray(images.semantic, np.float64), np.asarray(images.uncertainty, np.float64)
    costs = []
    for i, j in np.argwhere(np.asarray(pairs.positive)):
        beta, alpha = np.linalg.norm(u[i] + u[j]), np.linalg.norm(s[i] - s[j])
        costs.append(beta / (alpha if form == "relative" else 1.0) / 2.0)
    term = jax.jit(jax.value_and_grad(lambda images: log_term(metric, Compared(images, None, pairs))))
    value, slope = term(images)
    np.testing.assert_allclose(value, np.mean(costs), rtol=1e-5)
    assert np.abs(slope.semantic).max() == 0 and np.sum(np.asarray(slope.uncertainty) * u) > 0
    assert term(embedding(0.0))[0] == 0 == log_term(metric, Compared(Embedding(images.semantic), None, pairs))


@pytest.mark.parametrize("loss", ["proxy_anchor", pytest.param("multi_similarity", marks=pytest.mark.slow)])
def test_the_objective_adds_the_remedies_and_stays_plain_without_an_uncertainty(loss):
    images, without = embedding(), objective(loss)
    params = without.init(jax.random.key(0))
    remedied = objective(loss, negatives="stop", attenuation=0.5)
    by_confusion = objective(loss, prior=0.5, prior_by="confusion")
    plain = dataclasses.replace(without, metric=Metric("plain"))
    certain, pairs = embedding(0.0), losses.pairs_from_labels(LABELS)
    if loss == "proxy_anchor":
        found = Compared(images, Embedding(params["proxies"]), losses.pairs_from_labels(LABELS, jnp.arange(3)))
    else:
        found = Compared(images, None, pairs)

    @jax.jit
    def values(images, certain):
        usual = without(params, images, LABELS)
        added = 0.5 * log_term(Metric(), found._replace(references=_unit(found.references)))
        prior = 0.5 * auxiliary.length_prior(images.uncertainty, without.confusion(params, images, LABELS))
        return {
            "attenuation": (remedied(params, images, LABELS), usual + added),
            "prior": (by_confusion(params, images, LABELS), usual + prior),
            "plain": (remedied(params, certain, LABELS), plain(params, certain, LABELS)),
        }

    for got, expected in values(images, certain).values():
        np.testing.assert_allclose(got, expected, rtol=1e-5)


def _unit(references):
    return None if references is None else Embedding(ism.l2_normalize(references.semantic))


def test_the_prior_by_confusion_aims_at_lengths_in_the_order_of_the_confusion():
    confusions = jnp.array([-0.2, 0.1, jnp.nan, 0.4])
    known = np.array([-0.2, 0.1, 0.4])
    aims = 2.0 ** ((known - known.mean()) / known.std())
    u = np.array([[aims[0], 0.0], [0.0, aims[1]], [1.0, 0.0], [0.0, aims[2]]], np.float32)
    prior = jax.jit(jax.value_and_grad(auxiliary.length_prior))
    value, slope = prior(u, confusions)
    assert value < 1e-10 and np.abs(slope).max() < 1e-5
    value, slope = prior(0.5 * u, confusions)
    np.testing.assert_allclose(value, np.log(2.0) ** 2, rtol=1e-5)
    assert (np.sum(np.asarray(slope) * u, axis=1) < 0).all()
    np.testing.assert_allclose(prior(u, jnp.zeros(4))[0], auxiliary.length_prior(u), rtol=1e-6)


def test_an_image_that_is_left_out_has_no_part_in_the_means():
    images, mask = embedding(), jnp.arange(9) < 7
    far = images._replace(uncertainty=images.uncertainty.at[7:].mul(1e6))
    params, with_prior, plain = {}, objective("sup_con", prior=1.0), objective("sup_con")
    value = jax.jit(lambda rule_of, e: rule_of(params, e, LABELS, mask=mask), static_argnums=0)
    adds = [value(with_prior, e) - value(plain, e) for e in (images, far)]
    np.testing.assert_allclose(adds[1], adds[0], rtol=1e-5)
    np.testing.assert_allclose(adds[0], auxiliary.length_prior(images.uncertainty[:7]), rtol=1e-4)
    assert auxiliary.mean_of(jnp.arange(4.0), jnp.zeros(4, bool)) == 0
    assert auxiliary.mean_of(jnp.arange(4.0), None) == 1.5


def test_a_scalar_head_has_one_direction_and_a_positive_length():
    heads = Heads(8, 4, "scalar", uncertainty_hidden=8)
    features = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    out, params = jax.jit(heads.init_with_output)(jax.random.key(1), features)
    u = np.asarray(out["uncertainty"])
    assert u.shape == (5, 4) and (u > 0).all() and np.ptp(u, axis=1).max() == 0
    lengths = np.linalg.norm(u, axis=1)
    np.testing.assert_allclose(ism.pair_uncertainty(u, u), lengths[:, None] + lengths[None, :], rtol=1e-5)
    assert params["params"]["uncertainty_length"]["kernel"].shape == (8, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ism.prior_by": "confusion"}, "prior_by = 'confusion' needs config.ism.prior above 0"),
        ({"ism.prior_by": "loss"}, "prior_by = 'loss'; known: constant, confusion"),
        ({"ism.negatives": "stop", "ism.enabled": False}, "negatives = 'stop' needs .*config.ism.enabled"),
        ({"ism.attenuation": 0.1, "ism.variant": "released"}, "released' does not teach u"),
        ({"ism.attenuation": 0.1, "loss.name": "mc_info_nce"}, "mc_info_nce does not read the metric"),
        ({"prism.share": 1.0}, "prism.share = 1.0 must be a share"),
        ({"prism.window": 5}, "prism.window = 5 needs config.prism.share above 0"),
        (
            {"prism.share": 0.2, "epochs": 2, "prism.warmup_epochs": 2},
            "prism.warmup_epochs = 2 keeps all images in all of the 2 epochs",
        ),
        ({"prism.share": 0.01}, "prism.share = 0.01 of config.batch_size = 32 is less than one image"),
        ({"memory.warmup_epochs": 3}, "memory.warmup_epochs = 3 needs config.memory.size above 0"),
        (
            {"loss.name": "contrastive", "memory.size": 64, "epochs": 2, "memory.warmup_epochs": 2},
            "memory.warmup_epochs = 2: the memory is not used in any of the 2 epochs",
        ),
        ({"prism.share": 0.2, "prism.features": 8}, r"prism.features = 8 must be at least config.batch_size \(32\)"),
    ],
)
def test_settings_that_cannot_work(image_folder, changes, message):
    with pytest.raises(UserError, match=message):
        validate(small_config(image_folder, **changes))


@pytest.mark.parametrize("loss", ["proxy_anchor", "contrastive"])
def test_an_image_that_is_left_out_teaches_no_u_by_its_label(loss):
    """PRISM leaves out an image whose label is probably wrong, so the confusion does not read that label either."""
    images, criterion = embedding(), objective(loss, prior=0.5, prior_by="confusion")
    params = criterion.init(jax.random.key(0))
    mask, other = jnp.arange(len(LABELS)) != 1, LABELS.at[1].set((LABELS[1] + 1) % 3)

    @jax.jit
    def found(labels):
        value = jax.value_and_grad(lambda images: criterion(params, images, labels, mask=mask))
        return criterion.confusion(params, images, labels, mask), value(images)

    (confusions, one), (_, two) = found(LABELS), found(other)
    assert jnp.isnan(confusions[1]) and jnp.isfinite(confusions).sum() >= 2
    chex.assert_trees_all_equal(one, two)
