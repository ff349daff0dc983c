"""Confidence of answers, fitted on classes that the network was not trained on."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.ism import Metric
from idml_jax.metrics import uncertainty
from idml_jax.metrics.confidence import Confidence, confidence, fit_confidence
from idml_jax.metrics.embedded import Embedded, scores_of

# Parts of the held-out classes, each scored by a model fitted on the others.
FOLDS = 5
# Total weight of the corrupted held-out queries relative to the clean ones, which are far fewer.
CHANGED_WEIGHT = 0.3


class HeldOut(NamedTuple):
    """Queries of held-out classes, whose right and wrong answers fit the confidence.

    Attributes:
      queries: ``n`` images; without a gallery each one searches all the others.
      gallery: images that they search, ideally as large and as dense as the gallery in use: held-out and other images.
      own: ``[n]``, the gallery row of each query, which it leaves out.
      changed: ``m`` of the queries made harder to recognise, so that the confidence is fitted on such queries too;
        needs a gallery.
      changed_own: ``[m]``, the gallery row that each changed query leaves out.
    """

    queries: Embedded
    gallery: Embedded | None = None
    own: Int[np.ndarray, "n"] | None = None
    changed: Embedded | None = None
    changed_own: Int[np.ndarray, "m"] | None = None


class Calibration(NamedTuple):
    """A fitted confidence and its predictions for the clean held-out queries.

    Attributes:
      model: model of all scores, fitted on all queries.
      doubt: ``[n]``, 1 minus the confidence of each query, by a model fitted on queries of other classes: a threshold
        or a precision bound from the model's own training queries would be too optimistic.
      correct: ``[n]``, whether the nearest neighbour has the query's class.
    """

    model: Confidence
    doubt: Float[np.ndarray, "n"]
    correct: Bool[np.ndarray, "n"]


class Known(NamedTuple):
    """Answered held-out queries, on which a confidence is fitted.

    Attributes:
      scores: scores of the clean queries, each ``[n]``.
      correct: ``[n]``, whether their nearest neighbour is of their class.
      labels: ``[n]``, their classes.
      changed: the same for the changed queries, if there are any.
    """

    scores: dict[str, Float[np.ndarray, "n"]]
    correct: Bool[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    changed: Known | None = None


def answer(held_out: HeldOut, metric: Metric) -> Known:
    """Answers the held-out queries; the result serves several fits.

    Args:
      held_out: queries of classes that the network was not trained on.
      metric: metric for the scores that use the uncertainty.

    Returns:
      Their scores and whether their answers are right.

    Raises:
      ValueError: for empty or mismatched input.
    """

    def answers(queries: Embedded, own: Int[np.ndarray, "n"] | None) -> Known:
        gallery = held_out.gallery
        found = uncertainty.nearest_twenty(queries.semantic, None if gallery is None else gallery.semantic, own=own)
        nearest = (queries if gallery is None else gallery).labels[found.index[:, 0]]
        return Known(scores_of(queries, gallery, metric, own, found), nearest == queries.labels, queries.labels)

    known, changed = answers(held_out.queries, held_out.own), held_out.changed
    return known if changed is None else known._replace(changed=answers(changed, held_out.changed_own))


def fit(known: Known, names: Collection[str] | None = None) -> Calibration:
    """Fits the confidence of answers, and predicts each held-out query with a model that has not seen its class.

    Args:
      known: result of ``answer``.
      names: names of the scores to use; a small gallery has fewer margins. All by default.

    Returns:
      The calibration.

    Raises:
      ValueError: for non-finite scores, or none.
    """
    model = fit_model(known, names)
    doubt = np.empty(len(known.correct))
    parts, changed_parts = _parts(known)
    for part in np.unique(parts):
        others = _rows(known, parts != part)
        if known.changed is not None and (changed_parts != part).any():
            others = others._replace(changed=_rows(known.changed, changed_parts != part))
        here = parts == part
        fitted = fit_model(others, names) if len(others.correct) else model
        doubt[here] = 1.0 - confidence(fitted, {name: score[here] for name, score in known.scores.items()})
    return Calibration(model, doubt, known.correct)


def fit_model(known: Known, names: Collection[str] | None = None) -> Confidence:
    """Fits only the confidence model of ``fit``.

    With changed queries the model also uses products of scores: which score detects wrong answers depends on how
    unusual the query is. Arguments and errors as for ``fit``.
    """
    scores, correct = {k: v for k, v in known.scores.items() if names is None or k in names}, known.correct
    if known.changed is None:
        return fit_confidence(scores, correct)
    more, more_correct = known.changed.scores, known.changed.correct
    weights = np.ones(len(correct)), np.full(len(more_correct), CHANGED_WEIGHT * len(correct) / len(more_correct))
    return fit_confidence(
        {name: np.concatenate([scores[name], more[name]]) for name in scores if name in more},
        np.concatenate([correct, more_correct]),
        ridge=10.0,
        weights=np.concatenate(weights),
        products=True,
    )


def _parts(known: Known) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "m"]]:
    """The part of each query and each changed query: whole classes, or single queries if there is only one class."""
    more = known.labels[:0] if known.changed is None else known.changed.labels
    classes, codes = np.unique(np.concatenate([known.labels, more]), return_inverse=True)
    if len(classes) < 2:
        codes = np.concatenate([np.arange(len(known.labels)), np.full(len(more), -1)])
    parts = np.where(codes < 0, -1, codes % FOLDS)
    return parts[: len(known.labels)], parts[len(known.labels) :]


def _rows(known: Known, chosen: Bool[np.ndarray, "n"]) -> Known:
    scores = {name: score[chosen] for name, score in known.scores.items()}
    return Known(scores, known.correct[chosen], known.labels[chosen])


def calibrate(held_out: HeldOut, metric: Metric, names: Collection[str] | None = None) -> Calibration:
    """``answer`` and ``fit`` in one; raises as they do."""
    return fit(answer(held_out, metric), names)
