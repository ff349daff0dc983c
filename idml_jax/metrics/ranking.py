"""Two exact ways to rank the positives of a query.

Counting: the rank of a positive is 1 + the number of gallery rows that come before it, so no list of neighbours is
needed: one tile of distances at a time, compared with the distance of every positive. Within one set the tile (I, J)
also serves the queries in J, so half of the product is enough. The cost grows with the number of positives; for more
than `COUNTING_LIMIT` of them a top-k list as long as the class is cheaper.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree, Shaped

from idml_jax.metrics import tiles

COUNTING_LIMIT = 48
_BLOCK_BYTES = 2**26  # of distances at a time on the top-k way


class Task(NamedTuple):
    """Queries and gallery on the host. Classes are numbered by falling size in the gallery.

    For a distance other than the Euclidean one `queries` and `gallery` are trees of arrays, without norms.
    """

    queries: Float[np.ndarray, "n d"]
    query_norms: Float[np.ndarray, "n"] | None  # squared
    labels: Int[np.ndarray, "n"]
    gallery: Float[np.ndarray, "m d"]
    norms: Float[np.ndarray, "m"] | None
    gallery_labels: Int[np.ndarray, "m"]
    sizes: Int[np.ndarray, "classes"]
    same_set: bool

    @property
    def positives(self) -> Int[np.ndarray, "n"]:
        return self.sizes[self.labels] - self.same_set


class Found(NamedTuple):
    """For each query: rank of the first hit, R-precision, average precision, squared distance to the nearest row."""

    first_hit: Int[np.ndarray, "n"]
    r_precision: Float[np.ndarray, "n"]
    average_precision: Float[np.ndarray, "n"]
    nearest: Float[np.ndarray, "n"]


def make_task(
    queries: Float[np.ndarray, "n d"],
    query_norms: Float[np.ndarray, "n"] | None,
    labels: Shaped[np.ndarray, "n"],
    gallery: Float[np.ndarray, "m d"],
    norms: Float[np.ndarray, "m"] | None,
    gallery_labels: Shaped[np.ndarray, "m"],
    same_set: bool,
) -> Task:
    """A task from labels of any kind; a class that only the queries have gets size 0."""
    rows = len(gallery_labels)
    codes = np.unique(np.concatenate([gallery_labels, labels]), return_inverse=True)[1]
    sizes = np.bincount(codes[:rows], minlength=codes.max() + 1)
    order = np.argsort(-sizes, kind="stable")
    codes = np.argsort(order)[codes]
    return Task(queries, query_norms, codes[rows:], gallery, norms, codes[:rows], sizes[order], same_set)


def by_counting(task: Task, chosen: Int[np.ndarray, "q"], devices: list[jax.Device]) -> Found:
    """Results for the chosen queries, each with at most `COUNTING_LIMIT` positives; undefined without positives."""
    tile = _tile(len(task.gallery))
    starts = _class_starts(task.sizes, tile)
    order = np.argsort(task.gallery_labels, kind="stable")
    within = np.arange(len(order)) - (np.cumsum(task.sizes) - task.sizes)[task.gallery_labels[order]]
    gallery_slots = np.empty(len(order), np.int64)
    gallery_slots[order] = starts[task.gallery_labels[order]] + within
    assert task.norms is not None  # of the Euclidean distance they are there
    columns = _blocks(task.gallery, task.norms, np.arange(len(order)), gallery_slots, tile)
    if task.same_set and len(chosen) == len(task.queries):
        slots, queries = gallery_slots, columns
    else:
        # Rows of one class side by side: the rows of a block then have about as many positives each.
        slots = np.empty(len(chosen), np.int64)
        slots[np.argsort(task.labels[chosen], kind="stable")] = np.arange(len(chosen))
        ids = chosen if task.same_set else np.full(len(chosen), -2)
        assert task.query_norms is not None
        queries = _blocks(task.queries[chosen], task.query_norms[chosen], ids, slots, _tile(len(chosen)))

    blocks, height = queries.ids.shape
    positives = task.positives[chosen]
    most = _power_of_two(positives.max(), least=1)
    wanted = starts[task.labels[chosen]] + np.arange(most)[:, None]
    if task.same_set:
        wanted += wanted >= gallery_slots[chosen]  # step over the query itself
    wanted[np.arange(most)[:, None] >= positives] = -1
    target_slots = np.full((most, blocks * height), -1, np.int32)
    target_slots[:, slots] = wanted
    target_slots = target_slots.reshape(most, blocks, height).swapaxes(0, 1)
    limits = np.zeros(blocks, np.int32)
    np.maximum.at(limits, slots // height, positives.astype(np.int32))
    targets = tiles.Targets(target_slots, columns.ids.reshape(-1)[target_slots], limits)  # type: ignore[arg-type]
    some = positives > 0
    own = np.stack([slots[some] // height, starts[task.labels[chosen[some]]] // tile], axis=1)
    before, nearest = tiles.count_before(queries, columns, targets, np.unique(own, axis=0), devices)

    ranks = before.swapaxes(0, 1).reshape(most, -1)[:, slots] + 1
    ranks = np.sort(np.where(wanted < 0, len(task.gallery) + 1, ranks), axis=0)
    inside = ranks <= positives
    share = np.maximum(positives, 1)
    average = np.sum(inside * (np.arange(1, most + 1)[:, None] / ranks), axis=0) / share
    return Found(ranks[0], np.sum(inside, axis=0) / share, average, nearest.reshape(-1)[slots])


def by_top_k(
    task: Task,
    chosen: Int[np.ndarray, "q"],
    devices: list[jax.Device],
    distance: tiles.Distance = tiles.euclidean_squared,
) -> Found:
    """Results for the chosen queries with any number of positives, under any distance of two trees of arrays."""
    order = np.argsort(-task.positives[chosen], kind="stable")
    chosen = chosen[order]
    positives = task.positives[chosen]
    queries, size = task.queries, len(task.gallery_labels)
    gallery = task.gallery
    if distance is tiles.euclidean_squared:
        queries, gallery = (queries, task.query_norms), (gallery, task.norms)
    mesh, gallery, columns = _shared_gallery(gallery, devices)
    labels = np.pad(task.gallery_labels, (0, columns - size), constant_values=-1).astype(np.int32)
    height = _height(len(chosen), columns, len(devices))
    ids = chosen if task.same_set else np.full(len(chosen), -2)

    def start(rows: slice) -> tuple[Int[Array, "h k"] | Float[Array, "h m"], Int[Array, "h"], Float[Array, "h"]]:
        return tiles.rank_block(
            jax.tree.map(lambda x: _padded(x[chosen[rows]], height), queries),
            _padded(ids[rows].astype(np.int32), height, -2),
            _padded(task.labels[chosen[rows]].astype(np.int32), height, -2),
            gallery,
            labels,
            size,
            distance=distance,
            k=_device_k(max(1, positives[rows.start]), columns),
            mesh=mesh,
        )

    parts = []
    for rows, (listed, before, nearest) in _two_ahead(start, len(chosen), height):
        r = positives[rows, None]
        count, most = len(r), max(1, r.max())
        listed = listed[:count, :most] if _device_k(most, columns) else tiles.smallest(listed[:count], most)
        hits = labels[listed] == task.labels[chosen[rows], None]
        row, place = np.nonzero(hits & (np.arange(most) < r))
        # Added one by one, so that the sum does not depend on the length of the lists in this block.
        precision = np.cumsum(hits, axis=1)[row, place] / (place + 1)
        share = np.maximum(r[:, 0], 1)
        average = np.bincount(row, precision, minlength=count) / share
        parts.append((before[:count] + 1, np.bincount(row, minlength=count) / share, average, nearest[:count]))
    back = np.argsort(order)
    return Found(*(np.concatenate(column)[back] for column in zip(*parts, strict=True)))


def nearest_rows(
    queries: Float[np.ndarray, "n d"],
    query_norms: Float[np.ndarray, "n"],
    gallery: Float[np.ndarray, "m d"],
    norms: Float[np.ndarray, "m"],
    k: int,
    own: Int[np.ndarray, "n"],
    devices: list[jax.Device],
) -> Int[np.ndarray, "n k"]:
    """Gallery indices of the k nearest rows of each query, nearest first, equal distances by index.

    `own` is the gallery row that each query leaves out, -2 for none.
    """
    size = len(gallery)
    mesh, gallery, columns = _shared_gallery((gallery, norms), devices)
    height = _height(len(queries), columns, len(devices))
    ids = own.astype(np.int32)
    device_k = _device_k(k, columns)

    def start(rows: slice) -> Int[Array, "h k"] | Float[Array, "h m"]:
        block = _padded(queries[rows], height), _padded(query_norms[rows], height)
        block_ids = _padded(ids[rows], height, -2)
        return tiles.list_block(
            block, block_ids, gallery, size, distance=tiles.euclidean_squared, k=device_k, mesh=mesh
        )

    index = np.empty((len(queries), k), np.int32)
    for rows, listed in _two_ahead(start, len(queries), height):
        listed = listed[: len(ids[rows])]
        index[rows] = listed[:, :k] if device_k else tiles.smallest(listed, k)
    return index


def all_distances(
    queries: Float[np.ndarray, "n d"],
    query_norms: Float[np.ndarray, "n"],
    gallery: Float[np.ndarray, "m d"],
    norms: Float[np.ndarray, "m"],
    devices: list[jax.Device],
) -> Iterator[tuple[int, Float[np.ndarray, "h m"]]]:
    """Squared distances of all pairs, block by block: the index of the block's first query, and its rows."""
    size = len(gallery)
    mesh, gallery, columns = _shared_gallery((gallery, norms), devices)
    height = _height(len(queries), columns, len(devices))
    none = np.full(height, -2, np.int32)

    def start(rows: slice) -> Float[Array, "h m"]:
        block = _padded(queries[rows], height), _padded(query_norms[rows], height)
        return tiles.list_block(block, none, gallery, size, distance=tiles.euclidean_squared, k=None, mesh=mesh)

    for rows, distances in _two_ahead(start, len(queries), height):
        yield rows.start, distances[: len(queries) - rows.start, :size]


