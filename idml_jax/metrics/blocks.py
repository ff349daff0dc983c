"""The nearest rows of a gallery that is read block by block, so that it need not fit into memory.

Every block is searched exactly (`nearest`), and the lists are merged by the squared distances in float64, equal ones by
row. So the result does not depend on the blocks, and is that of a search of the whole gallery, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jaxtyping import Float, Int

from idml_jax.metrics import nearest
from idml_jax.metrics.checks import Array, check_width, embedding_rows
from idml_jax.metrics.retrieval import Neighbours

# Rows of a gallery with their numbers, ascending within a block and from block to block.
Block = tuple[Int[np.ndarray, "b"], Float[np.ndarray, "b d"]]


def neighbours_in_blocks(
    embeddings: Float[Array, "n d"],
    blocks: Iterable[Block],
    k: int,
    *,
    own: Int[Array, "n"] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Neighbours:
    """The k nearest rows of each query among the rows of all blocks, as `retrieval.neighbours`.

    Args:
      embeddings: ``[n, d]`` queries.
      blocks: row numbers ``[b]`` and rows ``[b, d]`` of one block after another; blocks of equal size share one
        compiled program.
      k: number of neighbours.
      own: ``[n]`` number of the row that each query leaves out; -1: none.
      devices: devices that share the work; by default all of this process.

    Returns:
      Distances, and row numbers as the blocks give them.

    Raises:
      ValueError: naming the argument, for mismatched or non-finite input, or if there are fewer than k rows to find.
    """
    queries = embedding_rows(embeddings, "embeddings")[0]
    devices = list(jax.local_devices() if devices is None else devices)
    mine = np.full(len(queries), -1) if own is None else np.asarray(own)
    nobody = np.full(len(queries), -2)
    # A query's own row is dropped after the search: it takes one more place.
    depth = k + bool((mine >= 0).any())
    squares, found, rows = np.zeros((len(queries), 0)), np.zeros((len(queries), 0), np.int64), 0
    for numbers, block in blocks:
        block = embedding_rows(block, "blocks")[0]
        check_width(queries, block)
        rows += len(block)
        near, places = nearest.nearest_squares(queries, block, min(depth, len(block)), nobody, devices)
        index = np.asarray(numbers, np.int64)[places]
        near = np.where(index == mine[:, None], np.inf, near)
        squares, found = np.concatenate([squares, near], axis=1), np.concatenate([found, index], axis=1)
        order = np.lexsort((found, squares))[:, :k]
        squares, found = (np.take_along_axis(side, order, axis=1) for side in (squares, found))
    if squares.shape[1] < k or not np.isfinite(squares).all():
        raise ValueError(f"k: expected 1 to the rows there are to find, of {rows:,}, got {k}")
    return Neighbours(np.sqrt(squares).astype(np.float32), found)


def rescored(
    embeddings: Float[Array, "n d"],
    candidates: Int[np.ndarray, "n c"],
    numbers: Int[np.ndarray, "m"],
    rows: Float[np.ndarray, "m d"],
    k: int,
) -> Neighbours:
    """The k nearest of each query's candidates, by the exact distance.

    Args:
      embeddings: ``[n, d]`` queries.
      candidates: ``[n, c]`` row numbers, -1: none.
      numbers: ``[m]`` ascending numbers of the rows that are given; all candidates are among them.
      rows: ``[m, d]`` these rows.
      k: number of neighbours.

    Returns:
      Distances and row numbers, nearest first, equal distances by row number.

    Raises:
      ValueError: if a query has fewer than k candidates.
    """
    queries = embedding_rows(embeddings, "embeddings")[0]
    if (np.sum(candidates >= 0, axis=1) < k).any():
        raise ValueError(f"candidates: fewer than k = {k} for some query")
    places = np.searchsorted(numbers, np.maximum(candidates, numbers[0]))
    squares = np.empty(candidates.shape)
    step = max(1, 2**20 // max(1, candidates.shape[1] * queries.shape[1]))
    for start in range(0, len(queries), step):
        cut = slice(start, start + step)
        squares[cut] = nearest.squares_of(queries[cut, None, :], rows[places[cut]])
    squares = np.where(candidates >= 0, squares, np.inf)
    order = np.lexsort((candidates, squares))[:, :k]
    near, index = (np.take_along_axis(side, order, axis=1) for side in (squares, candidates))
    return Neighbours(np.sqrt(near).astype(np.float32), index.astype(np.int64))
