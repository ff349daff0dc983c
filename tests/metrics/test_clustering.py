"""k-means against a naive Lloyd and scikit-learn; NMI, AMI and F1 against scikit-learn and by hand."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idml_jax.metrics import clustering, seeding
from idml_jax.metrics.clustering import ami, f1, kmeans, nmi

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed (extra 'test')")
from sklearn.cluster import KMeans as SklearnKMeans  # noqa: E402
from sklearn.cluster import kmeans_plusplus  # noqa: E402


def blobs(size, width, classes, spread, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, size)
    rows = rng.normal(size=(classes, width))[labels] + spread * rng.normal(size=(size, width))
    return rows.astype(np.float32), labels


def naive_lloyd(rows, centres, iterations):
    """Labels and centres of plain Lloyd in float64, none of whose clusters runs empty."""
    rows, centres = rows.astype(np.float64), centres.astype(np.float64)
    labels = np.argmin(((rows[:, None] - centres[None]) ** 2).sum(2), axis=1)
    for _ in range(iterations):
        centres = np.array([rows[labels == c].mean(axis=0) for c in range(len(centres))])
        labels = np.argmin(((rows[:, None] - centres[None]) ** 2).sum(2), axis=1)
    return labels, centres


@pytest.mark.parametrize("size, k", [(300, 7), (1500, 40), (1500, 300)])
def test_same_clusters_as_a_naive_lloyd(monkeypatch, size, k):
    # The shortcuts leave out only what cannot matter: the result is Lloyd's.
    rows, _ = blobs(size, 8, k, 0.8)
    starts = np.random.default_rng(1).choice(size, k, replace=False)
    monkeypatch.setattr(seeding, "draw", lambda search, k, rng, candidates: starts)
    for iterations in (1, 4, 30):
        found = kmeans(rows, k, iterations=iterations)
        labels, centres = naive_lloyd(rows, rows[starts], iterations)
        np.testing.assert_array_equal(found.labels, labels)
        np.testing.assert_allclose(found.centres, centres, rtol=1e-4, atol=1e-5)
        assert found.inertia == pytest.approx(np.sum((rows - centres[labels]) ** 2), rel=1e-4)
        assert found.iterations <= iterations


@pytest.mark.parametrize("candidates", [None, 1])
def test_inertia_within_one_percent_of_scikit_learn(candidates):
    rows, _ = blobs(2000, 32, 100, 0.9)
    ours = min(kmeans(rows, 100, seed, iterations=50, candidates=candidates).inertia for seed in range(5))
    theirs = []
    for seed in range(5):
        start, _ = kmeans_plusplus(rows, 100, random_state=seed, n_local_trials=candidates)
        theirs.append(SklearnKMeans(100, init=start, n_init=1, max_iter=50, tol=0).fit(rows).inertia_)
    assert ours <= 1.01 * min(theirs)


def test_seeds_follow_the_squared_distance():
    # Three places: a (900 rows), b (50), c (50), c twice as far from a as b is. A first seed at a, as in nine of ten
    # runs, leaves b and c the weights 50 * 1 and 50 * 4.
    rows = np.repeat(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]], np.float32), [900, 50, 50], axis=0)
    norms = np.sum(rows * rows, axis=1)
    search = clustering._Search(rows, norms, jax.devices()[:1])
    second = []
    for seed in range(150):
        first, next_ = seeding.plain(search, 2, np.random.default_rng(seed))
        if first < 900:
            second.append(next_ >= 950)
    assert np.mean(second) == pytest.approx(0.8, abs=0.12)


def test_of_several_candidates_the_best_is_kept():
    # A heap, a smaller one at distance 10, a lone row at 20: the small heap has the weight 9 * 100, the lone row 400.
    rows = np.repeat(np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 20.0]], np.float32), [60, 9, 1], axis=0)
    search = clustering._Search(rows, np.sum(rows * rows, axis=1), jax.devices()[:1])
    heap = {1: [], 8: []}
    for candidates, seen in heap.items():
        for seed in range(60):
            first, second = seeding.draw(search, 2, np.random.default_rng(seed), candidates)
            if first < 60:
                seen.append(60 <= second < 69)
    # One of 900 : 400 is drawn; of eight all miss the heap in one of ten thousand runs.
    assert np.mean(heap[1]) == pytest.approx(9 / 13, abs=0.2)
    assert np.all(heap[8])


@pytest.mark.parametrize("candidates", [1, 6])
def test_seeds_in_batches_reach_the_quality_of_single_draws(candidates):
    rows, _ = blobs(1500, 16, 60, 0.5)
    search = clustering._Search(rows, np.sum(rows * rows, axis=1), jax.devices()[:1])
    ours, theirs = [], []
    for seed in range(8):
        seeds = seeding.draw(search, 60, np.random.default_rng(seed), candidates)
        assert len(set(seeds)) == 60
        ours.append(search.nearest(np.arange(1500), rows[seeds])[0].sum())
        centres, _ = kmeans_plusplus(rows, 60, random_state=seed, n_local_trials=candidates)
        theirs.append(search.nearest(np.arange(1500), centres)[0].sum())
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.1)


def test_same_key_same_clusters_on_any_number_of_devices():
    rows, _ = blobs(700, 12, 30, 1.0)
    one = kmeans(rows, 30, jax.random.key(3), devices=jax.devices()[:1])
    eight = kmeans(rows, 30, jax.random.key(3), devices=jax.devices())
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    again = kmeans(rows, 30, jax.random.PRNGKey(3))
    np.testing.assert_array_equal(one.labels, again.labels)
    assert not np.array_equal(one.labels, kmeans(rows, 30, 4).labels)


def test_restarts_keep_the_best():
    rows, _ = blobs(300, 6, 20, 1.0)
    pairs = [(kmeans(rows, 20, seed).inertia, kmeans(rows, 20, seed, restarts=6).inertia) for seed in range(4)]
    assert all(best <= single for single, best in pairs)
    assert any(best < single for single, best in pairs)


def test_separated_blobs_are_found():
    rows, labels = blobs(900, 16, 12, 0.05)
    found = kmeans(rows, 12, 0)
    for measure in (nmi, ami, f1):
        assert measure(labels, found.labels) == pytest.approx(1, abs=1e-12)


def test_an_empty_cluster_starts_again(monkeypatch):
    # The third start lies on the second: it gets no row, and then the farthest one.
    rows = np.array([[0.0], [0.1], [5.0], [5.1], [5.2], [9.0]], np.float32)
    monkeypatch.setattr(seeding, "draw", lambda search, k, rng, candidates: np.array([0, 2, 2]))
    found = kmeans(rows, 3)
    np.testing.assert_array_equal(found.labels, [0, 0, 1, 1, 1, 2])


def test_far_from_the_origin():
    rows, labels = blobs(400, 5, 8, 0.05)
    found = kmeans(rows + 300, 8, 0, restarts=3)
    assert nmi(labels, found.labels) > 0.95
    np.testing.assert_allclose(found.centres.mean(axis=0), 300, atol=3)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 40])
def test_fewer_distinct_rows_than_clusters(k):
    rows = np.repeat(np.array([[0.3, 1.0, -2.0], [4.0, 0.1, 1.0], [7.0, 7.7, 0.0]], np.float32), [20, 10, 10], axis=0)
    found = kmeans(rows, k)
    assert found.centres.shape == (k, 3) and np.isfinite(found.centres).all()
    assert found.iterations < 10
    if k >= 3:
        assert found.inertia < 1e-6
        assert len({tuple(found.labels[part]) for part in (slice(0, 20), slice(20, 30), slice(30, 40))}) == 3


def test_as_many_clusters_as_rows():
    rows, _ = blobs(70, 5, 3, 1.0)
    found = kmeans(rows, 70)
    assert found.inertia == pytest.approx(0, abs=1e-6)
    assert len(set(found.labels)) == 70


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.zeros((0, 2)), 1), "embeddings: no rows"),
        ((np.full((3, 2), np.nan), 1), "embeddings: NaN"),
        ((np.zeros((3, 2)), 0), "k: expected 1 to 3"),
        ((np.zeros((3, 2)), 4), "k: expected 1 to 3"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        kmeans(*arguments)


def test_bad_numbers_of_runs():
    with pytest.raises(ValueError, match="restarts"):
        kmeans(np.zeros((3, 2)), 1, restarts=0)
    with pytest.raises(ValueError, match="iterations"):
        kmeans(np.zeros((3, 2)), 1, iterations=0)
    with pytest.raises(ValueError, match="candidates"):
        kmeans(np.zeros((3, 2)), 1, candidates=0)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 12), st.booleans(), st.integers(0, 2**32 - 1))
def test_agreement_against_scikit_learn(size, classes, clusters, related, seed):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, classes, size)
    b = (
        np.where(rng.random(size) < 0.7, a, rng.integers(0, clusters, size))
        if related
        else rng.integers(0, clusters, size)
    )
    assert nmi(a, b) == pytest.approx(sklearn_metrics.normalized_mutual_info_score(a, b), abs=1e-9)
    assert ami(a, b) == pytest.approx(sklearn_metrics.adjusted_mutual_info_score(a, b), abs=1e-7)
    (_, false_positive), (false_negative, both) = sklearn_metrics.cluster.pair_confusion_matrix(a, b)
    pairs = 2 * both + false_positive + false_negative
    assert f1(a, b) == pytest.approx(2 * both / pairs if pairs else 1.0)


def test_agreement_at_a_larger_size():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 150, 5000)
    b = np.where(rng.random(5000) < 0.5, a, rng.integers(0, 150, 5000))
    assert nmi(a, b) == pytest.approx(sklearn_metrics.normalized_mutual_info_score(a, b), abs=1e-9)
    assert ami(a, b) == pytest.approx(sklearn_metrics.adjusted_mutual_info_score(a, b), abs=1e-7)


def test_agreement_by_hand():
    a, b = ["x", "x", "x", "y"], [0, 0, 1, 1]
    # Pairs together: in a {01, 02, 12}, in b {01, 23}, in both {01}.
    assert f1(a, b) == pytest.approx(2 * 1 / (3 + 2))
    assert f1([0, 1, 2], [2, 1, 0]) == nmi([0, 1, 2], [2, 1, 0]) == ami([0, 1, 2], [2, 1, 0]) == 1
    assert nmi([0, 0], [1, 1]) == ami([0, 0], [1, 1]) == f1([0, 0], [1, 1]) == 1
    for measure in (nmi, ami, f1):
        with pytest.raises(ValueError, match="clusters: expected shape"):
            measure([0, 1], [0])
        with pytest.raises(ValueError, match="labels: expected shape"):
            measure([], [])
