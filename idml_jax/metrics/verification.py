"""Verification over all pairs of images, "same class or not": FNMR at a wanted FMR, EER, AUROC.

A pair is genuine if its classes are equal, else an impostor; it matches if its score is at least the threshold. FMR is
the share of impostors that match, FNMR the share of genuine pairs that do not. All pairs are counted, in tiles
(`pair_tiles`):

* Up to `EXACT_PAIRS` pairs the scores are kept and sorted: every number is exact.
* Beyond, two passes. The first counts the scores in `BINS` bins of equal width over the range that a sample of pairs
  spans (the outer bins are open). The second keeps only the scores in the bins where a wanted FMR or the EER lies. So
  FNMR, EER and thresholds are exact here too. AUROC counts pairs that share a bin half; it is off by at most half the
  probability that a genuine pair and an impostor share a bin, which is returned as `auroc_error`.

Memory: the rows once more in the order of their classes, a few tiles, and two tables of `BINS` counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from idml_jax.metrics.checks import Array
from idml_jax.metrics.pair_scores import Scored
from idml_jax.metrics.pair_tiles import Pairs, Union

FMRS = (1e-2, 1e-3, 1e-4)
EXACT_PAIRS = 2**24
BINS = 2**18
_HELD = 2**23  # collected scores before equal ones are joined


class Rates(NamedTuple):
    """What a threshold does: shares of impostors that match and of genuine pairs that do not."""

    threshold: float
    fmr: float
    fnmr: float


_NONE = Rates(np.nan, np.nan, np.nan)


class Verification(NamedTuple):
    """Verification over all pairs; NaN where there are no genuine pairs or no impostors.

    Attributes:
      genuine: number of pairs of one class.
      impostors: number of other pairs.
      auroc: probability that a genuine pair has a larger score than an impostor, ties counted half.
      auroc_error: most that ``auroc`` may be off; 0 up to ``EXACT_PAIRS`` pairs.
      eer: rate at which FMR and FNMR are equal, on the line through neighbouring operating points.
      eer_threshold: score of that place.
      at_fmr: by wanted FMR, the lowest threshold whose FMR is not above it. All NaN where there are fewer than 1 / FMR
        impostors, which cannot show such a rate.
      at_threshold: the rates of the given thresholds, in their order.
    """

    genuine: int
    impostors: int
    auroc: float
    auroc_error: float
    eer: float
    eer_threshold: float
    at_fmr: dict[float, Rates]
    at_threshold: list[Rates]


def verify(
    scored: Scored,
    labels: Shaped[Array, "n"],
    gallery: Scored | None = None,
    gallery_labels: Shaped[Array, "m"] | None = None,
    *,
    fmrs: Sequence[float] = FMRS,
    thresholds: Sequence[float] = (),
    exact_pairs: int = EXACT_PAIRS,
) -> Verification:
    """Verification over all pairs of one set, or over every query with every gallery image.

    Args:
      scored: the images, from ``pair_scores.cosine`` or a ``pair_scores.Plda``.
      labels: ``[n]`` classes of any kind.
      gallery: the other side of the pairs; nothing is left out.
      gallery_labels: ``[m]`` classes.
      fmrs: wanted FMR, each above 0 and below 1.
      thresholds: thresholds chosen elsewhere, whose rates are wanted.
      exact_pairs: number of pairs up to which all scores are kept.

    Raises:
      ValueError: for mismatched input, a single image without a gallery, and an FMR outside of (0, 1).
    """
    return _verify([Pairs(scored, labels, gallery, gallery_labels)], fmrs, thresholds, exact_pairs)


def verify_within(
    sets: Sequence[tuple[Scored, Shaped[Array, "_"]]], *, fmrs: Sequence[float] = FMRS, exact_pairs: int = EXACT_PAIRS
) -> Verification:
    """Verification over the pairs within each of several sets (scores and classes), counted together."""
    return _verify([Pairs(scored, labels, None, None) for scored, labels in sets], fmrs, (), exact_pairs)


def _verify(
    sets: Sequence[Pairs], fmrs: Sequence[float], thresholds: Sequence[float], exact_pairs: int
) -> Verification:
    if wrong := [fmr for fmr in fmrs if not 0 < fmr < 1]:
        raise ValueError(f"fmrs: expected shares above 0 and below 1, got {wrong[0]}")
    pairs = Union(sets)
    if pairs.total == 0:
        raise ValueError("scored: a single image makes no pair; give at least 2 or a gallery")
    tally = _kept(pairs, thresholds) if pairs.total <= exact_pairs else _counted(pairs, fmrs, thresholds)
    if not (tally.genuine.total and tally.impostor.total):
        told = [_NONE._replace(threshold=float(t)) for t in thresholds]
        sizes = tally.genuine.total, tally.impostor.total
        return Verification(*sizes, np.nan, np.nan, np.nan, np.nan, dict.fromkeys(fmrs, _NONE), told)
    return _summary(tally, fmrs, thresholds)


def pair_scores(
    scored: Scored,
    labels: Shaped[Array, "n"],
    gallery: Scored | None = None,
    gallery_labels: Shaped[Array, "m"] | None = None,
) -> tuple[Float[np.ndarray, "g"], Float[np.ndarray, "i"]]:
    """All scores of genuine pairs and of impostors, each in ascending order; for sets whose pairs fit into memory."""
    tally = _kept(Union([Pairs(scored, labels, gallery, gallery_labels)]))
    return tally.genuine.values, tally.impostor.values


class _Column(NamedTuple):
    """Scores of one kind in ascending order; `ends` counts those up to each entry (None: every entry is one)."""

    values: Float[np.ndarray, "v"]
    ends: Int[np.ndarray, "v"] | None
    total: int

    def below(self, value: float) -> int:
        """Number of scores below a value."""
        return self._up_to(int(np.searchsorted(self.values, np.float32(value), side="left")))

    def up_to(self, value: float) -> int:
        """Number of scores up to a value."""
        return self._up_to(int(np.searchsorted(self.values, np.float32(value), side="right")))

    def at(self, place: int) -> float:
        """The score at a place of the ascending order."""
        return float(self.values[place if self.ends is None else np.searchsorted(self.ends, place, side="right")])

    def _up_to(self, entries: int) -> int:
        return entries if self.ends is None else int(self.ends[entries - 1]) if entries else 0


class _Tally(NamedTuple):
    """The scores of both kinds, AUROC with its largest error, and by given threshold the pairs of each kind below it.

    Where not all scores are kept, a bin that no answer lies in is one entry in the middle of the bin.
    """

    genuine: _Column
    impostor: _Column
    auroc: float
    auroc_error: float
    below: list[tuple[int, int]]


def _kept(pairs: Union, thresholds: Sequence[float] = ()) -> _Tally:
    """All scores, sorted."""
    parts = [(genuine.copy(), impostor.copy()) for genuine, impostor in pairs.tiles()]
    kinds = [np.sort(np.concatenate(part)) for part in zip(*parts, strict=True)]
    genuine, impostor = (_Column(x, None, len(x)) for x in kinds)
    auroc = np.nan
    if genuine.total and impostor.total:
        below = np.searchsorted(impostor.values, genuine.values, side="left")
        up_to = np.searchsorted(impostor.values, genuine.values, side="right")
        auroc = (below.sum() + up_to.sum()) / (2 * genuine.total * impostor.total)
    return _Tally(genuine, impostor, float(auroc), 0.0, [(genuine.below(t), impostor.below(t)) for t in thresholds])


class _Bins:
    """Bins of equal width; a larger score is never in a lower bin."""

    def __init__(self, sample: Float[np.ndarray, "s"]):
        self._low = np.float32(sample.min())
        span, largest = float(sample.max()) - float(sample.min()), float(np.abs(sample).max())
        # Far wider than the spacing of the numbers, so that the middle of a bin is in it.
        self.count = int(np.clip(span / (8 * np.finfo(np.float32).eps * max(largest, 1e-30)), 1, BINS))
        self._scale = np.float32(self.count / span if span > 0 else 1.0)

    def __call__(self, scores: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
        place = scores - self._low
        place *= self._scale
        np.clip(place, 0, self.count - 1, out=place)
        return place.astype(np.int32)

    def middles(self) -> Float[np.ndarray, "bins"]:
        middles = float(self._low) + (np.arange(self.count) + 0.5) / float(self._scale)
        return middles.astype(np.float32)


def _counted(pairs: Union, fmrs: Sequence[float], thresholds: Sequence[float]) -> _Tally:
    """Two passes: the counts of bins, then the scores of those that matter."""
    bins = _Bins(pairs.sample())
    counts = np.zeros((2, bins.count), np.int64)
    below = np.zeros((len(thresholds), 2), np.int64)
    for kinds in pairs.tiles():
        for kind, scores in enumerate(kinds):
            if len(scores):
                counts[kind] += np.bincount(bins(scores), minlength=bins.count)
                below[:, kind] += np.asarray([(scores < np.float32(t)).sum() for t in thresholds], np.int64)
    ends = counts.cumsum(axis=1)
    total = ends[:, -1]
    auroc = error = np.nan
    chosen = np.zeros(bins.count, bool)
    if total.all():
        sharing = (counts[0] / total[0]) @ (counts[1] / total[1])
        auroc, error = (counts[0] / total[0]) @ ((ends[1] - counts[1]) / total[1]) + sharing / 2, sharing / 2
        places = [total[1] - 1 - k for fmr in fmrs if (k := _allowed(fmr, int(total[1])))]
        chosen[np.searchsorted(ends[1], places, side="right")] = True
        chosen[np.argmax(ends[0] / total[0] + ends[1] / total[1] >= 1)] = True
    held = [_Held(), _Held()]
    if chosen.any():
        for kinds in pairs.tiles():
            for kind, scores in enumerate(kinds):
                held[kind].add(scores[chosen[bins(scores)]])
    columns = [_column(bins, counts[kind], chosen, held[kind]) for kind in range(2)]
    return _Tally(columns[0], columns[1], float(auroc), float(error), [(int(g), int(i)) for g, i in below])


class _Held:
    """Scores collected over the tiles; equal ones are joined when there are many."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._size = 0

    def add(self, scores: Float[np.ndarray, "n"]) -> None:
        if len(scores):
            self._parts.append((scores, np.ones(len(scores), np.int64)))
            self._size += len(scores)
            if self._size > _HELD:
                self._parts = [self.joined()]
                self._size = len(self._parts[0][0]) // 2  # so that scores that all differ are not joined every time

    def joined(self) -> tuple[Float[np.ndarray, "v"], Int[np.ndarray, "v"]]:
        if not self._parts:
            return np.zeros(0, np.float32), np.zeros(0, np.int64)
        scores, times = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        values, group = np.unique(scores, return_inverse=True)
        return values, np.bincount(group, weights=times, minlength=len(values)).astype(np.int64)


