"""The device code of `ranking`: tiles of squared distances, counted or reduced to the k smallest.

Ties. Comparisons are meaningful only if equal rows give equal numbers. So all tiles of a call come from products of one
shape, which sum every element in the same order at any position, and the distance of a positive is read from the same
tile in which the others are compared with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree, Shaped

# An array, or a tree of arrays, with one entry per row in front.
Rows: TypeAlias = PyTree[Shaped[Array, "_ ..."]]
# Distances of all pairs of two sides, smaller meaning more alike.
Distance = Callable[[Rows, Rows], Float[Array, "n m"]]
_Fold = Callable[[Shaped[Array, "*shape"], Shaped[Array, "*shape"]], Shaped[Array, "*shape"]]
# Distances of the targets, counts of the rows before them, distance of each row to the nearest.
_Counted = tuple[Float[Array, "b r t"], Int[Array, "b r t"], Float[Array, "b t"]]


class Blocks(NamedTuple):
    """One side of the product, cut into b blocks of t rows; padding rows are zero with an infinite norm."""

    rows: Float[Array, "b t d"]
    norms: Float[Array, "b t"]  # squared
    ids: Int[Array, "b t"]  # index in the gallery; below 0: none


class Targets(NamedTuple):
    """What each query row looks for: up to r positives, by slot (place among the column blocks) and gallery index."""

    slots: Int[Array, "b r t"]  # -1: no such positive
    ids: Int[Array, "b r t"]
    limits: Int[Array, "b"]  # the most positives that a row of the block has


def mesh_of(devices: list[jax.Device]) -> Mesh:
    """The devices in a row, axis `data`."""
    return Mesh(np.array(devices), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def squared_distances(
    a: Float[Array, "n d"], a_norms: Float[Array, "n"], b: Float[Array, "m d"], b_norms: Float[Array, "m"]
) -> Float[Array, "n m"]:
    """|a|^2 + |b|^2 - 2 a.b in float32, negative values from rounding set to 0; infinite where a norm is."""
    product = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum((a_norms[:, None] + b_norms[None, :]) - 2 * product, 0)


def euclidean_squared(
    a: tuple[Float[Array, "n d"], Float[Array, "n"]], b: tuple[Float[Array, "m d"], Float[Array, "m"]]
) -> Float[Array, "n m"]:
    """`squared_distances` of two pairs (rows, squared norms)."""
    return squared_distances(*a, *b)


def count_before(
    queries: Blocks, columns: Blocks, targets: Targets, own_pairs: np.ndarray, devices: list[jax.Device]
) -> tuple[Int[np.ndarray, "b r t"], Float[np.ndarray, "b t"]]:
    """For each target the number of gallery rows before it; for each query the squared distance to the nearest row.

    A column with the query's own id is left out; equal distances are ordered by id. own_pairs [p, 2] lists the (query
    block, column block) pairs that hold the targets. When `queries is columns` these must be the pairs (i, i), and half
    of the product is computed.
    """
    symmetric = queries is columns
    pairs = np.moveaxis(np.indices((len(queries.rows), len(columns.rows))), 0, -1).reshape(-1, 2)
    if symmetric:  # the tiles on the diagonal hold the targets, and are counted as soon as those are read
        own_pairs, pairs = pairs[pairs[:, 0] == pairs[:, 1]], pairs[pairs[:, 0] < pairs[:, 1]]
    devices = devices[: max(1, len(pairs))]
    # Every device reads the distances of all targets, then counts its share of the pairs.
    shares = []
    for hand in range(len(devices)):
        here = symmetric & (np.arange(len(own_pairs)) % len(devices) == hand)
        mine = pairs[hand :: len(devices)]
        first = np.column_stack([own_pairs, np.ones(len(own_pairs)), here])
        shares.append(np.concatenate([first, np.column_stack([mine, np.zeros(len(mine)), np.ones(len(mine))])]))
    ends = np.array([len(share) for share in shares], np.int32)
    work = np.zeros((len(devices), ends.max(), 4), np.int32)
    for hand, share in enumerate(shares):
        work[hand, : len(share)] = share
    counts, nearest = _count_before(queries, None if symmetric else columns, targets, work, ends, mesh=mesh_of(devices))
    return np.sum(jax.device_get(counts), axis=0), np.min(jax.device_get(nearest), axis=0)


@partial(jax.jit, static_argnames=("mesh",))
def _count_before(
    queries: Blocks,
    columns: Blocks | None,
    targets: Targets,
    work: Int[Array, "devices w 4"],
    ends: Int[Array, "devices"],
    *,
    mesh: Mesh,
) -> tuple[Int[Array, "devices b r t"], Float[Array, "devices b t"]]:
    """The counts and least distances of every device's share of the tiles; columns None: the queries themselves."""
    symmetric = columns is None
    columns = queries if symmetric else columns
    tile = columns.rows.shape[1]  # type: ignore[union-attr]  # where it was None it is `queries` now

    def local(
        queries: Blocks, columns: Blocks, targets: Targets, work: Int[Array, "1 w 4"], ends: Int[Array, "1"]
    ) -> tuple[Int[Array, "1 b r t"], Float[Array, "1 b t"]]:
        def step(k: Int[Array, ""], carry: _Counted) -> _Counted:
            found, counts, nearest = carry
            i, j, reading, counting = work[0, k]  # blocks, and the purpose of the tile
            distances = squared_distances(queries.rows[i], queries.norms[i], columns.rows[j], columns.norms[j])
            distances = jnp.where(queries.ids[i][:, None] == columns.ids[j][None, :], jnp.inf, distances)
            # Without the barrier the compiler may repeat this work in every pass that reads it.
            distances = jax.lax.optimization_barrier(distances)

            def read(_: Int[Array, ""], found: Float[Array, "b r t"]) -> Float[Array, "b r t"]:
                place = targets.slots[i] - j * tile
                inside = (targets.slots[i] >= 0) & (place >= 0) & (place < tile)
                here = jnp.take_along_axis(distances, jnp.clip(place, 0, tile - 1).T, axis=1).T
                return found.at[i].set(jnp.where(inside, here, found[i]))

            def count_for_rows(r: Int[Array, ""], counts: Int[Array, "b r t"]) -> Int[Array, "b r t"]:
                return counts.at[i, r].add(_before_in_rows(distances, columns.ids[j], found[i, r], targets.ids[i, r]))

            def count_for_columns(r: Int[Array, ""], counts: Int[Array, "b r t"]) -> Int[Array, "b r t"]:
                count = _before_in_columns(distances, queries.ids[i], found[j, r], targets.ids[j, r])
                return counts.at[j, r].add(count)

            # One loop body with one product for both purposes; a loop of no turns skips what is not wanted.
            found = jax.lax.fori_loop(0, reading, read, found)
            counts = jax.lax.fori_loop(0, counting * targets.limits[i], count_for_rows, counts)
            nearest = nearest.at[i].min(_fold_columns(jnp.minimum, distances))
            if symmetric:
                turns = jnp.where(i == j, 0, counting * targets.limits[j])
                counts = jax.lax.fori_loop(0, turns, count_for_columns, counts)
                nearest = nearest.at[j].min(_fold_rows(jnp.minimum, distances))
            return found, counts, nearest

        found = jnp.full(targets.slots.shape, -jnp.inf)
        counts = jnp.zeros(targets.slots.shape, jnp.int32)
        nearest = jnp.full(queries.norms.shape, jnp.inf)
        _, counts, nearest = jax.lax.fori_loop(0, ends[0], step, (found, counts, nearest))
        return counts[None], nearest[None]

    specs = (P(), P(), P(), P("data"), P("data"))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)
    return sharded(queries, columns, targets, work, ends)  # type: ignore[arg-type]  # likewise


