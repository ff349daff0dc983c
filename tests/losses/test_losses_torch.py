"""Value and gradients against pytorch-metric-learning in float64, from the embeddings on."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idml_jax import ism, losses
from idml_jax.losses import auxiliary, miners

pytestmark = pytest.mark.torch

reason = "parity with PyTorch needs the extra 'parity'"
torch = pytest.importorskip("torch", reason=reason)
pytest.importorskip("pytorch_metric_learning", reason=reason)
from pytorch_metric_learning import losses as pml  # noqa: E402
from pytorch_metric_learning import miners as pml_miners  # noqa: E402
from pytorch_metric_learning import reducers as pml_reducers  # noqa: E402
from pytorch_metric_learning.utils import loss_and_miner_utils  # noqa: E402

SEEDS, N, D, CLASSES = 20, 24, 10, 6


def batch(seed, centres=1):
    """Clusters from tight to none, so that every branch of a loss is taken; every class at least twice."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.concatenate([np.repeat(np.arange(CLASSES), 2), rng.integers(0, CLASSES, N - 12)]))
    means, spread = rng.normal(size=(CLASSES, D)), rng.uniform(0.1, 2)
    proxies = np.repeat(means, centres, axis=0) + rng.normal(size=(CLASSES * centres, D))
    return means[labels] + spread * rng.normal(size=(N, D)), labels, proxies


def ours(embedding, references, labels, *, name, **options):
    spec = losses.LOSSES[name]
    unit = ism.l2_normalize(embedding)
    proxied = spec.references == "proxies"
    others = ism.l2_normalize(references) if proxied else None
    read = ism.semantic_distance if spec.reads == "distance" else ism.cosine_similarity
    classes = jnp.repeat(jnp.arange(CLASSES), spec.centres)
    pairs = losses.pairs_from_labels(labels, classes if proxied else None)
    return spec.function(read(unit, others), pairs, **options)


def theirs(embedding, references, labels, *, loss, miner=None):
    """Value, gradient of the embeddings, gradient of the proxies or None."""
    embedding = torch.tensor(embedding, requires_grad=True)
    labels = torch.tensor(labels)
    proxies = next((name for name in ("proxies", "W", "fc") if hasattr(loss, name)), None)
    turned = proxies in ("W", "fc")  # a proxy per column
    if proxies:
        setattr(loss, proxies, torch.nn.Parameter(torch.tensor(references.T.copy() if turned else references)))
    value = loss(embedding, labels, None if miner is None else miner(embedding, labels))
    value.backward()
    of_proxies = getattr(loss, proxies).grad.numpy() if proxies else None
    return value.item(), embedding.grad.numpy(), of_proxies.T if turned else of_proxies