def _two_ahead(
    start: Callable[[slice], PyTree[Array]], total: int, height: int
) -> Iterator[tuple[slice, PyTree[np.ndarray]]]:
    """Yields start(rows) on the host, for blocks of `height` rows; the next block is computed meanwhile."""
    pending: deque[tuple[slice, PyTree[Array]]] = deque()
    for first in range(0, total, height):
        rows = slice(first, first + height)
        pending.append((rows, start(rows)))
        if len(pending) == 2:
            rows, result = pending.popleft()
            yield rows, jax.device_get(result)
    for rows, result in pending:
        yield rows, jax.device_get(result)


def _blocks(
    rows: Float[np.ndarray, "n d"],
    norms: Float[np.ndarray, "n"],
    ids: Int[np.ndarray, "n"],
    slots: Int[np.ndarray, "n"],
    tile: int,
) -> tiles.Blocks:
    """Rows placed at their slots in blocks of `tile` rows; slots that no row has are padding."""
    blocks = slots.max() // tile + 1
    placed = np.zeros((blocks * tile, rows.shape[1]), np.float32)
    placed_norms = np.full(blocks * tile, np.inf, np.float32)
    placed_ids = np.full(blocks * tile, -1, np.int32)
    placed[slots], placed_norms[slots], placed_ids[slots] = rows, norms, ids
    return tiles.Blocks(
        placed.reshape(blocks, tile, -1),  # type: ignore[arg-type]  # of numpy
        placed_norms.reshape(blocks, tile),  # type: ignore[arg-type]
        placed_ids.reshape(blocks, tile),  # type: ignore[arg-type]
    )


