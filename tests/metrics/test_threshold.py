"""A threshold for a wanted precision keeps its promise: simulated held-out queries, judged on many new ones."""

import numpy as np
import pytest

from idml_jax.metrics import binomial, calibration, design_effect, strangers, uncertainty
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


class TestClasses:
    """Queries of a class are right or wrong together."""

    @staticmethod
    def draw(rng, classes, each=15, spread=2.0):
        """Doubts and right answers, and the share of right answers of each doubt over all classes.

        The chance of a right answer falls with the doubt, and differs by class.
        """
        doubt = rng.random(classes * each)
        shift = np.repeat(rng.normal(scale=spread, size=classes), each)
        right = rng.random(len(doubt)) < 1 / (1 + np.exp(-(5 - 6 * doubt + shift)))
        return doubt, right, np.repeat(np.arange(classes), each)

    def test_the_precision_is_missed_no_more_often_than_stated(self):
        rng = np.random.default_rng(0)
        doubt, right, _ = self.draw(rng, 20_000)
        order = np.argsort(doubt)
        truth = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
        missed = {"as independent": 0, "by class": 0}
        for _ in range(TRIES):
            held, correct, labels = self.draw(rng, 25)
            for name, groups in (("as independent", None), ("by class", labels)):
                found = uncertainty.threshold_for_precision(held, correct, WANTED, groups=groups)
                place = np.searchsorted(doubt[order], found.value)
                missed[name] += bool(found.reached and truth[place] < WANTED)
        allowed = 0.05 * TRIES + 2 * np.sqrt(0.05 * 0.95 * TRIES)
        assert missed["by class"] <= allowed < missed["as independent"], missed

    def test_effects_against_the_formula(self):
        rng = np.random.default_rng(1)
        labels = rng.permutation(np.repeat(np.arange(6), 5))
        strata = (labels >= 4).astype(int)
        right = rng.random(30) < 0.5
        effect = design_effect.design_effects(right, labels, strata, [30])[0]
        share, variance = right.mean(), 0.0
        for stratum in ([0, 1, 2, 3], [4, 5]):
            sums = [sum(right[i] - share for i in range(30) if labels[i] == one) for one in stratum]
            variance += len(sums) / (len(sums) - 1) * sum((x - np.mean(sums)) ** 2 for x in sums)
        smooth = (right.sum() + 0.5) / 31
        assert effect == pytest.approx(max(1.0, variance / (30 * smooth * (1 - smooth))))

    def test_a_group_alone_in_its_stratum_counts_as_independent_queries(self):
        rng = np.random.default_rng(5)
        labels, right = np.repeat(np.arange(5), 20), rng.random(100) < 0.8
        alone, order = labels == 4, rng.permutation(100)
        apart = np.where(alone, 4 + np.arange(100), labels)
        one, many = (
            design_effect.design_effects(right[order], groups[order], alone[order], [40, 100])
            for groups in (labels, np.unique(apart, return_inverse=True)[1])
        )
        np.testing.assert_allclose(one, many)

    def test_worth_of_extreme_samples(self):
        labels = np.repeat(np.arange(10), 20)
        effects = lambda right, groups: design_effect.design_effects(right, groups, None, [200])[0]
        assert effects(np.ones(200, bool), labels) == 1  # all right: classes do not differ
        whole = effects(labels < 5, labels)  # 10 answers, each given 20 times
        assert 20 < whole < 23
        assert effects(labels < 5, np.arange(200)) == pytest.approx(1, abs=0.01)

    def test_effects_of_first_strangers_are_those_of_a_sample(self):
        rng = np.random.default_rng(3)
        labels = rng.permutation(np.repeat(np.arange(8), [3, 5, 7, 9, 4, 6, 2, 8]))
        found = design_effect.effects_of_first(labels)
        for first in (0, 1, 7, 30, len(labels)):
            answered = np.arange(len(labels)) < first
            whole = design_effect.design_effects(answered, labels, None, [len(labels)])[0]
            assert found[first] == pytest.approx(whole)

    def test_strangers_are_answered_no_more_often_than_stated(self):
        """Classes of strangers differ in how like a known class they are."""
        rng = np.random.default_rng(4)
        draw = lambda classes: np.repeat(rng.normal(size=classes), 20) + 0.7 * rng.normal(size=20 * classes)
        new = draw(20_000)
        missed = {"as independent": 0, "by class": 0}
        for _ in range(TRIES):
            held, labels = draw(60), np.repeat(np.arange(60), 20)
            for name, groups in (("as independent", None), ("by class", labels)):
                missed[name] += bool((new <= strangers.stranger_threshold(held, 0.1, groups=groups)).mean() > 0.1)
        allowed = 0.05 * TRIES + 2 * np.sqrt(0.05 * 0.95 * TRIES)
        assert missed["by class"] <= allowed < missed["as independent"], missed

    def test_one_class_per_query_is_as_without_classes(self):
        rng = np.random.default_rng(2)
        doubt, right = rng.random(300), rng.random(300) < 0.9
        names = np.asarray([f"class {i}" for i in range(300)])
        alone = uncertainty.threshold_for_precision(doubt, right, 0.8, groups=names)
        assert alone.reached and alone.coverage == uncertainty.threshold_for_precision(doubt, right, 0.8).coverage

    def test_refusals(self):
        for name in ("groups", "strata"):
            given = {"groups": [0, 1], "strata": [0, 1]} | {name: [0]}
            with pytest.raises(ValueError, match=name):
                uncertainty.threshold_for_precision([1.0, 2.0], [True, False], 0.5, **given)
