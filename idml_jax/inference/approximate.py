"""Approximate search of a gallery by faiss: an index beside the parts, whose recall against exact search is measured.

faiss proposes candidates by the semantic distance; the exact distances decide among them. It cannot propose by the
introspective distance: ``alpha * exp(-|u1 + u2| / alpha / tau)`` is neither an inner product nor a Euclidean distance
of any vectors of one image each. The search of this package ranks by the semantic distance anyway, and computes the
introspective one for the images that it shows.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from idml_jax.inference.faiss_index import library
from idml_jax.inference.gallery import Gallery
from idml_jax.inference.store import digest
from idml_jax.metrics.blocks import neighbours_in_blocks, rescored
from idml_jax.metrics.retrieval import Neighbours
from idml_jax.runtime.files import atomic, write_json

GRAPH_ROWS = 50_000  # up to so many rows a graph (HNSW), beyond it lists (IVF) of vectors in 8 bits per number
TRAIN_ROWS = 40  # rows per list that its centre is learned from
RECALL, SAMPLE, NEAR = 0.95, 100, 10  # wanted recall@10, measured on so many images of the gallery
EFFORTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
FILE, ABOUT = "_ann.faiss", "_ann.json"


class Approximate(NamedTuple):
    """A faiss index of a gallery.

    Attributes:
      index: the index of faiss; its row i is row i of the gallery.
      kind: its kind, as ``index_factory`` names it.
      effort: lists that are searched (IVF), or length of the candidate list (HNSW).
      recall: share of the 10 nearest that it finds, measured on images of the gallery.
      queries: number of these images.
    """

    index: Any
    kind: str
    effort: int
    recall: float
    queries: int

    def __str__(self) -> str:
        what = "lists searched" if self.kind.startswith("IVF") else "candidates kept"
        return (
            f"approximate search by faiss ({self.kind}, {self.effort} {what}): recall@{NEAR} {self.recall:.3f} against "
            f"exact search, on {self.queries:,} images of the gallery"
        )


def kind_for(rows: int) -> str:
    """The kind of index for so many rows."""
    return "HNSW32" if rows <= GRAPH_ROWS else f"IVF{round(2 * np.sqrt(rows))},SQ8"


def open_or_build(gallery: Gallery, say: Callable[[str], None] = print) -> Approximate:
    """The index beside the parts; built if it is missing or is not of these parts.

    Args:
      gallery: the gallery.
      say: receives a line before an index is built.

    Raises:
      UserError: if faiss is missing, or the index cannot be written.
    """
    faiss, of = (
        library(),
        digest([f"{part.path.name} {part.rows} {part.path.stat().st_mtime_ns}" for part in gallery.parts]),
    )
    file, told = gallery.folder / FILE, gallery.folder / ABOUT
    try:
        about = json.loads(told.read_text())
        if about.pop("parts") == of:
            return Approximate(faiss.read_index(str(file), faiss.IO_FLAG_MMAP), **about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        pass  # missing, or another's: it is built
    kind = kind_for(len(gallery))
    say(f"building {file} ({kind}) of {len(gallery):,} rows")
    index = _built(faiss, gallery, kind)
    found = _tuned(gallery, index, kind)
    told.unlink(missing_ok=True)  # an index without its description is built again
    with atomic(file) as opened:
        faiss.write_index(index, faiss.PyCallbackIOWriter(opened.write))
    write_json(told, {**{k: v for k, v in found._asdict().items() if k != "index"}, "parts": of})
    return found


def _built(faiss: Any, gallery: Gallery, kind: str) -> Any:
    index = faiss.index_factory(gallery.width, kind, faiss.METRIC_L2)
    if not index.is_trained:
        wanted = min(len(gallery), TRAIN_ROWS * index.nlist)
        chosen = np.sort(np.random.default_rng(0).choice(len(gallery), wanted, replace=False))
        index.train(gallery.take(chosen, ("semantic",))["semantic"])
    for _, block in gallery.blocks():
        index.add(block)
    return index


def _tuned(gallery: Gallery, index: Any, kind: str) -> Approximate:
    """The index with the least effort that reaches the wanted recall, or else the largest."""
    k = min(NEAR, len(gallery) - 1)
    chosen = np.sort(np.random.default_rng(1).choice(len(gallery), min(SAMPLE, len(gallery)), replace=False))
    if k < 1:
        return Approximate(index, kind, EFFORTS[-1], 1.0, len(chosen))
    queries = gallery.take(chosen, ("semantic",))["semantic"]
    truth = neighbours_in_blocks(queries, gallery.blocks(), k, own=chosen)
    found = Approximate(index, kind, 1, 0.0, len(chosen))
    for effort in EFFORTS:
        found = found._replace(effort=effort)
        near = search(found, gallery, queries, k, own=chosen)
        hits = (near.index[:, :, None] == truth.index[:, None, :]).any(axis=2)
        found = found._replace(recall=float(hits.mean()))
        if found.recall >= RECALL:
            break
    return found


def search(
    found: Approximate,
    gallery: Gallery,
    queries: Float[np.ndarray, "n d"],
    k: int,
    *,
    own: Int[np.ndarray, "n"] | None = None,
    left_out: Bool[np.ndarray, "m"] | None = None,
) -> Neighbours:
    """The k nearest of faiss's candidates by the exact distance.

    Where faiss finds fewer than k candidates for some query, all queries are searched exactly.

    Args:
      found: index of the gallery.
      gallery: the gallery.
      queries: ``[n, d]`` semantic embeddings.
      k: number of neighbours.
      own: ``[n]`` row that each query leaves out; -1: none.
      left_out: ``[m]`` rows that all queries leave out.
    """
    faiss = library()
    wanted = min(len(gallery), max(4 * k, 64))
    gone = None if left_out is None else faiss.IDSelectorBatch(np.flatnonzero(left_out))
    selector = None if gone is None else faiss.IDSelectorNot(gone)
    if found.kind.startswith("IVF"):
        how = faiss.SearchParametersIVF(nprobe=found.effort, sel=selector)
    else:
        how = faiss.SearchParametersHNSW(efSearch=max(found.effort, wanted), sel=selector)
    queries = np.ascontiguousarray(queries, np.float32)
    # faiss.contrib.torch_utils, which pytorch-metric-learning loads, replaces `search` by one without `params`.
    ask = getattr(found.index, "search_numpy", found.index.search)
    candidates = ask(queries, wanted, params=how)[1]
    if own is not None:
        candidates = np.where(candidates == own[:, None], -1, candidates)
    if (np.sum(candidates >= 0, axis=1) < k).any():
        return neighbours_in_blocks(queries, gallery.blocks(left_out), k, own=own)
    rows = np.unique(candidates[candidates >= 0])
    return rescored(queries, candidates, rows, gallery.take(rows, ("semantic",))["semantic"], k)
