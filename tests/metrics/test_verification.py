"""Verification over all pairs against naive loops and scikit-learn; PLDA against the densities of Gaussians."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.metrics import roc_auc_score, roc_curve

from idml_jax.metrics import names, pair_tiles, same_class, verification
from idml_jax.metrics.closed_form import unit_rows
from idml_jax.metrics.embedded import Embedded
from idml_jax.metrics.pair_scores import Scored, cosine, fit_plda
from idml_jax.metrics.same_class import fit_judge
from idml_jax.metrics.verification import pair_scores, verify


def clouds(classes, each, width, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    x = rng.normal(size=(classes, width))[labels] + spread * rng.normal(size=(len(labels), width))
    return x.astype(np.float32), labels


def naive(scored, labels, gallery=None, gallery_labels=None):
    """All pairs by loops: scores and whether genuine."""
    scores, same = [], []
    for i in range(len(labels)):
        others = range(i + 1, len(labels)) if gallery is None else range(len(gallery_labels))
        for j in others:
            side, names = (scored, labels) if gallery is None else (gallery, gallery_labels)
            scores.append(scored.rows[i] @ side.rows[j] + scored.offsets[i] + side.offsets[j])
            same.append(labels[i] == names[j])
    return np.asarray(scores, np.float32), np.asarray(same)


def check(found, scores, same, fmrs):
    genuine, impostor = scores[same], scores[~same]
    assert (found.genuine, found.impostors) == (len(genuine), len(impostor))
    assert abs(found.auroc - roc_auc_score(same, scores)) <= found.auroc_error + 1e-7
    fpr, tpr, _ = roc_curve(same, scores, drop_intermediate=False)
    gap = (1 - tpr) - fpr  # falls from 1 to -1
    k = int(np.argmax(gap <= 0))
    w = gap[k - 1] / (gap[k - 1] - gap[k])
    assert found.eer == pytest.approx(fpr[k - 1] + w * (fpr[k] - fpr[k - 1]), abs=1e-6)
    for fmr in fmrs:
        rates = found.at_fmr[fmr]
        if fmr * len(impostor) < 1:
            assert np.isnan(rates).all()
            continue
        every = np.unique(scores)
        every = np.append(every, np.nextafter(every[-1], np.float32(np.inf)))
        best = next(t for t in every if np.mean(impostor >= t) <= fmr)  # the lowest one
        assert rates.fmr == pytest.approx(np.mean(impostor >= best)) and rates.fmr <= fmr
        assert rates.fnmr == pytest.approx(np.mean(genuine < best))
        assert np.mean(impostor >= np.float32(rates.threshold)) == pytest.approx(rates.fmr)


FMRS = (0.2, 0.01, 0.001, 1e-5)


@pytest.mark.parametrize("exact_pairs", [2**24, 0])
@pytest.mark.parametrize("kind", ["one set", "gallery", "ties", "constant"])
def test_all_pairs_against_loops_and_sklearn(kind, exact_pairs, monkeypatch):
    monkeypatch.setattr(pair_tiles, "TILE", 16)
    monkeypatch.setattr(pair_tiles, "SAMPLE", 9)  # so that scores lie outside of the range of the bins
    monkeypatch.setattr(verification, "_HELD", 50)
    monkeypatch.setattr(verification, "BINS", 64)
    x, labels = clouds(9, 6, 5)
    order = np.random.default_rng(1).permutation(len(labels))
    x, labels = x[order], labels[order]
    if kind == "ties":
        x = np.round(x)[:, :2] + np.float32(0.5)
    rounded = lambda values: (np.round(values * 256) / 256).astype(np.float32)  # so that sums are exact in any order
    scored = Scored(rounded(cosine(x).rows), rounded(np.linspace(-0.1, 0.3, len(x))))
    if kind == "ties":
        scored = Scored(np.sign(scored.rows), np.zeros(len(x), np.float32))
    if kind == "constant":
        scored = Scored(np.ones((len(x), 2), np.float32), np.zeros(len(x), np.float32))
    given = [0.0, 0.5]
    if kind == "gallery":
        half = Scored(scored.rows[:20], scored.offsets[:20]), Scored(scored.rows[20:], scored.offsets[20:])
        args = half[0], labels[:20], half[1], labels[20:]
    else:
        args = scored, labels
    found = verify(*args, fmrs=FMRS, thresholds=given, exact_pairs=exact_pairs)
    scores, same = naive(*args)
    check(found, scores, same, FMRS)
    assert (found.auroc_error > 0) is (exact_pairs == 0)
    for threshold, rates in zip(given, found.at_threshold, strict=True):
        assert rates == (
            threshold,
            *(pytest.approx(np.mean(v)) for v in (scores[~same] >= threshold, scores[same] < threshold)),
        )
    if exact_pairs and kind != "gallery":
        np.testing.assert_allclose(pair_scores(*args)[0], np.sort(scores[same]), atol=1e-6)


def test_two_passes_agree_with_sorting_at_the_default_sizes():
    x, labels = clouds(40, 40, 8)
    exact, counted = (verify(cosine(x), labels, exact_pairs=n) for n in (2**24, 0))
    assert exact.at_fmr == counted.at_fmr and (exact.eer, exact.eer_threshold) == (counted.eer, counted.eer_threshold)
    assert abs(exact.auroc - counted.auroc) <= counted.auroc_error < 1e-5


def test_sets_without_genuine_pairs_or_impostors():
    x = np.eye(4, dtype=np.float32)
    for labels in (np.arange(4), np.zeros(4)):
        for exact_pairs in (0, 100):
            found = verify(cosine(x), labels, thresholds=[0.5], exact_pairs=exact_pairs)
            assert np.isnan([found.auroc, found.eer, found.at_threshold[0].fmr]).all()
    with pytest.raises(ValueError, match="single image"):
        verify(cosine(x[:1]), np.zeros(1))
    with pytest.raises(ValueError, match="fmrs"):
        verify(cosine(x), np.zeros(4), fmrs=(1.0,))


def test_plda_is_the_log_likelihood_ratio_of_gaussians():
    x, labels = clouds(30, 5, 4)
    labels[:3] = 40  # classes of other sizes
    model = fit_plda(x, labels, 0.05)
    z = unit_rows(x.astype(np.float64))
    codes = np.unique(labels, return_inverse=True)[1]
    counts = np.bincount(codes)
    means = np.stack([z[codes == c].mean(axis=0) for c in range(len(counts))])
    within = (z - means[codes]).T @ (z - means[codes]) / (len(z) - len(counts))
    mu = z.mean(axis=0)
    spread = (counts[:, None] * (means - mu)).T @ (means - mu) / (len(counts) - 1)
    size = (len(z) - (counts**2).sum() / len(z)) / (len(counts) - 1)
    w = within + 0.05 * np.trace(within) / 4 * np.eye(4)
    b = (spread - within) / size
    assert np.linalg.eigvalsh(b).min() > 0  # so that nothing is cut off
    one, two = multivariate_normal(mu, b + w), multivariate_normal(np.r_[mu, mu], np.block([[b + w, b], [b, b + w]]))
    scored = model(x)
    got = scored.rows @ scored.rows.T + scored.offsets[:, None] + scored.offsets
    pairs = [(0, 1), (0, 50), (7, 8), (99, 100), (3, 149)]
    wanted = [two.logpdf(np.r_[z[i], z[j]]) - one.logpdf(z[i]) - one.logpdf(z[j]) for i, j in pairs]
    np.testing.assert_allclose([got[i, j] for i, j in pairs], wanted, atol=1e-4)


def test_plda_beats_the_cosine_where_nuisance_is_large():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(60), 8)
    signal = rng.normal(size=(60, 6))[labels] + 0.5 * rng.normal(size=(480, 6))
    x = np.column_stack([signal, 4 * rng.normal(size=(480, 2))]).astype(np.float32)
    fitted, others = labels < 30, labels >= 30
    model = fit_plda(x[fitted], labels[fitted])
    assert verify(model(x[others]), labels[others]).eer < verify(cosine(x[others]), labels[others]).eer - 0.05
    for bad, message in (((x, np.zeros(480)), "one class"), ((x, np.arange(480)), "no class has two images")):
        with pytest.raises(ValueError, match=message):
            fit_plda(*bad)


def test_the_judge_takes_the_better_score_and_keeps_the_fmr_on_other_classes():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(80), 8)
    signal = rng.normal(size=(80, 6))[labels] + 0.5 * rng.normal(size=(640, 6))
    rounds, noisy = signal.astype(np.float32), np.column_stack([signal, 4 * rng.normal(size=(640, 2))])
    fitted, others = labels < 40, labels >= 40
    judge = fit_judge(noisy[fitted], labels[fitted], fmrs=(0.05,))
    assert judge.name.startswith("plda") and judge.eer[judge.name] < judge.eer["cosine"] and len(judge.eer) == 4
    assert fit_judge(rounds[fitted][:, :1], labels[fitted]).name == "cosine"  # two directions only
    threshold = judge.at_fmr[0.05].threshold
    rates = verify(judge.score(noisy[others]), labels[others], thresholds=[threshold]).at_threshold[0]
    assert (
        0.01 < rates.fmr < 0.1
        and rates.fnmr < verify(cosine(noisy[others]), labels[others], fmrs=[rates.fmr]).at_fmr[rates.fmr].fnmr
    )
    one, other = rng.integers(320, 640, (2, 4000))
    scores, same = judge.scores(noisy[one], noisy[other]), labels[one] == labels[other]
    for share in (0.5, same.mean()):
        p = judge.probability(scores, share)
        weight = np.where(same, share / same.mean(), (1 - share) / (1 - same.mean()))
        assert abs(np.average(p, weights=weight) - share) < 0.1  # calibrated in the large
    with pytest.raises(ValueError, match="2 classes of 2 images"):
        fit_judge(noisy[:9], labels[:9])


def test_the_report_of_a_run_has_the_rates_of_thresholds_chosen_on_held_out_classes():
    x, labels = clouds(20, 10, 6)
    held_out, test = labels < 10, labels >= 10
    queries = Embedded(x[test], labels[test])
    found, told = same_class.report(queries, None, Embedded(x[held_out], labels[held_out]), fmrs=(0.1, 1e-9))
    assert not told and set(found) == {
        f"verification/{name}"
        for name in ("AUROC", "EER", "FNMR@0.1", "chosen/EER", "chosen/FMR@0.1", "chosen/FNMR@0.1")
    }
    assert all(names.describe(name).unit == "share" for name in (*found, "verification/FNMR@1e-09"))
    assert found["verification/FNMR@0.1"] == verify(cosine(x[test]), labels[test], fmrs=[0.1]).at_fmr[0.1].fnmr
    few = Embedded(x[:5], labels[:5])
    found, told = same_class.report(queries, queries, few)
    assert "verification/chosen/EER" not in found and len(told) == 1 and "at least 2 classes" in told[0]
