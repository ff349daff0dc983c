"""Exactness of the retrieval metrics: by hand, against naive numpy, with ties, over devices."""

import warnings

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from naive_retrieval import naive_metrics, naive_ranks

from idml_jax.metrics import ranking
from idml_jax.metrics.clustering import kmeans
from idml_jax.metrics.failure_signs import failure_signs
from idml_jax.metrics.retrieval import neighbours, retrieval_metrics, retrieval_ranks, summarise

WAYS = {"counting": 1000, "top-k": 0, "mixed": 3}
COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def assert_same(ranks, expected):
    for name, got, want in zip(ranks._fields, ranks, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Every way of ranking, for any number of positives."""
    monkeypatch.setattr(ranking, "COUNTING_LIMIT", WAYS[request.param])
    return request.param


def test_by_hand(way):
    # On a line: query 0 sees b (1), a (2), a (4), b (6).
    embeddings = np.array([[0.0], [1.0], [2.0], [4.0], [6.0]])
    labels = np.array(["a", "b", "a", "a", "b"])
    ranks = retrieval_ranks(embeddings, labels)
    # Nearest first, ties by index: 0: 1 2 3 4 | 1: 0 2 3 4 | 2: 1 0 3 4 | 3: 2 4 1 0 | 4: 3 2 1 0
    np.testing.assert_array_equal(ranks.first_hit, [2, 4, 2, 1, 3])
    np.testing.assert_array_equal(ranks.nearest_correct, [False, False, False, True, False])
    np.testing.assert_array_equal(ranks.positives, [2, 1, 2, 2, 1])
    np.testing.assert_allclose(ranks.r_precision, [1 / 2, 0, 1 / 2, 1 / 2, 0])
    np.testing.assert_allclose(ranks.average_precision, [1 / 4, 0, 1 / 4, 1 / 2, 0])
    np.testing.assert_allclose(ranks.nearest_distance, [1, 1, 1, 2, 2])
    metrics = retrieval_metrics(embeddings, labels, ks=(1, 2, 3, 100))
    expected = {"R@1": 0.2, "R@2": 0.6, "R@3": 0.8, "R@100": 1.0, "RP": 0.3, "MAP@R": 0.2}
    expected |= {"MRR": (1 / 2 + 1 / 4 + 1 / 2 + 1 + 1 / 3) / 5, "queries": 5, "lone_queries": 0}
    assert metrics == pytest.approx(expected)
    assert all(type(value) in (float, int) for value in metrics.values())


def test_lone_queries_miss_but_do_not_lower_rp(way):
    embeddings = np.array([[0.0], [0.1], [5.0], [5.1]])
    labels = np.array([0, 0, 1, 2])
    metrics = retrieval_metrics(embeddings, labels, ks=(1, 4))
    assert metrics["R@1"] == metrics["R@4"] == 0.5
    assert metrics["RP"] == metrics["MAP@R"] == 1.0
    assert metrics["MRR"] == 0.5
    assert (metrics["queries"], metrics["lone_queries"]) == (4, 2)
    ranks = retrieval_ranks(embeddings, labels)
    np.testing.assert_array_equal(ranks.first_hit, [1, 1, 0, 0])
    assert np.isnan(ranks.r_precision[2:]).all() and np.isnan(ranks.average_precision[2:]).all()


def test_only_lone_queries(way):
    metrics = retrieval_metrics(np.eye(3), [0, 1, 2])
    assert metrics["R@1"] == metrics["R@8"] == metrics["MRR"] == 0
    assert np.isnan(metrics["RP"]) and np.isnan(metrics["MAP@R"])
    metrics = retrieval_metrics(np.eye(3), [0, 1, 2], np.eye(3), [3, 4, 5])
    assert metrics["lone_queries"] == 3


def test_a_duplicate_may_come_before_the_query_itself(way):
    # Row 0 equals row 2: dropping "the first column" would drop row 0 from the list of row 2.
    embeddings = np.array([[1.0, 2.0], [5.0, 5.0], [1.0, 2.0]])
    ranks = retrieval_ranks(embeddings, [0, 1, 0])
    np.testing.assert_array_equal(ranks.first_hit, [1, 0, 1])
    np.testing.assert_array_equal(ranks.nearest_distance[[0, 2]], [0, 0])


def test_all_rows_equal(way):
    # Everything is tied, so the order is that of the index.
    labels = np.array([0, 1, 1, 0, 2, 0])
    embeddings = np.full((6, 7), 0.3, np.float32)
    assert_same(retrieval_ranks(embeddings, labels), naive_ranks(np.zeros((6, 1)), labels))


def test_query_equal_to_itself_in_a_gallery_is_an_answer(way):
    embeddings, labels = np.arange(6.0).reshape(3, 2), [0, 1, 2]
    ranks = retrieval_ranks(embeddings, labels, embeddings, labels)
    np.testing.assert_array_equal(ranks.first_hit, [1, 1, 1])
    np.testing.assert_array_equal(ranks.nearest_distance, [0, 0, 0])


small_sets = st.tuples(st.integers(2, 40), st.integers(1, 12), st.integers(0, 2**32 - 1))


@settings(max_examples=100, **COMMON)
@given(small_sets)
def test_same_set_against_naive(way, case):
    size, classes, seed = case
    rng = np.random.default_rng(seed)
    embeddings = rng.integers(-2, 3, (size, 3))  # many ties and duplicates, and exact in float32
    labels = rng.integers(0, classes, size)
    assert_same(retrieval_ranks(embeddings, labels), naive_ranks(embeddings, labels))
    assert retrieval_metrics(embeddings, labels) == pytest.approx(naive_metrics(embeddings, labels), nan_ok=True)


@settings(max_examples=100, **COMMON)
@given(small_sets, st.integers(1, 40))
def test_query_and_gallery_against_naive(way, case, gallery_size):
    size, classes, seed = case
    rng = np.random.default_rng(seed)
    sets = (rng.integers(-2, 3, (size, 3)), rng.integers(0, classes, size) - 3)
    sets += (rng.integers(-2, 3, (gallery_size, 3)), rng.integers(0, classes, gallery_size) - 3)
    assert_same(retrieval_ranks(*sets), naive_ranks(*sets))
    assert retrieval_metrics(*sets, ks=(1, 3)) == pytest.approx(naive_metrics(*sets, ks=(1, 3)), nan_ok=True)


@pytest.mark.parametrize("seed", range(3))
def test_many_blocks_against_naive(way, monkeypatch, seed):
    monkeypatch.setattr(ranking, "_tile", lambda rows: 64)
    monkeypatch.setattr(ranking, "_BLOCK_BYTES", 2**14)
    rng = np.random.default_rng(seed)
    labels = np.concatenate([rng.integers(0, 60, 250), rng.integers(60, 63, 50), [99]])
    rng.shuffle(labels)
    embeddings = rng.integers(-3, 4, (len(labels), 3))
    assert_same(retrieval_ranks(embeddings, labels), naive_ranks(embeddings, labels))
    sets = embeddings[:90], labels[:90], embeddings[60:], labels[60:]
    assert_same(retrieval_ranks(*sets), naive_ranks(*sets))


@pytest.mark.parametrize("size, width", [(40, 3), (300, 64), (1300, 17)])
def test_equal_rows_get_equal_distances_wherever_they_lie(way, size, width):
    # Rows that are not exact in float32: only one order of summation for all makes duplicates tie. Expected is the
    # same set with integers in place of the distinct rows.
    rng = np.random.default_rng(size)
    kinds = rng.integers(0, 9, size)
    distinct = rng.normal(size=(9, width)).astype(np.float32)
    labels = rng.integers(0, size // 8, size)
    squared = np.sum((distinct[:, None].astype(np.float64) - distinct[None]) ** 2, axis=2)
    coded = np.argsort(np.argsort(squared, axis=1), axis=1)  # rank of each kind as seen from each kind
    ranks = retrieval_ranks(distinct[kinds], labels)
    for i in rng.choice(size, 40, replace=False):
        order = np.lexsort((np.arange(size), coded[kinds[i]][kinds]))
        hits = labels[order[order != i]] == labels[i]
        expected = np.argmax(hits) + 1 if hits.any() else 0
        assert ranks.first_hit[i] == expected
        r = hits.sum()
        assert r == 0 or ranks.r_precision[i] == pytest.approx(hits[:r].mean())


@pytest.mark.parametrize("size", [2, 90, 2100])
def test_one_device_equals_eight(way, size):
    rng = np.random.default_rng(size)
    embeddings, labels = rng.normal(size=(size, 16)), rng.integers(0, max(1, size // 40), size)
    assert len(jax.devices()) == 8
    one = retrieval_ranks(embeddings, labels, devices=jax.devices()[:1])
    eight = retrieval_ranks(embeddings, labels, devices=jax.devices())
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    one = neighbours(embeddings, k=1, devices=jax.devices()[:1])
    jax.tree.map(np.testing.assert_array_equal, one, neighbours(embeddings, k=1))


def test_counting_and_top_k_agree(monkeypatch):
    rng = np.random.default_rng(0)
    embeddings, labels = rng.normal(size=(1500, 32)), rng.integers(0, 40, 1500)
    results = []
    for limit in WAYS.values():
        monkeypatch.setattr(ranking, "COUNTING_LIMIT", limit)
        results.append(retrieval_ranks(embeddings, labels))
    for name, *columns in zip(results[0]._fields, *results, strict=True):
        for column in columns[1:]:
            np.testing.assert_allclose(column, columns[0], rtol=1e-5, atol=1e-6, err_msg=name)


def test_norm_matters_and_jax_arrays_are_taken():
    embeddings = np.array([[1.0, 0.0], [10.0, 0.0], [1.0, 1.0], [9.0, 1.0]])
    labels = np.array([0, 1, 0, 1])
    assert retrieval_metrics(embeddings, labels)["R@1"] == 1
    assert retrieval_metrics(jax.numpy.asarray(embeddings), jax.numpy.asarray(labels))["R@1"] == 1
    assert retrieval_metrics(embeddings.astype(np.float16), labels.tolist())["R@1"] == 1


def test_summarise_is_the_second_half():
    rng = np.random.default_rng(0)
    embeddings, labels = rng.normal(size=(30, 4)), rng.integers(0, 5, 30)
    ranks = retrieval_ranks(embeddings, labels)
    assert summarise(ranks, ks=(1, 7)) == retrieval_metrics(embeddings, labels, ks=(1, 7))


@settings(max_examples=60, **COMMON)
@given(st.integers(2, 40), st.integers(1, 45), st.booleans(), st.integers(0, 2**32 - 1))
def test_neighbours_against_naive(size, k, same_set, seed):
    rng = np.random.default_rng(seed)
    queries = rng.integers(-2, 3, (size, 3))
    gallery = queries if same_set else rng.integers(-2, 3, (50, 3))
    k = min(k, size - 1) if same_set else k
    found = neighbours(queries, None if same_set else gallery, k)
    distance = np.linalg.norm(queries[:, None] - gallery[None], axis=2)
    if same_set:
        np.fill_diagonal(distance, np.inf)
    order = np.argsort(distance, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(found.index, order)
    np.testing.assert_allclose(found.distance, np.take_along_axis(distance, order, axis=1), rtol=1e-6)


X, Y = np.eye(4), np.arange(4) % 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.zeros((0, 3)), []), "embeddings: no rows"),
        ((np.zeros((1, 3)), [0]), "embeddings: a single row"),
        ((np.zeros(3), [0, 1, 2]), "embeddings: expected shape"),
        ((np.zeros((3, 0)), [0, 1, 2]), "embeddings: expected shape"),
        ((X, Y[:3]), "labels: expected shape"),
        ((X, Y[:, None]), "labels: expected shape"),
        ((X, [0, 1, np.nan, 1]), "labels: NaN"),
        ((np.where(X > 0, np.nan, X), Y), "embeddings: NaN"),
        ((np.where(X > 0, np.inf, X), Y), "embeddings: NaN"),
        ((X * 1e19, Y), "embeddings: .* too large"),
        ((X * 1e200, Y), "embeddings: .* too large"),
        ((X * 1e-20, Y), "^embeddings: too small for float32, the largest number is 1e-20; multiply all by one factor"),
        ((X * 1e-60, Y), "embeddings: too small for float32, the largest number is 1e-60"),
        (((X * 1e-18).astype(np.float32), Y), "embeddings: too small for float32, the largest number is 1e-18"),
        ((X, Y, X * 1e-18, Y), "gallery: too small for float32"),
        ((X * [[1], [1], [1e-50], [1e-42]], Y), "2 rows are too small for float32 but not 0, the first is row 2"),
        ((X, [[1], [1, 2], [1], [2]]), "^labels: rows hold different numbers of labels$"),
        ((X, Y, X, np.array([[1], [1, 2], [1], [2]], object)), "^gallery_labels: rows hold different numbers of"),
        ((X, np.stack([Y, Y], axis=1)), r"got \(4, 2\); several labels per row: full_ranking.rank_all takes \[n, l\]"),
        ((X, Y, X, np.stack([Y, Y], axis=1)), r"gallery_labels: .* full_ranking.rank_all takes \[n, l\]"),
        ((X, Y, X), "gallery_labels: missing"),
        ((X, Y, None, Y), "gallery: missing"),
        ((X, Y, X[:, :3], Y), "gallery: width 3"),
        ((X, Y, X, Y[:2]), "gallery_labels: expected shape"),
        ((X, Y, X[:0], Y[:0]), "gallery: no rows"),
        ((X, Y, np.where(X > 0, np.nan, X), Y), "gallery: NaN"),
        ((X, Y, None, None, ()), "ks: "),
        ((X, Y, None, None, (0,)), "ks: "),
        ((X, Y, None, None, (1.5,)), "ks: "),
        ((X, [None] * len(X)), "labels: None is no label"),
        ((X + 0j, Y), "embeddings: expected real numbers, got complex"),
        ((X, Y.astype(str), X, Y), "names on one side and numbers on the other"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=message) as error:
        warnings.simplefilter("error")  # numpy's of a cast, which the error tells
        retrieval_metrics(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [2.0**-48, 2.0**58, 1.0])
def test_any_norm_that_float32_holds_gives_the_same_metrics(scale):
    rng = np.random.default_rng(3)
    labels = np.arange(60) // 4
    x = rng.normal(size=(15, 8))[labels] + 0.7 * rng.normal(size=(60, 8))
    assert retrieval_metrics(x * scale, labels) == retrieval_metrics(x, labels)


def test_rows_of_zeros_and_vanished_uncertainties_are_not_too_small():
    x = np.eye(4) * [1, 1, 0, 0]
    assert retrieval_metrics(x, Y, ks=(4,))["R@4"] == retrieval_metrics(np.zeros((4, 4)), Y, ks=(4,))["R@4"] == 1
    assert "collapsed" in failure_signs(np.eye(4), np.full((4, 2), 1e-25) + 1e-26 * np.eye(4, 2))[0]
    kmeans(np.full((6, 3), 1e-9) + np.spacing(1e-9) * np.eye(6, 3), 2)


@pytest.mark.parametrize("k", [0, 4, -1])
def test_neighbours_that_are_not_there(k):
    with pytest.raises(ValueError, match="k: expected 1 to 3"):
        neighbours(np.eye(4), k=k)
