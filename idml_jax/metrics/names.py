"""The names of the metrics: what each means, its unit, which way is better, and where it is shown.

One row of ``TABLE`` for a name, or for a family of names with a part in braces: ``R@{k}``, ``R-AUROC({score})``.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Literal, NamedTuple

__all__ = ["TABLE", "Described", "compared", "describe", "shown"]


class Described(NamedTuple):
    """The description of a metric.

    Attributes:
      name: name in ``result.json``; a part in braces matches anything.
      meaning: one sentence.
      unit: ``share`` (0 to 1), ``correlation`` (-1 to 1), ``nats``, ``images``, ``steps``, ``length`` (of ``u``).
      better: ``higher``, ``lower``, or ``neither``.
    """

    name: str
    meaning: str
    unit: str
    better: Literal["higher", "lower", "neither"]


TABLE: tuple[Described, ...] = (
    # Retrieval.
    Described("R@{k}", "Share of queries with an image of their class among the k nearest.", "share", "higher"),
    Described("R@1_low", "Lower end of the 95 % bootstrap interval of R@1.", "share", "higher"),
    Described("R@1_high", "Upper end of the 95 % bootstrap interval of R@1.", "share", "higher"),
    Described("RP", "R-precision: share of the query's class among its R nearest, R its size.", "share", "higher"),
    Described(
        "MAP@R", "Mean average precision over the R nearest, R the size of the query's class.", "share", "higher"
    ),
    Described("MRR", "Mean reciprocal rank of the nearest image of the query's class.", "share", "higher"),
    Described("queries", "Number of queries.", "images", "neither"),
    Described("lone_queries", "Queries whose class the gallery does not have.", "images", "neither"),
    Described("introspective/R@{k}", "R@k where the introspective distance ranks.", "share", "higher"),
    Described("introspective/MAP@R", "MAP@R where the introspective distance ranks.", "share", "higher"),
    Described("P@{k}", "Share of the query's class among the k nearest.", "share", "higher"),
    Described("mAP", "Mean average precision over all ranks.", "share", "higher"),
    Described("CMC@{k}", "R@k without the images of the query's class and group.", "share", "higher"),
    Described("CMC_queries", "Queries with an image of their class in another group.", "images", "neither"),
    Described("reranked/R@{k}", "R@k after re-ranking.", "share", "higher"),
    Described("reranked/P@{k}", "P@k after re-ranking.", "share", "higher"),
    Described("reranked/MAP@R", "MAP@R after re-ranking.", "share", "higher"),
    # Verification: is it the same class?
    Described(
        "verification/AUROC", "Probability that a pair of one class is more similar than another.", "share", "higher"
    ),
    Described(
        "verification/AUROC_error",
        "Most that verification/AUROC may be off, from its counting in bins.",
        "share",
        "lower",
    ),
    Described("verification/EER", "Rate at which FMR and FNMR are equal, by cosine similarity.", "share", "lower"),
    Described(
        "verification/FNMR@{fmr}",
        "Share of pairs of one class that do not match where that share of other pairs does.",
        "share",
        "lower",
    ),
    Described("verification/chosen/EER", "EER of the score chosen on held-out classes.", "share", "lower"),
    Described(
        "verification/chosen/FMR@{fmr}",
        "Share of other pairs that match at the threshold chosen for that share on held-out classes.",
        "share",
        "lower",
    ),
    Described(
        "verification/chosen/FNMR@{fmr}",
        "Share of pairs of one class that do not match at that threshold.",
        "share",
        "lower",
    ),
    # Clustering.
    Described("NMI", "Normalised mutual information of k-means clusters and classes.", "share", "higher"),
    Described("AMI", "Mutual information of clusters and classes, adjusted for chance.", "share", "higher"),
    Described("F1", "F1 of the pairs of images that share a cluster and those that share a class.", "share", "higher"),
    # Which answers are wrong.
    Described(
        "R-AUROC({score})",
        "Probability that the score is larger for a wrong answer than for a right one.",
        "share",
        "higher",
    ),
    Described("R-AUROC({score})_low", "Lower end of the 95 % bootstrap interval of that R-AUROC.", "share", "higher"),
    Described("R-AUROC({score})_high", "Upper end of the 95 % bootstrap interval of that R-AUROC.", "share", "higher"),
    Described("AURC({score})", "Mean share of wrong answers as the least sure are dropped.", "share", "lower"),
    Described("E-AURC({score})", "AURC less that of the best possible order.", "share", "lower"),
    Described("wanted_precision", "Share of right answers that the threshold was chosen for.", "share", "neither"),
    Described("answered", "Share of queries that are answered at that threshold.", "share", "higher"),
    Described("answered_precision", "Share of right answers among those; NaN without any.", "share", "higher"),
    Described("corrupted/R@{k}", "R@k of clean and corrupted queries together.", "share", "higher"),
    Described(
        "corrupted/R-AUROC({score})",
        "R-AUROC of the score over clean and corrupted queries together.",
        "share",
        "higher",
    ),
    # The vote of the nearest images for a class.
    Described("vote/top{k}", "Share of queries whose class is among the k with the most votes.", "share", "higher"),
    Described("vote/nll", "Mean negative log-likelihood of the class under the vote.", "nats", "lower"),
    Described("vote/ece", "Expected calibration error of the largest share of the vote.", "share", "lower"),
    # Half of the classes are not in the gallery; means over several choices of them.
    Described(
        "open_set/AUROC({score})",
        "Probability that the score is larger for a query whose class is not in the gallery than for another.",
        "share",
        "higher",
    ),
    Described(
        "open_set/AURC({score})",
        "Mean share of wrong answers, all to strangers among them, as the least sure are dropped.",
        "share",
        "lower",
    ),
    Described(
        "open_set/TPIR@{fpir}({score})",
        "Share of mated queries answered rightly where that share of strangers gets an answer.",
        "share",
        "higher",
    ),
    Described("open_set/answered", "Share of queries, half of them strangers, that are answered.", "share", "higher"),
    Described("open_set/answered_precision", "Share of right answers among those; NaN without any.", "share", "higher"),
    Described("open_set/strangers", "Share of strangers, as estimated from the scores.", "share", "neither"),
    Described("open_set/{what}_std", "Standard deviation over the choices of classes.", "share", "lower"),
    # The uncertainty itself.
    Described("uncertainty_mean", "Mean length of the uncertainty embedding.", "length", "neither"),
    Described("uncertainty_std", "Standard deviation of the length of the uncertainty embedding.", "length", "neither"),
    Described("s-u_correlation", "Correlation of the similarities of pairs in s and in u.", "correlation", "neither"),
    Described(
        "P({changed}>{score})",
        "Probability that the score of an image is larger once it is changed.",
        "share",
        "higher",
    ),
    Described(
        "spearman(u,{what})",
        "Rank correlation of u with the true ambiguity or the strength of a change.",
        "correlation",
        "higher",
    ),
    # Classification.
    Described("top{k}", "Share of images with their class among the k most probable.", "share", "higher"),
    Described("nll", "Mean negative log-likelihood of the class.", "nats", "lower"),
    Described("ece", "Expected calibration error of the largest probability.", "share", "lower"),
    Described("count", "Number of images.", "images", "neither"),
    Described(
        "AUROC_error({score})",
        "Probability that the score is larger for a wrong class than for a right one.",
        "share",
        "higher",
    ),
    Described("mean_u", "Mean length of the uncertainty embedding.", "length", "neither"),
    Described("mean_u_{change}", "The same of mixed images.", "length", "neither"),
    Described("share_u_zero", "Share of images whose uncertainty embedding is 0.", "share", "lower"),
    # Of training.
    Described("step", "Training steps until then.", "steps", "neither"),
)

# Shown on the console at the end of a run, in this order.
_SHOWN = (
    "NMI",
    "verification/EER",
    "P(u_mixed>u)",
    "P(u_occlusion>u)",
    "spearman(u,ambiguity)",
    "R-AUROC(uncertainty)",
    "R-AUROC(nearest_distance)",
    "R-AUROC(margin_20)",
    "R-AUROC(ratio_20)",
    "R-AUROC(confidence)",
    "R-AUROC(vote_share)",
    "vote/top1",
    "open_set/AUROC(confidence)",
    "open_set/TPIR@0.1(confidence)",
    "answered",
    "answered_precision",
    "AUROC_error(u)",
    "AUROC_error(max_softmax)",
    "mean_u",
)
# Shown where two runs are compared, in this order.
_COMPARED = (
    "top1",
    "top5",
    "nll",
    "ece",
    "AUROC_error(u)",
    "AUROC_error(max_softmax)",
    "AUROC_error(entropy)",
    "R@1",
    "R@2",
    "R@4",
    "R@8",
    "RP",
    "MAP@R",
    "NMI",
    "AMI",
    "F1",
    "verification/EER",
    "verification/FNMR@0.001",
    "R-AUROC(uncertainty)",
    "R-AUROC(margin_10)",
    "R-AUROC(nearest_distance)",
    "R-AUROC(confidence)",
    "R-AUROC(vote_share)",
    "vote/top1",
    "open_set/AUROC(confidence)",
    "open_set/TPIR@0.1(confidence)",
    "spearman(u,ambiguity)",
    "corrupted/R@1",
    "corrupted/R-AUROC(uncertainty)",
    "corrupted/R-AUROC(margin_10)",
)


def shown() -> tuple[str, ...]:
    """Names of the metrics that a run shows on the console when it ends, in order; a run has some of them."""
    return _SHOWN


def compared() -> tuple[str, ...]:
    """Names of the metrics that a report sets side by side for two runs, in order; a run has some of them."""
    return _COMPARED


def describe(name: str) -> Described:
    """Describes a metric.

    Args:
      name: name in ``result.json``.

    Returns:
      The row of the table: the one of that name, else the one of its family with the longest fixed part.

    Raises:
      KeyError: for a name that no row has.

    >>> describe("R@8").unit, describe("R-AUROC(norm)").better
    ('share', 'higher')
    """
    found = [row for row in TABLE if _pattern(row.name).fullmatch(name)]
    if not found:
        raise KeyError(name)
    return max(found, key=lambda row: ("{" not in row.name, len(row.name)))


@cache
def _pattern(name: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\})", name)
    return re.compile("".join(_PARTS.get(part, r"\w+") if part[:1] == "{" else re.escape(part) for part in parts))


_PARTS = {"{k}": r"\d+", "{fmr}": r"[\w.-]+", "{fpir}": r"[\w.]+", "{what}": r"[\w.@(),]+"}
