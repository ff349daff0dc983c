"""How sure an answer is, learned on classes that the network was not trained on."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.metrics import uncertainty
from idml_jax.metrics.confidence import Confidence, confidence, fit_confidence
from idml_jax.metrics.embedded import Embedded, Ism, scores_of

# What all corrupted held-out queries count beside the clean ones, whose number they exceed many times.
CHANGED_WEIGHT = 0.3


class HeldOut(NamedTuple):
    """Queries of held-out classes, whose right and wrong answers teach the confidence.

    Attributes:
      queries: ``n`` images; without a gallery every one searches all the others.
      gallery: what they search: best as large and as dense as what will be searched, so held-out images and others.
      own: ``[n]``, the gallery row of each query, which it leaves out.
      changed: some of them made harder to recognise, ``m`` images, so that the confidence knows such queries too;
        they need a gallery.
      changed_own: ``[m]``, the gallery row that each of those leaves out.
    """

    queries: Embedded
    gallery: Embedded | None = None
    own: Int[np.ndarray, "n"] | None = None
    changed: Embedded | None = None
    changed_own: Int[np.ndarray, "m"] | None = None

    def without_uncertainty(self) -> HeldOut:
        """The same of a network whose uncertainty head has learned nothing."""
        plain: Any = lambda x: None if x is None else x._replace(uncertainty=None)
        return self._replace(queries=plain(self.queries), gallery=plain(self.gallery), changed=plain(self.changed))


class Calibration(NamedTuple):
    """A fitted confidence and what it says of the clean held-out queries.

    Attributes:
      model: of all scores.
      doubt: ``[n]``, 1 less the confidence of each.
      correct: ``[n]``, whether its nearest neighbour is of its class.
    """

    model: Confidence
    doubt: Float[np.ndarray, "n"]
    correct: Bool[np.ndarray, "n"]


class Known(NamedTuple):
    """Held-out queries answered: what a confidence is fitted on.

    Attributes:
      scores: of the clean queries, each ``[n]``.
      correct: ``[n]``, whether their nearest neighbour is of their class.
      changed: the same two of the changed queries, if there are any.
    """

    scores: dict[str, Float[np.ndarray, "n"]]
    correct: Bool[np.ndarray, "n"]
    changed: tuple[dict[str, Float[np.ndarray, "m"]], Bool[np.ndarray, "m"]] | None


def answer(held_out: HeldOut, settings: Ism) -> Known:
    """Searches the held-out queries, once for however many fits.

    Args:
      held_out: queries of classes that the network was not trained on.
      settings: of the introspective metric.

    Returns:
      Their scores and whether they are answered rightly.

    Raises:
      ValueError: for empty or mismatched input.
    """

    def answers(queries: Embedded, own: np.ndarray | None) -> tuple[dict[str, np.ndarray], np.ndarray]:
        gallery = held_out.gallery
        found = uncertainty.nearest_twenty(queries.semantic, None if gallery is None else gallery.semantic, own=own)
        nearest = (queries if gallery is None else gallery).labels[found.index[:, 0]]
        return scores_of(queries, gallery, settings, own, found), nearest == queries.labels

    changed = held_out.changed
    return Known(
        *answers(held_out.queries, held_out.own), None if changed is None else answers(changed, held_out.changed_own)
    )


def fit(known: Known, names: Collection[str] | None = None) -> Calibration:
    """Fits how sure answers are.

    Args:
      known: of ``answer``. With changed queries the model also has the products of the scores: which of them tells
        wrong answers depends on how strange the query is.
      names: of the scores to use; a small gallery has fewer margins. All by default.

    Returns:
      The calibration.

    Raises:
      ValueError: for non-finite scores, or none.
    """
    scores, correct = {k: v for k, v in known.scores.items() if names is None or k in names}, known.correct
    if known.changed is None:
        model = fit_confidence(scores, correct)
    else:
        more, more_correct = known.changed
        weights = np.ones(len(correct)), np.full(len(more_correct), CHANGED_WEIGHT * len(correct) / len(more_correct))
        model = fit_confidence(
            {name: np.concatenate([scores[name], more[name]]) for name in scores if name in more},
            np.concatenate([correct, more_correct]),
            ridge=10.0,
            weights=np.concatenate(weights),
            products=True,
        )
    return Calibration(model, 1.0 - confidence(model, scores), correct)


def calibrate(held_out: HeldOut, settings: Ism, names: Collection[str] | None = None) -> Calibration:
    """``answer`` and ``fit`` in one; raises as they do."""
    return fit(answer(held_out, settings), names)
