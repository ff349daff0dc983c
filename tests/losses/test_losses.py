"""Options of every loss: weights, reductions, clear errors, jit, and its registry entry."""

import inspect
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from loss_helpers import FIRST, NAMES, call, of_families, value_and_gradient

from idml_jax import losses
from idml_jax.losses import LOSSES, Pairs

LABELS = jnp.array([0, 0, 1, 1, 2, 2, 0])


def random_matrix(seed=0, n=7, m=7):
    return jnp.asarray(np.random.default_rng(seed).uniform(0.1, 1.5, (n, m)), jnp.float32)


@pytest.mark.parametrize("name", of_families())
def test_whole_weights_repeat_rows(name):
    """Weight 2: as if the anchor were there twice; weight 0: as if it were not. Any factor on all: no change."""
    matrix, pairs = random_matrix(), losses.pairs_from_labels(LABELS)
    times = np.array([1, 2, 0, 1, 3, 0, 0])
    rows = np.repeat(np.arange(7), times)
    function = lambda matrix, pairs, weights: np.asarray(value_and_gradient(name, matrix, pairs, weights)[0])
    if name == "margin_distance_weighted":  # without draws, which differ from row to row
        function = lambda matrix, pairs, weights: losses.margin_distance_weighted(matrix, pairs, weights=weights)
    weighted = function(matrix, pairs, jnp.asarray(times))
    repeated = function(matrix[rows], Pairs(pairs.positive[rows], pairs.negative[rows]), None)
    np.testing.assert_allclose(weighted, repeated, rtol=1e-5)
    if name != "proxy_anchor":
        np.testing.assert_allclose(function(matrix, pairs, 0.1 * jnp.asarray(times)), weighted, rtol=1e-5)


