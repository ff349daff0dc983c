"""Nearest neighbours of queries in an index, and how sure the answers are."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.errors import UserError
from idml_jax.inference import embed
from idml_jax.inference import model as trained
from idml_jax.inference.index import SUFFIXES, Index, check_comparable, read, weights_digest
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
      uncertainty: ``[n]`` length of the query's uncertainty embedding; ``None`` without one.
      margin: ``[n]`` similarity of the nearest minus that of the 10th, or of the 2nd in an index of fewer images.
      sure: ``[n]`` probability that the nearest image is of the query's class; ``None`` where nothing tells.
      answered: ``[n]`` whether that is enough.
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
    """Fits how sure answers are, each held-out image searching all the others.

    Args:
      held_out: embeddings with labels, of classes that the network was not trained on.
      metric: that the embeddings are compared by, beside the semantic distance.
      names: of the scores that queries will have; a small index has fewer margins. All by default.

    Returns:
      The fitted model with what it says of these queries.

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
    """The k nearest rows of a gallery, exactly, in tiles.

    Args:
      queries: embeddings.
      gallery: what is searched.
      k: how many.
      own: ``[n]`` row that each query leaves out; -1: none.
      metric: that the embeddings are compared by, beside the semantic distance.
      calibrated: by ``calibrate``; without it nothing is said about how sure answers are.
      threshold: of the doubt, beyond which there is no answer.
      scores: of ``metrics.report.scores_of``, if they are known.

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
    """The network that an index was made with.

    Args:
      index: embeddings.
      workdir: folder of the run; by default the one that the index names.
      warn: receives a line where the index does not tell its weights.

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
        found = weights_digest(model.variables)
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
        warn(
            "the index does not tell which weights it was made with; whether it fits the run is known by its step only"
        )
    return model


def open_index(where: str, option: str, model: Callable[[], Trained]) -> Index:
    """Embeddings from a file, or made of images.

    Args:
      where: a file of embeddings, or what ``embed.list_images`` takes.
      option: its name in messages.
      model: gives the network, if images are to be embedded.
    """
    if Path(where).suffix in SUFFIXES:
        return read(where, option)
    source, labelled = embed.list_images(where, option)
    return embed.index_of(model(), source, labelled, where)


class Confidence(NamedTuple):
    """What tells how sure answers are.

    Attributes:
      calibrated: the fitted model; ``None`` where nothing tells.
      threshold: of the doubt, beyond which there is no answer; ``None`` where all are answered.
      note: a line that says where this comes from.
    """

    calibrated: Calibration | None
    threshold: Threshold | None
    note: str


def confidence_of(held_out: Index, what: str, wanted: float | None, names: Collection[str]) -> Confidence:
    """How sure answers are, from embeddings with classes.

    Args:
      held_out: embeddings, each of which searches all the others.
      what: what messages call them.
      wanted: share of right answers to reach by leaving out the least sure.
      names: of the scores that queries will have.

    Raises:
      UserError: for fewer than two classes or images.
    """
    calibrated = calibrate(held_out.embedded, held_out.metric, names)
    note = f"how sure: from {len(calibrated.correct):,} queries of {what}"
    if wanted is None:
        return Confidence(calibrated, None, note)
    threshold = uncertainty.threshold_for_precision(calibrated.doubt, calibrated.correct, wanted)
    if not threshold.reached:
        told = f"{note}; {wanted:.0%} right answers cannot be had there: nothing is answered"
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
    """How sure answers from an index are, by held-out images or by the index itself.

    Args:
      held_out: a file of embeddings, or images in class folders; empty: the index itself.
      wanted: share of right answers to reach by leaving out the least sure.
      index: what is searched; its settings of the metric are used.
      named: what messages call the index.
      model: gives the network, if images are to be embedded.
      names: of the scores that queries will have.

    Raises:
      UserError: if classes are needed and unknown, or the two sets cannot be compared.
    """
    others, what = index, "the index itself, each image searching the others"
    if held_out:
        others, what = open_index(held_out, "--held_out", model), held_out
        check_comparable(others, index, what, named)
    if others.class_names is not None:
        return confidence_of(others._replace(about=index.about), what, wanted, names)
    if wanted is not None or held_out:
        raise UserError(
            f"{held_out or named}: its classes are unknown, so nothing tells how sure an answer is; give --held_out, "
            "a file or a folder of class folders"
        )
    return Confidence(None, None, "how sure answers are is unknown: neither --held_out nor an index with classes")
