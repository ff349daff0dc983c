"""Measures how well an uncertainty detects wrong answers. Scores are per query; larger means less certain.

Everything is compared with baseline scores (`free_scores`), which need no learned uncertainty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from idml_jax.metrics import binomial
from idml_jax.metrics.checks import Array, embedding_rows, label_column, score_column
from idml_jax.metrics.design_effect import design_effects
from idml_jax.metrics.failure_signs import failure_signs as failure_signs
from idml_jax.metrics.failure_signs import pearson
from idml_jax.metrics.failure_signs import similarity_correlation as similarity_correlation
from idml_jax.metrics.retrieval import Neighbours, neighbours

# Coverages of the thresholds that are tested, in this order.
_COVERAGES = np.r_[0.05, 0.075, np.arange(2, 21) / 20]


class RiskCoverage(NamedTuple):
    """Risk as the least certain answers are dropped (Geifman, Uziel, El-Yaniv, ICLR 2019).

    coverage: 1/n, 2/n, ..., 1, the share of answers kept, the most certain first.
    risk: share of wrong answers among those kept.
    aurc: mean risk over all coverages (area under the curve); 0 is perfect.
    excess_aurc: aurc less that of an oracle which drops all wrong answers first; 0 is the best possible ordering.
    """

    coverage: Float[np.ndarray, "n"]
    risk: Float[np.ndarray, "n"]
    aurc: float
    excess_aurc: float


class Interval(NamedTuple):
    """A value and its bootstrap confidence interval; all NaN where the value is undefined."""

    value: float
    low: float
    high: float


class Threshold(NamedTuple):
    """Answer when the score is <= value, abstain otherwise.

    reached: whether the wanted precision can be reached. If not, value is -inf: always abstain.
    coverage: share of the held-out queries that are answered.
    precision: share of right answers among them; if not reached, the best of any threshold.
    bound: the lower confidence bound of that precision, which was compared with the wanted one.
    """

    value: float
    reached: bool
    coverage: float
    precision: float
    bound: float


def r_auroc(uncertainty: Float[Array, "n"], nearest_correct: Bool[Array, "n"]) -> float:
    """AUROC of a query's uncertainty predicting that its nearest neighbour is of another class.

    The probability that a query answered wrongly is less certain than one answered rightly, ties counted half: 1 is
    perfect, 0.5 is chance. NaN if it is undefined, because all answers are right or all wrong (R@1 is 0 or 1;
    `r_auroc_undefined` says which). Kirchhof et al., "URL: A Representation Learning Benchmark for Transferable
    Uncertainty Estimates", NeurIPS 2023.

    Raises ValueError for empty, mismatched or NaN input.
    """
    uncertainty = score_column(uncertainty, "uncertainty")
    wrong = ~_correct(nearest_correct, "nearest_correct", len(uncertainty))
    if r_auroc_undefined(~wrong):
        return float("nan")
    wrongs = int(wrong.sum())
    return float((_ranks(uncertainty)[wrong].sum() - wrongs * (wrongs + 1) / 2) / (wrongs * (len(wrong) - wrongs)))


def r_auroc_undefined(nearest_correct: Bool[Array, "n"]) -> str | None:
    """The reason why R-AUROC is undefined for these answers; None if it is defined."""
    correct = np.asarray(nearest_correct, bool)
    if correct.all():
        return "every nearest neighbour is right (R@1 = 1): there is no error to predict"
    return None if correct.any() else "every nearest neighbour is wrong (R@1 = 0): there is no success to tell apart"


def risk_coverage(uncertainty: Float[Array, "n"], correct: Bool[Array, "n"]) -> RiskCoverage:
    """The curve of risk over coverage, its area, and the area's excess over the oracle's; see `RiskCoverage`.

    Equally uncertain answers share their errors evenly, so the order of the input does not matter. Raises ValueError
    for empty, mismatched or NaN input.
    """
    uncertainty = score_column(uncertainty, "uncertainty")
    wrong = ~_correct(correct, "correct", len(uncertainty))
    kept = np.arange(1, len(wrong) + 1)
    group, size = np.unique(uncertainty, return_inverse=True, return_counts=True)[1:]
    shared = np.bincount(group, weights=wrong) / size
    risk = np.cumsum(np.repeat(shared, size)) / kept
    oracle = np.maximum(kept - (len(wrong) - wrong.sum()), 0) / kept
    return RiskCoverage(kept / len(wrong), risk, float(risk.mean()), float(risk.mean() - oracle.mean()))


def spearman(a: Float[Array, "n"], b: Float[Array, "n"]) -> float:
    """Spearman's rank correlation, ties averaged; NaN where one side is constant or there is one entry only."""
    a = score_column(a, "a")
    b = score_column(b, "b", len(a))
    return pearson(_ranks(a), _ranks(b))


