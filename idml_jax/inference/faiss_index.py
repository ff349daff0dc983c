"""Writes embeddings as a faiss search index; faiss-cpu is optional."""

import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import Float

from idml_jax.errors import UserError
from idml_jax.runtime.files import atomic, check_result, user_path

_ROWS = 65536  # rows added at a time
_MOST_LINKS = 512  # links of a row in a graph


def library() -> ModuleType:
    """faiss; ``UserError`` where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise UserError("a faiss index needs faiss, which is not installed; pip install faiss-cpu") from error
    return faiss


def _check_kind(kind: str) -> None:
    """Refuses numbers that make faiss abort the whole process instead of raising an error."""
    links = [int(number) for number in re.findall(r"HNSW([0-9]{1,9})", kind)]
    if links and not 2 <= min(links) <= max(links) <= _MOST_LINKS:
        raise UserError(f"--faiss_kind={kind}: HNSW takes 2 to {_MOST_LINKS} links for each row, e.g. HNSW32")
    if re.search(r"(?<![0-9])0+(?![0-9])", kind):
        raise UserError(
            f"--faiss_kind={kind}: faiss cannot make it; its numbers start at 1, e.g. HNSW32 or IVF1024,Flat"
        )


def write(
    semantic: Float[np.ndarray, "n d"], path: str | Path, kind: str = "Flat", reads: Iterable[str | Path] = ()
) -> Path:
    """Writes an index for the squared Euclidean distance, completely or not at all.

    Args:
      semantic: ``[n, d]`` semantic embeddings; row i of the index is row i here.
      path: file to write, readable by ``faiss.read_index``.
      kind: argument of faiss's ``index_factory``: ``Flat`` is exact; ``HNSW32`` and ``IVF1024,Flat`` are faster and
        find most neighbours. Indices that need training are trained on these rows.
      reads: files that the rows are from, which are not overwritten.

    Returns:
      The file.

    Raises:
      UserError: if faiss is missing, the kind is unknown, rows are not finite, or the file cannot be written.
    """
    path = user_path(path)
    check_result(path, reads)
    faiss = library()
    _check_kind(kind)
    rows = np.ascontiguousarray(semantic, np.float32)
    if not np.isfinite(rows).all():
        raise UserError("the embeddings hold NaN or infinite values; faiss cannot compare them")
    try:
        index = faiss.index_factory(rows.shape[1], kind, faiss.METRIC_L2)
        if not index.is_trained:
            index.train(rows)
        for start in range(0, len(rows), _ROWS):
            index.add(rows[start : start + _ROWS])
    except RuntimeError as error:
        told = re.sub(r"^Error in .* at \S+:\d+: (Error: .* failed: )?", "", str(error).splitlines()[-1])
        raise UserError(f"--faiss_kind={kind}: faiss cannot make it of {len(rows):,} rows ({told})") from error
    with atomic(path) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
    return path