def test_unreduced_values_give_the_mean():
    matrix, pairs = random_matrix(), losses.pairs_from_labels(LABELS)
    weights = jnp.array([1.0, 2.0, 0.5, 1.0, 1.0, 0.0, 3.0])

    pair = losses.contrastive(matrix, pairs, weights=weights, reduction="none")
    assert pair.shape == (7, 7)
    expected = 0
    for mask in pairs:
        chosen = np.asarray(mask & (pair > 0))
        expected += np.sum(np.where(chosen, pair, 0)) / np.sum(chosen * np.asarray(weights)[:, None])
    np.testing.assert_allclose(losses.contrastive(matrix, pairs, weights=weights), expected, rtol=1e-5)

    triplet = losses.triplet_semihard(matrix, pairs, reduction="none", weights=weights)
    for i in range(7):
        alone = Pairs(pairs.positive[i : i + 1], pairs.negative[i : i + 1])
        one = losses.triplet_semihard(matrix[i : i + 1], alone)
        np.testing.assert_allclose(triplet[i], weights[i] * one, rtol=1e-4, atol=1e-6)

    drawn = losses.margin_distance_weighted(matrix, pairs, jax.random.key(0), reduction="none")
    assert drawn.shape == (7, 7)
    assert not np.any(np.asarray(drawn)[~np.asarray(pairs.positive | pairs.negative)])

    for name in ("multi_similarity", "fast_ap", "proxy_nca", "sup_con", "triplet_hard"):
        rows = LOSSES[name].function(matrix, pairs, weights=weights, reduction="none")
        assert rows.shape == (7,)
        mean = LOSSES[name].function(matrix, pairs, weights=weights)
        np.testing.assert_allclose(mean, np.sum(rows) / np.sum(weights), rtol=1e-5)

    columns = losses.proxy_anchor(matrix, pairs, reduction="none")
    assert columns.shape == (7,)
    np.testing.assert_allclose(losses.proxy_anchor(matrix, pairs), np.mean(columns), rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_errors_name_what_is_wrong(name):
    function = LOSSES[name].function
    matrix, pairs = random_matrix(), losses.pairs_from_labels(LABELS)
    with pytest.raises(ValueError, match=r"same shape \[n, m\]"):
        function(matrix[:3], pairs)
    with pytest.raises(ValueError, match=r"same shape \[n, m\]"):
        function(matrix[0], Pairs(pairs.positive[0], pairs.negative[0]))
    with pytest.raises(ValueError, match="weights need"):
        function(matrix, pairs, weights=jnp.ones(3))
    with pytest.raises(ValueError, match="'mean' or 'none'"):
        function(matrix, pairs, reduction="sum")


def test_errors_of_single_losses():
    matrix, pairs = random_matrix(), losses.pairs_from_labels(LABELS)
    with pytest.raises(ValueError, match="at least 1"):
        losses.fast_ap(matrix, pairs, bins=0)
    with pytest.raises(ValueError, match="beta needs"):
        losses.margin_distance_weighted(matrix, pairs, beta=jnp.ones(3))
    with pytest.raises(ValueError, match="cutoff"):
        losses.margin_distance_weighted(matrix, pairs, cutoff=1.5)


@pytest.mark.parametrize("name", list(LOSSES))
def test_registry_describes_the_function(name):
    spec = LOSSES[name]
    options = inspect.signature(spec.function).parameters
    assert list(options)[:2] == [spec.reads, "pairs"]
    assert spec.function is getattr(losses, name)
    assert spec.needs_key == ("key" in options)
    assert spec.needs_dimension == ("dimension" in options)
    assert spec.takes_share == ("stands_for" in options)
    assert spec.centres == (options["centres"].default if "centres" in options else 1)
    assert ("references" in options) == (spec.reads == "embeddings")
    for parameter, described in spec.parameters.items():
        assert options[parameter].default == described.initial


def test_every_loss_is_in_the_tables_of_the_documentation():
    root = Path(__file__).resolve().parent.parent.parent
    page, readme = (root / "docs" / "losses.md").read_text(), (root / "README.md").read_text().splitlines()
    for name, spec in LOSSES.items():
        assert f"\n| `{name}` | " in page, name
        (row,) = [line for line in readme if f"| `{name}` |" in line]
        told = "samples" if spec.needs_key else "distributions"  # of losses that read embeddings
        assert {"embeddings": told}.get(spec.reads, spec.reads) in row
        assert ("proxies" in row) == (spec.references == "proxies")
        assert spec.centres == 1 or f"{spec.centres} per class" in row


def test_learned_parameters_once_or_per_class():
    spec = LOSSES["margin_distance_weighted"]
    matrix, pairs = random_matrix(), losses.pairs_from_labels(LABELS)

    def loss(parameters):
        return spec.function(matrix, pairs, **losses.parameters_of_rows(parameters, LABELS))

    shared, each = losses.init_parameters(spec), losses.init_parameters(spec, num_classes=4)
    assert shared["beta"].shape == () and each["beta"].shape == (4,)
    np.testing.assert_allclose(loss(shared), spec.function(matrix, pairs), rtol=1e-6)
    np.testing.assert_allclose(loss(each), loss(shared), rtol=1e-6)
    one, many = jax.grad(loss)(shared)["beta"], jax.grad(loss)(each)["beta"]
    np.testing.assert_allclose(jnp.sum(many), one, rtol=1e-5, atol=1e-7)
    assert many[3] == 0  # no image of class 3 in the batch
    assert losses.init_parameters(LOSSES["contrastive"]) == {}


def test_settings_can_be_traced():
    """A schedule may change them without compiling anew."""
    matrix, pairs = random_matrix(), losses.pairs_from_labels(LABELS)
    for name, option, value in [
        ("contrastive", "negative_margin", 0.7),
        ("triplet_semihard", "margin", 0.2),
        ("margin_distance_weighted", "margin", 0.1),
        ("multi_similarity", "base", 0.4),
        ("proxy_nca", "scale", 3.0),
        ("proxy_anchor", "alpha", 8.0),
        ("arcface", "margin", 10.0),
        ("smooth_ap", "temperature", 0.1),
    ]:
        function = LOSSES[name].function
        traced = jax.jit(lambda x, f=function, o=option: f(matrix, pairs, **{o: x}))(value)
        np.testing.assert_allclose(traced, function(matrix, pairs, **{option: value}), rtol=1e-6)


class VariantsTest(chex.TestCase):
    """The same value and gradient without jit and under pmap as under jit."""

    @chex.variants(without_jit=True, with_pmap=True)
    @parameterized.parameters(*FIRST)
    def test_value_and_gradient(self, name):
        matrix, pairs = random_matrix(), losses.pairs_from_labels(LABELS)
        value, gradient = self.variant(jax.value_and_grad(lambda x: call(name, x, pairs)))(matrix)
        expected_value, expected = value_and_gradient(name, matrix, pairs)
        chex.assert_shape(gradient, (7, 7))
        np.testing.assert_allclose(value, expected_value, rtol=1e-5)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", of_families())
def test_negative_weights_are_refused(name):
    weights = jnp.array([1.0, 2.0, -0.5, 1.0, 1.0, 0.0, 3.0])
    options = {"key": jax.random.key(0)} if LOSSES[name].needs_key else {}
    with pytest.raises(ValueError, match=r"weights must not be negative; the least is -0\.5"):
        LOSSES[name].function(random_matrix(), losses.pairs_from_labels(LABELS), weights=weights, **options)
