"""A threshold for a wanted precision keeps its promise: simulated held-out queries, judged on many new ones."""

import numpy as np
import pytest

from idml_jax.metrics import binomial, calibration, uncertainty
from idml_jax.metrics.confidence import confidence

TRIES, QUERIES, WANTED = 200, 200, 0.85


def draw(rng, size, weights):
    """Scores, whether answers are right, and classes."""
    scores = rng.normal(size=(size, 6))
    chance = 1 / (1 + np.exp(-(1.2 + scores @ weights)))
    named = {f"score_{i}": scores[:, i] for i in range(6)}
    return calibration.Known(named, rng.random(size) < chance, rng.integers(0, 20, size)), chance


@pytest.mark.parametrize("weights", [(1.5, 0.8, 0, 0, 0, 0), (0,) * 6], ids=["informative", "uninformative"])
def test_the_precision_is_missed_no_more_often_than_stated(weights):
    missed = reached = 0
    for seed in range(TRIES):
        rng = np.random.default_rng(seed)
        known, _ = draw(rng, QUERIES, np.asarray(weights))
        fitted = calibration.fit(known)
        threshold = uncertainty.threshold_for_precision(fitted.doubt, fitted.correct, WANTED)
        new, chance = draw(rng, 4000, np.asarray(weights))
        answered = 1 - confidence(fitted.model, new.scores) <= threshold.value
        reached += threshold.reached
        missed += bool(answered.any() and chance[answered].mean() < WANTED)
    # 5 % of the tries, and two standard deviations of such a count.
    assert missed <= 0.05 * TRIES + 2 * np.sqrt(0.05 * 0.95 * TRIES)
    assert reached > TRIES / 2 if any(weights) else reached <= 0.05 * TRIES + 2 * np.sqrt(0.05 * 0.95 * TRIES)


def test_where_every_threshold_has_just_the_wanted_precision_the_risk_is_used_and_kept():
    rng = np.random.default_rng(0)
    reached = sum(
        uncertainty.threshold_for_precision(rng.random(QUERIES), rng.random(QUERIES) < WANTED, WANTED).reached
        for _ in range(200)
    )
    assert 2 <= reached <= 17  # of 10, and two standard deviations


def test_doubts_come_from_models_that_have_not_seen_the_class():
    rng = np.random.default_rng(0)
    # One score is the class itself and right answers go by the class: only a model that has seen it can know.
    labels = rng.integers(0, 16, 100)
    right = np.arange(16) % 2 == 0
    scores = {str(c): (labels == c).astype(float) for c in range(16)}
    known = calibration.Known(scores, right[labels], labels)
    fitted = calibration.fit(known)
    seen = uncertainty.r_auroc(1 - confidence(fitted.model, scores), known.correct)
    assert seen > 0.95 and uncertainty.r_auroc(fitted.doubt, known.correct) < 0.6
    changed = calibration.fit(known._replace(changed=known))
    assert uncertainty.r_auroc(changed.doubt, known.correct) < 0.6
    one_class = calibration.fit(known._replace(labels=np.zeros(100, int)))
    assert np.isfinite(one_class.doubt).all()


def test_bounds_and_tails_of_binomial_shares():
    assert binomial.lower_bound(0, 5, 0.05) == 0
    assert binomial.lower_bound(20, 20, 0.05) == pytest.approx(0.05 ** (1 / 20))
    np.testing.assert_allclose(binomial.upper_tail(2, 0.3), [1, 1 - 0.49, 0.09])
    for right, total in ((93, 100), (850, 1000), (1, 7)):
        bound = binomial.lower_bound(right, total, 0.05)
        assert binomial.upper_tail(total, bound)[right] == pytest.approx(0.05)
    assert (binomial.upper_tail(3, 1.0) == 1).all()
