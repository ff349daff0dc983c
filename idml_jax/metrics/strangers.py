"""Answers among strangers: how sure an answer is, and which are given, if some queries' classes are not in the gallery.

The held-out classes play both parts (`calibration.Strangers`). From them come the probability that a query's class is
in the gallery at all (known) and, for such queries, the probability that the answer is right; their product says how
sure the answer is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.metrics import binomial
from idml_jax.metrics.calibration import Calibration, filled
from idml_jax.metrics.confidence import confidence
from idml_jax.metrics.design_effect import effects_of_first
from idml_jax.metrics.uncertainty import Threshold, threshold_for_precision

# Queries, half of them strangers, that the share of strangers is estimated from besides the real ones: a prior.
PRIOR_QUERIES = 10.0
# Choices of the classes that play strangers, for the threshold of a wanted precision: an odd number.
CHOICES = 9
# Risk that the share of strangers that get an answer is above the wanted one.
RISK = 0.05


class Sure(NamedTuple):
    """Probabilities of n answers.

    Attributes:
      known: ``[n]`` that the query's class is in the gallery; ``None`` if the calibration does not know strangers.
      sure: ``[n]`` that the answer is right.
    """

    known: Float[np.ndarray, "n"] | None
    sure: Float[np.ndarray, "n"]


def with_share(known: Float[np.ndarray, "n"], share: float) -> Float[np.ndarray, "n"]:
    """Moves probabilities of being mated from half of strangers to another share of them, by Bayes' rule."""
    mated = known * (1.0 - share)
    return mated / np.maximum(mated + (1.0 - known) * share, np.finfo(np.float64).tiny)


def judge(calibrated: Calibration, scores: Mapping[str, Float[np.ndarray, "n"]], share: float = 0.5) -> Sure:
    """How sure the answers are.

    Args:
      calibrated: calibration on held-out classes.
      scores: scores of the answers, ``metrics.embedded.scores_of``.
      share: share of the queries whose class is not in the gallery, from 0 to 1.
    """
    right = confidence(calibrated.model, scores)
    if calibrated.open is None:
        return Sure(None, right)
    model = calibrated.open.model
    known = with_share(confidence(model, filled(dict(scores), model)), share)
    return Sure(known, known * right)


def estimated_share(calibrated: Calibration, scores: Mapping[str, Float[np.ndarray, "n"]]) -> float:
    """Share of strangers among the queries, from their scores alone; 0 if the calibration does not know strangers.

    The share under which it is itself the mean probability of being a stranger (Saerens, Latinne, Decaestecker, Neural
    Computation 2002), with ``PRIOR_QUERIES`` queries of a prior: few queries say little about it.
    """
    if calibrated.open is None:
        return 0.0
    model, share = calibrated.open.model, 0.5
    even = confidence(model, filled(dict(scores), model))
    for _ in range(1000):
        before, stranger = share, np.sum(1.0 - with_share(even, share))
        share = float((stranger + PRIOR_QUERIES / 2) / (len(even) + PRIOR_QUERIES))
        if abs(share - before) < 1e-6:
            break
    return share


class Mixture(NamedTuple):
    """Held-out queries, each playing one part, so that they are independent: mated or a stranger.

    Attributes:
      doubt: ``[n]`` 1 minus how sure the answer is, by models that have not seen the query's class.
      correct: ``[n]`` whether the answer is right; those of strangers are wrong.
      stranger: ``[n]`` which part the query plays.
    """

    doubt: Float[np.ndarray, "n"]
    correct: Bool[np.ndarray, "n"]
    stranger: Bool[np.ndarray, "n"]


def mixture(calibrated: Calibration, share: float, seed: int = 0) -> Mixture:
    """Held-out queries with a share of strangers; whole classes are strangers, drawn by the seed.

    At least one class is mated and, for a share above 0, one a stranger, if there are two. Without ``calibrated.open``
    all are mated.
    """
    part = calibrated.open
    if part is None or share <= 0:
        return Mixture(calibrated.doubt, calibrated.correct, np.zeros(len(calibrated.correct), bool))
    classes, code, sizes = np.unique(calibrated.labels, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(classes))
    taken = int(np.argmin(np.abs(np.cumsum(sizes[order]) - share * len(code)))) + 1
    taken = min(taken, max(1, len(classes) - 1))
    stranger = np.isin(code, order[:taken])
    mated_doubt = 1.0 - with_share(part.mated, share) * (1.0 - calibrated.doubt)
    stranger_doubt = 1.0 - with_share(part.strangers, share) * part.right
    return Mixture(np.where(stranger, stranger_doubt, mated_doubt), calibrated.correct & ~stranger, stranger)


