"""The nearest rows by the true distance: candidates by products in float32, their order by differences in float64.

The fast product (|a|^2 + |b|^2 - 2 a.b) loses the digits in which distances differ if rows are long compared with their
distances. So rows are first centred, a few more candidates than needed are listed, and the candidates are compared by
differences. A row that is not listed could still be nearer: a bound on the rounding error decides this, and if it is
possible, all rows within the bound are compared.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Float, Int

from idml_jax.metrics import ranking

_SLACK = 4  # additional candidates
_SAMPLE = 1023  # rows that the centre is taken from; an odd number, so that each median is one of the values
_CHUNK = 2**18  # numbers of float64 at a time, so that they stay in the cache


def centre(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "d"]:
    """A centre of the rows to use as origin: the medians of some of them; 0 if that is about as good.

    Distances do not depend on the origin, but their rounding does. A row near the centre is moved without any rounding,
    and whole numbers stay whole.

    Args:
      rows: ``[n, d]`` finite float32.

    Returns:
      ``[d]`` float32, 0 unless the squared lengths at least halve.
    """
    some = rows[np.unique(np.linspace(0, len(rows) - 1, min(_SAMPLE, len(rows) - 1 + len(rows) % 2)).astype(int))]
    middle = np.median(some, axis=0).astype(np.float32)
    length = lambda x: np.sum(np.square(x, dtype=np.float64))
    with np.errstate(over="ignore"):
        return middle if 2 * length(some - middle) < length(some) else np.zeros_like(middle)


def moved(*sides: Float[np.ndarray, "n d"]) -> list[tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n"]]]:
    """Rows moved to the centre of the last side, and their squared lengths; unmoved if these would overflow."""
    origin = centre(sides[-1])
    squares = lambda x: (x, np.einsum("nd,nd->n", x, x))
    if not origin.any():
        return [squares(x) for x in sides]
    with np.errstate(over="ignore"):
        result = [squares(x - origin) for x in sides]
    fits = all(norms.max() < np.finfo(np.float32).max / 4 for _, norms in result)
    return result if fits else [squares(x) for x in sides]


def nearest(
    queries: Float[np.ndarray, "n d"],
    gallery: Float[np.ndarray, "m d"],
    k: int,
    own: Int[np.ndarray, "n"],
    devices: list[jax.Device],
) -> tuple[Float[np.ndarray, "n k"], Int[np.ndarray, "n k"]]:
    """The k nearest gallery rows of each query by their Euclidean distance in float64, equal ones by index.

    Arguments as for `nearest_squares`.

    Returns:
      Distances, rounded to float32, and indices, nearest first.
    """
    squares, found = nearest_squares(queries, gallery, k, own, devices)
    return np.sqrt(squares).astype(np.float32), found


def nearest_squares(
    queries: Float[np.ndarray, "n d"],
    gallery: Float[np.ndarray, "m d"],
    k: int,
    own: Int[np.ndarray, "n"],
    devices: list[jax.Device],
) -> tuple[Float[np.ndarray, "n k"], Int[np.ndarray, "n k"]]:
    """The k nearest gallery rows of each query, as `nearest`, with their squared distances in float64.

    Args:
      queries: finite float32 rows.
      gallery: finite float32 rows.
      k: number of neighbours, at most the number of rows that every query can find.
      own: gallery row that each query leaves out; below 0: none.
      devices: devices that share the work.

    Returns:
      Squared distances and indices, nearest first.
    """
    others = len(gallery) - bool(np.any(own >= 0))
    wide = min(k + _SLACK, others)
    (near, near_norms), (far, norms) = moved(queries, gallery)
    index = ranking.nearest_rows(near, near_norms, far, norms, wide, own, devices)
    squares = np.empty((len(queries), k))
    found = np.empty((len(queries), k), np.int32)
    unsure = np.zeros(len(queries), bool)
    share = rounding(near.shape[1])
    largest = np.sqrt(norms.max(), dtype=np.float64)
    for cut in _chunks(len(queries), wide * queries.shape[1]):
        exact = squares_of(queries[cut, None, :], gallery[index[cut]])
        order = np.lexsort((index[cut], exact))
        found[cut] = np.take_along_axis(index[cut], order[:, :k], axis=1)
        exact = np.take_along_axis(exact, order, axis=1)
        squares[cut] = exact[:, :k]
        bound = share * (np.sqrt(near_norms[cut], dtype=np.float64) + largest) ** 2
        # Up to rounding, any row that is not listed is at least as far as the last listed one.
        unsure[cut] = exact[:, -1] - exact[:, k - 1] <= 2 * bound
    if wide < others and unsure.any():
        _among_all(queries, gallery, np.flatnonzero(unsure), own, squares, found, devices)
    return squares, found


def _among_all(
    queries: Float[np.ndarray, "n d"],
    gallery: Float[np.ndarray, "m d"],
    chosen: Int[np.ndarray, "q"],
    own: Int[np.ndarray, "n"],
    squares: Float[np.ndarray, "n k"],
    found: Int[np.ndarray, "n k"],
    devices: list[jax.Device],
) -> None:
    """Replaces the results of the chosen queries by those of all rows that rounding could have hidden.

    Rows that occur more than once are compared once.
    """
    k = found.shape[1]
    keys = np.ascontiguousarray(gallery + np.float32(0)).view(np.dtype((np.void, gallery.strides[0])))[:, 0]
    first, group, times = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)[1:]
    members = np.split(np.argsort(group, kind="stable"), np.cumsum(times)[:-1])
    distinct = gallery[first]
    (near, near_norms), (far, norms) = moved(queries[chosen], distinct)
    lengths = np.sqrt(norms, dtype=np.float64)
    share = rounding(gallery.shape[1])
    for start, distances in ranking.all_distances(near, near_norms, far, norms, devices):
        for place, approximate in enumerate(distances, start):
            query = chosen[place]
            bound = share * (np.sqrt(float(near_norms[place])) + lengths) ** 2
            some = np.flatnonzero(approximate <= squares[query, -1] + bound)
            exact = np.concatenate(
                [squares_of(queries[query], distinct[some[cut]]) for cut in _chunks(len(some), gallery.shape[1])]
            )
            some = some[np.argsort(exact, kind="stable")]
            exact = np.sort(exact)
            enough = np.searchsorted(np.cumsum(times[some]), k + 1)  # one of them may be the query's own
            last = exact[min(enough, len(exact) - 1)]
            inside = exact <= last
            listed = [members[g][: k + 1] for g in some[inside]]
            index = np.concatenate(listed)
            distance = np.repeat(exact[inside], [len(rows) for rows in listed])
            distance, index = distance[index != own[query]], index[index != own[query]]
            order = np.lexsort((index, distance))[:k]
            squares[query], found[query] = distance[order], index[order]


def rounding(width: int) -> float:
    """Rounding error of a squared distance by products, as a share of (|a| + |b|)^2; errors add like a random walk."""
    return (4 * np.sqrt(width) + 16) * float(np.finfo(np.float32).eps) / 2


def squares_of(a: Float[np.ndarray, "... d"], b: Float[np.ndarray, "... d"]) -> Float[np.ndarray, "..."]:
    """Squared distances by differences, in float64."""
    return np.sum(np.square(np.subtract(a, b, dtype=np.float64)), axis=-1)


def _chunks(rows: int, numbers: int) -> Iterator[slice]:
    """Rows cut so that a chunk holds so many numbers each and not too many in all."""
    step = max(1, _CHUNK // max(1, numbers))
    for start in range(0, rows, step):
        yield slice(start, start + step)
