"""Nearest neighbours of queries in an index, and how sure the answers are."""

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.errors import UserError
from idml_jax.inference import embed
from idml_jax.inference import model as trained
from idml_jax.inference import store as embeddings
from idml_jax.inference.store import Index
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
      margin: ``[n]`` similarity of the nearest less that of the 10th, or of the 2nd in an index of fewer pictures.
      sure: ``[n]`` probability that the nearest picture is of the query's class; ``None`` where nothing tells.
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
    """Fits how sure answers are, each held-out picture searching all the others.

    Args:
      held_out: embeddings with labels, of classes that the network was not trained on.
      metric: that the embeddings are compared by, beside the semantic distance.
      names: of the scores that queries will have; a small index has fewer margins. All by default.

    Returns:
      The fitted model with what it says of these queries.

    Raises:
      UserError: for fewer than two classes or pictures.
    """
    if len(np.unique(held_out.labels)) < 2:
        raise UserError("the held-out pictures are of one class; at least 2 are needed to tell right from wrong")
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


def _own_rows(queries: Index, index: Index) -> Int[np.ndarray, "n"] | None:
    """Rows of the index that are the query's own file."""
    known = {os.path.realpath(file): row for row, file in enumerate(index.files.tolist())}
    own = np.asarray([known.get(os.path.realpath(file), -1) for file in queries.files.tolist()])
    return own if (own >= 0).any() else None


def _model(index: Index, workdir: str) -> trained.Trained:
    where = workdir or index.about.get("workdir")
    if not where:
        raise UserError("--workdir is missing: the index does not say which run it was made with")
    model = trained.load(where)
    remembered = index.about.get("step")
    if remembered is not None and (str(model.workdir), model.step) != (index.about.get("workdir"), remembered):
        raise UserError(
            f"the index was made with step {remembered} of {index.about.get('workdir')}, and {model.workdir} has step "
            f"{model.step} now: the vectors cannot be compared; embed the index again"
        )
    return model


def _open(where: str, option: str, model: Callable[[], trained.Trained]) -> Index:
    """Embeddings from a file, or made of pictures."""
    if Path(where).suffix in embeddings.SUFFIXES:
        return embeddings.read(where, option)
    source, labelled = embed.list_images(where, option)
    return embed.index_of(model(), source, labelled, where)


def _calibration(given: dict[str, Any], index: Index, model: Callable, metric: Metric, names: Collection[str]) -> tuple:
    wanted = given["abstain"]
    if wanted is not None and not 0 < wanted < 1:
        raise UserError(f"--abstain={wanted}: a share of right answers, above 0 and below 1")
    held_out, what = index, "the index itself, each picture searching the others"
    if given["held_out"]:
        held_out, what = _open(given["held_out"], "--held_out", model), given["held_out"]
    if held_out.class_names is None:
        if wanted is not None or given["held_out"]:
            raise UserError(
                f"{given['held_out'] or given['index']}: its classes are unknown, so nothing tells how sure an answer "
                "is; give --held_out, a file or a folder of class folders"
            )
        return None, None, "how sure answers are is unknown: neither --held_out nor an index with classes"
    calibrated = calibrate(held_out.embedded, metric, names)
    note = f"how sure: from {len(calibrated.correct):,} queries of {what}"
    if wanted is None:
        return calibrated, None, note
    threshold = uncertainty.threshold_for_precision(calibrated.doubt, calibrated.correct, wanted)
    if not threshold.reached:
        return calibrated, threshold, f"{note}; {wanted:.0%} right answers cannot be had there: nothing is answered"
    share = f"{threshold.coverage:.0%} of them are answered, {threshold.precision:.1%} rightly"
    return calibrated, threshold, f"{note}; {share}"
