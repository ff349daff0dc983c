"""How sure the answers of a search are: the calibration on held-out images, the rule for answers, and what came out."""

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.errors import UserError
from idml_jax.inference.held_out import Files, held_out_beside, warn_of_shared
from idml_jax.inference.index import Index, check_comparable, labels_in_common, sets_in_common
from idml_jax.inference.kept_calibration import kept
from idml_jax.inference.model import Trained
from idml_jax.inference.search import open_index
from idml_jax.inference.trained_on import warn_of_training_images
from idml_jax.metrics import calibration, relevance, strangers, uncertainty, visible
from idml_jax.metrics.calibration import Calibration
from idml_jax.metrics.embedded import scores_of
from idml_jax.metrics.strangers import Rule
from idml_jax.metrics.vote import Vote


class Wanted(NamedTuple):
    """What is wanted of the answers.

    Attributes:
      precision: share of right answers; ``None``: any.
      strangers: share of the queries of unknown classes that may get an answer; ``None``: any.
      balanced: whether votes count less for classes with many images.
    """

    precision: float | None = None
    strangers: float | None = None
    balanced: bool = False

    @property
    def some(self) -> bool:
        """Whether answers may have to be left out."""
        return self.precision is not None or self.strangers is not None


class Confidence(NamedTuple):
    """The confidence model of answers.

    Attributes:
      calibrated: fitted model; ``None`` if there is nothing to fit it on.
      source: where it comes from, for the note below the answers.
    """

    calibrated: Calibration | None
    source: str


def confidence_for(
    files: Files,
    index: Index,
    named: str,
    model: Callable[[], Trained],
    names: Collection[str],
    wanted: Wanted = Wanted(),  # noqa: B008 (immutable)
    queries: Index | None = None,
) -> Confidence:
    """Fits the confidence of answers from an index, on held-out images or on the index itself.

    Args:
      files: where the images are that it is fitted on.
      index: embeddings to search; its settings of the metric are used.
      named: name of the index in messages.
      model: loads the network, if images must be embedded.
      names: names of the scores that queries will have.
      wanted: what is wanted of the answers.
      queries: what is asked; a warning says how many of them are held-out images.

    Raises:
      UserError: if classes are needed and unknown, if there are fewer than two, or if the two sets cannot be compared.
    """
    others, what, held_out = index, "the index itself, each image searching the others", files.held_out
    if held_out:
        others, what = open_index(held_out, "--held_out", model), held_out
        check_comparable(others, index, what, named)
    if others.class_names is None:
        if wanted.some or held_out:
            raise UserError(
                f"{held_out or named}: its classes are unknown, so nothing tells how sure an answer is; give "
                "--held_out, a file or a folder of class folders"
            )
        return Confidence(None, "how sure answers are is unknown: neither --held_out nor an index with classes")
    if len(np.unique(others.embedded.labels)) < 2:
        one = "one class; at least 2 are needed to tell right from wrong"
        if wanted.some or held_out:
            raise UserError(f"{held_out or named}: its images are of {one}" + ("" if held_out else "; give --held_out"))
        return Confidence(None, f"how sure answers are is unknown: the images are of {one}")
    warn_of_training_images(others, held_out or named)
    if held_out:
        warn_of_shared(others, held_out, queries, "queries")
    fitted = fit(others, index, names, wanted, distractors_of(files, index, named, model))
    return Confidence(fitted, f"how sure: from {len(fitted.correct):,} queries of {what}{told_of(files)}")


def distractors_of(files: Files, index: Index, named: str, model: Callable[[], Trained]) -> Index | None:
    """The distractors, if some are named; arguments and errors as for ``confidence_for``."""
    if not files.distractors:
        return None
    found = open_index(files.distractors, "--distractors", model)
    check_comparable(found, index, files.distractors, named)
    if found.class_names is None:
        raise UserError(f"{files.distractors}: its classes are unknown (--distractors)")
    return found


def told_of(files: Files) -> str:
    """What the note says about distractors."""
    return f" among the images of {files.distractors}, too" if files.distractors else ""


def fit(
    held_out: Index, index: Index, names: Collection[str], wanted: Wanted, distractors: Index | None = None
) -> Calibration:
    """Fits the confidence of answers from an index on images of at least two known classes, or on the index itself.

    Arguments and errors as for ``confidence_for`` and ``held_out_beside``.
    """
    found, labelled = held_out_beside(held_out, index, distractors), index.class_names is not None

    def fitted() -> Calibration:
        known = calibration.answer(found, index.metric, labelled=labelled, balanced=wanted.balanced)
        return calibration.fit(known, names)

    return kept(found, index.metric, names, (labelled, wanted.balanced), fitted)


class Scored(NamedTuple):
    """Scores of the nearest images as answers, and the confidence that is fitted on the same scores.

    Attributes:
      scores: each ``[n]``.
      setting: settings of the vote: those chosen for the confidence, if there is one; ``None`` without labels.
      confidence: the confidence of the answers.
    """

    scores: dict[str, Float[np.ndarray, "n"]]
    setting: Vote | None
    confidence: Confidence


