"""Finds the nearest neighbours of queries in an index, with the confidence of the answers."""

import contextlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.errors import UserError
from idml_jax.inference import embed
from idml_jax.inference import model as trained
from idml_jax.inference.arrays import is_table_of_images
from idml_jax.inference.gallery import is_gallery, read_stored
from idml_jax.inference.index import SUFFIXES, Index
from idml_jax.inference.model import Trained
from idml_jax.ism import Embedding, Metric
from idml_jax.metrics import calibration, retrieval, strangers, uncertainty, vote
from idml_jax.metrics.calibration import Calibration, HeldOut
from idml_jax.metrics.confidence import confidence
from idml_jax.metrics.retrieval import Neighbours
from idml_jax.metrics.strangers import Rule
from idml_jax.metrics.summary import Embedded, scores_of
from idml_jax.metrics.uncertainty import Threshold
from idml_jax.metrics.vote import Ballot, Vote
from idml_jax.runtime.files import user_path
from idml_jax.training.risk import digest


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
      known: ``[n]`` probability that the query's class is in the index at all; ``None`` without a ``rule``.
      vote: the vote of the nearest images for a class; ``None`` without labels.
      voters: ``[n, v]`` rows of the index that vote.
    """

    index: Int[np.ndarray, "n k"]  # type: ignore[assignment]  # in place of tuple.index
    distance: Float[np.ndarray, "n k"]
    introspective: Float[np.ndarray, "n k"] | None
    uncertainty: Float[np.ndarray, "n"] | None
    margin: Float[np.ndarray, "n"] | None
    sure: Float[np.ndarray, "n"] | None
    answered: Bool[np.ndarray, "n"]
    known: Float[np.ndarray, "n"] | None = None
    vote: Ballot | None = None
    voters: Int[np.ndarray, "n v"] | None = None


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
    rule: Rule | None = None,
    setting: Vote | None = Vote(),  # noqa: B008 (immutable)
    found: Neighbours | None = None,
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
      rule: rule for answers where some queries' classes are not in the gallery; in place of ``threshold``.
      setting: settings of the vote, unless ``calibrated`` has some; ``None`` if the labels are unknown.
      found: neighbours to answer with, in their order, if not the nearest ones.

    Returns:
      The answers.

    Raises:
      ValueError: for mismatched widths or a k that the gallery cannot serve.
    """
    found = retrieval.neighbours(queries.semantic, gallery.semantic, k, own=own) if found is None else found
    if calibrated is not None:
        setting = calibrated.setting
    scores = scores_of(queries, gallery, metric, own, setting=setting) if scores is None else scores
    both = queries.uncertainty is not None and gallery.uncertainty is not None
    sure, known, answered = None, None, np.ones(len(queries.semantic), bool)
    if calibrated is not None and rule is not None:
        known, sure = strangers.judge(calibrated, scores, rule.share)
        answered = 1.0 - sure <= rule.value
    elif calibrated is not None:
        sure = confidence(calibrated.model, scores)
        if threshold is not None:
            answered = 1.0 - sure <= threshold.value
    ballot = voters = None
    if setting is not None:
        near = uncertainty.nearest_twenty(queries.semantic, gallery.semantic, own=own)
        ballot = vote.cast(queries.semantic, gallery.semantic, gallery.labels, near, setting, own)
        voters = near.index[:, : setting.k]
    margin = next((-scores[name] for name in ("margin_10", "margin_2") if name in scores), None)
    return Answers(
        found.index,
        found.distance,
        _introspective(queries, gallery, found.index, metric) if both else None,
        queries.uncertainty_norm if both else None,
        margin,
        sure,
        answered,
        known,
        ballot,
        voters,
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
    if not workdir:
        trained.check_there(where)
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
        index.about["workdir"] = str(model.workdir)  # the same run, wherever it is now
        fitted = None if model.embedder.risk is None else digest(model.embedder.risk)
        if None not in (fitted, index.about.get("risk")) and fitted != index.about["risk"]:
            raise UserError(
                f"the index was made with the risk head {index.about['risk']}, and {model.workdir} has {fitted} now: "
                "risks of two heads cannot be compared; embed the index again"
            )
    elif step is not None and (str(model.workdir), model.step) != (made_in, step):
        raise UserError(
            f"the index was made with step {step} of {made_in}, and {model.workdir} has step {model.step} now: {cure}"
        )
    else:
        warn("the index does not identify the weights it was made with; it is compared with the run by its step only")
    return model


def _of_run_now(index: Index, model: Callable[[], Trained]) -> Index:
    """An index whose run has moved, with the place of the network in use if it has the same weights."""
    run = index.about.get("workdir")
    if run and "weights" in index.about and not trained.is_there(run):
        with contextlib.suppress(UserError):  # the network is not there, either
            if model().embedder.digest == index.about["weights"]:
                index.about["workdir"] = str(model().workdir)
    return index


def is_stored(where: str | Path) -> bool:
    """Whether a path names embeddings, a file or a gallery, and not images; a Parquet file is told by its columns."""
    if is_gallery(where):
        return True
    suffix = Path(where).suffix
    return suffix in SUFFIXES and not (suffix == ".parquet" and is_table_of_images(user_path(where)))


def open_index(where: str, option: str, model: Callable[[], Trained]) -> Index:
    """Reads embeddings from a file, or embeds images.

    Args:
      where: a file or gallery of embeddings, or an image, folder, list or table of images.
      option: name of the command-line option, for messages.
      model: loads the network, if images must be embedded.
    """
    if is_stored(where):
        return _of_run_now(read_stored(where, option), model)
    source, labelled = embed.list_images(where, option)
    return embed.index_of(model(), source, labelled, where)
