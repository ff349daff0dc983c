"""Queries whose class is not in the gallery: metrics against naive loops, and the promises of the rules."""

import itertools

import numpy as np
import pytest

from idml_jax.ism import Metric
from idml_jax.metrics import calibration, open_set, strangers
from idml_jax.metrics.calibration import HeldOut
from idml_jax.metrics.embedded import Embedded, joined, rows_of, scores_of


def blobs(classes, per_class=12, d=8, seed=0, first=0, spread=0.45):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    rows = rng.normal(size=(classes, d))[labels] + spread * rng.uniform(0.3, 2, (len(labels), 1)) * rng.normal(
        size=(len(labels), d)
    )
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Embedded(rows.astype(np.float32), labels + first)


def test_rates_are_those_of_loops_over_all_thresholds():
    rng = np.random.default_rng(0)
    for size in (5, 40):
        score, mated, right = rng.integers(0, 8, size).astype(float), rng.random(size) < 0.6, rng.random(size) < 0.7
        mated[:2] = True, False
        fpirs = (0.0, 0.1, 0.25, 1.0)
        expected = []
        for share in fpirs:
            rates = [0.0]
            for limit in np.unique(score):
                if np.mean(score[~mated] <= limit) <= share + 1e-12:
                    rates.append(np.mean((score <= limit)[mated] & right[mated]))
            expected.append(rates[-1])
        np.testing.assert_allclose(open_set.tpir(score, right, mated, fpirs), expected)
        found = open_set.measures(score, right, mated)
        pairs = [(b > a) + 0.5 * (b == a) for a in score[mated] for b in score[~mated]]
        assert found["AUROC"] == pytest.approx(np.mean(pairs)) and set(found) == {
            "AUROC",
            "AURC",
            "TPIR@0.1",
            "TPIR@0.01",
        }
    everyone = np.ones(4, bool)
    assert np.isnan(open_set.tpir(np.arange(4.0), everyone, everyone)).all()
    with pytest.raises(ValueError, match="fpirs"):
        open_set.tpir(score, right, mated, [2])


def test_a_split_takes_classes_out_of_the_gallery():
    data = blobs(9)
    one = open_set.split(data, None, 3)
    gone = set(range(9)) - set(one.gallery.labels.tolist())
    assert len(gone) == 4 and not one.mated[np.isin(data.labels, list(gone))].any() and one.mated.sum() == 60
    for query, row in enumerate(one.own):
        assert (row < 0) == (data.labels[query] in gone)
        assert row < 0 or (one.gallery.semantic[row] == data.semantic[query]).all()
    # A class of one image in the gallery: its only image is the query, which is then a stranger.
    lone = data._replace(labels=np.where(np.arange(108) == 0, 99, data.labels))
    for seed in range(3):
        assert not open_set.split(lone, None, seed).mated[0]
    apart = open_set.split(rows_of(data, np.arange(0, 108, 2)), rows_of(data, np.arange(1, 108, 2)), 0, queries=20)
    assert len(apart.own) == 20 and (apart.own == -1).all() and 0 < apart.mated.sum() < 20
    assert open_set.report(data._replace(labels=np.zeros(108, int))) == {}


def test_strangers_see_nothing_of_their_class():
    held = blobs(6)
    known = calibration.answer(HeldOut(held), Metric())
    for label in range(6):
        mine = held.labels == label
        alone = scores_of(rows_of(held, mine), rows_of(held, ~mine), setting=known.setting)
        for name, expected in alone.items():
            np.testing.assert_allclose(known.strangers.scores[name][mine], expected, atol=1e-6, err_msg=name)
    fitted = calibration.fit(known)
    assert np.all((fitted.open.mated > 0) & (fitted.open.mated < 1)) and fitted.open.mated.mean() > 0.5
    two = calibration.fit(calibration.answer(HeldOut(blobs(2, per_class=3)), Metric()))
    assert two.open is not None and np.isfinite(two.open.right).all()
    one = calibration.fit(calibration.answer(HeldOut(held._replace(labels=held.labels * 0)), Metric()))
    assert one.open is None and strangers.judge(one, known.scores).known is None
    assert strangers.estimated_share(one, known.scores) == 0


@pytest.fixture(scope="module")
def calibrated():
    """Two calibrations on different held-out classes, each with its gallery."""

    def one(seed):
        held, gallery = blobs(30, seed=seed + 1), blobs(60, seed=seed + 2, first=100)
        return calibration.calibrate(HeldOut(held, joined([held, gallery]), np.arange(360)), Metric()), gallery

    return one(0), one(10)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_the_rules_keep_their_promises_among_strangers(calibrated, share):
    right = answered = unknown = unknown_answered = 0
    off = []
    for (fitted, gallery), seed in itertools.product(calibrated, range(4)):
        rng = np.random.default_rng(seed)
        others = blobs(40, seed=50 + seed, first=500)
        size = int(200 * share)
        asked = np.concatenate([rng.choice(720, 200 - size, False), rng.choice(480, size, False) + 720])
        queries = rows_of(joined([gallery, others]), asked)
        own = np.where(asked < 720, asked, -1)
        found = calibration.uncertainty.nearest_twenty(queries.semantic, gallery.semantic, own=own)
        scores = scores_of(queries, gallery, Metric(), own, found, setting=fitted.setting)
        correct = gallery.labels[found.index[:, 0]] == queries.labels
        estimate = strangers.estimated_share(fitted, scores)
        sure = strangers.judge(fitted, scores, estimate)
        off.append((abs(estimate - share), abs(sure.known.mean() - (1 - share))))
        # The confidence is fitted in a gallery of 90 classes and used in one of 60: rather too low than too high.
        assert -0.15 < sure.sure.mean() - correct.mean() < 0.05
        given = 1 - sure.sure <= strangers.rule(fitted, estimate, 0.8).value
        right, answered = right + np.sum(correct & given), answered + np.sum(given)
        few = 1 - sure.sure <= strangers.rule(fitted, estimate, answered_strangers=0.05).value
        unknown, unknown_answered = unknown + np.sum(own < 0), unknown_answered + np.sum(few & (own < 0))
        both = strangers.rule(fitted, estimate, 0.8, 0.05)
        assert both.value == min(both.precision.value, both.strangers)
    assert np.max(off) < 0.2 and np.mean(off) < 0.13  # the estimate of 0 % can only be too high
    assert right >= 0.78 * answered and (answered > 200 or share > 0.5)
    assert unknown_answered <= 0.05 * unknown + 2 * np.sqrt(0.05 * max(1, unknown))


def test_moved_shares_and_thresholds():
    known = np.asarray([0.1, 0.5, 0.9])
    np.testing.assert_allclose(strangers.with_share(known, 0.5), known)
    assert (strangers.with_share(known, 0.0) == 1).all() and (strangers.with_share(known, 1.0) == 0).all()
    assert strangers.with_share(known, 0.2)[1] == pytest.approx(0.8)
    rng = np.random.default_rng(0)
    missed = sum(strangers.stranger_threshold(rng.random(200), 0.1) > 0.1 for _ in range(400))
    assert 5 <= missed <= 32  # at most 5 %, and two standard deviations
    assert strangers.stranger_threshold(np.arange(10.0), 0.01) == -np.inf
    assert strangers.stranger_threshold(np.arange(100.0), 0.05) < 1
    with pytest.raises(ValueError, match="share above 0"):
        strangers.stranger_threshold(np.arange(3.0), 1.5)