def _before(
    distances: Float[Array, "n m"],
    ids: Int[Array, "#n #m"],
    threshold: Float[Array, "#n #m"],
    target: Int[Array, "#n #m"],
) -> Int[Array, "n m"]:
    """1 where an entry comes before the target: it is nearer, or as near with a smaller id."""
    return ((distances < threshold) | ((distances == threshold) & (ids < target))).astype(jnp.int32)


# XLA on the CPU does not fuse a comparison into a reduction: it would write the whole mask to memory first. Sums of
# slices are elementwise, so they fuse and vectorise, and leave little to reduce.


def _before_in_rows(
    distances: Float[Array, "n m"], ids: Int[Array, "m"], threshold: Float[Array, "n"], target: Int[Array, "n"]
) -> Int[Array, "n"]:
    """For each row the number of columns before its target, which has this distance (threshold) and id."""
    terms = [
        _before(part, ids[None, cut], threshold[:, None], target[:, None]) for cut, part in _cut_columns(distances)
    ]
    return jnp.sum(reduce(jnp.add, terms), axis=1)


def _before_in_columns(
    distances: Float[Array, "n m"], ids: Int[Array, "n"], threshold: Float[Array, "m"], target: Int[Array, "m"]
) -> Int[Array, "m"]:
    """For each column the number of rows before its target, which has this distance (threshold) and id."""
    terms = [_before(part, ids[cut, None], threshold[None, :], target[None, :]) for cut, part in _cut_rows(distances)]
    return _fold_rows(jnp.add, reduce(jnp.add, terms))


