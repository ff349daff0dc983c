"""Confidence of answers, fitted on classes that the network was not trained on."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.ism import Metric
from idml_jax.metrics import relevance, uncertainty, visible
from idml_jax.metrics import vote as votes
from idml_jax.metrics.confidence import Confidence, confidence, fit_confidence
from idml_jax.metrics.embedded import Embedded, scores_of
from idml_jax.metrics.vote import Vote

# Parts of the held-out classes, each scored by a model fitted on the others.
FOLDS = 10
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


class Strangers(NamedTuple):
    """The held-out queries in both parts: their class is in the gallery (mated), or is taken out of it (strangers).

    Attributes:
      model: probability that a query's class is in the gallery, for as many strangers as mated queries.
      mated: ``[n]``, that probability for the mated queries, by a model fitted on queries of other classes.
      strangers: ``[n]``, the same for the strangers.
      right: ``[n]``, for the strangers the probability that the answer is right, by a model that takes them as mated.
    """

    model: Confidence
    mated: Float[np.ndarray, "n"]
    strangers: Float[np.ndarray, "n"]
    right: Float[np.ndarray, "n"]


class Calibration(NamedTuple):
    """A fitted confidence and its predictions for the clean held-out queries.

    Attributes:
      model: model of all scores, fitted on all queries, whose classes are all in the gallery.
      doubt: ``[n]``, 1 minus the confidence of each query, by a model fitted on queries of other classes: a threshold
        or a precision bound from the model's own training queries would be too optimistic.
      correct: ``[n]``, whether the nearest neighbour has the query's class.
      labels: ``[n]``, the class of each query (the first, where images have several).
      setting: settings of the vote, chosen on the held-out queries; ``None`` without labels of the gallery.
      open: the queries as strangers; ``None`` if no other class is left to search then. ``metrics.strangers`` uses it.
    """

    model: Confidence
    doubt: Float[np.ndarray, "n"]
    correct: Bool[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    setting: Vote | None = None
    open: Strangers | None = None


class Known(NamedTuple):
    """Answered held-out queries, on which a confidence is fitted.

    Attributes:
      scores: scores of the clean queries, each ``[n]``.
      correct: ``[n]``, whether their nearest neighbour is of their class.
      labels: ``[n]``, their classes.
      changed: the same for the changed queries, if there are any.
      strangers: the same for the clean queries, each searching the gallery without its class.
      setting: settings of the vote.
    """

    scores: dict[str, Float[np.ndarray, "n"]]
    correct: Bool[np.ndarray, "n"]
    labels: Int[np.ndarray, "n"]
    changed: Known | None = None
    strangers: Known | None = None
    setting: Vote | None = None


def answer(held_out: HeldOut, metric: Metric, *, labelled: bool = True, balanced: bool = False) -> Known:
    """Answers the held-out queries; the result serves several fits.

    An answer is right if it shares a label with the query. Where images have several labels, the vote counts each as
    the first of its labels, and no query plays a stranger.

    Args:
      held_out: queries of classes that the network was not trained on.
      metric: metric for the scores that use the uncertainty.
      labelled: whether the gallery in use will have labels; otherwise only label-free scores are computed.
      balanced: whether the vote is corrected for the sizes of classes, ``vote.Vote.balanced``.

    Returns:
      Their scores and whether their answers are right.

    Raises:
      ValueError: for empty or mismatched input.
    """
    queries, own = held_out.queries, held_out.own
    gallery = queries if held_out.gallery is None else held_out.gallery
    if held_out.gallery is None:
        own = np.arange(len(queries.labels))
    found = uncertainty.nearest_twenty(queries.semantic, gallery.semantic, own=own)
    vectors = queries.semantic, queries.labels, gallery.semantic, gallery.labels
    several = queries.sets is not None or gallery.sets is not None
    setting = None
    if labelled:
        setting = Vote(balanced=balanced) if several else votes.chosen(*vectors, found, own, balanced=balanced)

    def answers(queries: Embedded, own: Int[np.ndarray, "n"] | None, found: uncertainty.Neighbours) -> Known:
        scores = scores_of(queries, gallery, metric, own, found, setting=setting)
        return Known(scores, relevance.relevant(queries, gallery, found.index[:, 0]), queries.labels)

    known = answers(queries, own, found)._replace(setting=setting)
    if (changed := held_out.changed) is not None:
        mine = held_out.changed_own
        near = uncertainty.nearest_twenty(changed.semantic, gallery.semantic, own=mine)
        known = known._replace(changed=answers(changed, mine, near))
    if several:  # a class cannot be taken out of the gallery where its images are of others, too
        return known
    return known._replace(strangers=_as_strangers(queries, gallery, own, metric, setting))


def _as_strangers(
    queries: Embedded, gallery: Embedded, own: Int[np.ndarray, "n"] | None, metric: Metric, setting: Vote | None
) -> Known | None:
    """The queries, each searching the gallery without its class; ``None`` if some query then finds nothing."""
    hidden = queries.labels[:, None]
    depth = min(20, int(visible.visible_rows(hidden, gallery.labels, own).min()))
    if depth < 1:
        return None
    found = visible.nearest_of_other_classes(queries.semantic, hidden, gallery.semantic, gallery.labels, depth, own=own)
    scores = scores_of(queries, gallery, metric, own, found, setting=setting, absent=queries.labels)
    return Known(scores, np.zeros(len(queries.labels), bool), queries.labels)


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
    parts, changed_parts = _parts(known)
    strangers = known.strangers
    shared = [] if strangers is None else _shared(known, strangers, names)
    if not shared:
        strangers = None
    knowing = None if strangers is None else _fit_knowing(known, strangers, shared)
    doubt, mated, apart, right = (np.empty(len(known.correct)) for _ in range(4))
    for part in np.unique(parts):
        others = _rows(known, parts != part)
        if known.changed is not None and (changed_parts != part).any():
            others = others._replace(changed=_rows(known.changed, changed_parts != part))
        here = parts == part
        fitted = fit_model(others, names) if len(others.correct) else model
        scores = _rows(known, here).scores
        doubt[here] = 1.0 - confidence(fitted, scores)
        if strangers is None or knowing is None:
            continue
        absent = _rows(strangers, here).scores
        apart_model = _fit_knowing(others, _rows(strangers, parts != part), shared) if len(others.correct) else knowing
        mated[here], apart[here] = confidence(apart_model, scores), confidence(apart_model, absent)
        right[here] = confidence(fitted, filled(absent, fitted))
    both = None if knowing is None else Strangers(knowing, mated, apart, right)
    return Calibration(model, doubt, known.correct, known.labels, known.setting, both)


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


def _shared(known: Known, strangers: Known, names: Collection[str] | None) -> list[str]:
    """Names of the scores that the queries have in both parts."""
    return [n for n in known.scores if n in strangers.scores and (names is None or n in names)]


def _fit_knowing(known: Known, strangers: Known, names: list[str]) -> Confidence:
    """Fits the probability that a query is mated, each query playing both parts."""
    scores = {name: np.concatenate([known.scores[name], strangers.scores[name]]) for name in names}
    return fit_confidence(scores, np.repeat([True, False], [len(known.correct), len(strangers.correct)]))


def filled(scores: dict[str, Float[np.ndarray, "n"]], model: Confidence) -> dict[str, Float[np.ndarray, "n"]]:
    """The scores, and for those of the model that are missing its mean: a small gallery has fewer margins."""
    size = len(next(iter(scores.values())))
    return {n: scores.get(n, np.full(size, mean)) for n, mean in zip(model.names, model.mean, strict=True)}


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