def _class_starts(sizes: Int[np.ndarray, "classes"], tile: int) -> Int[np.ndarray, "classes"]:
    """First slot of each class; one that fits into a block and can be counted does not lie across two."""
    starts, slot = np.empty(len(sizes), np.int64), 0
    for label, size in enumerate(sizes.tolist()):
        if slot % tile + size > tile and size <= COUNTING_LIMIT + 1:
            slot += tile - slot % tile
        starts[label] = slot
        slot += size
    return starts


def _shared_gallery(
    gallery: PyTree[Shaped[np.ndarray, "m ..."]], devices: list[jax.Device]
) -> tuple[Mesh, tiles.Rows, int]:
    """Puts the gallery, padded to a round number of rows, on every device: mesh, arrays, and that number."""
    size = len(jax.tree.leaves(gallery)[0])
    columns = -(-size // 1024) * 1024 if size > 1024 else _power_of_two(size, least=64)
    mesh = tiles.mesh_of(devices)
    filled = jax.tree.map(lambda x: _padded(x, columns), gallery)
    return mesh, jax.device_put(filled, NamedSharding(mesh, PartitionSpec())), columns


def _tile(rows: int) -> int:
    # On a CPU a tile should stay in the cache; an accelerator wants larger products.
    return min(512 if jax.default_backend() == "cpu" else 4096, _power_of_two(rows, least=64))


def _height(rows: int, columns: int, devices: int) -> int:
    """Rows per block: as many as memory allows for the distances, and at most all rows."""
    fitting = max(8, 1 << (_BLOCK_BYTES // (4 * columns)).bit_length() - 1)
    return devices * min(256, fitting, _power_of_two(-(-rows // devices), least=8))


def _power_of_two(size: int | np.integer, least: int) -> int:
    """The smallest power of two that is at least `size`, or `least` if that is larger."""
    return max(least, 1 << (int(size) - 1).bit_length())


def _device_k(k: int | np.integer, columns: int) -> int | None:
    """Length of the lists that the device makes, rounded up to compile few programs; None: the host makes them."""
    if jax.default_backend() == "cpu" and k > 32:
        return None  # numpy's vectorised selection is several times as fast as XLA's there
    step = 1 << max(0, int(k).bit_length() - 3)
    return min(columns, -(-int(k) // step) * step)


def _padded(x: Shaped[np.ndarray, "n ..."], height: int, fill: int = 0) -> Shaped[np.ndarray, "height ..."]:
    """The array filled up to `height` rows."""
    return np.pad(x, [(0, height - len(x))] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
