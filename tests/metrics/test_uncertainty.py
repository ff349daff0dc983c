"""Uncertainty metrics by hand and against naive definitions; introspective retrieval; confidence."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_retrieval import naive_ranks

from idml_jax import ism
from idml_jax.ism import Metric
from idml_jax.metrics import introspective, uncertainty
from idml_jax.metrics.confidence import confidence, fit_confidence
from idml_jax.metrics.retrieval import ranks_by_distance, retrieval_ranks

scores_and_answers = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(scores_and_answers)
def test_r_auroc_is_the_share_of_ordered_pairs(case):
    scores, correct = (np.array(column) for column in zip(*case, strict=True))
    pairs = [np.sign(w - c) / 2 + 0.5 for w in scores[~correct] for c in scores[correct]]
    assert uncertainty.r_auroc(scores, correct) == pytest.approx(np.mean(pairs) if pairs else np.nan, nan_ok=True)
    assert (uncertainty.r_auroc_undefined(correct) is None) == bool(pairs)


def test_r_auroc_by_hand():
    assert uncertainty.r_auroc([0.1, 0.2, 0.9], [True, True, False]) == 1
    assert uncertainty.r_auroc([0.1, 0.2, 0.9], [False, True, True]) == 0
    assert uncertainty.r_auroc([0.5, 0.5, 0.5, 0.5], [False, True, True, False]) == 0.5
    assert uncertainty.r_auroc([np.inf, 0.5], [False, True]) == 1
    assert "R@1 = 1" in uncertainty.r_auroc_undefined([True, True])
    assert "R@1 = 0" in uncertainty.r_auroc_undefined([False])


def test_r_auroc_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed (extra 'test')")
    rng = np.random.default_rng(0)
    scores, correct = rng.integers(0, 50, 2000), rng.random(2000) < 0.7
    assert uncertainty.r_auroc(scores, correct) == pytest.approx(metrics.roc_auc_score(~correct, scores))


def test_risk_coverage_by_hand():
    curve = uncertainty.risk_coverage([0.1, 0.4, 0.2, 0.3], [True, False, False, True])
    np.testing.assert_allclose(curve.coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(curve.risk, [0, 1 / 2, 1 / 3, 2 / 4])
    assert curve.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert curve.excess_aurc == pytest.approx(curve.aurc - (0 + 0 + 1 / 3 + 1 / 2) / 4)


@settings(max_examples=100, deadline=None)
@given(scores_and_answers)
def test_risk_coverage(case):
    scores, correct = (np.array(column) for column in zip(*case, strict=True))
    curve = uncertainty.risk_coverage(scores, correct)
    assert curve.risk[-1] == pytest.approx(np.mean(~correct))
    assert curve.excess_aurc >= -1e-12
    assert uncertainty.risk_coverage(~correct, correct).excess_aurc == pytest.approx(0)
    order = np.random.default_rng(0).permutation(len(scores))
    np.testing.assert_allclose(curve.risk, uncertainty.risk_coverage(scores[order], correct[order]).risk)
    # Ties: the mean over many random orders.
    rng, risks = np.random.default_rng(1), []
    for _ in range(400):
        wrong = ~correct[np.lexsort((rng.random(len(scores)), scores))]
        risks.append(np.cumsum(wrong) / np.arange(1, len(scores) + 1))
    np.testing.assert_allclose(np.mean(risks, axis=0), curve.risk, atol=0.15)


def test_spearman():
    assert uncertainty.spearman([1, 2, 3, 4], [10, 20, 20.5, 100]) == pytest.approx(1)
    assert uncertainty.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert np.isnan(uncertainty.spearman([1, 1, 1], [1, 2, 3]))
    # Ranks 1.5 1.5 3 4 and 1 2 3 4.
    expected = np.corrcoef([1.5, 1.5, 3, 4], [1, 2, 3, 4])[0, 1]
    assert uncertainty.spearman([0, 0, 5, 9], [1, 2, 3, 4]) == pytest.approx(expected)


def test_probability_greater():
    assert uncertainty.probability_greater([2, 3, 1, 5], [1, 3, 2, 4]) == (1 + 0.5 + 0 + 1) / 4


@pytest.mark.parametrize("function", [uncertainty.r_auroc, uncertainty.risk_coverage, uncertainty.spearman])
def test_bad_columns(function):
    for arguments in (([], []), ([1.0, np.nan], [1, 0]), ([1.0, 2.0], [1]), ([[1.0]], [[1]])):
        with pytest.raises(ValueError, match=r"^\w+: "):
            function(*arguments)
    with pytest.raises(ValueError, match="nearest_correct: expected booleans"):
        uncertainty.r_auroc([1.0, 2.0], [0.3, 1])


def test_free_scores():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 8))
    scores = uncertainty.free_scores(rows)
    assert list(scores) == ["nearest_distance", "margin_2", "margin_10", "margin_20", "ratio_20", "norm"]
    distance = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    order = np.argsort(distance, axis=1)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = np.take_along_axis(unit @ unit.T, order, axis=1)
    np.testing.assert_allclose(scores["nearest_distance"], distance.min(1), rtol=1e-5)
    np.testing.assert_allclose(scores["margin_10"], cosine[:, 9] - cosine[:, 0], atol=1e-5)
    np.testing.assert_allclose(scores["norm"], -np.linalg.norm(rows, axis=1), rtol=1e-5)
    # A small gallery has no 10th neighbour; normalised rows have no norm to speak of, unless it is given.
    scores = uncertainty.free_scores(unit, unit[:5], norms=np.linalg.norm(rows, axis=1))
    assert list(scores) == ["nearest_distance", "margin_2", "norm"]
    assert "norm" not in uncertainty.free_scores(unit)
    assert "norm" not in uncertainty.free_scores(unit[:1], unit[1:])
    # A single query has the norm too, as it must where a confidence was fitted with it.
    for known in ({"norms": np.linalg.norm(rows[:1], axis=1)}, {}):
        one = uncertainty.free_scores(unit[:1] if known else rows[:1], rows[1:], **known)
        np.testing.assert_allclose(one["norm"], -np.linalg.norm(rows[:1], axis=1), rtol=1e-5)
    assert list(uncertainty.free_scores(rows[:2])) == ["nearest_distance", "norm"]


def test_bootstrap_intervals():
    rng = np.random.default_rng(0)
    correct = rng.random(400) < 0.7
    scores = rng.normal(size=400) - correct
    recall = uncertainty.recall_interval(correct, seed=1)
    spread = 1.96 * np.sqrt(0.7 * 0.3 / 400)
    assert recall.value == correct.mean()
    assert recall.low == pytest.approx(recall.value - spread, abs=0.01)
    assert recall.high == pytest.approx(recall.value + spread, abs=0.01)
    quick = uncertainty.r_auroc_interval(scores, correct, seed=1, samples=500)
    plain = uncertainty.bootstrap(uncertainty.r_auroc, scores, correct, seed=1, samples=500)
    assert quick == plain  # the same draws
    assert quick.low < uncertainty.r_auroc(scores, correct) < quick.high
    assert quick == uncertainty.r_auroc_interval(scores, correct, seed=1, samples=500)
    assert quick != uncertainty.r_auroc_interval(scores, correct, seed=2, samples=500)
    assert np.isnan(uncertainty.r_auroc_interval([1.0, 2.0], [True, True])).all()
    assert uncertainty.recall_interval([True, True]) == (1, 1, 1)


def test_similarity_correlation_and_failure_signs():
    rng = np.random.default_rng(0)
    semantic, other = rng.normal(size=(300, 16)), rng.normal(size=(300, 5))
    rotated = semantic @ np.linalg.qr(rng.normal(size=(16, 16)))[0] + 3.0
    assert uncertainty.similarity_correlation(semantic, rotated) == pytest.approx(1, abs=1e-3)
    assert abs(uncertainty.similarity_correlation(semantic, other)) < 0.05
    assert abs(uncertainty.similarity_correlation(semantic[:10], other[:10])) < 0.5
    assert uncertainty.failure_signs(semantic, other) == []
    (sign,) = uncertainty.failure_signs(semantic, rotated)
    assert "copies" in sign
    (sign,) = uncertainty.failure_signs(semantic, 1e-4 * other)
    assert "collapsed" in sign
    (sign,) = uncertainty.failure_signs(semantic, other / np.linalg.norm(other, axis=1, keepdims=True))
    assert "constant" in sign
    assert len(uncertainty.failure_signs(semantic, np.zeros((300, 5)))) >= 1


def test_an_uncertainty_that_leaves_no_distances_is_a_sign_of_failure():
    rng = np.random.default_rng(0)
    semantic, other = rng.normal(size=(300, 16)), rng.normal(size=(300, 5))
    semantic /= np.linalg.norm(semantic, axis=1, keepdims=True)
    assert uncertainty.failure_signs(semantic, other) == []
    (sign,) = uncertainty.failure_signs(semantic, 10 * other)
    one, two = np.triu_indices(256, 1)
    some = np.unique(np.linspace(0, 299, 256).astype(int))
    alpha = np.linalg.norm(semantic[some][one] - semantic[some][two], axis=1)
    beta = np.linalg.norm(10 * (other[some][one] + other[some][two]), axis=1)
    assert f"keep less than {100 * np.median(np.exp(-beta / alpha / 5)):.2g}% of" in sign
    assert uncertainty.failure_signs(semantic, 10 * other, Metric(temperature=100.0)) == []
    assert uncertainty.failure_signs(semantic, 10 * other, Metric("released"))  # ranks as the relative form


def test_threshold_for_precision():
    scores = np.arange(1000.0)
    correct = np.random.default_rng(0).random(1000) < np.linspace(1, 0.2, 1000)
    chosen = uncertainty.threshold_for_precision(scores, correct, 0.8)
    assert chosen.reached and chosen.bound >= 0.8 and chosen.precision > 0.8
    assert uncertainty.selective(scores, correct, chosen) == pytest.approx(
        {"coverage": chosen.coverage, "precision": chosen.precision, "answers": round(1000 * chosen.coverage)}
    )
    bold = uncertainty.threshold_for_precision(scores, correct, 0.8, confidence=None)
    assert bold.coverage > chosen.coverage and bold.precision >= 0.8
    # No larger threshold would do.
    shares = np.cumsum(correct) / np.arange(1, 1001)
    assert bold.coverage == (np.flatnonzero(shares >= 0.8)[-1] + 1) / 1000


def test_a_precision_that_cannot_be_reached():
    chosen = uncertainty.threshold_for_precision([1.0, 2.0, 3.0], [True, True, True], 0.99)
    assert not chosen.reached and chosen.value == -np.inf and chosen.coverage == 0
    assert chosen.precision == 1 and chosen.bound < 0.99
    nothing = uncertainty.selective([1.0, -np.inf], [True, True], -1e9)
    assert nothing["coverage"] == 0.5
    nothing = uncertainty.selective([1.0, 2.0], [True, True], chosen)
    assert nothing["answers"] == 0 and np.isnan(nothing["precision"])
    # A threshold cannot part equal scores.
    tied = uncertainty.threshold_for_precision([1.0, 1.0, 2.0], [True, False, True], 0.9, confidence=None)
    assert not tied.reached and tied.precision == pytest.approx(2 / 3)
    for precision, level in ((0, 0.95), (1.1, 0.95), (0.9, 1.0), (0.9, 0.2)):
        with pytest.raises(ValueError, match=r"precision|confidence"):
            uncertainty.threshold_for_precision([1.0], [True], precision, confidence=level)


def embeddings(seed, size, classes):
    rng = np.random.default_rng(seed)
    semantic, u = rng.normal(size=(size, 6)), 0.5 * rng.normal(size=(size, 4))
    return ism.Embedding(semantic.astype(np.float32), u.astype(np.float32)), rng.integers(0, classes, size)


@pytest.mark.parametrize("relative", [True, False])
def test_introspective_ranking_against_naive(relative):
    embedding, labels = embeddings(0, 80, 9)
    both = introspective.compare(embedding, labels, metric=Metric("relative" if relative else "absolute", 2.0))
    s, u = (np.asarray(x, np.float64) for x in embedding)
    alpha = np.linalg.norm(s[:, None] - s[None], axis=2)
    beta = np.linalg.norm(u[:, None] + u[None], axis=2)
    exponent = beta / np.where(alpha > 0, alpha, 1) if relative else beta
    distance = alpha * np.exp(-exponent / 2.0)
    for i in range(80):
        others = np.delete(np.arange(80), i)
        hits = labels[others[np.argsort(distance[i, others], kind="stable")]] == labels[i]
        r = hits.sum()
        assert both.introspective.first_hit[i] == (np.argmax(hits) + 1 if r else 0)
        assert r == 0 or both.introspective.r_precision[i] == pytest.approx(hits[:r].mean())
        assert both.introspective.nearest_distance[i] == pytest.approx(distance[i, others].min(), rel=1e-4)
    np.testing.assert_array_equal(both.semantic.first_hit, retrieval_ranks(s, labels).first_hit)
    flat = introspective.compare_metrics(both, ks=(1,))
    assert flat["semantic/R@1"] == np.mean(both.semantic.nearest_correct)
    assert flat["introspective/R@1"] == np.mean(both.introspective.nearest_correct)


def test_certain_embeddings_rank_as_the_semantic_distance():
    embedding, labels = embeddings(1, 60, 7)
    gallery, gallery_labels = embeddings(2, 50, 8)
    certain = ism.Embedding(embedding.semantic), ism.Embedding(gallery.semantic)
    both = introspective.compare(certain[0], labels, certain[1], gallery_labels)
    np.testing.assert_array_equal(both.semantic.first_hit, both.introspective.first_hit)
    np.testing.assert_allclose(both.semantic.average_precision, both.introspective.average_precision)


def city_block(a, b):
    return jax.numpy.sum(jax.numpy.abs(a[:, None, :] - b[None, :, :]), axis=2)


def negative_product(a, b):
    return -a @ b.T


def square(x):
    return np.asarray([[v, v * v] for v in x], np.float32)


@pytest.mark.parametrize("size, same_set", [(50, True), (50, False), (200, True)])
def test_any_distance(size, same_set):
    rng = np.random.default_rng(size)
    rows, labels = rng.integers(-3, 4, (size, 2)), rng.integers(0, 3, size)
    gallery, gallery_labels = (None, None) if same_set else (rng.integers(-3, 4, (30, 2)), rng.integers(0, 3, 30))
    found = ranks_by_distance(city_block, rows.astype(np.float32), labels, gallery, gallery_labels)
    # City-block distance in the plane is the squared distance of unary codes.
    code = lambda x: None if x is None else (x[:, :, None] >= np.arange(-3, 4)).reshape(len(x), -1).astype(float)
    expected = naive_ranks(code(rows), labels, code(gallery), gallery_labels)
    for got, want in zip(found[:5], expected[:5], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_negative_distances_are_ordered_too():
    rng = np.random.default_rng(0)
    rows, labels = rng.integers(-3, 4, (90, 3)).astype(np.float32), rng.integers(0, 2, 90)
    found = ranks_by_distance(negative_product, rows, labels)
    for i in range(90):
        others = np.delete(np.arange(90), i)
        hits = labels[others[np.argsort(-(rows[i] @ rows[others].T), kind="stable")]] == labels[i]
        assert found.first_hit[i] == np.argmax(hits) + 1
        assert found.r_precision[i] == pytest.approx(hits[: hits.sum()].mean())


def test_any_distance_bad_input():
    with pytest.raises(ValueError, match="distance: gave NaN"):
        ranks_by_distance(lambda a, b: negative_product(a, b) + np.nan, np.eye(3), [0, 0, 1])
    with pytest.raises(ValueError, match="queries: expected arrays"):
        ranks_by_distance(city_block, (np.eye(3), np.eye(2)), [0, 0, 1])
    with pytest.raises(ValueError, match="queries: a single row"):
        ranks_by_distance(city_block, np.eye(1), [0])
    with pytest.raises(ValueError, match="labels: expected shape"):
        ranks_by_distance(city_block, np.eye(3), [0])


def test_answer_scores():
    embedding, _ = embeddings(3, 40, 4)
    scores = introspective.answer_scores(embedding, metric=Metric(temperature=2.0))
    s, u = (np.asarray(x, np.float64) for x in embedding)
    alpha = np.linalg.norm(s[:, None] - s[None], axis=2)
    np.fill_diagonal(alpha, np.inf)
    answer = alpha.argmin(1)
    beta = np.linalg.norm(u + u[answer], axis=1)
    np.testing.assert_allclose(scores["uncertainty"], np.linalg.norm(u, axis=1), rtol=1e-5)
    np.testing.assert_allclose(scores["pair_uncertainty"], beta, rtol=1e-5)
    expected = alpha.min(1) * np.exp(-beta / alpha.min(1) / 2.0)
    np.testing.assert_allclose(scores["introspective_distance"], expected, rtol=1e-4)
    assert "margin_20" in scores
    assert "uncertainty" not in introspective.answer_scores(ism.Embedding(embedding.semantic))


def test_confidence_is_calibrated_and_ignores_noise():
    rng = np.random.default_rng(0)
    scores = {"useful": rng.normal(size=4000), "noise": rng.normal(size=4000), "constant": np.ones(4000)}
    truth = 1 / (1 + np.exp(-(1 - 2 * scores["useful"])))
    correct = rng.random(4000) < truth
    model = fit_confidence({name: column[:2000] for name, column in scores.items()}, correct[:2000])
    held_out = confidence(model, {name: column[2000:] for name, column in scores.items()})
    assert np.mean(np.abs(held_out - truth[2000:])) < 0.03
    assert abs(model.weights[1]) < 0.2 and model.weights[2] == 0
    assert uncertainty.r_auroc(1 - held_out, correct[2000:]) > 0.75


def test_confidence_of_data_without_errors_stays_below_one():
    model = fit_confidence({"score": np.arange(10.0)}, np.ones(10, bool))
    assert (confidence(model, {"score": np.arange(10.0)}) < 0.97).all()
    with pytest.raises(ValueError, match="score missing"):
        confidence(model, {"other": np.arange(10.0)})
    with pytest.raises(ValueError, match="scores: infinite"):
        fit_confidence({"score": [1.0, np.inf]}, [True, False])
    with pytest.raises(ValueError, match="none given"):
        fit_confidence({}, [True])


def test_the_ratio_is_of_the_nearest_and_the_twentieth_distance():
    rng = np.random.default_rng(0)
    gallery, queries = rng.normal(size=(30, 5)), rng.normal(size=(4, 5))
    found = np.sort(np.linalg.norm(queries[:, None] - gallery[None], axis=2), axis=1)
    scores = uncertainty.free_scores(queries, gallery)
    np.testing.assert_allclose(scores["ratio_20"], found[:, 0] / found[:, 19], rtol=1e-4)
    assert "ratio_20" not in uncertainty.free_scores(queries, gallery[:19])
    same = uncertainty.free_scores(np.ones((2, 3)), np.ones((25, 3)))
    np.testing.assert_array_equal(same["ratio_20"], 1.0)


def test_confidence_with_products_weights_and_scores_out_of_range():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 4000))
    correct = rng.random(4000) < 1 / (1 + np.exp(-3 * a * b))  # nothing but the product tells
    scores = {"a": a, "b": b}
    plain = confidence(fit_confidence(scores, correct), scores)
    model = fit_confidence(scores, correct, products=True)
    assert uncertainty.r_auroc(1 - plain, correct) < 0.6
    assert uncertainty.r_auroc(1 - confidence(model, scores), correct) > 0.8
    far = {"a": [a.max(), 50.0], "b": [b.max(), 50.0]}  # beyond what was seen counts as its end
    assert len(set(confidence(model, far))) == 1
    # A weight is a number of copies.
    weights = rng.integers(0, 3, 4000)
    copied = fit_confidence({k: np.repeat(v, weights) for k, v in scores.items()}, np.repeat(correct, weights))
    weighted = fit_confidence(scores, correct, weights=weights)
    some = {"a": [0.3, -0.5], "b": [0.1, 0.9]}
    np.testing.assert_allclose(confidence(weighted, some), confidence(copied, some), atol=1e-3)
    with pytest.raises(ValueError, match="weights"):
        fit_confidence(scores, correct, weights=-np.ones(4000))