def _column(bins: _Bins, counts: Int[np.ndarray, "bins"], chosen: np.ndarray, held: _Held) -> _Column:
    values, times = held.joined()
    other = ~chosen & (counts > 0)
    values = np.concatenate([values, bins.middles()[other]])
    times = np.concatenate([times, counts[other]])
    # By bin first: the outer bins are open, so that their middle may be on the wrong side of a score.
    order = np.lexsort((values, bins(values)))
    values, ends = np.maximum.accumulate(values[order]), times[order].cumsum()
    return _Column(values, ends, int(ends[-1]) if len(ends) else 0)


def _allowed(fmr: float, impostors: int) -> int:
    """Number of impostors that may match."""
    return int(np.floor(fmr * impostors * (1 + 1e-12)))


def _summary(tally: _Tally, fmrs: Sequence[float], thresholds: Sequence[float]) -> Verification:
    genuine, impostor = tally.genuine, tally.impostor
    at_fmr = {}
    for fmr in fmrs:
        allowed = _allowed(fmr, impostor.total)
        if not allowed:
            at_fmr[fmr] = _NONE
            continue
        last = impostor.at(impostor.total - 1 - allowed)  # the best impostor that must not match
        threshold = float(np.nextafter(np.float32(last), np.float32(np.inf)))
        at_fmr[fmr] = Rates(threshold, 1 - impostor.up_to(last) / impostor.total, genuine.up_to(last) / genuine.total)
    given = [
        Rates(float(t), 1 - i / impostor.total, g / genuine.total)
        for t, (g, i) in zip(thresholds, tally.below, strict=True)
    ]
    sizes = genuine.total, impostor.total
    return Verification(*sizes, tally.auroc, tally.auroc_error, *_equal_error(genuine, impostor), at_fmr, given)


