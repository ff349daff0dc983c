"""Embeddings as a search index of faiss; faiss-cpu is optional."""

import re
from pathlib import Path
from types import ModuleType

import numpy as np
from jaxtyping import Float

from idml_jax.errors import UserError
from idml_jax.runtime.files import atomic, check_target, user_path

_ROWS = 65536  # added at a time
_MOST_LINKS = 512  # of a row in a graph


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise UserError("a faiss index needs faiss, which is not installed; pip install faiss-cpu") from error
    return faiss


def _check_kind(kind: str) -> None:
    """Refuses numbers with which faiss ends the whole process instead of raising an error."""
    links = [int(number) for number in re.findall(r"HNSW([0-9]{1,9})", kind)]
    if links and not 2 <= min(links) <= max(links) <= _MOST_LINKS:
        raise UserError(f"--faiss_kind={kind}: HNSW takes 2 to {_MOST_LINKS} links for each row, e.g. HNSW32")
    if re.search(r"(?<![0-9])0+(?![0-9])", kind):
        raise UserError(
            f"--faiss_kind={kind}: faiss cannot make it; its numbers start at 1, e.g. HNSW32 or IVF1024,Flat"
        )


def write(semantic: Float[np.ndarray, "n d"], path: str | Path, kind: str = "Flat") -> Path:
    """Writes an index by the squared Euclidean distance, whole or not at all.

    Args:
      semantic: ``[n, d]`` semantic embeddings; row i of the index is row i here.
      path: of the file, which ``faiss.read_index`` reads.
      kind: what faiss's ``index_factory`` makes: ``Flat`` is exact, ``HNSW32`` or ``IVF1024,Flat`` are faster and find
        most neighbours. Those that have to be trained are trained on these rows.

    Returns:
      The file.

    Raises:
      UserError: without faiss, for an unknown kind, rows that are no numbers, or a place that cannot be written to.
    """
    faiss = _faiss()
    _check_kind(kind)
    path = user_path(path)
    check_target(path)  # fails before the work starts
    rows = np.ascontiguousarray(semantic, np.float32)
    if not np.isfinite(rows).all():
        raise UserError("the embeddings hold values that are no numbers; faiss cannot compare them")
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
