"""Arguments that make no sense end in one clear ValueError instead of NaN or a plausible number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idml_jax import ism, losses
from idml_jax.ism import Embedding
from idml_jax.losses import memory

LABELS = jnp.array([0, 0, 1, 1])
PAIRS = losses.pairs_from_labels(LABELS)
MATRIX = jnp.array([[0.1, 0.2, 0.6, 0.7], [0.2, 0.1, 0.5, 0.8], [0.6, 0.5, 0.1, 0.3], [0.7, 0.8, 0.3, 0.1]])
S, U = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32), jnp.full((4, 2), 0.3)
KEY = jax.random.key(0)
ON_EMBEDDINGS = ["elk", "mc_info_nce", "hedged_instance"]


def on_embeddings(name, embedding, **options):
    return losses.LOSSES[name].function(embedding, PAIRS, **({} if name == "elk" else {"key": KEY}), **options)


@pytest.mark.parametrize("name", ["elk", "mc_info_nce"])
def test_directions_need_two_dimensions(name):
    with pytest.raises(ValueError, match="at least 2 dimensions; got 1"):
        on_embeddings(name, Embedding(jnp.ones((4, 1)), U))


@pytest.mark.parametrize("name", ON_EMBEDDINGS)
def test_embeddings_that_do_not_fit(name):
    with pytest.raises(ValueError, match=r"Embedding\(semantic, uncertainty\)"):
        on_embeddings(name, S)
    with pytest.raises(ValueError, match="same width; got 3 and 5"):
        on_embeddings(name, Embedding(S, U), references=Embedding(jnp.ones((4, 5)), U))
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(3, 2\)"):
        on_embeddings(name, Embedding(S, U[:3]))
    with pytest.raises(ValueError, match=r"\[n, d\] and \[n, k\]; got \(3,\)"):
        on_embeddings(name, Embedding(S[0]))


def test_one_uncertainty_is_not_that_of_all_images():
    one = Embedding(S, U[:1])
    for call in (
        *(lambda name=name: on_embeddings(name, one) for name in ON_EMBEDDINGS),
        lambda: ism.introspective_distance(one),
        lambda: ism.introspective_similarity(Embedding(S, U), one),
        lambda: ism.released_similarity(one, S),
    ):
        with pytest.raises(ValueError, match=r"\[n, d\] and \[n, k\]; got \(4, 3\) and \(1, 2\)"):
            call()


POSITIVE = [
    ("info_nce", "temperature"), ("sup_con", "temperature"), ("circle", "gamma"), ("n_pair", "scale"),
    ("smooth_ap", "temperature"), ("recall_at_k", "temperature"), ("recall_at_k", "rank_temperature"),
    ("normalized_softmax", "temperature"), ("cosface", "scale"), ("arcface", "scale"), ("subcenter_arcface", "scale"),
    ("soft_triple", "scale"), ("soft_triple", "gamma"), ("proxy_anchor", "alpha"), ("proxy_nca", "scale"),
    ("multi_similarity", "alpha"), ("multi_similarity", "beta"), ("fast_ap", "largest_square"),
]  # fmt: skip


@pytest.mark.parametrize("bad", [0.0, -1.0, 1e-50, 1e39, np.nan, np.inf, np.float32(0), jnp.zeros(()), "1", None])
def test_scales_and_temperatures(bad):
    for name, option in POSITIVE:
        with pytest.raises(ValueError, match=f"^{option} must be a finite number above 0"):
            losses.LOSSES[name].function(MATRIX, PAIRS, **{option: bad})
    for name, option in (("elk", "temperature"), ("mc_info_nce", "kappa")):
        with pytest.raises(ValueError, match=f"^{option} must be a finite number above 0"):
            on_embeddings(name, Embedding(S, U), **{option: bad})


@pytest.mark.parametrize("bad", [2.5, 0, True, "2", None])
def test_whole_numbers(bad):
    for name, option, value in (
        ("fast_ap", "bins", bad), ("recall_at_k", "ks", (bad,)), ("subcenter_arcface", "centres", bad),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{option} must be at least 1, a whole number"):
            losses.LOSSES[name].function(MATRIX, PAIRS, **{option: value})
    with pytest.raises(ValueError, match="samples must be at least 1, a whole number"):
        on_embeddings("mc_info_nce", Embedding(S, U), samples=bad)


def test_numbers_of_answers_pairs_and_levels():
    for bad in (1, (), np.array([])):
        with pytest.raises(ValueError, match="ks must be some whole numbers of at least 1"):
            losses.recall_at_k(MATRIX, PAIRS, ks=bad)
    with pytest.raises(ValueError, match=r"ks must be at least 1, a whole number below 2\*\*31"):
        losses.recall_at_k(MATRIX, PAIRS, ks=(10**30,))
    given = losses.recall_at_k(MATRIX, PAIRS, ks=np.array([1, 2]))
    np.testing.assert_array_equal(given, losses.recall_at_k(MATRIX, PAIRS, ks=(1, 2)))
    with pytest.raises(ValueError, match="the parts of Pairs must be bool; got float32"):
        losses.contrastive(MATRIX, losses.Pairs(*(part.astype(jnp.float32) for part in PAIRS)))
    with pytest.raises(ValueError, match="levels must be at least one relation"):
        losses.over_levels(losses.contrastive, MATRIX, (), ())


def test_cutoffs_may_be_traced():
    loss = lambda low, high: losses.margin_distance_weighted(MATRIX, PAIRS, cutoff=low, nonzero_cutoff=high)
    np.testing.assert_allclose(jax.jit(loss)(0.4, 1.3), loss(0.4, 1.3), rtol=1e-6)


@pytest.mark.parametrize("margin", [28.6, 90.0, 133.0, 150.0, 180.0])
def test_arcface_falls_as_an_image_nears_its_class(margin):
    """At any margin: the line beyond the curve's end does not begin above it."""
    own = jnp.linspace(-1.0, 1.0, 401)
    matrix = jnp.stack([own, jnp.zeros_like(own)], axis=1)
    pairs = losses.pairs_from_labels(jnp.zeros(401, int), jnp.arange(2))
    terms = losses.arcface(matrix, pairs, margin=margin, scale=1.0, reduction="none")
    assert (jnp.diff(terms) < 1e-6).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_are_finite(bad):
    with pytest.raises(ValueError, match=f"weights must be finite; one is {bad}"):
        losses.contrastive(MATRIX, PAIRS, weights=[1, bad, 1, 1])


