"""The settings of a loss: sums, weights, several proxies per class, a share of the classes, regularisers."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs_made import small_config
from test_runtime import batch as images
from test_runtime import fresh, objective, setup

from idml_jax import ism
from idml_jax.errors import UserError
from idml_jax.ism import Embedding
from idml_jax.losses import LOSSES
from idml_jax.runtime import sharding
from idml_jax.training.config_checks import validate
from idml_jax.training.semantic_init import proxy_rows
from idml_jax.training.tasks import TASKS, terms
from idml_jax.training.tasks.embedding_loss import embedding_loss
from idml_jax.training.tasks.terms import Term, advice, without_effect

LABELS = np.repeat(np.arange(4), 2).astype(np.int32)
MESH = sharding.data_mesh(jax.devices()[:1])


def batch(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return Embedding(ism.l2_normalize(jax.random.normal(keys[0], (8, 8))), jax.random.normal(keys[1], (8, 4)))


def values(rules, params, embedding, stores=None):
    """The losses of several objectives, compiled together."""
    key, stores = jax.random.key(5), stores or [()] * len(rules)
    every = lambda *given: [r(*given, LABELS, key=key, store=s) for r, s in zip(rules, stores, strict=True)]
    return jax.jit(every)(params, embedding)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_made_from_its_name(name):
    config = small_config("x", **{"loss.name": name})
    validate(config)
    rule = TASKS["retrieval"].criterion(config, 8, 3, MESH)
    assert hash(rule) == hash(TASKS["retrieval"].criterion(config, 8, 3, MESH))
    params = jax.eval_shape(rule.init, jax.random.key(0))
    assert ("proxies" in params) == (LOSSES[name].references == "proxies")
    # Settings that were read from a file have lists for tuples.
    config.loss.recall_at_k = {"ks": [1, 2], "temperature": 0.01, "rank_temperature": 1.0}
    hash(TASKS["retrieval"].criterion(config, 8, 3, MESH))


def test_losses_that_fail_with_the_introspective_metric_are_named_with_what_helps():
    told = lambda **fields: advice(small_config("x", **fields))
    assert told() == "" and told(**{"loss.name": "cosface+sup_con"}) == ""
    assert "under arcface" in told(**{"loss.name": "proxy_anchor+arcface"}) and "ism.prior=10" in told(
        **{"loss.name": "subcenter_arcface"}
    )
    assert told(**{"loss.name": "arcface", "ism.prior": 10.0}) == ""
    assert "triplet_semihard" in told(**{"loss.name": "triplet_hard", "ism.prior": 10.0})
    assert told(**{"loss.name": "triplet_hard", "ism.enabled": False}) == ""


def test_options_of_other_losses_are_named():
    config = small_config("x", **{"loss.name": "proxy_anchor+sup_con", "loss.proxy_anchor.margin": 0.2})
    config.loss.recall_at_k.ks = [1, 2, 4, 8, 16]  # the default, as read from a file
    assert without_effect(config) == []
    config.loss.arcface.margin, config.loss.recall_at_k.ks = 0.3, (1, 2)
    assert without_effect(config) == ["config.loss.arcface.margin = 0.3", "config.loss.recall_at_k.ks = (1, 2)"]
    config.task, config.mixup.alpha = "classification", 0.2
    found = without_effect(config)
    assert {"config.loss.proxy_anchor.margin = 0.2", "config.mixup.alpha = 0.2"} < set(found)
    assert "config.loss.name = 'proxy_anchor+sup_con'" in found


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"mixup.alpha": 0.2}, []),
        ({"mixup.alpha": 0.2, "mixup.enabled": False}, ["config.mixup.alpha = 0.2"]),
        ({"classification.mixing": "cutmix", "classification.alpha": -1.0},
         ["config.classification.alpha = -1.0", "config.classification.mixing = 'cutmix'"]),
        ({"ism.temperature": 2.0}, []),
        ({"ism.temperature": 2.0, "ism.variant": "released"}, ["config.ism.temperature = 2.0"]),
        ({"ism.temperature": 2.0, "ism.variant": "absolute", "loss.name": "elk"},
         ["config.ism.temperature = 2.0", "config.ism.variant = 'absolute'"]),
        ({"ism.temperature": 2.0, "loss.name": "elk+sup_con"}, []),
    ],
)  # fmt: skip
def test_settings_of_other_tasks_and_metrics_are_named(fields, expected):
    assert without_effect(small_config("x", **fields)) == expected


def test_a_sum_is_the_sum_on_one_matrix():
    names, weights = ("proxy_anchor", "normalized_softmax", "sup_con"), (1.0, 0.5, 2.0)
    config = small_config("x", **{"loss.name": "+".join(names), "loss.weights": weights})
    config.model.embedding_dim, config.model.uncertainty_dim = 8, 4
    validate(config)
    rule = TASKS["retrieval"].criterion(config, 4, 3, MESH)
    assert TASKS["retrieval"].images_per_class(config) == 4
    assert [(term.loss, term.weight) for term in rule.terms] == list(zip(names, weights, strict=True))
    params, embedding = jax.jit(rule.init)(jax.random.key(0)), batch()
    assert params["proxies"].shape == (4, 8)
    found, *alone = values([rule, *(objective(loss=name) for name in names)], params, embedding)
    np.testing.assert_allclose(found, np.dot(weights, alone), rtol=1e-6)
    products = [str(jax.make_jaxpr(lambda p, e, r=r: r(p, e, LABELS))(params, embedding)).count("dot_general")
                for r in (rule, objective(loss="proxy_anchor"), objective(loss="sup_con"))]  # fmt: skip
    assert products[0] == products[1] + products[2]  # two losses share the matrix of the proxies


def test_a_sum_with_a_memory():
    terms = (Term("proxy_anchor"), Term("info_nce", 0.5, (("temperature", 0.2),)))
    rule = objective(loss="proxy_anchor+info_nce", terms=terms, memory_size=16)
    params, embedding = jax.jit(rule.init)(jax.random.key(0)), batch()
    store = rule.remember(rule.init_memory(), batch(1), jnp.asarray(LABELS))
    alone = objective(loss="info_nce", options=terms[1].options, memory_size=16)
    found, first, second = values([rule, objective(), alone], params, embedding, [store, (), store])
    np.testing.assert_allclose(found, first + 0.5 * second, rtol=1e-6)


def test_a_term_that_takes_no_memory_sees_the_batch_alone():
    labels, key = jnp.array([0, 0, 1, 1, 2, 3, 4, 5]), jax.random.key(4)
    of = lambda name: objective(
        loss=name, num_classes=6, memory_size=16 * ("contrastive" in name), terms=tuple(map(Term, name.split("+")))
    )
    keys = jax.random.split(jax.random.key(0), 3)
    images, older = (
        Embedding(ism.l2_normalize(jax.random.normal(k, (8, 8))), jax.random.normal(k, (8, 4))) for k in keys[:2]
    )
    both, with_memory, alone = of("contrastive+n_pair"), of("contrastive"), of("n_pair")
    store = both.remember(both.init_memory(), older, labels[::-1])
    value = lambda rule, **more: rule({}, images, labels, key=key, step=9, **more)
    found = jax.jit(lambda: (value(both, store=store), value(with_memory, store=store), value(alone)))()
    np.testing.assert_allclose(found[0], found[1] + found[2], rtol=1e-5)


@pytest.mark.parametrize("share", [1.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_several_proxies_per_class_whole_and_split(share):
    """The table has a row per class, so padding and devices are as for one proxy; every proxy learns."""
    mesh, found = sharding.data_mesh(), []
    embedding, options = batch(), (("centres", 3),)
    for split in (False, True):
        rule = objective(
            loss="soft_triple", options=options, centre_spread=100.0, num_classes=9, mesh=mesh if split else None,
            class_share=share,
        )  # fmt: skip
        params = jax.jit(rule.init)(jax.random.key(0))
        assert params["proxies"].shape == (3840 if split else 9, 24)
        params = jax.device_put(params, sharding.placement(params, mesh, rule.split))
        function = jax.jit(jax.value_and_grad(lambda p, e, r=rule: r(p, e, LABELS, key=jax.random.key(5))))
        loss, gradient = function(params, embedding)
        gradient = np.asarray(gradient["proxies"])
        assert not np.any(gradient[9:])
        found.append((loss, gradient[:9]))
    (loss, gradient), (split_loss, split_gradient) = found
    assert 10.0 < loss < 110.0  # the mean distance of random directions is about 1.4, halved
    assert np.abs(gradient.reshape(9, 3, 8)).max(2).min() > 0
    if share == 1:  # another number of devices draws other classes
        np.testing.assert_allclose(split_loss, loss, rtol=1e-5)
        np.testing.assert_allclose(split_gradient, gradient, rtol=1e-3, atol=1e-6)


NUMBERS = {"proxy_anchor": 1, "soft_triple": 3, "normalized_softmax": 1, "subcenter_arcface": 2}


@pytest.mark.parametrize("share", [1.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_sum_of_losses_with_different_numbers_of_proxies(share):
    """Those with the same number share a set, the others have their own; whole and split over devices."""
    names = [name for name in NUMBERS if share == 1 or name != "proxy_anchor"]
    config = small_config("x", **{"loss.name": "+".join(names), "loss.centre_spread": 0.5, "loss.class_share": share})
    config.loss.soft_triple.centres, config.loss.subcenter_arcface.centres = 3, 2
    config.model.embedding_dim, config.model.uncertainty_dim, embedding = 8, 4, batch()
    validate(config)
    rule = TASKS["retrieval"].criterion(config, 9, 3, MESH)
    params = jax.jit(rule.init)(jax.random.key(0))
    assert params["proxies"].shape == (9, 6 * 8)  # 1 + 3 + 2 proxies of each class
    columns = {1: slice(0, 8), 3: slice(8, 32), 2: slice(32, 48)} if share == 1 else {
        3: slice(0, 24), 1: slice(24, 32), 2: slice(32, 48)}  # fmt: skip
    value = jax.value_and_grad(lambda p, e, r: r(p, e, LABELS, key=jax.random.key(5)))
    mesh = sharding.data_mesh()
    split = dataclasses.replace(rule, mesh=mesh)
    padded = jax.device_put({"proxies": np.pad(params["proxies"], ((0, 3840 - 9), (0, 0)))},
                            sharding.placement({"proxies": jnp.zeros((3840, 48))}, mesh, split.split))  # fmt: skip

    @jax.jit
    def together(params, padded, embedding):
        every = [value(params, embedding, rule), value(padded, embedding, split)]
        for name in names if share == 1 else ():  # the drawn classes depend on the number of terms
            number = NUMBERS[name]
            options = (("centres", number),) if number > 1 else ()
            alone = objective(loss=name, options=options, num_classes=9, centre_spread=0.5 * (number > 1))
            every.append(value({"proxies": params["proxies"][:, columns[number]]}, embedding, alone))
        return every

    (loss, gradient), (split_loss, split_gradient), *alone = together(params, padded, embedding)
    assert not np.any(split_gradient["proxies"][9:])
    gradient, split_gradient = np.asarray(gradient["proxies"]), np.asarray(split_gradient["proxies"][:9])
    assert np.abs(gradient.reshape(9, 6, 8)).max(2).min() > 0
    if share < 1:  # another number of devices draws other classes
        assert np.isfinite(split_loss) and np.isfinite(split_gradient).all()
        return
    np.testing.assert_allclose(loss, sum(one for one, _ in alone), rtol=1e-6)
    expected = np.zeros((9, 48))
    for name, (_, of_one) in zip(names, alone, strict=True):
        expected[:, columns[NUMBERS[name]]] += of_one["proxies"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(split_loss, loss, rtol=1e-5)
    np.testing.assert_allclose(split_gradient, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_embedding_norm_adds_the_mean_squared_length():
    rules = [objective(embedding_norm=weight) for weight in (0.0, 0.1)]
    setups = [setup(objective=rule, mixup_alpha=0.0) for rule in rules]
    state = fresh(setups[0])
    both = jax.jit(lambda state, data: [embedding_loss(state.params, {}, state, data, s, True) for s in setups])
    (plain, (_, out, _)), (loss, _) = both(state, images())
    assert np.mean(out["semantic_norm"] ** 2) > 0
    np.testing.assert_allclose(loss - plain, 0.1 * np.mean(out["semantic_norm"] ** 2), rtol=1e-3)


def test_proxies_at_the_class_means_are_distinct():
    """A run that starts from the closed form: also with several proxies per class, and with rows of padding."""
    rng = np.random.default_rng(0)
    means, fresh = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=(5, 8)).astype(np.float32)
    rows = proxy_rows(means, fresh)
    both = rows[:3].reshape(3, 2, 4)
    assert not np.any(rows[3:]) and np.abs(both[:, 0] - both[:, 1]).max(1).min() > 0
    lengths = np.linalg.norm(means, axis=1)[:, None]
    np.testing.assert_allclose(np.linalg.norm(both - means[:, None], axis=2), 0.1 * lengths.repeat(2, 1), rtol=1e-5)
    np.testing.assert_array_equal(proxy_rows(means, fresh[:, :4])[:3], means)
    moved = proxy_rows(means, fresh, alone=1)  # of a sum in which one loss has a single proxy per class
    np.testing.assert_array_equal(moved[:3, 4:], means)
    np.testing.assert_array_equal(moved[:, :4], rows[:, :4])


def test_a_share_of_the_classes_is_a_smaller_matrix():
    rule = objective(loss="cosface", num_classes=101, class_share=0.3)
    params, embedding = jax.eval_shape(rule.init, jax.random.key(0)), batch()
    text = str(jax.make_jaxpr(lambda p, e: rule(p, e, LABELS, key=jax.random.key(0)))(params, embedding))
    assert "f32[8,36]" in text and "f32[8,101]" not in text


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"loss.name": "proxy_anchor+triplets"}, r"known: .*\('triplets' is none\), joined by \+"),
        ({"loss.name": "sup_con+sup_con"}, "names a loss twice"),
        ({"loss.weights": (1.0, 2.0)}, "one number for each of the 1 losses"),
        ({"loss.name": "sup_con+circle", "loss.weights": (1.0, -1.0)}, "must be numbers above 0"),
        ({"loss.name": "sup_con+circle", "loss.weights": (1.0, "a")}, "must be numbers above 0"),
        ({"loss.name": "sup_con+circle", "loss.weights": (1.0, True)}, "must be numbers above 0"),
        ({"loss.name": "arcface", "loss.arcface.margin": float("nan")}, "arcface.margin = nan must be a finite number"),
        ({"loss.name": "subcenter_arcface", "loss.subcenter_arcface.margin": 200.0}, "between 0 and 180 degrees"),
        ({"loss.name": "arcface", "loss.arcface.margin": -1.0}, "between 0 and 180 degrees"),
        ({"loss.name": "cosface", "loss.cosface.margin": float("inf")}, "cosface.margin = inf must be a finite number"),
        ({"loss.name": "hedged_instance", "loss.hedged_instance.prior": -1.0}, "prior = -1.0 must be at least 0"),
        ({"loss.name": "hedged_instance", "loss.hedged_instance.slope": 0.0}, "slope = 0.0 must be above 0"),
        ({"loss.name": "multi_similarity", "loss.multi_similarity.alpha": 0.0}, "alpha = 0.0 must be above 0"),
        ({"loss.name": "multi_similarity", "loss.multi_similarity.beta": 0.0}, "beta = 0.0 must be above 0"),
        ({"loss.proxy_anchor.alpha": -3.0}, "alpha = -3.0 must be above 0"),
        # What the loss itself refuses.
        (
            {"loss.name": "sup_con", "loss.sup_con.temperature": 1e-40},
            "config.loss.sup_con.temperature must be a finite number above 0, from 1.2e-38 to 3.4e38",
        ),
        ({"loss.name": "cosface", "loss.cosface.scale": 1e39}, "config.loss.cosface.scale must be a finite number"),
        ({"loss.name": "elk", "loss.elk.temperature": 1e-40}, "config.loss.elk.temperature must be a finite number"),
        (
            {"loss.name": "recall_at_k", "loss.recall_at_k.ks": (10**30,)},
            "config.loss.recall_at_k.ks must be at least 1",
        ),
        ({"loss.name": "recall_at_k", "loss.recall_at_k.ks": (1, True)}, "ks = .* must be whole numbers"),
        ({"loss.name": "elk", "model.embedding_dim": 1}, "embedding_dim = 1: elk needs at least 2 dimensions"),
        ({"loss.name": "mc_info_nce", "model.embedding_dim": 1}, "embedding_dim = 1: mc_info_nce needs"),
        ({"loss.name": "n_pair", "memory.size": 64}, "has no use for a memory"),
        ({"loss.name": "triplet_semihard", "loss.triplet_semihard.margin": 0.0}, "margin = 0.0 must be above 0"),
        ({"loss.name": "contrastive", "loss.contrastive.negative_margin": -0.5}, "negative_margin = -0.5 must be"),
        (
            {"loss.name": "margin_distance_weighted", "loss.margin_distance_weighted.cutoff": 1.5},
            "margin_distance_weighted.cutoff = 1.5 and nonzero_cutoff = 1.4: 0 < cutoff < nonzero_cutoff <= 2",
        ),
        ({"loss.class_share": 0.0}, "must be above 0 and at most 1"),
        ({"loss.class_share": 0.5}, "for softmax losses over proxies .*, not for proxy_anchor"),
        ({"loss.name": "sup_con", "loss.class_share": 0.5}, "not for sup_con"),
        ({"loss.centre_spread": 0.2}, "several proxies per class: subcenter_arcface, soft_triple"),
        ({"loss.centre_spread": -0.2}, "config.loss.centre_spread"),
        ({"loss.embedding_norm": -1.0}, "config.loss.embedding_norm"),
        ({"loss.name": "soft_triple", "loss.soft_triple.centres": 0}, "centres = 0 must be at least 1"),
        ({"loss.name": "recall_at_k", "loss.recall_at_k.ks": (0, 1)}, "ks = .* must be whole numbers"),
        ({"loss.name": "arcface", "loss.arcface.scale": 0.0}, "config.loss.arcface.scale = 0.0 must be above 0"),
        ({"loss.name": "proxy_anchor+sup_con", "ism.variant": "released"}, "exists for proxy_anchor only"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        config = small_config("x", **changes)
        validate(config)
        TASKS["retrieval"].criterion(config, 8, 3, MESH)


def test_a_share_of_the_classes_that_is_not_reached_is_said():
    class Table:
        class_share, num_classes, proxy_rows, mesh = 0.1, 100_000, 100_032, SimpleNamespace(size=64)

    assert "is compared with 100% of the classes, as each of 64 parts of the table has room for 1,563" in (
        terms.of_class_share(Table, 4096)
    )
    Table.mesh = None
    assert terms.of_class_share(Table, 512) == ""
    Table.class_share = 1.0
    assert terms.of_class_share(Table, 512) == ""
