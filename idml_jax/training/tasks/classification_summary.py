"""Evaluation of a classifier on a whole set, tail included: accuracy, calibration, what the uncertainty knows."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from idml_jax.data import pipeline
from idml_jax.data.images.transforms import CHANGES, Changed, Transform
from idml_jax.data.sources import Source
from idml_jax.metrics import classification, uncertainty
from idml_jax.metrics.summary import ambiguity_report
from idml_jax.runtime import sharding
from idml_jax.training import evaluation as evaluate
from idml_jax.training.steps import StepSetup
from idml_jax.training.tasks import classification as classify_steps

SCORES = ("u", "max_softmax", "entropy")
MIXED = {"mixed": "mixup", "cutmix": "cutmix"}


def predict(
    variables: Any,
    source: Source,
    transform: Transform,
    setup: StepSetup,
    mesh: Mesh,
    *,
    batch_size: int,
    order: np.ndarray | None = None,
    channels: int = 3,
    threads: int = 4,
    check: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Judges every picture of a source (or those of ``order``) once.

    Args:
      variables: of the model, on the mesh.
      source: images.
      transform: test transform.
      setup: of the steps.
      mesh: devices.
      batch_size: images per step over all devices.
      order: records, ``[n]``; all by default.
      channels: 3 or 1.
      threads: that read and decode.
      check: called before every batch; may raise to stop.

    Returns:
      ``top1``, ``top5``, ``nll``, ``ece`` and ``count``; and per picture ``right`` and the scores of ``predict_step``.
    """
    total, parts = None, []
    options = dict(host=jax.process_index(), hosts=jax.process_count(), threads=threads, channels=channels)
    for batch in pipeline.eval_batches(source, transform, batch_size=batch_size, order=order, **options):
        check()
        placed = sharding.shard_batch({k: batch[k] for k in ("image", "label", "mask")}, mesh)
        sums, rows = classify_steps.jit_predict_step(
            variables, placed["image"], placed["label"], placed["mask"], setup=setup
        )
        total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
        parts.append(rows)
    count = len(source) if order is None else len(order)
    return classification.finish(sharding.to_host(total)), evaluate.joined_rows(parts, count)


def _mixed_scores(
    variables: Any,
    source: Source,
    transform: Transform,
    setup: StepSetup,
    mesh: Mesh,
    order: np.ndarray,
    partners: np.ndarray,
    method: str,
    check: Callable[[], None] = lambda: None,
    **options: Any,
) -> dict[str, np.ndarray]:
    options |= dict(host=jax.process_index(), hosts=jax.process_count())
    pairs = zip(
        pipeline.eval_batches(source, transform, order=order, **options),
        pipeline.eval_batches(source, transform, order=partners, **options),
        strict=True,
    )
    parts = []
    for one, other in pairs:
        check()
        placed = sharding.shard_batch({"one": one["image"], "other": other["image"]}, mesh)
        parts.append(
            classify_steps.jit_predict_mixed_step(variables, placed["one"], placed["other"], setup=setup, method=method)
        )
    return evaluate.joined_rows(parts, len(order))


def full_report(
    variables: Any,
    source: Source,
    transform: Transform,
    setup: StepSetup,
    mesh: Mesh,
    *,
    images: int,
    seed: int,
    **options: Any,
) -> dict[str, float]:
    """Accuracy, calibration, detection of errors, and whether the uncertainty rises where pictures are made harder.

    Args:
      variables: of the model.
      source: images.
      transform: test transform.
      setup: of the steps.
      mesh: devices.
      images: how many pictures, drawn at random, are mixed and changed; 0: none.
      seed: of the drawing.
      **options: of ``predict``.

    Returns:
      As ``predict``; ``AUROC_error(score)`` and ``AURC(score)`` (area under the risk-coverage curve) of the free
      scores ``max_softmax`` and ``entropy`` and, in an introspective run, of ``u``, with ``mean_u``, ``share_u_zero``,
      ``mean_u_mixed``, ``P(u_kind>u)`` and ``spearman(u,kind)``; ``P(max_softmax_mixed>max_softmax)`` beside them.
    """
    report, rows = predict(variables, source, transform, setup, mesh, **options)
    introspective = setup.objective.introspective
    right = rows["right"] > 0
    for name in SCORES if introspective else SCORES[1:]:
        report[f"AUROC_error({name})"] = uncertainty.r_auroc(rows[name], right)
        report[f"AURC({name})"] = uncertainty.risk_coverage(rows[name], right).aurc
    if introspective:
        report["mean_u"] = float(rows["u"].mean())
        report["share_u_zero"] = float((rows["u"] == 0).mean())
    if not images:
        return report
    chosen = evaluate.drawn_pictures(len(source), images, seed)
    partners = evaluate.partners_of_other_classes(source.labels, chosen, seed)
    lengths: dict[str, dict[float, np.ndarray]] = {}
    for kind, method in MIXED.items():
        scores = _mixed_scores(variables, source, transform, setup, mesh, chosen, partners, method, **options)
        greater = uncertainty.probability_greater(scores["max_softmax"], rows["max_softmax"][chosen])
        report[f"P(max_softmax_{kind}>max_softmax)"] = greater
        report[f"mean_u_{kind}"] = float(scores["u"].mean())
        lengths[kind] = {0.5: scores["u"]}
    if not introspective:
        return {k: v for k, v in report.items() if not k.startswith("mean_u")}
    for kind in CHANGES:
        changed = {s: Changed(transform, kind, s) for s in evaluate.STRENGTHS}
        lengths[kind] = {
            s: predict(variables, source, t, setup, mesh, order=chosen, **options)[1]["u"] for s, t in changed.items()
        }
    return report | ambiguity_report(rows["u"][chosen], lengths)


def report(run: Any, state: Any, full: bool, check: Callable[[], None] = lambda: None) -> dict[str, float]:
    """The figures of a run: those of every epoch, or all of them.

    Args:
      run: an ``idml_jax.training.build.Run`` whose task is classification.
      state: of its training.
      full: as ``full_report``; else as ``predict``.
      check: called before every batch; may raise to stop.
    """
    config = run.config
    what = (state.variables, run.eval_source, run.test_transform, run.setup, run.mesh)
    options = {
        "batch_size": config.eval.batch_size,
        "channels": config.data.channels,
        "threads": config.data.threads,
        "check": check,
    }
    if not full:
        return predict(*what, **options)[0]
    return full_report(*what, images=config.eval.ambiguity_images, seed=config.seed, **options)


def describe(metrics: dict[str, float]) -> str:
    """One line: ``top-1 76.3  top-5 92.9  NLL 0.95  ECE 3.1`` (percent but for NLL, in nats)."""
    percent = lambda name: 100 * metrics[name]
    return (
        f"top-1 {percent('top1'):.1f}  top-5 {percent('top5'):.1f}  NLL {metrics['nll']:.3f}  ECE {percent('ece'):.1f}"
    )
