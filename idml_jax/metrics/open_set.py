"""Open-set identification: queries whose class is in the gallery (mated) and queries whose is not (strangers).

A query is answered if its score (larger = less certain) is at most a threshold. FPIR: share of the strangers that are
answered. TPIR: share of the mated queries that are answered, and rightly, by the nearest image (ISO/IEC 19795-1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.ism import Metric
from idml_jax.metrics import strangers, uncertainty, visible
from idml_jax.metrics.calibration import Calibration
from idml_jax.metrics.checks import Array, score_column
from idml_jax.metrics.embedded import Embedded, rows_of, scores_of
from idml_jax.metrics.vote import Vote

FPIRS = (0.1, 0.01)
SPLITS = 3
# More queries than these are thinned out, evenly.
QUERIES = 4000


class Split(NamedTuple):
    """Queries of known and unknown classes.

    Attributes:
      queries: the queries, ``n`` of them.
      gallery: rows of the known classes.
      own: ``[n]`` gallery row of each query, which it leaves out; -1: none.
      mated: ``[n]`` whether the query's class has a (further) row in the gallery.
    """

    queries: Embedded
    gallery: Embedded
    own: Int[np.ndarray, "n"]
    mated: Bool[np.ndarray, "n"]


def tpir(
    score: Float[Array, "n"], right: Bool[Array, "n"], mated: Bool[Array, "n"], fpirs: Sequence[float] = FPIRS
) -> list[float]:
    """True positive identification rates at given false positive identification rates.

    Args:
      score: ``[n]`` larger = less certain; equal scores are answered together.
      right: ``[n]`` whether the nearest image is of the query's class.
      mated: ``[n]`` whether the query's class is in the gallery.
      fpirs: shares of the strangers that may be answered, from 0 to 1.

    Returns:
      One rate per share, at the largest threshold that keeps it; NaN without mated queries or without strangers.

    Raises:
      ValueError: for empty, mismatched or NaN input and shares outside [0, 1].
    """
    score = score_column(score, "score")
    right, mated = (np.asarray(score_column(x, n, len(score)), bool) for x, n in ((right, "right"), (mated, "mated")))
    if any(not 0 <= share <= 1 for share in fpirs):
        raise ValueError(f"fpirs: expected shares from 0 to 1, got {fpirs}")
    unknown = np.sort(score[~mated])
    if not len(unknown) or not mated.any():
        return [float("nan")] * len(fpirs)
    rates = []
    for share in fpirs:
        allowed = int(np.floor(share * len(unknown) + 1e-9))
        inside = score < unknown[allowed] if allowed < len(unknown) else np.ones(len(score), bool)
        rates.append(float(np.mean((inside & right)[mated])))
    return rates


def measures(
    score: Float[Array, "n"], right: Bool[Array, "n"], mated: Bool[Array, "n"], fpirs: Sequence[float] = FPIRS
) -> dict[str, float]:
    """``AUROC`` of mated against strangers, ``AURC`` with answers to strangers wrong, ``TPIR@f``; as for ``tpir``."""
    named = {f"TPIR@{share:g}": value for share, value in zip(fpirs, tpir(score, right, mated, fpirs), strict=True)}
    right = np.asarray(right, bool) & np.asarray(mated, bool)
    curve = uncertainty.risk_coverage(score, right)
    return {"AUROC": uncertainty.r_auroc(score, mated), "AURC": curve.aurc} | named


def split(embedded: Embedded, gallery: Embedded | None, seed: int, share: float = 0.5, queries: int = QUERIES) -> Split:
    """Takes a share of the classes out of the gallery; their queries become strangers.

    Args:
      embedded: the queries; without a gallery every image queries all the others.
      gallery: images that are searched.
      seed: seed of the choice of classes.
      share: share of the classes that are taken out; at least one stays and, of two or more, at least one goes.
      queries: number of queries kept, evenly spaced.
    """
    searched = embedded if gallery is None else gallery
    classes = np.unique(searched.labels)
    gone = int(np.clip(round(share * len(classes)), min(1, len(classes) - 1), len(classes) - 1))
    kept = np.flatnonzero(~np.isin(searched.labels, np.random.default_rng(seed).permutation(classes)[:gone]))
    chosen = np.unique(np.linspace(0, len(embedded.labels) - 1, queries).astype(int))
    place = np.full(len(searched.labels), -1)
    place[kept] = np.arange(len(kept))
    own = place[chosen] if gallery is None else np.full(len(chosen), -1)
    asked, rows = rows_of(embedded, chosen), rows_of(searched, kept)
    return Split(asked, rows, own, visible.sizes_of(asked.labels, rows.labels) - (own >= 0) > 0)


def report(
    embedded: Embedded,
    gallery: Embedded | None = None,
    metric: Metric = Metric(),  # noqa: B008 (immutable)
    calibrated: Calibration | None = None,
    *,
    fpirs: Sequence[float] = FPIRS,
    precision: float = 0.9,
    splits: int = SPLITS,
    seed: int = 0,
) -> dict[str, float]:
    """Open-set identification with half of the classes unknown, over several choices of them.

    Args:
      embedded: the queries; without a gallery every image queries all the others.
      gallery: images that are searched.
      metric: introspective metric.
      calibrated: calibration on held-out classes, for the score ``confidence``: how sure an answer is.
      fpirs: shares of the strangers that may be answered.
      precision: share of right answers that ``strangers.rule`` is to reach.
      splits: number of choices of the unknown classes.
      seed: seed of the first.

    Returns:
      ``open_set/AUROC(score)``, ``open_set/AURC(score)`` and ``open_set/TPIR@f(score)`` for every score, means over the
      choices, and their standard deviations as ``..._std``; with a calibration ``open_set/answered`` and
      ``open_set/answered_precision`` under ``strangers.rule``, with the share of strangers estimated. Empty if there
      is only one class, or too few images.
    """
    found: dict[str, list[float]] = {}
    for choice in range(splits):
        one = split(embedded, gallery, seed + choice)
        depth = min(20, len(one.gallery.labels) - bool((one.own >= 0).any()))
        if depth < 1 or one.mated.all() or not one.mated.any():
            continue
        for name, value in _measured(one, depth, metric, calibrated, (fpirs, precision)).items():
            found.setdefault(name, []).append(value)
    kept = {name: np.asarray(values)[~np.isnan(values)] for name, values in found.items()}
    over = lambda statistic, values: float(statistic(values)) if len(values) else float("nan")
    means = {name: over(np.mean, values) for name, values in kept.items()}
    return means | {f"{name}_std": over(np.std, values) for name, values in kept.items()}


def _measured(
    one: Split, depth: int, metric: Metric, calibrated: Calibration | None, wanted: tuple[Sequence[float], float]
) -> dict[str, float]:
    nothing = np.zeros((len(one.own), 0), int)
    found = visible.nearest_of_other_classes(
        one.queries.semantic, nothing, one.gallery.semantic, one.gallery.labels, depth, own=one.own
    )
    setting = Vote() if calibrated is None or calibrated.setting is None else calibrated.setting
    scores: Mapping[str, np.ndarray] = scores_of(one.queries, one.gallery, metric, one.own, found, setting=setting)
    right, more = one.gallery.labels[found.index[:, 0]] == one.queries.labels, {}
    if calibrated is not None and set(calibrated.model.names) <= set(scores):
        share = strangers.estimated_share(calibrated, scores)
        doubt = 1.0 - strangers.judge(calibrated, scores, share).sure
        scores = {**scores, "confidence": doubt}
        result = uncertainty.selective(doubt, right, strangers.rule(calibrated, share, wanted[1]).value)
        more = {"answered": result["coverage"], "answered_precision": result["precision"], "strangers": share}
    return {f"open_set/{name}": value for name, value in more.items()} | {
        f"open_set/{measure}({name})": value
        for name, score in scores.items()
        for measure, value in measures(score, right, one.mated, wanted[0]).items()
    }
