"""Evaluation of a classifier on a complete set: accuracy, calibration, and quality of the uncertainty."""

from collections.abc import Mapping
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from idml_jax import mixing
from idml_jax.data.images.transforms import CHANGES, Changed
from idml_jax.data.sources import Source
from idml_jax.metrics import classification, uncertainty
from idml_jax.metrics.classification import batch_sums
from idml_jax.metrics.summary import ambiguity_report
from idml_jax.runtime import sharding
from idml_jax.training.embedder import Embedder, Network, joined_rows
from idml_jax.training.tasks.probes import STRENGTHS, drawn_images, partners_of_other_classes
from idml_jax.training.tasks.task import Evaluation

SCORES = ("u", "max_softmax", "entropy")
MIXED = {"mixed": "mixup", "cutmix": "cutmix"}


def _scores(out: dict[str, Array]) -> dict[str, Array]:
    """Uncertainty scores per image; larger means less certain."""
    log_probability = jax.nn.log_softmax(out["logits"], axis=1)
    return {
        "u": jnp.linalg.norm(out["uncertainty"], axis=1),
        "max_softmax": 1.0 - jnp.exp(jnp.max(log_probability, axis=1)),
        "entropy": -jnp.sum(jnp.exp(log_probability) * log_probability, axis=1),
    }