@pytest.mark.parametrize("bad", [-1, 0, 5, 100, 2.5])
def test_number_of_proxies(bad):
    with pytest.raises(ValueError, match="num_proxies must be at (least 1|most the number of columns, 4)"):
        losses.proxy_anchor(MATRIX, PAIRS, num_proxies=bad)


@pytest.mark.parametrize("name", ["normalized_softmax", "cosface", "arcface", "proxy_nca"])
def test_stands_for(name):
    for bad, said in ((-jnp.ones(4), "above 0; one is -1"), (jnp.ones(1), r"shape \(4,\); got \(1,\)")):
        with pytest.raises(ValueError, match=f"stands_for .*{said}"):
            losses.LOSSES[name].function(MATRIX, PAIRS, stands_for=bad)


def test_minus_one_is_no_label_in_both_forms():
    labels = jnp.array([-1, -1, 0, 0])
    one, several = losses.pairs_from_label_sets(labels), losses.pairs_from_label_sets(labels[:, None])
    for vector, matrix in zip(one, several, strict=True):
        np.testing.assert_array_equal(vector, matrix)
    np.testing.assert_array_equal(one.positive[0], [False] * 4)
    assert losses.pairs_from_labels(labels).positive[0, 1]  # there, a label like any other


@pytest.mark.parametrize("kind", [list, np.array, lambda x: np.array(x, object), lambda x: np.array(x, bytes)])
def test_an_empty_name_is_no_label_of_a_set(kind):
    names = losses.pairs_from_label_sets(kind([["a", ""], ["b", ""], ["c", "a"], ["", ""]]))
    numbers = losses.pairs_from_label_sets(jnp.array([[0, -1], [1, -1], [2, 0], [-1, -1]]))
    for one, other in zip(names, numbers, strict=True):
        np.testing.assert_array_equal(one, other)
    one_each = losses.pairs_from_label_sets(kind(["", "", "a", "a"]), kind(["", "a"]))
    np.testing.assert_array_equal(one_each.positive, [[0, 0], [0, 0], [0, 1], [0, 1]])
    assert losses.pairs_from_labels(kind(["", ""])).positive[0, 1]  # there, a label like any other