def scored(
    queries: Index,
    index: Index,
    own: Int[np.ndarray, "n"] | None,
    confident: Callable[[Collection[str]], Confidence],
) -> Scored:
    """Scores the answers of an index to queries.

    Args:
      queries: the queries.
      index: embeddings that are searched.
      own: row of the index of each query itself; -1: none.
      confident: gives the confidence for the names of the scores.
    """
    near = uncertainty.nearest_twenty(queries.embedded.semantic, index.embedded.semantic, own=own)
    compute = lambda vote: scores_of(queries.embedded, index.embedded, index.metric, own, near, setting=vote)
    setting = None if index.class_names is None else Vote()
    scores = compute(setting)
    confidence = confident(scores)
    if confidence.calibrated is not None and confidence.calibrated.setting != setting:
        setting = confidence.calibrated.setting
        scores = compute(setting)
    return Scored(scores, setting, confidence)


def rule_for(confidence: Confidence, scores: dict[str, Float[np.ndarray, "n"]], wanted: Wanted) -> Rule | None:
    """The rule for answers; the share of strangers is estimated from the scores. ``None`` without a calibration.

    Raises:
      UserError: if a share of strangers is wanted and the held-out images cannot play strangers.
    """
    if confidence.calibrated is None:
        return None
    share = strangers.estimated_share(confidence.calibrated, scores)
    try:
        return strangers.rule(confidence.calibrated, share, wanted.precision, wanted.strangers)
    except ValueError as error:
        raise UserError(f"--{error}") from error


def note_of(confidence: Confidence, rule: Rule | None, wanted: Wanted) -> str:
    """A line that says where the confidence comes from, and what the rule did on the held-out queries."""
    if rule is None or confidence.calibrated is None:
        return confidence.source
    parts = [confidence.source]
    if confidence.calibrated.open is None:
        parts.append(
            "their classes cannot play strangers (too few, or several per image), so every query's class is taken to "
            "be in the index"
        )
    elif rule.share > 0:
        parts.append(
            f"by their scores, the share of queries of classes that the index lacks is taken as {rule.share:.0%}"
        )
    if (threshold := rule.precision) is not None:
        if not threshold.reached:
            what, below = f"{wanted.precision:.0%} right answers", threshold.bound < (wanted.precision or 0)
            proof = f"prove at most {threshold.bound:.0%}, not {what}" if below else f"do not prove {what}"
            classes = f"{len(np.unique(confidence.calibrated.labels)):,} classes"
            parts.append(f"the held-out queries, of {classes}, {proof}: nothing is answered")
        else:
            mixed = f" ({rule.held_out.stranger.mean():.0%} strangers)" if rule.held_out.stranger.any() else ""
            told = f"{threshold.coverage:.0%} are answered, {threshold.precision:.1%} rightly"
            parts.append(f"of the held-out queries{mixed} {told}")
    if rule.strangers is not None:
        told = f"at most {wanted.strangers:.3g} of the strangers are to be answered"
        never = " (they are too few to show it: nothing is answered)" if rule.strangers == float("-inf") else ""
        parts.append(told + never)
    return "; ".join(parts)


def outcome(
    queries: Index,
    index: Index,
    own: Int[np.ndarray, "n"] | None,
    nearest: Int[np.ndarray, "n"],
    answered: Bool[np.ndarray, "n"],
) -> str:
    """What came out on queries with classes, as a line; empty if the classes of one side are unknown.

    An answer is right if it shares a class with the query.

    Args:
      queries: the queries.
      index: embeddings that were searched.
      own: row of the index of each query itself; -1: none.
      nearest: row of the index of each answer.
      answered: whether it was given.
    """
    if queries.class_names is None or index.class_names is None:
        return ""
    if not labels_in_common(queries, index)[2]:
        return "the classes of one side are named and those of the other numbered: what came out is unknown"
    asked, labels = sets_in_common(queries, index)
    size = visible.sizes_of(asked, labels[labels >= 0])
    if own is not None:
        mine = labels[np.maximum(own, 0)]
        size = size - ((own >= 0)[:, None] & (asked[:, :, None] == mine[:, None, :]).any(axis=2))
    mated, right = ((size > 0) & (asked >= 0)).any(axis=1), relevance.shared(asked, labels[nearest])
    told = f"these queries: {int(answered.sum()):,} of {len(asked):,} answered"
    if answered.any():
        told += f", {right[answered].mean():.1%} rightly"
    if not mated.any():
        names = list(dict.fromkeys(name for row in range(len(queries)) for name in queries.classes_of(row)))
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        return f"{told}; no query's class ({shown}) is in the index, so no answer can be right"
    if not mated.all():
        gone, given = int((~mated).sum()), int((answered & ~mated).sum())
        told += f"; {gone:,} are of classes that the index lacks, {given:,} of them answered"
    return told