class Rule(NamedTuple):
    """Which answers are given: those with a doubt of at most ``value``.

    Attributes:
      value: the threshold; -inf: nothing is answered.
      share: share of strangers that was assumed.
      precision: threshold for the wanted precision; ``None`` if none was wanted.
      strangers: threshold for the wanted share of answered strangers; ``None`` if none was wanted.
      held_out: the held-out queries that it was chosen on.
    """

    value: float
    share: float
    precision: Threshold | None
    strangers: float | None
    held_out: Mixture


def rule(
    calibrated: Calibration, share: float, precision: float | None = None, answered_strangers: float | None = None
) -> Rule:
    """The rule that answers most queries while both wishes are met.

    Args:
      calibrated: calibration on held-out classes.
      share: share of strangers among the queries.
      precision: wanted share of right answers, those of strangers being wrong; see
        ``uncertainty.threshold_for_precision``.
      answered_strangers: wanted share of the strangers that get an answer, at most (FPIR); see ``stranger_threshold``.

    Raises:
      ValueError: for values outside (0, 1), or ``answered_strangers`` without ``calibrated.open``.
    """
    held_out, first, second = mixture(calibrated, share), None, None
    if precision is not None:
        held_out, first = _by_median(calibrated, share, precision)
    if answered_strangers is not None:
        if calibrated.open is None:
            raise ValueError(
                "strangers: the held-out images cannot play strangers: their classes are too few, or they have several "
                "labels each"
            )
        part = calibrated.open
        doubt = 1.0 - with_share(part.strangers, share) * part.right
        second = stranger_threshold(doubt, answered_strangers, groups=calibrated.labels)
    limits = [limit for limit in (None if first is None else first.value, second) if limit is not None]
    return Rule(min(limits, default=float("inf")), share, first, second, held_out)


def _by_median(calibrated: Calibration, share: float, precision: float) -> tuple[Mixture, Threshold]:
    """The median threshold over several choices of the classes that play strangers: no single choice decides."""
    tried = []
    for seed in range(CHOICES if calibrated.open is not None and share > 0 else 1):
        held_out = mixture(calibrated, share, seed)
        found = threshold_for_precision(
            held_out.doubt, held_out.correct, precision, groups=calibrated.labels, strata=held_out.stranger
        )
        tried.append((held_out, found))
    return sorted(tried, key=lambda one: (one[1].value, one[1].bound))[len(tried) // 2]


def stranger_threshold(
    doubt: Float[np.ndarray, "n"], wanted: float, risk: float = RISK, *, groups: Int[np.ndarray, "n"] | None = None
) -> float:
    """The largest threshold on the doubt at which no more than the wanted share of strangers is answered.

    A one-sided tolerance limit (Wilks, 1941): the true share is above the wanted one in at most ``risk`` of such
    choices, for independent strangers, or for independent groups of them. -inf if so many strangers are too few to
    show it.

    Args:
      doubt: ``[n]`` doubts of held-out strangers, by models that have not seen their classes.
      wanted: share of them that may be answered, above 0 and below 1.
      risk: see above.
      groups: ``[n]`` class of each stranger: those of a class are answered together, so they count for fewer
        (``design_effect.effects_of_first``). By default all are independent.

    Raises:
      ValueError: for a share outside (0, 1).
    """
    if not 0 < wanted < 1:
        raise ValueError(f"strangers: expected a share above 0 and below 1, got {wanted}")
    order, total = np.argsort(doubt, kind="stable"), len(doubt)
    effects = np.ones(total + 1)
    if groups is not None:
        effects = effects_of_first(np.unique(groups, return_inverse=True)[1][order])
    allowed = -1
    for count in _counts(int(wanted * total)):
        worth = max(1, int(total / effects[count]))
        hits = min(worth, int(np.ceil(count / effects[count] - 1e-9)))
        # P(at most so many are answered) for a true share just as wanted.
        if 1.0 - np.r_[binomial.upper_tail(worth, wanted), 0.0][hits + 1] > risk:
            break
        allowed = count
    if allowed < 0:
        return float("-inf")
    # Below the first that may not be answered; equal doubts cannot be parted.
    return float(np.nextafter(doubt[order][allowed], -np.inf))


def _counts(most: int) -> Iterator[int]:
    """Counts from 0 that are tested one after the other: each one, later in steps of a hundredth."""
    count = 0
    while count <= most:
        yield count
        count += max(1, count // 100)