CASES = {
    "contrastive": lambda: {"loss": pml.ContrastiveLoss(pos_margin=0, neg_margin=0.5)},
    "triplet_semihard": lambda: {
        "loss": pml.TripletMarginLoss(margin=0.1),
        "miner": pml_miners.TripletMarginMiner(margin=0.1, type_of_triplets="semihard"),
    },
    "multi_similarity": lambda: {
        "loss": pml.MultiSimilarityLoss(alpha=2, beta=50, base=0.5),
        "miner": pml_miners.MultiSimilarityMiner(epsilon=0.1),
    },
    "fast_ap": lambda: {"loss": pml.FastAPLoss(num_bins=10)},
    "proxy_nca": lambda: {"loss": pml.ProxyNCALoss(CLASSES, D, softmax_scale=32)},
    "proxy_anchor": lambda: {"loss": pml.ProxyAnchorLoss(CLASSES, D, margin=0.1, alpha=32)},
    "normalized_softmax": lambda: {"loss": pml.NormalizedSoftmaxLoss(CLASSES, D)},
    "cosface": lambda: {"loss": pml.CosFaceLoss(CLASSES, D)},
    "arcface": lambda: {"loss": pml.ArcFaceLoss(CLASSES, D)},
    "subcenter_arcface": lambda: {"loss": pml.SubCenterArcFaceLoss(num_classes=CLASSES, embedding_size=D)},
    "soft_triple": lambda: {"loss": pml.SoftTripleLoss(CLASSES, D)},
    "info_nce": lambda: {"loss": pml.NTXentLoss()},
    "sup_con": lambda: {"loss": pml.SupConLoss()},
    "circle": lambda: {"loss": pml.CircleLoss()},
    "lifted_structure": lambda: {"loss": pml.GeneralizedLiftedStructureLoss()},
    "triplet_hard": lambda: {
        "loss": pml.TripletMarginLoss(margin=0.1, reducer=pml_reducers.MeanReducer()),
        "miner": pml_miners.BatchHardMiner(),
    },
}
FIRST = list(CASES)[:6]


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients(name):
    function = jax.jit(jax.value_and_grad(partial(ours, name=name), argnums=(0, 1)))
    zeros = 0
    with jax.enable_x64(True):
        for seed in range(SEEDS if name in FIRST else 6):
            embedding, labels, references = batch(seed, losses.LOSSES[name].centres)
            value, (gradient, proxy_gradient) = function(embedding, references, labels)
            expected, expected_gradient, expected_proxies = theirs(embedding, references, labels, **CASES[name]())
            np.testing.assert_allclose(value, expected, rtol=1e-10, err_msg=f"seed {seed}")
            np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-7, atol=1e-11, err_msg=f"seed {seed}")
            if expected_proxies is not None:
                np.testing.assert_allclose(proxy_gradient, expected_proxies, rtol=1e-7, atol=1e-11)
            zeros += expected == 0
    assert zeros < (SEEDS if name in FIRST else 6) / 2


def test_n_pair_with_one_anchor_per_class():
    """Theirs has one anchor for each class; weights leave only those of ours."""
    function = jax.jit(jax.value_and_grad(partial(ours, name="n_pair")))
    with jax.enable_x64(True):
        for seed in range(4):
            embedding, labels, _ = batch(seed)
            weights = np.zeros(N)
            weights[np.unique(labels, return_index=True)[1]] = 1.0
            value, gradient = function(embedding, None, labels, weights=weights)
            expected, expected_gradient, _ = theirs(embedding, None, labels, loss=pml.NPairsLoss())
            np.testing.assert_allclose(value, expected, rtol=1e-10)
            np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-7, atol=1e-11)


def test_smooth_ap_with_the_anchor_among_its_positives():
    """Theirs counts the anchor as its own positive, which our relation can say too.

    It needs classes of one size, and takes that for the number of classes: it is right only where both are equal.
    """
    default = torch.get_default_dtype()
    labels = np.repeat(np.arange(5), 5)
    same = labels[:, None] == labels[None, :]

    @jax.jit
    @jax.value_and_grad
    def function(embedding):
        similarity = ism.cosine_similarity(ism.l2_normalize(embedding))
        return losses.smooth_ap(similarity, losses.pairs_from_relation(same))

    with jax.enable_x64(True):
        for seed in range(3):
            embedding = np.eye(5, D)[labels] + np.random.default_rng(seed).normal(size=(25, D))
            torch.set_default_dtype(torch.float64)  # their table of precisions has the default type
            try:
                expected, expected_gradient, _ = theirs(embedding, None, labels, loss=pml.SmoothAPLoss())
            finally:
                torch.set_default_dtype(default)
            value, gradient = function(embedding)
            np.testing.assert_allclose(value, expected, rtol=1e-10)
            np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-7, atol=1e-10)


def test_centre_spread():
    from pytorch_metric_learning import regularizers

    proxies = np.random.default_rng(0).normal(size=(CLASSES, 3, D))
    regularizer = regularizers.SparseCentersRegularizer(CLASSES, 3)
    expected = regularizer(torch.tensor(proxies.reshape(-1, D)))
    with jax.enable_x64(True):
        value = jax.jit(auxiliary.centre_spread)(proxies)
        # A row of padding counts in neither sum.
        padded = np.concatenate([proxies, np.zeros((1, 3, D))])
        again = jax.jit(auxiliary.centre_spread)(padded, np.arange(CLASSES + 1) < CLASSES)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-10)
    np.testing.assert_allclose(again, value, rtol=1e-12)


