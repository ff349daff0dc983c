"""Two exact ways to rank what a query should find.

Counting: the rank of a positive is 1 + the number of gallery rows that come before it, so no list of neighbours is
needed: one tile of distances at a time, compared with the distance of every positive. Within one set the tile (I, J)
also serves the queries in J, so half of the product is enough. The cost grows with the number of positives; for more
than `COUNTING_LIMIT` of them a top-k list as long as the class is cheaper.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from idml_jax.metrics import tiles

COUNTING_LIMIT = 48
_BLOCK_BYTES = 2**26  # of distances at a time on the top-k way


class Task(NamedTuple):
    """Queries and gallery on the host. Classes are numbered by falling size in the gallery."""

    queries: Float[np.ndarray, "n d"]
    query_norms: Float[np.ndarray, "n"]  # squared
    labels: Int[np.ndarray, "n"]
    gallery: Float[np.ndarray, "m d"]
    norms: Float[np.ndarray, "m"]
    gallery_labels: Int[np.ndarray, "m"]
    sizes: Int[np.ndarray, "classes"]
    same_set: bool

    @property
    def positives(self) -> Int[np.ndarray, "n"]:
        return self.sizes[self.labels] - self.same_set


class Found(NamedTuple):
    """Of each query: rank of the first hit, R-precision, average precision, squared distance to the nearest row."""

    first_hit: Int[np.ndarray, "n"]
    r_precision: Float[np.ndarray, "n"]
    average_precision: Float[np.ndarray, "n"]
    nearest: Float[np.ndarray, "n"]


def by_counting(task: Task, chosen: Int[np.ndarray, "q"], devices: list[jax.Device]) -> Found:
    """Results for the chosen queries, none with more than `COUNTING_LIMIT` positives; undefined where it has none."""
    tile = _tile(len(task.gallery))
    starts = _class_starts(task.sizes, tile)
    order = np.argsort(task.gallery_labels, kind="stable")
    within = np.arange(len(order)) - (np.cumsum(task.sizes) - task.sizes)[task.gallery_labels[order]]
    gallery_slots = np.empty(len(order), np.int64)
    gallery_slots[order] = starts[task.gallery_labels[order]] + within
    columns = _blocks(task.gallery, task.norms, np.arange(len(order)), gallery_slots, tile)
    if task.same_set and len(chosen) == len(task.queries):
        slots, queries = gallery_slots, columns
    else:
        # Rows of one class side by side: the rows of a block then have about as many positives each.
        slots = np.empty(len(chosen), np.int64)
        slots[np.argsort(task.labels[chosen], kind="stable")] = np.arange(len(chosen))
        ids = chosen if task.same_set else np.full(len(chosen), -2)
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
    targets = tiles.Targets(target_slots, columns.ids.reshape(-1)[target_slots], limits)
    some = positives > 0
    own = np.stack([slots[some] // height, starts[task.labels[chosen[some]]] // tile], axis=1)
    before, nearest = tiles.count_before(queries, columns, targets, np.unique(own, axis=0), devices)

    ranks = before.swapaxes(0, 1).reshape(most, -1)[:, slots] + 1
    ranks = np.sort(np.where(wanted < 0, len(task.gallery) + 1, ranks), axis=0)
    inside = ranks <= positives
    share = np.maximum(positives, 1)
    average = np.sum(inside * (np.arange(1, most + 1)[:, None] / ranks), axis=0) / share
    return Found(ranks[0], np.sum(inside, axis=0) / share, average, nearest.reshape(-1)[slots])


def by_top_k(task: Task, chosen: Int[np.ndarray, "q"], devices: list[jax.Device]) -> Found:
    """The same results for queries with any number of positives, at least one."""
    chosen = chosen[np.argsort(-task.positives[chosen], kind="stable")]
    gallery, norms = _padded_gallery(task.gallery, task.norms)
    labels = np.pad(task.gallery_labels, (0, len(norms) - len(task.gallery)), constant_values=-1)
    parts = []

    def kernel(rows, place, mesh):
        k = min(_coarse(task.positives[rows].max()), len(norms))
        query_labels = place(task.labels[rows], -2)
        ...