def predict_step(
    variables: Any,
    images: UInt8[Array, "n h w c"],
    labels: Int[Array, "n"],
    mask: Bool[Array, "n"],
    *,
    network: Network,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Evaluates the plain logits of one batch.

    Args:
      variables: variables of the model.
      images: images of the batch, uint8.
      labels: their classes.
      mask: false for padding, which does not affect the sums.
      network: model and normalisation.

    Returns:
      ``metrics.classification.batch_sums``, and per image, including padding, ``right`` and the uncertainty scores
      ``u`` (length of the uncertainty), ``max_softmax`` (1 minus the largest probability) and ``entropy`` (nats).
    """
    out: dict[str, Array] = network.outputs(variables, network.normal(images))
    right = jax.vmap(lambda row, label: batch_sums(row[None], label[None])["top1"])(out["logits"], labels)
    return batch_sums(out["logits"], labels, mask), {"right": right, **_scores(out)}


def predict_mixed_step(
    variables: Any,
    images: UInt8[Array, "n h w c"],
    others: UInt8[Array, "n h w c"],
    *,
    network: Network,
    method: str,
) -> dict[str, Array]:
    """Uncertainty scores, as in ``predict_step``, of images mixed with others in about equal parts.

    Args:
      variables: variables of the model.
      images: images of the batch, uint8.
      others: their partners.
      network: model and normalisation.
      method: ``mixup`` (equal weights) or ``cutmix`` (a central box of half the area).

    Returns:
      Scores per image.
    """
    n, height, width, _ = images.shape
    if method == "mixup":
        outside, box = 0.5, (0, 0, 0, 0)
    else:
        rows, columns = round(height * 0.5**0.5), round(width * 0.5**0.5)
        top, left = (height - rows) // 2, (width - columns) // 2
        outside, box = 1.0, (top, left, top + rows, left + columns)
    boxes = jnp.broadcast_to(jnp.asarray(box, jnp.int32)[None], (n, 4))
    mixed = mixing.mix(network.normal(images), network.normal(others), jnp.full((n,), outside), boxes)
    out: dict[str, Array] = network.outputs(variables, mixed)
    return _scores(out)


jit_predict_step = jax.jit(predict_step, static_argnames=("network",))
jit_predict_mixed_step = jax.jit(predict_mixed_step, static_argnames=("network", "method"))


def predict(
    embedder: Embedder, source: Source, order: Int[np.ndarray, "m"] | None = None
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Evaluates every image of a source (or those of ``order``) once.

    Args:
      embedder: network, weights and transform.
      source: images.
      order: ``[m]`` records; all by default.

    Returns:
      ``top1``, ``top5``, ``nll``, ``ece`` and ``count``; and per image ``right`` and the scores of ``predict_step``.

    Raises:
      UserError: naming an image that cannot be read.
    """
    count = len(source) if order is None else len(order)
    step = lambda placed: jit_predict_step(
        embedder.variables, placed["image"], placed["label"], placed["mask"], network=embedder.network
    )
    sums, rows = zip(*embedder.results(step, embedder.placed(source, order), count), strict=True)
    total = reduce(lambda one, other: jax.tree.map(jnp.add, one, other), sums)
    return classification.finish(sharding.to_host(total)), joined_rows(list(rows), count)


def measure(evaluation: Evaluation) -> dict[str, float]:
    """Accuracy and calibration after an epoch; see ``predict``."""
    return dict(_predicted(evaluation)[0])


def _predicted(evaluation: Evaluation) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """``predict`` of all images."""
    return evaluation.once("predicted", lambda: predict(evaluation.embedder, evaluation.source))


def evaluate(evaluation: Evaluation) -> dict[str, float]:
    """Accuracy, calibration, error detection, and the rise of the uncertainty on images made harder.

    Args:
      evaluation: network and images; its settings give the number of images drawn and the seed.

    Returns:
      The metrics of ``predict``; ``AUROC_error(score)`` and ``AURC(score)`` (area under the risk-coverage curve) of the
      baseline scores ``max_softmax`` and ``entropy``, and ``P(max_softmax_mixed>max_softmax)``. For an introspective
      run also those of ``u``, with ``mean_u``, ``share_u_zero``, ``mean_u_mixed``, ``P(u_kind>u)`` and
      ``spearman(u,kind)``.
    """
    embedder, source, config = evaluation.embedder, evaluation.source, evaluation.config
    accuracy, rows = _predicted(evaluation)
    report = dict(accuracy)
    introspective = config.ism.enabled
    right = rows["right"] > 0
    for name in SCORES if introspective else SCORES[1:]:
        report[f"AUROC_error({name})"] = uncertainty.r_auroc(rows[name], right)
        report[f"AURC({name})"] = uncertainty.risk_coverage(rows[name], right).aurc
    if introspective:
        report["mean_u"] = float(rows["u"].mean())
        report["share_u_zero"] = float((rows["u"] == 0).mean())
    if not config.eval.ambiguity_images:
        return report
    chosen = drawn_images(len(source), config.eval.ambiguity_images, config.seed)
    partners = partners_of_other_classes(source.labels, chosen, config.seed)
    lengths: dict[str, dict[float, np.ndarray]] = {}
    for kind, method in MIXED.items():
        step = partial(jit_predict_mixed_step, embedder.variables, network=embedder.network, method=method)
        scores = embedder.gathered(step, source, chosen, partners)
        greater = uncertainty.probability_greater(scores["max_softmax"], rows["max_softmax"][chosen])
        report[f"P(max_softmax_{kind}>max_softmax)"] = greater
        report[f"mean_u_{kind}"] = float(scores["u"].mean())
        lengths[kind] = {0.5: scores["u"]}
    if not introspective:
        return {k: v for k, v in report.items() if not k.startswith("mean_u")}
    for kind in CHANGES:
        lengths[kind] = {
            s: predict(evaluation.changed(Changed(embedder.transform, kind, s)), source, chosen)[1]["u"]
            for s in STRENGTHS
        }
    return report | ambiguity_report(rows["u"][chosen], lengths)


def describe(metrics: Mapping[str, Any]) -> str:
    """One line: ``top-1 76.3  top-5 92.9  NLL 0.95  ECE 3.1`` (percent but for NLL, in nats)."""
    percent = lambda name: 100 * metrics[name]
    return (
        f"top-1 {percent('top1'):.1f}  top-5 {percent('top5'):.1f}  NLL {metrics['nll']:.3f}  ECE {percent('ece'):.1f}"
    )
