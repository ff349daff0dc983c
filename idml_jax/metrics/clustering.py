"""Exact k-means that fits in memory for thousands of clusters, and measures of agreement between clusterings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int, Shaped

from idml_jax.metrics import seeding, tiles
from idml_jax.metrics.checks import Array, embedding_rows, label_array, label_column

# Squared distance to the nearest centre, its index, squared distance to the next one: of rows, or of tiles of rows.
_Nearest = tuple[Shaped[jax.Array, "*rows"], ...]
# Cells (row, column, count) of a table of two clusterings that are not 0.
_Cells = tuple[Int[np.ndarray, "c"], Int[np.ndarray, "c"], Int[np.ndarray, "c"]]


class KMeans(NamedTuple):
    """labels: cluster of each row; centres; inertia: sum of squared distances to them; iterations: of the best run."""

    labels: Int[np.ndarray, "n"]
    centres: Float[np.ndarray, "k d"]
    inertia: float
    iterations: int


def kmeans(
    embeddings: Float[Array, "n d"],
    k: int,
    key: Array | int = 0,
    *,
    restarts: int = 1,
    iterations: int = 100,
    candidates: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> KMeans:
    """Lloyd's k-means (1982) from k-means++ seeds (Arthur and Vassilvitskii, SODA 2007); the best of some restarts.

    embeddings [n, d] of any norm; key: a jax random key or a whole number, the same one giving the same clusters on any
    number of `devices`. `candidates` rows are drawn for each seed, and the one that leaves the least inertia is kept;
    None: 2 + ln k of them, as in scikit-learn; 1: k-means++ as published, quicker and less good. Each restart ends
    after `iterations` or as soon as no row changes its cluster. A row at equal distance to two centres goes to the
    first; a cluster that lost all its rows restarts at the row that is farthest from its own centre (it stays empty
    only where fewer distinct rows than clusters exist).

    Needs memory for the rows, the centres and one tile of distances. Raises ValueError, naming the argument, for empty
    or non-finite rows and for k outside 1..n.
    """
    rows, _ = embedding_rows(embeddings, "embeddings")
    if not 1 <= k <= len(rows):
        raise ValueError(f"k: expected 1 to {len(rows)}, the number of rows, got {k}")
    for name, value in (("restarts", restarts), ("iterations", iterations), ("candidates", candidates)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    seed = key if isinstance(key, int) else np.asarray(jax.random.key_data(key)).ravel().tolist()
    # Squared distances from a product lose digits if the rows are far from the origin.
    middle = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    rows, norms = embedding_rows(rows - middle, "embeddings", small=True)  # all rows may be equal
    search = _Search(rows, norms, list(jax.local_devices() if devices is None else devices))
    candidates = 2 + int(np.log(k)) if candidates is None else candidates
    runs = (_run(search, int(k), rng, iterations, candidates) for rng in np.random.default_rng(seed).spawn(restarts))
    best = min(runs, key=lambda run: run.inertia)
    return best._replace(centres=best.centres + middle)


class _Search:
    """Finds the nearest centres of rows that lie on the devices.

    Args:
      rows: [n, d] float32.
      norms: [n], their squared lengths.
      devices: that share the work.
    """

    def __init__(self, rows: Float[np.ndarray, "n d"], norms: Float[np.ndarray, "n"], devices: list[jax.Device]):
        self.rows, self.norms = rows, norms
        self.tile = min(1024, max(64, 1 << (len(rows) - 1).bit_length()))
        self.mesh = tiles.mesh_of(devices)
        everywhere = jax.sharding.NamedSharding(self.mesh, P())
        self.on_device = jax.device_put((rows, norms), everywhere)

    def nearest(
        self, which: Int[np.ndarray, "w"], centres: Float[np.ndarray, "c d"]
    ) -> tuple[Float[np.ndarray, "w"], Int[np.ndarray, "w"], Float[np.ndarray, "w"]]:
        """Finds the nearest centre of each row in `which`.

        Returns:
          Squared distance to it, its index (the first of equals), and the squared distance to the next one (infinite
          if there is none).
        """
        hands = self.mesh.size
        blocks = -(-len(self.rows) // self.tile)
        blocks = -(-blocks // hands) * hands
        work = np.zeros((blocks, self.tile), np.int32)
        work.reshape(-1)[: len(which)] = which
        needed = -(-len(which) // self.tile)
        # Block b is dealt to device b % hands, so that a few blocks are spread too.
        dealt = work.reshape(-1, hands, self.tile).swapaxes(0, 1)
        ends = np.array([len(range(hand, needed, hands)) for hand in range(hands)], np.int32)
        size = len(centres)
        width = min(256, max(64, 1 << (size - 1).bit_length()))
        count = -(-size // width)
        # Padded to a power of two of blocks: few programs to compile, and only the blocks in use are computed.
        room = 1 << (count - 1).bit_length()
        filled = np.zeros((room * width, centres.shape[1]), np.float32)
        filled[:size] = centres
        squares = np.full(room * width, np.inf, np.float32)
        squares[:size] = np.einsum("kd,kd->k", centres, centres)
        result = _nearest_centres(
            *self.on_device,
            dealt,
            ends,
            filled.reshape(room, width, -1),
            squares.reshape(room, width),
            np.int32(count),
            mesh=self.mesh,
        )
        least, at, after = (np.asarray(x).swapaxes(0, 1).reshape(-1)[: len(which)].copy() for x in result)
        return least, at, after

    def distance(self, which: Int[np.ndarray, "w"], centres: Float[np.ndarray, "w d"]) -> Float[np.ndarray, "w"]:
        """Squared distances of rows to one centre each."""
        squares = np.einsum("wd,wd->w", centres, centres)
        return np.maximum(self.norms[which] + squares - 2 * np.einsum("wd,wd->w", self.rows[which], centres), 0)


@partial(jax.jit, static_argnames=("mesh",))
def _nearest_centres(
    rows: Float[jax.Array, "n d"],
    norms: Float[jax.Array, "n"],
    work: Int[jax.Array, "devices b t"],
    ends: Int[jax.Array, "devices"],
    centres: Float[jax.Array, "c k d"],
    squares: Float[jax.Array, "c k"],
    count: Int[jax.Array, ""],
    *,
    mesh: Mesh,
) -> _Nearest:
    """Nearest centres of the rows that `work` deals to the devices, in tiles; `count` blocks of centres are in use."""
    width = centres.shape[1]

    def local(
        rows: Float[jax.Array, "n d"],
        norms: Float[jax.Array, "n"],
        work: Int[jax.Array, "1 b t"],
        ends: Int[jax.Array, "1"],
        centres: Float[jax.Array, "c k d"],
        squares: Float[jax.Array, "c k"],
        count: Int[jax.Array, ""],
    ) -> _Nearest:
        def block(b: Int[jax.Array, ""], carry: _Nearest) -> _Nearest:
            mine, mine_norms = rows[work[0, b]], norms[work[0, b]]

            def step(c: Int[jax.Array, ""], best: _Nearest) -> _Nearest:
                distances = tiles.squared_distances(mine, mine_norms, centres[c], squares[c])
                least, at, after = tiles.two_least(jax.lax.optimization_barrier(distances))
                nearer = least < best[0]
                second = jnp.minimum(jnp.where(nearer, best[0], least), jnp.where(nearer, after, best[2]))
                return jnp.where(nearer, least, best[0]), jnp.where(nearer, at + c * width, best[1]), second

            far, none = jnp.full(mine_norms.shape, jnp.inf), jnp.zeros(mine_norms.shape, jnp.int32)
            best = jax.lax.fori_loop(0, count, step, (far, none, far))
            return tuple(column.at[0, b].set(value) for column, value in zip(carry, best, strict=True))

        start = (jnp.zeros(work.shape), jnp.zeros(work.shape, jnp.int32), jnp.zeros(work.shape))
        return jax.lax.fori_loop(0, ends[0], block, start)

    specs = (P(), P(), P("data"), P("data"), P(), P(), P())
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)
    return sharded(rows, norms, work, ends, centres, squares, count)


def _run(search: _Search, k: int, rng: np.random.Generator, iterations: int, candidates: int) -> KMeans:
    everything = np.arange(len(search.rows))
    centres = search.rows[seeding.draw(search, k, rng, candidates)]
    squared, labels, second = search.nearest(everything, centres)
    changed, done = np.full(k, True), 0
    while done < iterations and changed.any():
        done += 1
        changed |= _fill_empty(search, labels, squared, second, k)
        centres, moved = _updated(search.rows, labels, centres, changed)
        if not moved.any():
            break
        old = labels.copy()
        # Lloyd's assignment without distances that cannot matter: `second` is a lower bound of the distance to every
        # centre but a row's own, and only centres that moved can be nearer than that.
        unsure = everything
        if moved.mean() < 0.8:
            mine = np.flatnonzero(moved[labels])
            squared[mine] = search.distance(mine, centres[labels[mine]])
            some = np.flatnonzero(moved)
            least, at, after = search.nearest(everything, centres[some])
            second = np.minimum(second, np.where(some[at] == labels, after, least))
            unsure = np.flatnonzero(squared >= second - 1e-5 * (search.norms + second))  # more than rounding
        squared[unsure], labels[unsure], second[unsure] = search.nearest(unsure, centres)
        changed = np.full(k, False)
        swapped = labels != old
        changed[labels[swapped]] = changed[old[swapped]] = True
    return KMeans(labels.astype(np.int32), centres, _inertia(search.rows, labels, centres), done)


def _fill_empty(
    search: _Search,
    labels: Int[np.ndarray, "n"],
    squared: Float[np.ndarray, "n"],
    second: Float[np.ndarray, "n"],
    k: int,
) -> Bool[np.ndarray, "k"]:
    """Gives each empty cluster the row that is farthest from its centre, in place; returns the clusters that changed.

    Args:
      search: the rows.
      labels: cluster of each row; changed in place, as are the next two.
      squared: squared distance of each row to its centre.
      second: lower bound of its squared distance to every other centre.
      k: number of clusters.
    """
    sizes = np.bincount(labels, minlength=k)
    empty = np.flatnonzero(sizes == 0)
    changed = np.full(k, False)
    if not len(empty):
        return changed
    farthest = iter(np.argsort(-squared, kind="stable"))
    for cluster in empty:
        for row in farthest:
            if squared[row] <= seeding.ROUNDING * search.norms[row]:
                return changed  # the rest lie on their centres
            if sizes[labels[row]] > 1:
                sizes[labels[row]] -= 1
                changed[[labels[row], cluster]] = True
                labels[row], squared[row], second[row] = cluster, 0, 0
                break
    return changed


def _updated(
    rows: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, "n"],
    centres: Float[np.ndarray, "k d"],
    changed: Bool[np.ndarray, "k"],
) -> tuple[Float[np.ndarray, "k d"], Bool[np.ndarray, "k"]]:
    """Moves the centres of changed clusters to their means; returns all centres, and which moved.

    The centre of an empty cluster stays where it is.
    """
    members = np.flatnonzero(changed[labels])
    members = members[np.argsort(labels[members], kind="stable")]
    found, starts, sizes = np.unique(labels[members], return_index=True, return_counts=True)
    sums = np.empty((len(found), rows.shape[1]), np.float32)
    for i, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
        # A loop over clusters is ten times as fast as `np.add.reduceat`, and needs no copy of all rows.
        np.add.reduce(rows[members[start : start + size]], axis=0, out=sums[i])
    centres = centres.copy()
    old = centres[found]
    centres[found] = sums / sizes[:, None].astype(np.float32)
    moved = np.full(len(centres), False)
    moved[found] = np.any(centres[found] != old, axis=1)
    return centres, moved


def _inertia(rows: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n"], centres: Float[np.ndarray, "k d"]) -> float:
    """Sum of the squared distances of all rows to their centres, in float64."""
    total = 0.0
    for start in range(0, len(rows), 4096):
        gap = rows[start : start + 4096] - centres[labels[start : start + 4096]]
        total += float(np.sum(np.square(gap), dtype=np.float64))
    return total


def nmi(labels: Int[Array, "n"], clusters: Int[Array, "n"]) -> float:
    """Normalised mutual information, arithmetic mean of the entropies, in [0, 1].

    1 where both sides put everything in one cluster. Raises ValueError for empty or mismatched input.
    """
    table, a, b = _contingency(labels, clusters)
    if len(a) == len(b) == 1:
        return 1.0
    information = max(0.0, _information(table, a, b))
    return min(1.0, information / (0.5 * (_entropy(a) + _entropy(b))))


def ami(labels: Int[Array, "n"], clusters: Int[Array, "n"]) -> float:
    """Adjusted mutual information, arithmetic mean: 0 expected by chance, 1 for equal clusterings.

    Vinh, Epps and Bailey, "Information theoretic measures for clusterings comparison", JMLR 2010. Raises ValueError
    for empty or mismatched input.
    """
    table, a, b = _contingency(labels, clusters)
    if len(a) == len(b) == 1 or len(a) == len(b) == a.sum():
        return 1.0
    expected = _expected_information(a, b)
    gap = 0.5 * (_entropy(a) + _entropy(b)) - expected
    tiny = np.finfo(np.float64).eps
    return min(1.0, (_information(table, a, b) - expected) / (min(gap, -tiny) if gap < 0 else max(gap, tiny)))


def f1(labels: Int[Array, "n"], clusters: Int[Array, "n"]) -> float:
    """F1 of the decision "same cluster" over all pairs of rows, by counting: no n x n table.

    As in the clustering evaluation of Song, Xiang, Jegelka and Savarese, CVPR 2016. 1 if neither side
    groups any pair. Raises ValueError for empty or mismatched input.
    """
    table, a, b = _contingency(labels, clusters)
    both, in_labels, in_clusters = (int(np.sum(x * (x - 1) // 2)) for x in (table[2], a, b))
    return 2 * both / (in_labels + in_clusters) if in_labels + in_clusters else 1.0


def _contingency(
    labels: Shaped[Array, "n"], clusters: Shaped[Array, "n"]
) -> tuple[_Cells, Int[np.ndarray, "a"], Int[np.ndarray, "b"]]:
    """The cells of the contingency table that are not 0, and the sizes of the clusters on both sides."""
    labels = label_array(labels, "labels")
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels: expected shape (n,) with n >= 1, got {labels.shape}")
    clusters = label_column(clusters, len(labels), "clusters", "labels")
    a = np.unique(label_column(labels, len(labels), "labels", "labels"), return_inverse=True)[1]
    b = np.unique(clusters, return_inverse=True)[1]
    cells, counts = np.unique(a.astype(np.int64) * (b.max() + 1) + b, return_counts=True)
    return (*np.divmod(cells, b.max() + 1), counts), np.bincount(a), np.bincount(b)


def _entropy(sizes: Int[np.ndarray, "a"]) -> float:
    """Entropy of a clustering with these sizes, in nats."""
    share = sizes / sizes.sum()
    return float(-np.sum(share * np.log(share)))


def _information(table: _Cells, a: Int[np.ndarray, "a"], b: Int[np.ndarray, "b"]) -> float:
    """Mutual information of two clusterings, in nats."""
    row, column, count = table
    n = a.sum()
    return float(np.sum(count / n * (np.log(count) + np.log(n) - np.log(a[row]) - np.log(b[column]))))


def _expected_information(a: Int[np.ndarray, "a"], b: Int[np.ndarray, "b"]) -> float:
    """Expected mutual information, in nats, of random clusterings with these sizes (hypergeometric distribution)."""
    n = int(a.sum())
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    total = 0.0
    sizes_b, times_b = np.unique(b, return_counts=True)
    for size_a, times_a in zip(*np.unique(a, return_counts=True), strict=True):
        for size_b, times in zip(sizes_b, times_b, strict=True):
            cell = np.arange(max(1, size_a + size_b - n), min(size_a, size_b) + 1)
            log_probability = (
                log_factorial[[size_a, size_b, n - size_a, n - size_b]].sum()
                - log_factorial[n]
                - log_factorial[cell]
                - log_factorial[size_a - cell]
                - log_factorial[size_b - cell]
                - log_factorial[n - size_a - size_b + cell]
            )
            gain = cell / n * (np.log(n) + np.log(cell) - np.log(size_a) - np.log(size_b))
            total += int(times_a) * int(times) * float(np.sum(gain * np.exp(log_probability)))
    return total