def _fold_columns(op: _Fold, x: Shaped[Array, "n m"]) -> Shaped[Array, "n"]:
    """Sum (`jnp.add`) or minimum (`jnp.minimum`) of each row."""
    folded = reduce(op, [part for _, part in _cut_columns(x)])
    return jnp.min(folded, axis=1) if op is jnp.minimum else jnp.sum(folded, axis=1)


def _fold_rows(op: _Fold, x: Shaped[Array, "n m"]) -> Shaped[Array, "m"]:
    """Sum (`jnp.add`) or minimum (`jnp.minimum`) of each column."""
    while len(x) > 1:
        # The barrier keeps the steps apart: one loop over all rows would read too many lines of the cache at once.
        x = jax.lax.optimization_barrier(reduce(op, [part for _, part in _cut_rows(x)]))
    return x[0]


def least_column(x: Float[Array, "n m"]) -> tuple[Float[Array, "n"], Int[Array, "n"]]:
    """The least value of each row and the first column that has it."""
    least = _fold_columns(jnp.minimum, x)
    place = jnp.arange(x.shape[1], dtype=jnp.int32)
    return least, _fold_columns(jnp.minimum, jnp.where(x == least[:, None], place[None, :], x.shape[1]))


def two_least(x: Float[Array, "n m"]) -> tuple[Float[Array, "n"], Int[Array, "n"], Float[Array, "n"]]:
    """`least_column` and the least value of the other columns (infinite if there is none)."""
    least, at = least_column(x)
    place = jnp.arange(x.shape[1], dtype=jnp.int32)
    return least, at, _fold_columns(jnp.minimum, jnp.where(place[None, :] == at[:, None], jnp.inf, x))


def _cut_columns(x: Shaped[Array, "n m"]) -> list[tuple[slice, Shaped[Array, "n _"]]]:
    """Some 32 slices of columns, at least 32 wide, each with its place."""
    width = max(32, x.shape[1] // 32)
    return [(slice(u, u + width), x[:, u : u + width]) for u in range(0, x.shape[1], width)]


def _cut_rows(x: Shaped[Array, "n m"]) -> list[tuple[slice, Shaped[Array, "_ m"]]]:
    """Some 16 slices of rows, each with its place."""
    height = max(1, len(x) // 16)
    return [(slice(u, u + height), x[u : u + height]) for u in range(0, len(x), height)]


@partial(jax.jit, static_argnames=("distance", "k", "mesh"))
def list_block(
    queries: Rows,
    query_ids: Int[Array, "n"],
    gallery: Rows,
    size: int,
    *,
    distance: Distance,
    k: int | None,
    mesh: Mesh,
) -> Int[Array, "n k"] | Float[Array, "n m"]:
    """Lists the k nearest gallery rows of each query by index; for k None gives the distances [n, m] instead.

    Args:
      queries: [n, ...], an array or a tree of arrays.
      query_ids: the gallery row that each query leaves out, below 0 for none.
      gallery: [m, ...], the same kind of tree.
      size: number of gallery rows that count; the others are padding.
      distance: distances [n, m] of queries and gallery.
      k: length of the lists.
      mesh: devices, among which the queries are split.
    """

    def local(
        queries: Rows, query_ids: Int[Array, "h"], gallery: Rows, size: int | Int[Array, ""]
    ) -> Int[Array, "h k"] | Float[Array, "h m"]:
        return _listed(_among_others(distance(queries, gallery), query_ids, size), k)

    rows, all_ = P("data"), P()
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, all_, all_), out_specs=rows, check_vma=False)
    return sharded(queries, query_ids, gallery, size)


