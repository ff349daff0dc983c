"""Computes all metrics of a set of embeddings as one flat dictionary, for training, evaluation and the command line.

``metrics.names`` explains each name.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from idml_jax.ism import Metric
from idml_jax.metrics import (
    calibration,
    clustering,
    introspective,
    open_set,
    relevance,
    retrieval,
    same_class,
    strangers,
    uncertainty,
    vote,
)
from idml_jax.metrics.calibration import Calibration, HeldOut, Known
from idml_jax.metrics.confidence import confidence
from idml_jax.metrics.embedded import LABELLED, Embedded, joined, scores_of
from idml_jax.metrics.retrieval import Ranks
from idml_jax.metrics.vote import Vote

__all__ = [
    "Embedded", "HeldOut", "ambiguity_report", "corrupted_report", "full_report", "retrieval_report", "scores_of"
]  # fmt: skip


# Joined scores besides the confidence, and the scores that each does without.
JOINED = {
    "unlearned_confidence": introspective.LEARNED,
    "label_free_confidence": LABELLED,
    "free_confidence": (*introspective.LEARNED, *LABELLED, "answer_density"),
}


def _searched(gallery: Embedded | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    return (None, None) if gallery is None else (gallery.semantic, gallery.labels)


def retrieval_report(
    embedded: Embedded, ks: Sequence[int] = (1, 2, 4, 8), gallery: Embedded | None = None
) -> dict[str, float]:
    """The metrics followed during training: R@K, RP, MAP@R, MRR, and mean and deviation of the uncertainty's length.

    With several labels per image, groups, or queries in the gallery: those of ``relevance.short_report``.
    """
    searched = _searched(gallery)
    if relevance.is_special(embedded, gallery):
        report = relevance.short_report(embedded, gallery, ks)
    else:
        report = retrieval.retrieval_metrics(embedded.semantic, embedded.labels, searched[0], searched[1], ks=ks)
    if embedded.uncertainty is not None:
        length = embedded.uncertainty_norm
        report |= {"uncertainty_mean": float(length.mean()), "uncertainty_std": float(length.std())}
    return report


def full_report(
    embedded: Embedded,
    gallery: Embedded | None = None,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    metric: Metric = Metric(),  # noqa: B008 (immutable)
    ambiguity: Float[np.ndarray, "n"] | None = None,
    held_out: HeldOut | Embedded | None = None,
    answered: Known | None = None,
    precision: float = 0.9,
    cluster: bool = True,
    seed: int = 0,
) -> tuple[dict[str, float], list[str]]:
    """Computes all metrics of a set of embeddings.

    Args:
      embedded: the queries; without a gallery every image queries all the others.
      gallery: embeddings to search.
      ks: K of R@K.
      metric: introspective metric, used besides the semantic distance.
      ambiguity: true ambiguity of each query, ``[n]``, where it is known.
      held_out: queries of classes that are neither training nor test classes; fit the confidence and its threshold.
      answered: what ``calibration.answer`` gives for them, if it is known.
      precision: share of right answers that the threshold is chosen for.
      cluster: whether to cluster the queries into as many clusters as classes (NMI, AMI, F1).
      seed: seed of clustering and bootstrap.

    Returns:
      The metrics, and warnings about the uncertainty, one line each. Metrics: those of ``retrieval_report``;
      ``R@1_low`` and ``R@1_high`` (95% bootstrap); ``NMI``, ``AMI``, ``F1``; ``R-AUROC(score)``, ``AURC(score)`` and
      ``E-AURC(score)`` for every score of ``scores_of``, baseline scores first; ``vote/...`` of ``vote.accuracy``;
      ``open_set/...`` of ``open_set.report``; with an uncertainty
      ``R-AUROC(uncertainty)_low`` and ``_high``, ``introspective/R@1`` and ``introspective/MAP@R`` (ranking by D) and
      ``s-u_correlation``; ``spearman(u,ambiguity)``; ``R-AUROC(confidence)`` of all scores joined,
      and of those in ``JOINED``; ``answered`` and ``answered_precision`` up to the threshold; ``verification/...`` of
      ``same_class.report``. With several labels per image, groups, or queries in the gallery: those of
      ``relevance.report``.

    Raises:
      ValueError: for empty, mismatched or non-finite input.
    """
    if relevance.is_special(embedded, gallery):
        return relevance.report(embedded, gallery, ks, seed)
    ranks = retrieval.retrieval_ranks(embedded.semantic, embedded.labels, *_searched(gallery))
    report = retrieval.summarise(ranks, ks)
    interval = uncertainty.recall_interval(ranks.nearest_correct, seed=seed)
    report |= {"R@1_low": interval.low, "R@1_high": interval.high}
    if cluster:
        classes = len(np.unique(embedded.labels))
        clusters = clustering.kmeans(embedded.semantic, classes, seed).labels
        for name in ("nmi", "ami", "f1"):
            report[name.upper()] = getattr(clustering, name)(embedded.labels, clusters)
    known = _answered(held_out, metric) if answered is None else answered
    found = uncertainty.nearest_twenty(embedded.semantic, _searched(gallery)[0])
    report |= _vote_report(embedded, gallery, ranks, found, _setting(known))
    scores = scores_of(embedded, gallery, metric, found=found, setting=_setting(known))
    for name, score in scores.items():
        curve = uncertainty.risk_coverage(score, ranks.nearest_correct)
        report[f"R-AUROC({name})"] = uncertainty.r_auroc(score, ranks.nearest_correct)
        report[f"AURC({name})"], report[f"E-AURC({name})"] = curve.aurc, curve.excess_aurc
    warnings = []
    if embedded.uncertainty is not None:
        report |= _uncertainty_report(embedded, gallery, ranks, ks, metric, seed)
        warnings = uncertainty.failure_signs(embedded.semantic, embedded.uncertainty)
        if ambiguity is not None:
            report["spearman(u,ambiguity)"] = uncertainty.spearman(embedded.uncertainty_norm, ambiguity)
    fitted = None
    if known is not None:
        more, fitted = _threshold_report(scores, ranks, known, precision)
        report |= more
    report |= open_set.report(embedded, gallery, metric, fitted, precision=precision, seed=seed)
    others = held_out.queries if isinstance(held_out, HeldOut) else held_out
    pairs, told = same_class.report(embedded, gallery, others, seed=seed)
    report, warnings = report | pairs, warnings + told
    return {k: float(v) for k, v in report.items()}, warnings


def _uncertainty_report(
    embedded: Embedded, gallery: Embedded | None, ranks: Ranks, ks: Sequence[int], metric: Metric, seed: int
) -> dict[str, float]:
    assert embedded.uncertainty is not None
    length = embedded.uncertainty_norm
    report = {"uncertainty_mean": length.mean(), "uncertainty_std": length.std()}
    report["s-u_correlation"] = uncertainty.similarity_correlation(embedded.semantic, embedded.uncertainty)
    if uncertainty.r_auroc_undefined(ranks.nearest_correct) is None:
        interval = uncertainty.r_auroc_interval(length, ranks.nearest_correct, seed=seed)
        report |= {"R-AUROC(uncertainty)_low": interval.low, "R-AUROC(uncertainty)_high": interval.high}
    by_distance = introspective.ranks_by_metric(
        metric,
        embedded.embedding,
        embedded.labels,
        None if gallery is None else gallery.embedding,
        None if gallery is None else gallery.labels,
    )
    side = retrieval.summarise(by_distance, ks)
    return report | {f"introspective/{name}": side[name] for name in (f"R@{ks[0]}", "MAP@R")}


def _answered(held_out: HeldOut | Embedded | None, metric: Metric) -> Known | None:
    if held_out is None:
        return None
    return calibration.answer(held_out if isinstance(held_out, HeldOut) else HeldOut(held_out), metric)


def _setting(known: Known | None) -> Vote:
    """Settings of the vote: those chosen on the held-out classes, or the default."""
    return Vote() if known is None or known.setting is None else known.setting


def _vote_report(
    embedded: Embedded, gallery: Embedded | None, ranks: Ranks, found: retrieval.Neighbours, setting: Vote
) -> dict[str, float]:
    """Accuracy of the vote of the nearest images as a classifier."""
    searched = embedded if gallery is None else gallery
    own = np.arange(len(embedded.labels)) if gallery is None else None
    ballot = vote.cast(embedded.semantic, searched.semantic, searched.labels, found, setting, own)
    quality = vote.accuracy(ballot, embedded.labels, searched.labels, ranks.positives == 0)
    return {f"vote/{name}": value for name, value in quality.items()}


def _threshold_report(
    scores: Mapping[str, np.ndarray], ranks: Ranks, known: Known, precision: float
) -> tuple[dict[str, float], Calibration]:
    """A confidence from all scores and its threshold, both fitted on held-out classes, applied to the queries."""
    report, fitted = _confidence_report(scores, ranks.nearest_correct, known)
    share = strangers.estimated_share(fitted, scores)
    unsure = 1.0 - strangers.judge(fitted, scores, share).sure
    rule = strangers.rule(fitted, share, precision)
    selected = uncertainty.selective(unsure, ranks.nearest_correct, rule.value)
    doubt = 1.0 - confidence(fitted.model, scores)
    curve = uncertainty.risk_coverage(doubt, ranks.nearest_correct)
    return report | {
        "AURC(confidence)": curve.aurc,
        "E-AURC(confidence)": curve.excess_aurc,
        "wanted_precision": precision,
        "answered": selected["coverage"],
        "answered_precision": selected["precision"],
    }, fitted


def _confidence_report(
    scores: Mapping[str, np.ndarray], correct: np.ndarray, known: Known
) -> tuple[dict[str, float], Calibration]:
    """R-AUROC of all scores joined and of parts of them joined; also the fit of all scores."""
    fitted = calibration.fit(known, scores)
    models = {"confidence": fitted.model} | {
        name: calibration.fit_model(known, [n for n in scores if n not in without]) for name, without in JOINED.items()
    }
    report = {f"R-AUROC({n})": uncertainty.r_auroc(1.0 - confidence(m, scores), correct) for n, m in models.items()}
    return report, fitted


def corrupted_report(
    clean: Embedded,
    changed: Sequence[Embedded],
    gallery: Embedded,
    own: Int[np.ndarray, "n"],
    metric: Metric,
    known: Known | None = None,
) -> dict[str, float]:
    """How well each score detects wrong answers, over clean and corrupted queries together.

    Args:
      clean: some images of the gallery as queries, ``n`` of them.
      changed: the same images in the same order, changed; one entry per change.
      gallery: all images, unchanged.
      own: ``[n]``, the gallery row of each image, which it and its changed forms leave out.
      metric: introspective metric, used besides the semantic distance.
      known: answered held-out queries, from ``calibration.answer``.

    Returns:
      ``corrupted/R@1`` over all these queries, and ``corrupted/R-AUROC(score)`` for every score of
      ``introspective.answer_scores`` and, with ``known``, the confidence; NaN where all answers are right or all
      are wrong.
    """
    queries = joined([clean, *changed])
    own = np.tile(own, 1 + len(changed))
    found = uncertainty.nearest_twenty(queries.semantic, gallery.semantic, own=own)
    correct = gallery.labels[found.index[:, 0]] == queries.labels
    scores = scores_of(queries, gallery, metric, own, found, setting=_setting(known))
    report = {f"R-AUROC({name})": uncertainty.r_auroc(score, correct) for name, score in scores.items()}
    if known is not None:
        report |= _confidence_report(scores, correct, known)[0]
    return {f"corrupted/{name}": float(value) for name, value in ({"R@1": correct.mean()} | report).items()}


def ambiguity_report(
    original: Float[np.ndarray, "n"], changed: Mapping[str, Mapping[float, Float[np.ndarray, "n"]]]
) -> dict[str, float]:
    """How the uncertainty rises if an image is made harder.

    Args:
      original: ``[n]`` uncertainty of the images.
      changed: by kind of change and strength above 0, the uncertainty ``[n]`` of the same images changed.

    Returns:
      ``P(u_kind>u)`` at the strongest change, ties counting half, and, for kinds of several strengths,
      ``spearman(u,kind)`` of strength and uncertainty over all images, the unchanged ones being strength 0.
    """
    report = {}
    for kind, by_strength in changed.items():
        report[f"P(u_{kind}>u)"] = uncertainty.probability_greater(by_strength[max(by_strength)], original)
        if len(by_strength) > 1:
            strengths = [0.0, *by_strength]
            values = np.concatenate([original, *by_strength.values()])
            report[f"spearman(u,{kind})"] = uncertainty.spearman(np.repeat(strengths, len(original)), values)
    return report
