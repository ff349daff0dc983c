"""All figures of one set of embeddings in one flat dictionary: what training, evaluation and the command line print."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from idml_jax import ism
from idml_jax.metrics import clustering, confidence, introspective, retrieval, uncertainty
from idml_jax.metrics.retrieval import Ranks


class Embedded(NamedTuple):
    """Embeddings of a set of images, on the host.

    Attributes:
      semantic: ``[n, d]``.
      labels: ``[n]``.
      uncertainty: ``[n, k]``, ``None`` where there is none.
      semantic_norm: ``[n]``, length of the semantic embedding before normalising, if known.
    """

    semantic: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, "n"]
    uncertainty: Float[np.ndarray, "n k"] | None = None
    semantic_norm: Float[np.ndarray, "n"] | None = None

    @property
    def embedding(self) -> ism.Embedding:
        """As the metric takes it."""
        return ism.Embedding(self.semantic, self.uncertainty)  # type: ignore[arg-type]  # of numpy

    @property
    def uncertainty_norm(self) -> Float[np.ndarray, "n"]:
        """Length of the uncertainty embedding, the score of a single image."""
        assert self.uncertainty is not None
        return np.linalg.norm(self.uncertainty, axis=1)


class Ism(NamedTuple):
    """Settings of the introspective metric that the embeddings were trained with."""

    temperature: float = ism.DEFAULT_TEMPERATURE
    relative: bool = True


def _searched(gallery: Embedded | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    return (None, None) if gallery is None else (gallery.semantic, gallery.labels)


def retrieval_report(
    embedded: Embedded, ks: Sequence[int] = (1, 2, 4, 8), gallery: Embedded | None = None
) -> dict[str, float]:
    """What is followed during training: R@K, RP, MAP@R, MRR, and mean and deviation of the uncertainty's length."""
    searched = _searched(gallery)
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
    settings: Ism = Ism(),  # noqa: B008 (immutable)
    ambiguity: Float[np.ndarray, "n"] | None = None,
    held_out: Embedded | None = None,
    precision: float = 0.9,
    cluster: bool = True,
    seed: int = 0,
) -> tuple[dict[str, float], list[str]]:
    """Everything that can be said about a set of embeddings.

    Args:
      embedded: the queries; without a gallery every image queries all the others.
      gallery: what is searched.
      ks: K of R@K.
      settings: of the introspective metric.
      ambiguity: true ambiguity of each query, ``[n]``, where it is known.
      held_out: embeddings of classes that are neither training nor test classes; chooses the threshold of answers.
      precision: share of right answers that the threshold is chosen for.
      cluster: cluster the queries into as many clusters as they have classes (NMI, AMI, F1).
      seed: of clustering and bootstrap.

    Returns:
      The figures, and warnings about the uncertainty, one line each. Figures: those of ``retrieval_report``;
      ``R@1_low`` and ``R@1_high`` (95% bootstrap); ``NMI``, ``AMI``, ``F1``; ``R-AUROC(score)``, ``AURC(score)`` and
      ``E-AURC(score)`` for every score of ``introspective.answer_scores``, the free ones first; with an uncertainty
      ``R-AUROC(uncertainty)_low`` and ``_high``, ``introspective/R@1`` and ``introspective/MAP@R`` (ranking by D) and
      ``s-u_correlation``; ``spearman(u,ambiguity)``; ``answered`` and ``answered_precision`` beyond the threshold.

    Raises:
      ValueError: for empty, mismatched or non-finite input.
    """
    ranks = retrieval.retrieval_ranks(embedded.semantic, embedded.labels, *_searched(gallery))
    report = retrieval.summarise(ranks, ks)
    interval = uncertainty.recall_interval(ranks.nearest_correct, seed=seed)
    report |= {"R@1_low": interval.low, "R@1_high": interval.high}
    if cluster:
        classes = len(np.unique(embedded.labels))
        clusters = clustering.kmeans(embedded.semantic, classes, seed).labels
        for name in ("nmi", "ami", "f1"):
            report[name.upper()] = getattr(clustering, name)(embedded.labels, clusters)
    scores = scores_of(embedded, gallery, settings)
    for name, score in scores.items():
        curve = uncertainty.risk_coverage(score, ranks.nearest_correct)
        report[f"R-AUROC({name})"] = uncertainty.r_auroc(score, ranks.nearest_correct)
        report[f"AURC({name})"], report[f"E-AURC({name})"] = curve.aurc, curve.excess_aurc
    warnings = []
    if embedded.uncertainty is not None:
        report |= _uncertainty_report(embedded, gallery, ranks, ks, settings, seed)
        warnings = uncertainty.failure_signs(embedded.semantic, embedded.uncertainty)
        if ambiguity is not None:
            report["spearman(u,ambiguity)"] = uncertainty.spearman(embedded.uncertainty_norm, ambiguity)
    if held_out is not None:
        report |= _threshold_report(scores, ranks, held_out, settings, precision)
    return {k: float(v) for k, v in report.items()}, warnings


