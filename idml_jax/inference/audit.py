"""Finds wrong labels, near-duplicates, leaks between sets and images that do not belong, in embeddings."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from idml_jax.errors import UserError
from idml_jax.inference.choices import MOST as MOST
from idml_jax.inference.gallery import read_stored
from idml_jax.inference.index import Index, check_comparable
from idml_jax.metrics import duplicates, label_errors, retrieval
from idml_jax.metrics.retrieval import Neighbours

KINDS = {
    "label": "the label is probably wrong",
    "leak": "the other set has a copy of it",
    "duplicate": "a copy of an image before it",
    "blank": "the picture is empty",
    "unusual": "unlike its class or all others: junk, or a stranger",
}
BLANK = 4.0  # standard deviation of the grey values, of 255, below which a picture is empty
BESIDE = 4  # images shown beside a finding
# Gives the pixels of an image; called with its name, and with its box if it is a part of a picture.
Picture = Callable[..., UInt8[np.ndarray, "h w 3"] | None]


class Beside(NamedTuple):
    """An image that is shown beside a finding.

    Attributes:
      row: its row.
      other: whether it is of the other set.
    """

    row: int
    other: bool = False


class Finding(NamedTuple):
    """An image with a proposed change.

    Attributes:
      kind: key of ``KINDS``.
      row: row of the index.
      proposed: label that it should have; ``None``: it should be removed.
      score: how sure the finding is; comparable within a kind.
      reason: why, in words.
      beside: images that speak for the change.
    """

    kind: str
    row: int
    proposed: int | None
    score: float
    reason: str
    beside: tuple[Beside, ...] = ()


class Audit(NamedTuple):
    """What was found in an index.

    Attributes:
      findings: the findings, by kind in the order of ``KINDS``, the surest of each kind first.
      notes: lines about what was not looked at, or is not listed.
      groups: rows of each group of near-duplicates within the index.
    """

    findings: list[Finding]
    notes: list[str]
    groups: list[Int[np.ndarray, "g"]]


def audit(
    index: Index | str | Path,
    other: Index | str | Path | None = None,
    *,
    near: float = duplicates.NEAR,
    score: str = label_errors.SCORES[0],
    most: int = MOST,
    unusual: float = 0.01,
    picture: Picture | None = None,
) -> Audit:
    """Looks for mistakes in a set of images.

    Args:
      index: embeddings of the set, or a file or gallery of them.
      other: the same of another set, which must share no image with it (for a training set the test set).
      near: largest ratio of a pair of near-duplicates, see ``metrics.duplicates``.
      score: score that orders wrong labels, of ``label_errors.SCORES``.
      most: largest number of findings of each kind.
      unusual: share of the images that are listed as unusual.
      picture: gives the pixels of an image, to find empty ones; ``None``: they are not looked for.

    Returns:
      The findings.

    Raises:
      UserError: for a set of fewer than 3 images, sets that cannot be compared, or an unknown score.
    """
    index, other = _read(index), None if other is None else _read(other)
    if score not in label_errors.SCORES:
        raise UserError(f"score = {score!r}; known: {', '.join(label_errors.SCORES)}")
    if len(index) < 3:
        raise UserError(f"an audit compares images with each other; here are {len(index)}")
    if other is not None:
        check_comparable(other, index, "the other set", "the index", ())
    rows = index.embedded.semantic
    found = retrieval.neighbours(rows, k=min(label_errors.NEAREST, len(rows) - 1))
    notes: list[str] = []
    labels = _labels(index, found, score, most, notes)
    leaks = [] if other is None else _leaks(index, other, near, most, notes)
    copies, groups = _duplicates(index, found, near, most, notes)
    blank = [] if picture is None else _blank(index, picture, most, notes)
    rare = _unusual(index, found, unusual, most)
    return Audit([*labels, *leaks, *copies, *blank, *rare], notes, groups)


def _read(index: Index | str | Path) -> Index:
    if isinstance(index, str | Path):
        return read_stored(index, "index")
    if not isinstance(index, Index):
        raise UserError(f"the index is {type(index).__name__}; give one of model.embed, or a file of embeddings")
    return index


def _labels(index: Index, found: Neighbours, score: str, most: int, notes: list[str]) -> list[Finding]:
    labels = index.embedded.labels
    if index.embedded.sets is not None:
        notes.append("wrong labels were not looked for: images have several labels")
        return []
    if index.class_names is None or len(np.unique(labels)) < 2:
        notes.append("wrong labels were not looked for: fewer than two classes are known")
        return []
    seen = label_errors.evidence(index.embedded.semantic, labels, found)
    suspicion = seen.scores()[score]
    if not seen.judged.all():
        notes.append(
            f"{int((~seen.judged).sum()):,} images are the only one of their class; their labels are not judged"
        )
    flagged = np.flatnonzero(seen.wrong)
    order = flagged[np.argsort(-suspicion[flagged], kind="stable")]
    if len(order) > most:
        notes.append(f"label: the first {most:,} of {len(order):,} are listed")
    result = []
    for row in order[:most].tolist():
        proposed = int(seen.proposed[row])
        near = [n for n in found.index[row].tolist() if labels[n] == proposed][:BESIDE]
        reason = (
            f"probability {seen.other[row]:.0%} for {index.class_names[proposed]}, {seen.given[row]:.0%} for "
            f"{index.class_of(row)}"
        )
        result.append(Finding("label", row, proposed, float(suspicion[row]), reason, tuple(map(Beside, near))))
    return result


def _leaks(index: Index, other: Index, near: float, most: int, notes: list[str]) -> list[Finding]:
    """Images of the index with a copy in the other set; the scale is that of both sets together."""
    both = np.concatenate([index.embedded.semantic, other.embedded.semantic])
    found = retrieval.neighbours(both, k=min(duplicates.CANDIDATES, len(both) - 1))
    pairs = duplicates.near_pairs(found, near)
    across = (pairs.rows[:, 0] < len(index)) & (pairs.rows[:, 1] >= len(index))
    result: dict[int, Finding] = {}
    for (mine, theirs), ratio in zip(pairs.rows[across].tolist(), pairs.ratio[across].tolist(), strict=True):
        place = theirs - len(index)
        if mine in result:
            more = (*result[mine].beside, Beside(place, True))
            result[mine] = result[mine]._replace(beside=more[:BESIDE])
            continue
        reason = f"like {other.name_of(place)} of the other set (ratio {ratio:.2f})" + _named(index, mine, other, place)
        result[mine] = Finding("leak", mine, None, 1.0 - ratio, reason, (Beside(place, True),))
    if len(result) > most:
        notes.append(f"leak: the first {most:,} of {len(result):,} are listed")
    return list(result.values())[:most]


def _named(one: Index, a: int, two: Index, b: int) -> str:
    """A remark on a pair whose classes differ."""
    mine, theirs = one.classes_of(a), two.classes_of(b)
    if not (mine and theirs) or set(mine) == set(theirs):
        return ""
    return f"; their classes differ: {', '.join(mine)} and {', '.join(theirs)}"


def _duplicates(
    index: Index, found: Neighbours, near: float, most: int, notes: list[str]
) -> tuple[list[Finding], list[Int[np.ndarray, "g"]]]:
    """All but the first image of every group; the surest pair of each decides the order."""
    pairs = duplicates.near_pairs(found, near)
    groups = duplicates.groups(map(tuple, pairs.rows.tolist()), len(index))
    nearest: dict[int, tuple[float, int]] = {}
    for (one, two), ratio in zip(pairs.rows.tolist(), pairs.ratio.tolist(), strict=True):
        nearest.setdefault(two, (ratio, one))
        nearest.setdefault(one, (ratio, two))
    result = []
    for group in groups:
        for row in group[1:].tolist():
            ratio, partner = nearest[row]
            shown = list(dict.fromkeys([partner, int(group[0]), *group.tolist()]))
            reason = f"like {index.name_of(partner)} (ratio {ratio:.2f}), in a group of {len(group)}"
            reason += _named(index, row, index, partner)
            beside = tuple(Beside(r) for r in shown if r != row)[:BESIDE]
            result.append(Finding("duplicate", row, None, 1.0 - ratio, reason, beside))
    result.sort(key=lambda finding: -finding.score)
    if len(result) > most:
        notes.append(f"duplicate: the first {most:,} of {len(result):,} are listed")
    return result[:most], groups


def _blank(index: Index, picture: Picture, most: int, notes: list[str]) -> list[Finding]:
    result, absent = [], 0
    for row, name in enumerate(index.files.tolist()):
        box = index.box_of(row)
        pixels = picture(name) if box is None else picture(name, box)
        if pixels is None:
            absent += 1
            continue
        grey = pixels.astype(np.float32).mean(axis=2)
        if (spread := float(grey.std())) < BLANK:
            reason = f"all pixels are about {grey.mean():.0f} of 255 (standard deviation {spread:.1f})"
            result.append(Finding("blank", row, None, BLANK - spread, reason))
    if absent:
        notes.append(f"blank: {absent:,} of {len(index):,} pictures cannot be read")
    if len(result) > most:
        notes.append(f"blank: the first {most:,} of {len(result):,} are listed")
    return sorted(result, key=lambda finding: -finding.score)[:most]


def unusual_scores(index: Index, found: Neighbours, own: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """How unusual each image is, from 0 to 1; ``own`` are the ``own_class_cosines`` of the index.

    With labels: the rank of its distance from the mean direction of the other images of its class. Images without
    labels, or alone in their class: the larger of two ranks, of the distance to the nearest image and, where it is
    known, of the length of ``u``; junk that repeats itself is close to other junk, and is not found by these.
    """
    rank = lambda x: (np.argsort(np.argsort(x, kind="stable"), kind="stable") + 1) / len(x)
    scores = rank(found.distance[:, 0])
    if index.embedded.uncertainty is not None:
        scores = np.maximum(scores, rank(index.embedded.uncertainty_norm))
    known = ~np.isnan(own)
    if known.any():
        scores[known] = rank(-own[known])
    return scores


def own_class_cosines(index: Index) -> Float[np.ndarray, "n"]:
    """Those of ``label_errors``; NaN for all where no single label or only one class is known."""
    labels = index.embedded.labels
    if index.class_names is None or index.embedded.sets is not None or len(np.unique(labels)) < 2:
        return np.full(len(labels), np.nan)
    return label_errors.own_class_cosines(index.embedded.semantic, labels)


def _unusual(index: Index, found: Neighbours, share: float, most: int) -> list[Finding]:
    own = own_class_cosines(index)
    scores = unusual_scores(index, found, own)
    ordinary = np.nan if np.isnan(own).all() else float(np.nanmedian(own))
    order = np.argsort(-scores, kind="stable")[: min(most, int(np.ceil(share * len(scores))))]
    result = []
    for row in order.tolist():
        if np.isnan(own[row]):
            reason = f"distance to the nearest image {found.distance[row, 0]:.2f}"
            if index.embedded.uncertainty is not None:
                reason += f", length of u {np.linalg.norm(index.embedded.uncertainty[row]):.2f}"
        else:
            reason = f"cosine to the mean of its class {own[row]:.2f}; half of all images are above {ordinary:.2f}"
        near = tuple(map(Beside, found.index[row, :BESIDE].tolist()))
        result.append(Finding("unusual", row, None, float(scores[row]), reason, near))
    return result


def count_of(findings: Sequence[Finding]) -> dict[str, int]:
    """Number of findings of each kind."""
    return {kind: sum(finding.kind == kind for finding in findings) for kind in KINDS}