def _equal_error(genuine: _Column, impostor: _Column) -> tuple[float, float]:
    """Rate at which FMR and FNMR are equal, and its score: the first at which FNMR just above it reaches FMR."""

    def balance(missed: int, refused: int) -> float:
        return missed / genuine.total - (1 - refused / impostor.total)

    low, high = -(2**31), 2**31 - 1  # bisection over all float32, in their order
    while low < high:
        middle = (low + high) // 2
        value = _number(middle)
        if np.isnan(value):  # beyond infinity
            low, high = (middle + 1, high) if middle < 0 else (low, middle)
        elif balance(genuine.up_to(value), impostor.up_to(value)) >= 0:
            high = middle
        else:
            low = middle + 1
    value = _number(low)
    before = balance(genuine.below(value), impostor.below(value))
    after = balance(genuine.up_to(value), impostor.up_to(value))
    weight = -before / (after - before) if after > before else 0.0
    missed = genuine.below(value), genuine.up_to(value)
    return (missed[0] + weight * (missed[1] - missed[0])) / genuine.total, value


def _number(place: int) -> float:
    """The float32 at a place of their ascending order; 0 is at place 0."""
    return float(np.asarray(place if place >= 0 else place ^ 0x7FFFFFFF, np.int32).view(np.float32))
