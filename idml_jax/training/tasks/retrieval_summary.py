"""Evaluation of an embedding: retrieval, clustering, and quality of the uncertainty."""

from collections.abc import Iterable

import numpy as np

from idml_jax.data.images.transforms import CHANGES, Changed, Transform
from idml_jax.data.sources import Source
from idml_jax.metrics import calibration, relevance
from idml_jax.metrics.calibration import Known
from idml_jax.metrics.embedded import Embedded, joined
from idml_jax.metrics.summary import HeldOut, ambiguity_report, corrupted_report, full_report, retrieval_report
from idml_jax.training.tasks.metrics_of_run import metric_of
from idml_jax.training.tasks.probes import STRENGTHS, drawn_images, partners_of_other_classes
from idml_jax.training.tasks.task import Evaluation


def measure(evaluation: Evaluation) -> dict[str, float]:
    """Recall and precision after an epoch; see ``metrics.summary.retrieval_report``."""
    embedded, gallery = _embedded(evaluation)
    return retrieval_report(embedded, evaluation.config.eval.ks, gallery)


def evaluate(evaluation: Evaluation) -> tuple[dict[str, float], list[str]]:
    """All metrics (see ``metrics.summary.full_report``, ``ambiguity`` and ``held_out_queries``), and warnings."""
    config = evaluation.config
    embedded, gallery = _embedded(evaluation)
    if relevance.is_special(embedded, gallery):
        return full_report(embedded, gallery, ks=config.eval.ks, seed=config.seed)
    truth = evaluation.source.fields.get("ambiguity") if evaluation.embedder.learned else None
    held_out = held_out_queries(evaluation)
    known = None if held_out is None else calibration.answer(held_out, metric_of(config))
    report, warnings = full_report(
        embedded,
        gallery,
        ks=config.eval.ks,
        seed=config.seed,
        ambiguity=truth,
        metric=metric_of(config),
        precision=config.eval.precision,
        held_out=held_out,
        answered=known,
        cluster=config.eval.cluster,
    )
    if config.eval.ambiguity_images:
        report |= ambiguity(evaluation, embedded, known)
    return report, warnings


def _embedded(evaluation: Evaluation) -> tuple[Embedded, Embedded | None]:
    """Embeddings of the queries and of the gallery, if there is one."""
    gallery, embedder = evaluation.gallery, evaluation.embedder
    queries = evaluation.once("queries", lambda: embedder(evaluation.source))
    return queries, None if gallery is None else evaluation.once("gallery", lambda: embedder(gallery))


def ambiguity(
    evaluation: Evaluation, gallery: Embedded, known: Known | None = None, kinds: Iterable[str] = CHANGES
) -> dict[str, float]:
    """Measures how the uncertainty rises and detects errors on mixed, cropped, blurred, noised or occluded images.

    Args:
      evaluation: network and images; its settings give the number of images drawn and the seed.
      gallery: embeddings of all images of the source; without an uncertainty only baseline scores are evaluated.
      known: answered held-out queries, which fit the confidence of answers, see ``held_out_queries``.
      kinds: changes besides mixing, at the strengths 0.25, 0.5 and 0.75.

    Returns:
      The metrics of ``metrics.summary.ambiguity_report``, where images are mixed at equal weight with an image of
      another class, and of ``metrics.summary.corrupted_report`` over the changed images, without the mixed ones, which
      have no class.
    """
    config, source = evaluation.config, evaluation.source
    chosen = drawn_images(len(source), config.eval.ambiguity_images, config.seed)
    transform = evaluation.embedder.transform
    original = evaluation.embedder(source, chosen)
    changed = {
        kind: {s: evaluation.changed(Changed(transform, kind, s))(source, chosen) for s in STRENGTHS} for kind in kinds
    }
    every = [embedded for by_strength in changed.values() for embedded in by_strength.values()]
    report = corrupted_report(original, every, gallery, chosen, metric_of(config), known)
    if gallery.uncertainty is None:
        return report
    partners = partners_of_other_classes(source.labels, chosen, config.seed)
    changed["mixed"] = {0.5: evaluation.embedder(source, chosen, partners=partners)}
    lengths = {kind: {s: e.uncertainty_norm for s, e in by_strength.items()} for kind, by_strength in changed.items()}
    return ambiguity_report(original.uncertainty_norm, lengths) | report


def held_out_queries(evaluation: Evaluation) -> HeldOut | None:
    """Embeds held-out classes as queries to fit the confidence of answers on.

    They search themselves and complete training classes, added until the gallery is as large as the one that will be
    searched: in a small gallery few answers are wrong and distances are not comparable. Some queries (the settings give
    the number) are also cropped, blurred, noised and occluded.

    Args:
      evaluation: network and images.

    Returns:
      The queries, for ``metrics.summary``; ``None`` if there are no held-out classes or they are themselves evaluated.
    """
    validation, train, config = evaluation.held_out, evaluation.splits.train, evaluation.config
    if validation is None:
        return None
    searched = len(evaluation.gallery or evaluation.source)
    plain = evaluation.embedder.transform

    def run(source: Source, order: np.ndarray, transform: Transform = plain) -> Embedded:
        return evaluation.changed(transform)(source, order)

    queries = run(validation, np.arange(len(validation)))
    size = np.bincount(train.labels, minlength=len(train.class_names))
    classes = np.random.Generator(np.random.PCG64(config.seed)).permutation(len(size))
    wanted = classes[np.cumsum(size[classes]) <= max(0, searched - len(validation))]
    gallery = queries
    if len(wanted):
        others = run(train, np.flatnonzero(np.isin(train.labels, wanted)))
        gallery = joined([queries, others._replace(labels=others.labels + len(validation.class_names))])
    own = np.arange(len(validation))
    chosen = drawn_images(len(validation), config.eval.ambiguity_images, config.seed)
    if not len(chosen):
        return HeldOut(queries, gallery, own)
    changed = [run(validation, chosen, Changed(plain, kind, s)) for kind in CHANGES for s in STRENGTHS]
    return HeldOut(queries, gallery, own, joined(changed), np.tile(chosen, len(changed)))
