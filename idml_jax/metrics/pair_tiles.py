"""The scores of all pairs of images, tile by tile, split into pairs of one class and of two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped

from idml_jax.metrics.checks import Array, check_pair, label_column
from idml_jax.metrics.pair_scores import Scored

TILE = 1024
SAMPLE = 1024  # rows of each side whose pairs are a sample of the scores


class Pairs:
    """The scores of all pairs, tile by tile, rows sorted by class so that most tiles have impostors only."""

    def __init__(
        self,
        scored: Scored,
        labels: Shaped[Array, "n"],
        gallery: Scored | None,
        gallery_labels: Shaped[Array, "m"] | None,
    ):
        check_pair(gallery, gallery_labels, labels)
        self._same_set = gallery is None
        own = label_column(labels, len(scored.rows), "labels", "scored")
        if gallery is None or gallery_labels is None:
            codes = np.unique(own, return_inverse=True)[1]
            self._left = self._right = _sorted(scored, codes)
            self.total = len(own) * (len(own) - 1) // 2
            return
        others = label_column(gallery_labels, len(gallery.rows), "gallery_labels", "gallery")
        if gallery.rows.shape[1] != scored.rows.shape[1]:
            raise ValueError(f"gallery: width {gallery.rows.shape[1]} differs from {scored.rows.shape[1]}")
        codes = np.unique(np.concatenate([own, others]), return_inverse=True)[1]
        self._left, self._right = _sorted(scored, codes[: len(own)]), _sorted(gallery, codes[len(own) :])
        self.total = len(own) * len(others)

    def sample(self) -> Float[np.ndarray, "s"]:
        """Scores of evenly spaced images."""
        some = [np.unique(np.linspace(0, len(side[1]) - 1, SAMPLE).astype(int)) for side in (self._left, self._right)]
        (a, _), (b, _) = (
            (_rows(side[0], rows), rows) for side, rows in zip((self._left, self._right), some, strict=True)
        )
        found = _scores(a, b)
        return found[np.eye(*found.shape) == 0] if self._same_set else found.reshape(-1)

    def tiles(self) -> Iterator[tuple[Float[np.ndarray, "g"], Float[np.ndarray, "i"]]]:
        """Genuine and impostor scores of one tile after the other, float32; overwritten by the next."""
        (left, own), (right, others) = self._left, self._right
        for i in range(0, len(own), TILE):
            a, a_codes = _rows(left, slice(i, i + TILE)), own[i : i + TILE]
            for j in range(i if self._same_set else 0, len(others), TILE):
                b, b_codes = _rows(right, slice(j, j + TILE)), others[j : j + TILE]
                scores = _scores(a, b)
                apart = a_codes[-1] < b_codes[0] or b_codes[-1] < a_codes[0]
                if apart:
                    yield scores[:0, 0], scores.reshape(-1)
                    continue
                same = a_codes[:, None] == b_codes[None, :]
                if self._same_set and i == j:
                    upper = np.triu(np.ones(scores.shape, bool), 1)
                    yield scores[same & upper], scores[~same & upper]
                else:
                    yield scores[same], scores[~same]


class Union:
    """The pairs of several sets."""

    def __init__(self, sets: Sequence[Pairs]):
        self._sets = [pairs for pairs in sets if pairs.total]
        self.total = sum(pairs.total for pairs in sets)

    def sample(self) -> Float[np.ndarray, "s"]:
        """Scores of evenly spaced images."""
        return np.concatenate([pairs.sample() for pairs in self._sets])

    def tiles(self) -> Iterator[tuple[Float[np.ndarray, "g"], Float[np.ndarray, "i"]]]:
        """As `Pairs.tiles`."""
        for pairs in self._sets:
            yield from pairs.tiles()


def _sorted(scored: Scored, codes: Int[np.ndarray, "n"]) -> tuple[Scored, Int[np.ndarray, "n"]]:
    order = np.argsort(codes, kind="stable")
    return Scored(scored.rows[order], scored.offsets[order]), codes[order]


def _rows(scored: Scored, rows: slice | np.ndarray) -> Scored:
    return Scored(scored.rows[rows], scored.offsets[rows])


def _scores(a: Scored, b: Scored) -> Float[np.ndarray, "n m"]:
    scores = a.rows @ b.rows.T
    scores += a.offsets[:, None]
    scores += b.offsets[None, :]
    return scores