def test_the_text_of_minus_one_among_the_names_of_sets_is_refused():
    for labels in ([["a", -1], ["b", -1]], np.array([["a", "-1"]]), np.array([b"1", b"-1"])):
        with pytest.raises(ValueError, match="^labels: the text '-1' is a name here; names are filled up with ''"):
            losses.pairs_from_label_sets(labels)
    with pytest.raises(ValueError, match="^reference_labels: the text '-1'"):
        losses.pairs_from_label_sets(["a"], [["b", "-1"]])
    assert losses.pairs_from_labels(["-1", "-1"]).positive[0, 1]


@pytest.mark.parametrize("labels", [[[1], [1, 2]], [["a"], ["a", "b"]], np.array([[1], [1, 2]], object), [1, [1, 2]]])
def test_rows_with_different_numbers_of_labels(labels):
    with pytest.raises(ValueError, match=r"^labels: rows hold different numbers of labels; expected \[n, l\], filled"):
        losses.pairs_from_label_sets(labels)
    with pytest.raises(ValueError, match="^reference_labels: rows hold different numbers of labels"):
        losses.pairs_from_label_sets([0, 1], labels)
    with pytest.raises(ValueError, match=r"^labels: rows hold different numbers of labels; expected \[n\], one of"):
        losses.pairs_from_labels(labels)
    with pytest.raises(ValueError, match=r"^labels: rows hold different .* expected \[n, levels\], one of each level"):
        losses.pairs_from_levels(labels)


@pytest.mark.parametrize("labels", [[None, None, "a"], [None, None], ["a", float("nan")], ["a", 1]])
def test_missing_and_mixed_labels(labels):
    with pytest.raises(ValueError, match="labels"):
        losses.pairs_from_labels(np.array(labels, object))


def test_mask_of_other_rows():
    with pytest.raises(ValueError, match=r"mask needs the rows' shape \(4,\); got \(1,\)"):
        losses.mask_rows(PAIRS, jnp.array([False]))


@pytest.mark.parametrize(
    "labels",
    [
        np.array([0, 2**32, 1, 2**32]), [0, 2**32, 1, 2**32], np.array([16777216.0, 16777217.0, 1.0, 16777217.0]),
        np.array([-1, 2**31 - 1, -(2**40), 2**31 - 1]), np.array([2**63, 2**63 + 1, 0, 2**63 + 1], np.uint64),
    ],
)  # fmt: skip
def test_large_labels_stay_different(labels):
    expected = losses.pairs_from_labels(jnp.array([0, 1, 2, 1]))
    levels = losses.pairs_from_levels(np.stack([labels, labels], axis=1))
    for found in (losses.pairs_from_labels(labels), *levels):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    columns = losses.pairs_from_labels(labels, np.asarray(labels)[:2])
    np.testing.assert_array_equal(columns.positive, [[1, 0], [0, 1], [0, 0], [0, 1]])


def test_large_labels_of_sets_and_against_other_arrays():
    sets = losses.pairs_from_label_sets(np.array([[0, -1], [2**32, -1], [-1, 0], [5, 2**32]]))
    np.testing.assert_array_equal(sets.positive, [[0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]])
    against = losses.pairs_from_labels(np.array([2**32, 1]), jnp.array([0, 1]))
    np.testing.assert_array_equal(against.positive, [[False, False], [False, True]])
    with pytest.raises(ValueError, match="traced"):
        jax.jit(lambda x: losses.pairs_from_labels(np.array([2**32]), x))(jnp.arange(2))


@pytest.mark.parametrize("labels", [np.array([0, 2**32]), np.array([0, 0.5]), np.array([0, np.nan]), ["a", "b"]])
def test_a_memory_keeps_labels_exactly(labels):
    with pytest.raises(ValueError, match="a memory holds labels"):
        memory.enqueue(memory.create(4, 3), Embedding(S[:2]), labels)


def test_spread_of_elk_can_be_traced():
    batch = Embedding(S, U)
    traced = jax.jit(lambda x: losses.elk(batch, PAIRS, spread=x))
    for spread in (0.0, 0.8):
        np.testing.assert_allclose(traced(spread), losses.elk(batch, PAIRS, spread=spread), rtol=1e-5)
    for bad in (-1.0, np.nan):
        with pytest.raises(ValueError, match="spread must be"):
            losses.elk(batch, PAIRS, spread=bad)