def scores_of(
    embedded: Embedded,
    gallery: Embedded | None = None,
    settings: Ism = Ism(),  # noqa: B008 (immutable)
    own: Int[np.ndarray, "n"] | None = None,
) -> dict[str, Float[np.ndarray, "n"]]:
    """``introspective.answer_scores`` of embedded images; ``own`` as there."""
    return introspective.answer_scores(
        embedded.embedding,
        None if gallery is None else gallery.embedding,
        norms=embedded.semantic_norm,
        own=own,
        **settings._asdict(),
    )


def _uncertainty_report(
    embedded: Embedded, gallery: Embedded | None, ranks: Ranks, ks: Sequence[int], settings: Ism, seed: int
) -> dict[str, float]:
    assert embedded.uncertainty is not None
    length = embedded.uncertainty_norm
    report = {"uncertainty_mean": length.mean(), "uncertainty_std": length.std()}
    report["s-u_correlation"] = uncertainty.similarity_correlation(embedded.semantic, embedded.uncertainty)
    if uncertainty.r_auroc_undefined(ranks.nearest_correct) is None:
        interval = uncertainty.r_auroc_interval(length, ranks.nearest_correct, seed=seed)
        report |= {"R-AUROC(uncertainty)_low": interval.low, "R-AUROC(uncertainty)_high": interval.high}
    distance: Any = introspective.IntrospectiveDistance(*settings)
    by_distance = retrieval.ranks_by_distance(
        distance,
        embedded.embedding,
        embedded.labels,
        None if gallery is None else gallery.embedding,
        None if gallery is None else gallery.labels,
    )
    side = retrieval.summarise(by_distance, ks)
    return report | {f"introspective/{name}": side[name] for name in (f"R@{ks[0]}", "MAP@R")}


def _threshold_report(
    scores: Mapping[str, np.ndarray], ranks: Ranks, held_out: Embedded, settings: Ism, precision: float
) -> dict[str, float]:
    """A confidence from all scores and its threshold, both fitted on held-out classes, applied to the queries."""
    known = scores_of(held_out, None, settings)
    known_correct = retrieval.retrieval_ranks(held_out.semantic, held_out.labels).nearest_correct
    shared = {name: known[name] for name in scores if name in known}
    model = confidence.fit_confidence(shared, known_correct)
    doubt = 1.0 - confidence.confidence(model, shared)
    threshold = uncertainty.threshold_for_precision(doubt, known_correct, precision)
    doubt = 1.0 - confidence.confidence(model, {name: scores[name] for name in shared})
    selected = uncertainty.selective(doubt, ranks.nearest_correct, threshold)
    return {
        "R-AUROC(confidence)": uncertainty.r_auroc(doubt, ranks.nearest_correct),
        "wanted_precision": precision,
        "answered": selected["coverage"],
        "answered_precision": selected["precision"],
    }


def corrupted_report(
    clean: Embedded, changed: Sequence[Embedded], gallery: Embedded, own: Int[np.ndarray, "n"], settings: Ism
) -> dict[str, float]:
    """Which score tells the wrong answers among clean and corrupted queries together?

    Args:
      clean: some pictures of the gallery as queries, ``n`` of them.
      changed: the same pictures in the same order, changed; one entry per change.
      gallery: all pictures, unchanged.
      own: ``[n]``, the gallery row of each picture, which it and its changed forms leave out.
      settings: of the introspective metric.

    Returns:
      ``corrupted/R@1`` over all these queries, and ``corrupted/R-AUROC(score)`` for every score of
      ``introspective.answer_scores``; NaN where all answers are right or all are wrong.
    """
    sets = [clean, *changed]
    columns = {name: [getattr(s, name) for s in sets] for name in Embedded._fields}
    joined: dict[str, Any] = {n: None if c[0] is None else np.concatenate(c) for n, c in columns.items()}
    queries = Embedded(**joined)
    own = np.tile(own, len(sets))
    found = uncertainty.nearest_twenty(queries.semantic, gallery.semantic, own=own)
    correct = gallery.labels[found.index[:, 0]] == queries.labels
    scores = introspective.answer_scores(
        queries.embedding, gallery.embedding, norms=queries.semantic_norm, own=own, found=found, **settings._asdict()
    )
    report = {f"R-AUROC({name})": uncertainty.r_auroc(score, correct) for name, score in scores.items()}
    return {f"corrupted/{name}": float(value) for name, value in ({"R@1": correct.mean()} | report).items()}


def ambiguity_report(
    original: Float[np.ndarray, "n"], changed: Mapping[str, Mapping[float, Float[np.ndarray, "n"]]]
) -> dict[str, float]:
    """Does the uncertainty rise where a picture is made harder?

    Args:
      original: ``[n]`` uncertainty of the pictures.
      changed: by kind of change and strength above 0, the uncertainty ``[n]`` of the same pictures changed.

    Returns:
      ``P(u_kind>u)`` at the strongest change, ties counting half, and, for kinds of several strengths,
      ``spearman(u,kind)`` of strength and uncertainty over all pictures, the unchanged ones being strength 0.
    """
    report = {}
    for kind, by_strength in changed.items():
        report[f"P(u_{kind}>u)"] = uncertainty.probability_greater(by_strength[max(by_strength)], original)
        if len(by_strength) > 1:
            strengths = [0.0, *by_strength]
            values = np.concatenate([original, *by_strength.values()])
            report[f"spearman(u,{kind})"] = uncertainty.spearman(np.repeat(strengths, len(original)), values)
    return report
