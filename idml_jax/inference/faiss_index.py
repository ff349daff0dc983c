"""Embeddings as a search index of faiss, for those who search with it elsewhere; faiss-cpu is optional."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from idml_jax.errors import UserError

_ROWS = 65536  # added at a time


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UserError("a faiss index needs faiss, which is not installed; pip install faiss-cpu") from error
    return faiss


def write(semantic: Float[np.ndarray, "n d"], path: str | Path, kind: str = "Flat") -> Path:
    """Writes an index of the squared Euclidean distance, whole or not at all.

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
    path = Path(path).expanduser().absolute()
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
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        faiss.write_index(index, str(temporary))
        temporary.replace(path)
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be written") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path