def probability_greater(changed: Float[Array, "n"], original: Float[Array, "n"]) -> float:
    """P(u(changed) > u(original)) over pairs of the same image, ties counted half; 0.5 is chance."""
    original = score_column(original, "original")
    changed = score_column(changed, "changed", len(original))
    return float(np.mean((changed > original) + 0.5 * (changed == original)))


def nearest_twenty(
    embeddings: Float[Array, "n d"], gallery: Float[Array, "m d"] | None = None, *, own: Int[Array, "n"] | None = None
) -> Neighbours:
    """The neighbours that `free_scores` uses: 20, or all if fewer. Arguments and errors as for `neighbours`."""
    others = len(embeddings) - 1 if gallery is None else len(gallery) - (own is not None)
    return neighbours(embeddings, gallery, max(1, min(20, others)), own=own)


def free_scores(
    embeddings: Float[Array, "n d"],
    gallery: Float[Array, "m d"] | None = None,
    *,
    norms: Float[Array, "n"] | None = None,
    own: Int[Array, "n"] | None = None,
    found: Neighbours | None = None,
) -> dict[str, Float[np.ndarray, "n"]]:
    """Baseline scores that need no training, one value per query; larger = less certain.

    nearest_distance: Euclidean distance to the nearest row.
    margin_2, margin_10, margin_20: minus the cosine similarity to the nearest row less that to the 2nd (10th, 20th).
        Left out where the gallery has fewer rows.
    ratio_20: distance to the nearest row over that to the 20th (the ratio test of Lowe, IJCV 2004), 1 where both are
        0. Unlike the margins it also works for queries that are far from everything.
    norm: minus the length of the embedding. Pass `norms` [n], the lengths before normalising, for rows that are
        normalised already; without them it is left out where all rows, those of the gallery too, have the same length.

    Without a gallery every row queries all the others; `own` as in `retrieval.neighbours`, which also lists the errors.
    `found` is what `nearest_twenty` gives for the same arguments, if it is known.
    """
    queries, squares = embedding_rows(embeddings, "embeddings")
    found = nearest_twenty(queries, gallery, own=own) if found is None else found
    depth = found.index.shape[1]
    rows = queries if gallery is None else np.asarray(gallery, np.float32)
    scores = {"nearest_distance": found.distance[:, 0].astype(np.float64)}
    nearest = _cosine(queries, rows[found.index[:, 0]])
    for place in (2, 10, 20):
        if place <= depth:
            scores[f"margin_{place}"] = _cosine(queries, rows[found.index[:, place - 1]]) - nearest
    if depth >= 20:
        far = found.distance[:, 19].astype(np.float64)
        scores["ratio_20"] = np.where(far > 0, scores["nearest_distance"] / np.where(far > 0, far, 1.0), 1.0)
    if norms is not None:
        return scores | {"norm": -score_column(norms, "norms", len(queries)).astype(np.float64)}
    # A single query has no other row to differ from, so the gallery also decides whether lengths are informative.
    lengths = np.sqrt(squares)
    everyone = lengths if gallery is None else np.concatenate([lengths, np.linalg.norm(rows, axis=1)])
    if np.ptp(everyone) > 1e-3 * everyone.max():
        scores["norm"] = -lengths.astype(np.float64)
    return scores