@pytest.mark.parametrize("per_class", [False, True])
def test_margin_loss_with_the_same_triplets(per_class):
    """Their loss, given the triplets that ours draws: value, and the gradients of the embeddings and of beta."""

    def function(embedding, beta, labels, key):
        beta = losses.parameters_of_rows({"beta": beta}, labels)["beta"]
        return ours(embedding, None, labels, name="margin_distance_weighted", key=key, beta=beta, dimension=D)

    differentiated = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))

    @jax.jit
    def draws(embedding, labels, key):
        pairs = losses.pairs_from_labels(labels)
        distance = ism.semantic_distance(ism.l2_normalize(embedding))
        probabilities = miners.distance_weighted_probabilities(distance, pairs, dimension=D)
        return miners.draw_negatives(key, probabilities, jnp.sum(pairs.positive, axis=1))

    compared = 0
    with jax.enable_x64(True):
        for seed in range(SEEDS):
            embedding, labels, _ = batch(seed)
            key, shape = jax.random.key(seed), (CLASSES,) if per_class else ()
            beta = np.random.default_rng(seed).uniform(0.9, 1.4, shape)
            drawn = np.asarray(draws(embedding, labels, key)).astype(int)
            triplets = []
            for a in range(N):
                positives = [p for p in range(N) if p != a and labels[p] == labels[a]]
                negatives = [n for n in range(N) for _ in range(drawn[a, n])]
                if negatives:
                    triplets += [(a, p, n) for p, n in zip(positives, negatives, strict=True)]
            if len({a for a, _, _ in triplets}) < N:
                continue  # They cannot express an anchor that has positives but no negative in reach.
            loss = pml.MarginLoss(margin=0.2, learn_beta=True, num_classes=CLASSES if per_class else None)
            loss.beta = torch.nn.Parameter(torch.tensor(np.atleast_1d(beta)))
            variable = torch.tensor(embedding, requires_grad=True)
            expected = loss(variable, torch.tensor(labels), tuple(torch.tensor(np.array(triplets).T)))
            expected.sum().backward()
            value, (gradient, beta_gradient) = differentiated(embedding, beta, labels, key)
            np.testing.assert_allclose(value, expected.item(), rtol=1e-10)
            np.testing.assert_allclose(gradient, variable.grad.numpy(), rtol=1e-7, atol=1e-11)
            np.testing.assert_allclose(np.atleast_1d(beta_gradient), loss.beta.grad.numpy(), rtol=1e-9, atol=1e-12)
            compared += 1
    assert compared > SEEDS / 2


def test_sampling_probabilities(monkeypatch):
    """The weights their miner draws with; in float64 and few dimensions, where none of their rows underflows."""
    seen = {}

    def capture(labels, ref_labels=None, weights=None, **_):
        seen["weights"] = weights.numpy()
        return (torch.zeros(0, dtype=torch.long),) * 3

    monkeypatch.setattr(loss_and_miner_utils, "get_random_triplet_indices", capture)
    with jax.enable_x64(True):
        for seed in range(SEEDS):
            embedding, labels, _ = batch(seed)
            pml_miners.DistanceWeightedMiner(cutoff=0.5, nonzero_loss_cutoff=1.4)(
                torch.tensor(embedding), torch.tensor(labels)
            )
            got = miners.distance_weighted_probabilities(
                ism.semantic_distance(ism.l2_normalize(embedding)),
                losses.pairs_from_labels(jnp.asarray(labels)),
                dimension=D,
            )
            np.testing.assert_allclose(got, np.nan_to_num(seen["weights"]), rtol=1e-8, atol=1e-12)
