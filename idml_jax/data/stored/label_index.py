"""Labels of a stored data set: scanned once, then cached in a file next to the set, or in the user's cache if the set's
folder is not writable."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from idml_jax.errors import UserError
from idml_jax.runtime import cpus
from idml_jax.runtime.files import atomic, cache_home

Columns = dict[str, np.ndarray]
FOLDER = "idml_jax_index"
_CHUNK = 256


def fingerprint(folder: Path, split: str) -> str:
    """A digest that changes with a stored set: of its metadata, and the name and size of every file of the split."""
    digest = hashlib.sha256()
    for name in ("dataset_info.json", "features.json"):
        path = folder / name
        digest.update(path.read_bytes() if path.exists() else b"")
    for path in sorted(folder.glob(f"*-{split}.array_record*")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def user_cache() -> Path:
    """Folder for the indices of sets that are not writable: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return cache_home() / "idml_jax" / "index"


def _paths(folder: Path, split: str) -> tuple[Path, Path]:
    name = hashlib.sha256(f"{folder.resolve()}".encode()).hexdigest()[:24]
    return folder / FOLDER / f"{split}.npz", user_cache() / f"{name}-{split}.npz"


def read(folder: Path, split: str, keys: Sequence[str]) -> Columns | None:
    """Reads a stored index; ``None`` if it does not match the set or lacks a requested column."""
    wanted = fingerprint(folder, split)
    for path in _paths(folder, split):
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["fingerprint"]) == wanted and all(f"column/{key}" in file.files for key in keys):
                    return {key: file[f"column/{key}"] for key in keys}
        except Exception:  # missing or damaged alike: the set is scanned again
            continue
    return None


def write(folder: Path, split: str, columns: Mapping[str, np.ndarray]) -> Path | None:
    """Stores an index next to the set, or in the user's cache; ``None`` if neither is writable."""
    content = {f"column/{key}": value for key, value in columns.items()}
    content["fingerprint"] = np.asarray(fingerprint(folder, split))
    for path in _paths(folder, split):
        try:
            with atomic(path) as file:
                np.savez(file, allow_pickle=False, **content)
            return path
        except UserError:
            continue
    return None


def load(
    folder: Path,
    split: str,
    records: Callable[[], Sequence[dict]],
    keys: Sequence[str],
    say: Callable[[str], None] = lambda line: None,
) -> Columns:
    """Reads columns of a split from its index or, the first time, from its records.

    Args:
      folder: folder of the stored set, with ``dataset_info.json``.
      split: name of the split.
      records: returns random access to the records, dictionaries with the requested keys.
      keys: scalar features to read from every record.
      say: receives a line before a scan.

    Returns:
      ``[n]`` array by key.
    """
    keys = list(keys)
    known = read(folder, split, keys)
    if known is not None:
        return known
    opened = records()
    total = len(opened)
    say(f"reading the labels of {total:,} records of {folder.parent.name}/{split} once")

    def chunk(start: int) -> list[tuple]:
        return [
            tuple(record[key] for key in keys)
            for record in map(opened.__getitem__, range(start, min(start + _CHUNK, total)))
        ]

    with ThreadPoolExecutor(min(8, cpus.available())) as pool:
        rows = [row for part in pool.map(chunk, range(0, total, _CHUNK)) for row in part]
    columns = {key: np.asarray([row[i] for row in rows]) for i, key in enumerate(keys)}
    # Text is read as bytes objects, which NumPy could only store pickled.
    columns = {key: value.astype("S") if value.dtype == object else value for key, value in columns.items()}
    write(folder, split, columns)
    return columns