def bootstrap(
    statistic: Callable[..., float],
    *columns: Array,
    seed: int = 0,
    samples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of statistic(*columns) [n], queries drawn again with replacement (Efron, 1979).

    Draws without a value (NaN) are left out. Raises ValueError for mismatched columns and a level outside (0, 1).
    """
    columns = [np.asarray(column) for column in columns]
    size = len(columns[0])
    if any(len(column) != size for column in columns):
        raise ValueError(f"columns: different lengths {[len(column) for column in columns]}")
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, size, size) for _ in range(samples))
    return _interval(statistic(*columns), [statistic(*(c[draw] for c in columns)) for draw in draws], level)


def recall_interval(
    nearest_correct: Bool[Array, "n"], *, seed: int = 0, samples: int = 1000, level: float = 0.95
) -> Interval:
    """R@1 and its bootstrap interval over queries."""
    correct = _correct(nearest_correct, "nearest_correct", len(nearest_correct))
    # The mean of a resample of zeros and ones is binomial.
    draws = np.random.default_rng(seed).binomial(len(correct), correct.mean(), samples) / len(correct)
    return _interval(float(correct.mean()), draws, level)


def r_auroc_interval(
    uncertainty: Float[Array, "n"],
    nearest_correct: Bool[Array, "n"],
    *,
    seed: int = 0,
    samples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """R-AUROC and its bootstrap interval over queries; NaN where R-AUROC is undefined."""
    value = r_auroc(uncertainty, nearest_correct)
    order = np.argsort(np.asarray(uncertainty), kind="stable")
    scores, correct = np.asarray(uncertainty)[order], np.asarray(nearest_correct, bool)[order]
    starts = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(samples):
        # Sorted once: a resample only changes the count of each query.
        times = np.bincount(rng.integers(0, len(order), len(order)), minlength=len(order))[order]
        right = np.add.reduceat(times * correct, starts)
        wrong = np.add.reduceat(times * ~correct, starts)
        pairs = right.sum() * wrong.sum()
        below = np.cumsum(right) - 0.5 * right
        draws.append(np.sum(wrong * below) / pairs if pairs else np.nan)
    return _interval(value, draws, level)


def threshold_for_precision(
    uncertainty: Float[Array, "n"],
    correct: Bool[Array, "n"],
    precision: float,
    *,
    confidence: float | None = 0.95,
    groups: Shaped[Array, "n"] | None = None,
    strata: Shaped[Array, "n"] | None = None,
) -> Threshold:
    """The threshold that answers most queries with `precision` of the answers right, chosen on held-out data.

    The held-out queries must be of classes that the model was not trained on, and not those it is reported on; nor
    may the score have been fitted on them (`calibration.fit` scores every query by a model that has not seen it).

    With a confidence, the true precision of the answers is below the wanted one in at most that share (1 - confidence)
    of such choices, for independent queries: three right answers of three do not prove 99%, and the best of many
    thresholds is good by luck as well. So thresholds are tested one after the other, the smallest coverage first, each
    by the exact binomial test, and the first that fails ends it (a fixed sequence of hypotheses needs no correction:
    Maurer, Hothorn, Lehmacher, 1995; Angelopoulos et al., "Learn then Test", 2021). The coverages are 5%, 7.5%,
    10%, 15%, ..., 100%; see `_first_to_test`. Without a confidence (None) the share seen is compared, at
    every threshold.

    Queries of one class err together, so 300 queries of 30 classes show less than 300 of 300. With `groups` [n], the
    class of each, every sample counts as the independent queries that it is worth; `strata` [n] are the kinds of
    groups, the same within a group (see `design_effect.design_effects`).

    Wanting more than the data can show gives reached=False and a threshold that always abstains. Raises ValueError for
    bad input or levels outside (0, 1].
    """
    uncertainty = score_column(uncertainty, "uncertainty")
    correct = _correct(correct, "correct", len(uncertainty))
    if not 0 < precision <= 1:
        raise ValueError(f"precision: expected in (0, 1], got {precision}")
    if confidence is not None and not 0.5 <= confidence < 1:
        raise ValueError(f"confidence: expected in [0.5, 1) or None, got {confidence}")
    order = np.argsort(uncertainty, kind="stable")
    scores = uncertainty[order]
    last = np.flatnonzero(np.r_[scores[1:] != scores[:-1], True])  # a threshold cannot part equal scores
    rights = np.cumsum(correct[order])
    if confidence is None:
        share = rights[last] / (last + 1)
        good, bound = np.flatnonzero(share >= precision), share
    else:
        last = np.unique(last[np.maximum(np.searchsorted(last + 1, _COVERAGES * len(scores), side="right") - 1, 0)])
        share = rights[last] / (last + 1)
        risk = 1.0 - confidence
        effects = np.ones(len(last))
        if groups is not None:
            effects = design_effects(correct[order], *_grouped(groups, strata, order), last + 1)
        worth = np.maximum(1, np.floor((last + 1) / effects)).astype(int)
        wrong = np.ceil((last + 1 - rights[last]) / effects - 1e-9).astype(int)
        hits = np.maximum(worth - wrong, 0)
        tails = [binomial.upper_tail(int(kept), precision) for kept in worth]
        passed = np.asarray([tail[right] < risk for tail, right in zip(tails, hits, strict=True)])
        start = _first_to_test(tails, risk)
        good = start + np.flatnonzero(np.logical_and.accumulate(passed[start:]))
        bound = np.array([binomial.lower_bound(int(r), int(n), risk) for r, n in zip(hits, worth, strict=True)])
    if len(good):
        i = good[-1]
        kept = float((last[i] + 1) / len(scores))
        return Threshold(float(scores[last[i]]), True, kept, float(share[i]), float(bound[i]))
    best = np.argmax(bound)
    return Threshold(float("-inf"), False, 0.0, float(share[best]), float(bound[best]))


def _grouped(
    groups: Shaped[Array, "n"], strata: Shaped[Array, "n"] | None, order: Int[np.ndarray, "n"]
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"] | None]:
    """Groups and strata in this order, each numbered from 0; ValueError for other lengths."""

    def number(kinds: Shaped[Array, "n"], name: str) -> Int[np.ndarray, "n"]:
        return np.unique(label_column(kinds, len(order), name, "uncertainty"), return_inverse=True)[1][order]

    return number(groups, "groups"), None if strata is None else number(strata, "strata")


def _first_to_test(tails: Sequence[Float[np.ndarray, "total+1"]], risk: float) -> int:
    """The first of nested samples to test.

    It would pass with two wrong answers, or else with one, if it is at most a quarter of all; else it is the first that
    would pass with none, or the last.

    It depends on what the samples are worth, not on the answers themselves, so that the order of the tests is fixed.
    """
    for wrong, most in ((2, len(tails[-1]) / 4), (1, len(tails[-1]) / 4), (0, len(tails[-1]))):
        for place, tail in enumerate(tails):
            if wrong + 1 < len(tail) <= most and tail[-1 - wrong] < risk:
                return place
    return len(tails) - 1


def selective(
    uncertainty: Float[Array, "n"], correct: Bool[Array, "n"], threshold: float | Threshold
) -> dict[str, float]:
    """Result of a threshold on other data: 'coverage', 'precision' (NaN if nothing is answered), 'answers'."""
    uncertainty = score_column(uncertainty, "uncertainty")
    correct = _correct(correct, "correct", len(uncertainty))
    answered = uncertainty <= (threshold.value if isinstance(threshold, Threshold) else threshold)
    right = float(correct[answered].mean()) if answered.any() else float("nan")
    return {"coverage": float(answered.mean()), "precision": right, "answers": int(answered.sum())}


def _correct(correct: Bool[Array, "n"], name: str, size: int) -> Bool[np.ndarray, "n"]:
    """Booleans [size] on the host; ValueError, naming the argument, for other shapes or values."""
    column = score_column(correct, name, size)
    if not np.isin(column, (0, 1)).all():
        raise ValueError(f"{name}: expected booleans")
    return column.astype(bool)


def _ranks(x: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """1 for the smallest; equal entries share the mean of their ranks."""
    group, counts = np.unique(x, return_inverse=True, return_counts=True)[1:]
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def _cosine(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n"]:
    """Cosine of each row of `a` and the same row of `b`; 0 for a zero row."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.einsum("nd,nd->n", a, b) / np.maximum(lengths, np.finfo(np.float32).tiny)


def _interval(value: float, draws: Float[np.ndarray, "samples"] | Sequence[float], level: float) -> Interval:
    """Percentile interval at this level of the bootstrap values that are not NaN."""
    if not 0 < level < 1:
        raise ValueError(f"level: expected in (0, 1), got {level}")
    draws = np.asarray(draws, np.float64)
    draws = draws[~np.isnan(draws)]
    if np.isnan(value) or not len(draws):
        return Interval(float(value), float("nan"), float("nan"))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))