@partial(jax.jit, static_argnames=("distance", "k", "mesh"))
def rank_block(
    queries: Rows,
    query_ids: Int[Array, "n"],
    query_labels: Int[Array, "n"],
    gallery: Rows,
    labels: Int[Array, "m"],
    size: int,
    *,
    distance: Distance,
    k: int | None,
    mesh: Mesh,
) -> tuple[Int[Array, "n k"] | Float[Array, "n m"], Int[Array, "n"], Float[Array, "n"]]:
    """Result of `list_block`, the number of gallery rows before each query's nearest positive, the least distance."""

    def local(
        queries: Rows,
        query_ids: Int[Array, "h"],
        query_labels: Int[Array, "h"],
        gallery: Rows,
        labels: Int[Array, "m"],
        size: int | Int[Array, ""],
    ) -> tuple[Int[Array, "h k"] | Float[Array, "h m"], Int[Array, "h"], Float[Array, "h"]]:
        distances = _among_others(distance(queries, gallery), query_ids, size)
        place = jnp.arange(len(labels), dtype=jnp.int32)
        positive = (labels[None, :] == query_labels[:, None]) & (distances < jnp.inf)
        before = _before_in_rows(distances, place, *least_column(jnp.where(positive, distances, jnp.inf)))
        return _listed(distances, k), before, _fold_columns(jnp.minimum, distances)

    rows, all_ = P("data"), P()
    specs = (rows, rows, rows, all_, all_, all_)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)
    return sharded(queries, query_ids, query_labels, gallery, labels, size)


def smallest(distances: Float[np.ndarray, "n m"], k: int) -> Int[np.ndarray, "n k"]:
    """Host version of the list for long lists: columns of the k smallest, in order, equal ones by column."""
    # One sortable number per pair: a float's bits, made to grow with it (negative floats count backwards, and adding
    # 0 turns -0 into 0), then the column. A few rows at a time, so that they stay in the cache.
    result = np.empty((len(distances), k), np.int32)
    columns = np.arange(distances.shape[1])
    step = max(1, 2**16 // distances.shape[1])
    for start in range(0, len(distances), step):
        bits = (distances[start : start + step] + np.float32(0)).view(np.int32)
        keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
        keys <<= 32
        keys |= columns
        keys.partition(k - 1, axis=1)
        result[start : start + step] = np.sort(keys[:, :k], axis=1) & 0xFFFFFFFF
    return result


def _listed(distances: Float[Array, "n m"], k: int | None) -> Int[Array, "n k"] | Float[Array, "n m"]:
    """Columns of the k least distances of each row, in order, equal ones by column; the distances for k None."""
    return distances if k is None else jax.lax.top_k(-distances, k)[1]


def _among_others(
    distances: Shaped[Array, "n m"], query_ids: Int[Array, "n"], size: int | Int[Array, ""]
) -> Float[Array, "n m"]:
    """Distances in float32, infinite for a query's own row and for padding (columns from `size` on)."""
    place = jnp.arange(distances.shape[1], dtype=jnp.int32)
    out = (place[None, :] == query_ids[:, None]) | (place[None, :] >= size)
    return jax.lax.optimization_barrier(jnp.where(out, jnp.inf, distances.astype(jnp.float32)))
