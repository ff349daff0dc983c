"""Decides whether two images are of one class: score, thresholds by FMR, probability; all chosen on held-out classes.

The score is the cosine similarity or a PLDA, whichever has the lower EER on classes that neither has seen: the held-out
classes are dealt into folds, a PLDA is fitted on the other folds, and only pairs within a fold are counted. The
probability is a logistic regression of the score in which genuine pairs and impostors weigh the same in total
(Brummer and du Preez, Computer Speech and Language 2006), moved to the wanted share of genuine pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from idml_jax.metrics.checks import Array, embedding_rows, label_column
from idml_jax.metrics.class_folds import fold_classes
from idml_jax.metrics.confidence import Confidence, confidence, fit_confidence
from idml_jax.metrics.embedded import Embedded
from idml_jax.metrics.pair_scores import PairScore, Scored, cosine, fit_plda
from idml_jax.metrics.verification import FMRS, Rates, Verification, pair_scores, verify, verify_within

SHRINKAGES = (0.03, 0.3, 3.0)
FOLDS = 4
_FITTED = 3000  # images whose pairs the probability is fitted on
_ENTRIES = 20_000  # scores of each kind in that fit, evenly spaced in their order


class Judge(NamedTuple):
    """Decides whether two images are of one class.

    Attributes:
      score: the chosen score, fitted on all held-out classes if it is a PLDA.
      eer: by score tried (``cosine``, ``plda_0.3``), its EER on classes that it has not seen.
      name: the chosen one.
      at_fmr: by wanted FMR, the threshold and its rates on the held-out classes; NaN where they have too few pairs.
      model: probability of a genuine pair by the score, where half of the pairs are genuine.
      pairs: number of genuine pairs and of impostors that the thresholds were chosen on.
    """

    score: PairScore
    eer: dict[str, float]
    name: str
    at_fmr: dict[float, Rates]
    model: Confidence
    pairs: tuple[int, int]

    def scores(self, one: Float[Array, "n d"], other: Float[Array, "n d"]) -> Float[np.ndarray, "n"]:
        """The score of each pair of rows."""
        a, b = self.score(one), self.score(other)
        product = np.einsum("nd,nd->n", a.rows, b.rows, dtype=np.float64)
        return product + a.offsets + b.offsets

    def probability(self, scores: Float[Array, "n"], share: float = 0.5) -> Float[np.ndarray, "n"]:
        """Probability that pairs are genuine.

        Args:
          scores: their scores.
          share: share of genuine pairs among those that are compared, above 0 and below 1; others raise ValueError.
        """
        if not 0 < share < 1:
            raise ValueError(f"share: expected a share above 0 and below 1, got {share}")
        half = confidence(self.model, {"score": scores})
        return half * share / (half * share + (1 - half) * (1 - share))


def fit_judge(
    embeddings: Float[Array, "n d"], labels: Int[Array, "n"], *, fmrs: Sequence[float] = FMRS, seed: int = 0
) -> Judge:
    """Chooses score, thresholds and probability on held-out classes.

    Args:
      embeddings: ``[n, d]`` of classes that the network was not trained on.
      labels: ``[n]`` their classes.
      fmrs: wanted FMR.
      seed: seed of the folds.

    Raises:
      ValueError: without at least two classes of two images, and for non-finite input.
    """
    rows = embedding_rows(embeddings, "embeddings")[0]
    codes = np.unique(label_column(labels, len(rows), "labels", "embeddings"), return_inverse=True)[1]
    counts = np.bincount(codes)
    if (counts > 1).sum() < 2:
        raise ValueError("labels: at least 2 classes of 2 images are needed to tell pairs of one class from others")
    fold_of = fold_classes(counts, FOLDS, seed)[codes]
    folds = np.unique(fold_of)
    sides = {"cosine": [cosine(rows[fold_of == fold]) for fold in folds]}
    if len(folds) > 1:
        for shrinkage in SHRINKAGES:
            sides[f"plda_{shrinkage:g}"] = [
                fit_plda(rows[fold_of != fold], codes[fold_of != fold], shrinkage)(rows[fold_of == fold])
                for fold in folds
            ]
    sets = {
        name: [(side, codes[fold_of == fold]) for side, fold in zip(parts, folds, strict=True)]
        for name, parts in sides.items()
    }
    found = {name: verify_within(parts, fmrs=fmrs) for name, parts in sets.items()}
    eer = {name: each.eer for name, each in found.items()}
    name = min(eer, key=lambda key: (not eer[key] >= 0, eer[key]))  # NaN last; of equal ones the first, the cosine
    score: PairScore = cosine
    if name == "cosine":  # learns nothing, so that pairs across the folds count too
        sets[name] = [(cosine(rows), codes)]
        found[name] = verify(*sets[name][0], fmrs=fmrs)
    else:
        score = fit_plda(rows, codes, float(name.removeprefix("plda_")))
    return Judge(score, eer, name, found[name].at_fmr, _model(sets[name]), (found[name].genuine, found[name].impostors))


def _model(sets: Sequence[tuple[Scored, Int[np.ndarray, "_"]]]) -> Confidence:
    """Logistic regression of genuine pairs and impostors, each kind of the same total weight."""
    kinds: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for scored, labels in sets:
        order = np.argsort(labels, kind="stable")  # whole classes stay together
        some = order[: max(2, _FITTED // len(sets))]
        for kind, scores in zip(
            kinds, pair_scores(Scored(scored.rows[some], scored.offsets[some]), labels[some]), strict=True
        ):
            kind.append(scores)
    genuine, impostor = (_thinned(np.sort(np.concatenate(kind))) for kind in kinds)
    size = min(len(genuine), len(impostor))
    weights = [np.full(len(kind), size / len(kind)) for kind in (genuine, impostor)]
    correct = np.repeat([True, False], [len(genuine), len(impostor)])
    scores = {"score": np.concatenate([genuine, impostor])}
    return fit_confidence(scores, correct, weights=np.concatenate(weights))


def _thinned(scores: Float[np.ndarray, "n"]) -> Float[np.ndarray, "m"]:
    return scores[np.unique(np.linspace(0, len(scores) - 1, min(len(scores), _ENTRIES)).astype(int))]


def report(
    embedded: Embedded,
    gallery: Embedded | None = None,
    held_out: Embedded | None = None,
    *,
    fmrs: Sequence[float] = FMRS,
    seed: int = 0,
) -> tuple[dict[str, float], list[str]]:
    """Verification over all pairs, of one set or of queries and gallery.

    Args:
      embedded: queries.
      gallery: embeddings to compare them with; without one all pairs of the queries.
      held_out: images of classes that are neither training nor test classes, which choose score and thresholds.
      fmrs: wanted FMR.
      seed: seed of the folds of held-out classes.

    Returns:
      ``verification/AUROC``, ``EER`` and ``FNMR@f`` of the cosine similarity, the latter for those f that the number of
      pairs can show; with held-out classes
      ``verification/chosen/EER``, ``FMR@f`` and ``FNMR@f`` of the score and thresholds chosen on them; and warnings.
    """

    def measured(score: PairScore, thresholds: Sequence[float] = ()) -> Verification:
        searched = (None, None) if gallery is None else (score(gallery.semantic), gallery.labels)
        return verify(score(embedded.semantic), embedded.labels, *searched, fmrs=fmrs, thresholds=thresholds)

    found = measured(cosine)
    rates = {"AUROC": found.auroc} | ({"AUROC_error": found.auroc_error} if found.auroc_error else {})
    rates |= {"EER": found.eer} | {
        f"FNMR@{fmr:g}": at.fnmr for fmr, at in found.at_fmr.items() if not np.isnan(at.fnmr)
    }
    warnings = []
    if held_out is not None:
        try:
            judge = fit_judge(held_out.semantic, held_out.labels, fmrs=fmrs, seed=seed)
        except ValueError as error:
            warnings.append(f"no verification threshold from the held-out classes: {error}")
        else:
            reached = {fmr: at.threshold for fmr, at in judge.at_fmr.items() if not np.isnan(at.threshold)}
            chosen = measured(judge.score, list(reached.values()))
            rates["chosen/EER"] = chosen.eer
            for fmr, at in zip(reached, chosen.at_threshold, strict=True):
                rates |= {f"chosen/FMR@{fmr:g}": at.fmr, f"chosen/FNMR@{fmr:g}": at.fnmr}
    return {f"verification/{name}": float(value) for name, value in rates.items()}, warnings
