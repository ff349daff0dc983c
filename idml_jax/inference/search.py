"""Finds the nearest neighbours of queries in an index, with the confidence of the answers."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.errors import UserError
from idml_jax.inference import embed
from idml_jax.inference import model as trained
from idml_jax.inference.index import SUFFIXES, Index, check_comparable, read
from idml_jax.inference.model import Trained
from idml_jax.ism import Embedding, Metric
from idml_jax.metrics import calibration, retrieval, uncertainty
from idml_jax.metrics.calibration import Calibration, HeldOut
from idml_jax.metrics.confidence import confidence
from idml_jax.metrics.summary import Embedded, scores_of
from idml_jax.metrics.uncertainty import Threshold


class Answers(NamedTuple):
    """The k nearest rows of an index to each of n queries.

    Attributes:
      index: ``[n, k]`` rows, nearest first.
      distance: ``[n, k]`` semantic distance.
      introspective: ``[n, k]`` introspective distance; ``None`` without an uncertainty.
      uncertainty: ``[n]`` length of the query's uncertainty embedding; ``None`` without an uncertainty.
      margin: ``[n]`` similarity of the nearest minus that of the 10th, or of the 2nd in an index of fewer images.
      sure: ``[n]`` probability that the nearest image has the query's class; ``None`` if no model is fitted.
      answered: ``[n]`` whether that probability is high enough for an answer.
    """

    index: Int[np.ndarray, "n k"]  # type: ignore[assignment]  # in place of tuple.index
    distance: Float[np.ndarray, "n k"]
    introspective: Float[np.ndarray, "n k"] | None
    uncertainty: Float[np.ndarray, "n"] | None
    margin: Float[np.ndarray, "n"] | None
    sure: Float[np.ndarray, "n"] | None
    answered: Bool[np.ndarray, "n"]


def calibrate(
    held_out: Embedded,
    metric: Metric = Metric(),  # noqa: B008 (immutable)
    names: Collection[str] | None = None,
) -> Calibration:
    """Fits the confidence of answers; each held-out image searches all the others.

    Args:
      held_out: embeddings with labels, of classes that the network was not trained on.
      metric: introspective metric, used besides the semantic distance.
      names: names of the scores that queries will have; a small index has fewer margins. All by default.

    Returns:
      The fitted model and its predictions for these queries.

    Raises:
      UserError: for fewer than two classes or images.
    """
    if len(np.unique(held_out.labels)) < 2:
        raise UserError("the held-out images are of one class; at least 2 are needed to tell right from wrong")
    return calibration.calibrate(HeldOut(held_out), metric, names)


def search(
    queries: Embedded,
    gallery: Embedded,
    k: int,
    *,
    own: Int[np.ndarray, "n"] | None = None,
    metric: Metric = Metric(),  # noqa: B008 (immutable)
    calibrated: Calibration | None = None,
    threshold: Threshold | None = None,
    scores: Mapping[str, Float[np.ndarray, "n"]] | None = None,
) -> Answers:
    """Finds the k nearest rows of a gallery, exactly, in tiles.

    Args:
      queries: embeddings of the queries.
      gallery: embeddings to search.
      k: number of neighbours.
      own: ``[n]`` gallery row to leave out for each query; -1: none.
      metric: introspective metric, used besides the semantic distance.
      calibrated: result of ``calibrate``; without it answers have no confidence.
      threshold: largest doubt (1 - confidence) with an answer.
      scores: result of ``metrics.embedded.scores_of``, if already computed.

    Returns:
      The answers.

    Raises:
      ValueError: for mismatched widths or a k that the gallery cannot serve.
    """
    found = retrieval.neighbours(queries.semantic, gallery.semantic, k, own=own)
    scores = scores_of(queries, gallery, metric, own) if scores is None else scores
    both = queries.uncertainty is not None and gallery.uncertainty is not None
    sure, answered = None, np.ones(len(queries.semantic), bool)
    if calibrated is not None:
        sure = confidence(calibrated.model, scores)
        if threshold is not None:
            answered = 1.0 - sure <= threshold.value
    margin = next((-scores[name] for name in ("margin_10", "margin_2") if name in scores), None)
    return Answers(
        found.index,
        found.distance,
        _introspective(queries, gallery, found.index, metric) if both else None,
        queries.uncertainty_norm if both else None,
        margin,
        sure,
        answered,
    )


def _introspective(
    queries: Embedded, gallery: Embedded, index: Int[np.ndarray, "n k"], metric: Metric
) -> Float[np.ndarray, "n k"]:
    per_query = jax.jit(jax.vmap(lambda a, b: metric(jax.tree.map(lambda x: x[None], a), b)[0]))
    assert queries.uncertainty is not None and gallery.uncertainty is not None
    rows = []
    step = max(1, 2**24 // max(1, index.shape[1] * gallery.semantic.shape[1]))
    for start in range(0, len(index), step):
        cut = slice(start, start + step)
        one: Any = queries.semantic[cut], queries.uncertainty[cut]
        others: Any = gallery.semantic[index[cut]], gallery.uncertainty[index[cut]]
        rows.append(np.asarray(per_query(Embedding(*one), Embedding(*others))))
    return np.concatenate(rows)


def load_model(index: Index, workdir: str, warn: Callable[[str], None]) -> Trained:
    """Loads the network that an index was made with.

    Args:
      index: embeddings.
      workdir: folder of the run; by default the one that the index names.
      warn: receives a line if the index does not identify its weights.

    Raises:
      UserError: if there is no such run, or its weights are not those of the index.
    """
    where = workdir or index.about.get("workdir")
    if not where:
        raise UserError("--workdir is missing: the index does not say which run it was made with")
    model = trained.load(where)
    known, step, made_in = (index.about.get(name) for name in ("weights", "step", "workdir"))
    cure = "the vectors cannot be compared; embed the index again"
    if known is not None:
        found = model.embedder.digest
        if found != known:
            told = f"step {step} of {made_in} (weights {known})"
            raise UserError(
                f"the index was made with {told}, and {model.workdir} has step {model.step} with the weights {found} "
                f"now: {cure}"
            )
    elif step is not None and (str(model.workdir), model.step) != (made_in, step):
        raise UserError(
            f"the index was made with step {step} of {made_in}, and {model.workdir} has step {model.step} now: {cure}"
        )
    else:
        warn("the index does not identify the weights it was made with; it is compared with the run by its step only")
    return model


def open_index(where: str, option: str, model: Callable[[], Trained]) -> Index:
    """Reads embeddings from a file, or embeds images.

    Args:
      where: a file of embeddings, or an image, folder or list of images.
      option: name of the command-line option, for messages.
      model: loads the network, if images must be embedded.
    """
    if Path(where).suffix in SUFFIXES:
        return read(where, option)
    source, labelled = embed.list_images(where, option)
    return embed.index_of(model(), source, labelled, where)


class Confidence(NamedTuple):
    """The confidence model of answers and its threshold.

    Attributes:
      calibrated: fitted model; ``None`` if there is nothing to fit it on.
      threshold: largest doubt (1 - confidence) with an answer; ``None`` if all queries are answered.
      note: a line that describes the data of the fit.
    """

    calibrated: Calibration | None
    threshold: Threshold | None
    note: str


def confidence_of(held_out: Index, what: str, wanted: float | None, names: Collection[str]) -> Confidence:
    """Fits the confidence of answers on embeddings with classes.

    Args:
      held_out: embeddings, each of which searches all the others.
      what: name of these embeddings in messages.
      wanted: share of right answers to reach by not answering the least certain queries.
      names: names of the scores that queries will have.

    Raises:
      UserError: for fewer than two classes or images.
    """
    calibrated = calibrate(held_out.embedded, held_out.metric, names)
    note = f"how sure: from {len(calibrated.correct):,} queries of {what}"
    if wanted is None:
        return Confidence(calibrated, None, note)
    threshold = uncertainty.threshold_for_precision(calibrated.doubt, calibrated.correct, wanted)
    if not threshold.reached:
        told = f"{note}; {wanted:.0%} right answers cannot be reached on them: nothing is answered"
        return Confidence(calibrated, threshold, told)
    share = f"{threshold.coverage:.0%} of them are answered, {threshold.precision:.1%} rightly"
    return Confidence(calibrated, threshold, f"{note}; {share}")


def confidence_for(
    held_out: str,
    wanted: float | None,
    index: Index,
    named: str,
    model: Callable[[], Trained],
    names: Collection[str],
) -> Confidence:
    """Fits the confidence of answers from an index, on held-out images or on the index itself.

    Args:
      held_out: a file of embeddings, or images in class folders; empty: the index itself.
      wanted: share of right answers to reach by not answering the least certain queries.
      index: embeddings to search; its settings of the metric are used.
      named: name of the index in messages.
      model: loads the network, if images must be embedded.
      names: names of the scores that queries will have.

    Raises:
      UserError: if classes are needed and unknown, or the two sets cannot be compared.
    """
    others, what = index, "the index itself, each image searching the others"
    if held_out:
        others, what = open_index(held_out, "--held_out", model), held_out
        check_comparable(others, index, what, named)
    if others.class_names is not None:
        return confidence_of(replace(others, about=index.about), what, wanted, names)
    if wanted is not None or held_out:
        raise UserError(
            f"{held_out or named}: its classes are unknown, so nothing tells how sure an answer is; give --held_out, "
            "a file or a folder of class folders"
        )
    return Confidence(None, None, "how sure answers are is unknown: neither --held_out nor an index with classes")
