"""Calibrations that the commands keep for the next search: fitting one takes longer than searching for an image.

They lie in ``$XDG_CACHE_HOME/idml_jax/calibrations`` (default ``~/.cache``), named by a digest of all that they depend
on. ``JAX_ENABLE_COMPILATION_CACHE=0`` turns this off, as it does for compiled programs.
"""

import contextlib
import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import idml_jax
from idml_jax.errors import UserError
from idml_jax.ism import Metric
from idml_jax.metrics.calibration import Calibration, HeldOut, Strangers
from idml_jax.metrics.confidence import Confidence
from idml_jax.metrics.vote import Vote
from idml_jax.runtime.compiled import keeps_results, trim
from idml_jax.runtime.files import cache_home, write_bytes

MOST_BYTES = 2**28  # what is kept; those longest unused go first
# What a file raises that is missing, damaged, or not one of these.
_DAMAGED = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile)
_PACKAGE = Path(idml_jax.__file__).parent


def kept(
    held_out: HeldOut, metric: Metric, names: Collection[str], options: tuple[bool, ...], fit: Callable[[], Calibration]
) -> Calibration:
    """A calibration that was kept, or a new one, which is kept if ``compiled.keeps_results``.

    Args:
      held_out: queries and gallery of the fit.
      metric: metric of the scores.
      names: names of the scores that may be used.
      options: all else that the fit depends on.
      fit: makes it.
    """
    if not keeps_results():
        return fit()
    try:
        folder = cache_home() / "idml_jax" / "calibrations"
    except RuntimeError:  # no home
        return fit()
    file = folder / f"{_digest(held_out, metric, names, options)}.npz"
    with contextlib.suppress(*_DAMAGED):
        found = _read(file.read_bytes())
        os.utime(file)
        return found
    made = fit()
    with contextlib.suppress(OSError, UserError):  # nowhere to keep it
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_bytes(file, _written(made))
        trim(folder, MOST_BYTES)
    return made


def _digest(held_out: HeldOut, metric: Metric, names: Collection[str], options: tuple[bool, ...]) -> str:
    """Digest of what a calibration depends on: embeddings, labels, settings, and the programs that compute it."""
    found = hashlib.sha256()
    programs = [idml_jax.__version__, jax.__version__, np.__version__, jax.default_backend()]
    programs += sorted(f"{path.name} {path.stat().st_mtime_ns}" for path in _PACKAGE.rglob("*.py"))
    found.update(repr((programs, metric, sorted(names), options)).encode())
    for name, value in _arrays_of(held_out, ""):
        array = np.ascontiguousarray(value.astype(str) if value.dtype.hasobject else value)
        found.update(f"{name} {array.shape} {array.dtype}\n".encode())
        found.update(array.data if array.dtype.kind in "biuf" else array.tobytes())
    return found.hexdigest()[:32]


def _arrays_of(value: Any, name: str) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays and numbers in nested named tuples, each with its path; ``None`` has none."""
    if hasattr(value, "_asdict"):
        for field, part in value._asdict().items():
            yield from _arrays_of(part, f"{name}.{field}" if name else field)
    elif value is not None:
        yield name, np.asarray(value)


def _written(calibration: Calibration) -> bytes:
    file = io.BytesIO()
    np.savez(file, **dict(_arrays_of(calibration, "")))  # type: ignore[arg-type]
    return file.getvalue()


def _read(content: bytes) -> Calibration:
    """The calibration of ``_written``.

    Raises:
      ValueError, KeyError, TypeError, EOFError, BadZipFile: for what is none.
    """
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    setting, strangers = None, None
    if "setting.k" in found:
        k, temperature, balanced = (found[f"setting.{field}"].item() for field in Vote._fields)
        setting = Vote(int(k), float(temperature), bool(balanced))
    if "open.mated" in found:
        parts = (found[f"open.{field}"] for field in Strangers._fields[1:])
        strangers = Strangers(_confidence(found, "open.model"), *parts)
    rows = [found["doubt"], found["correct"], found["labels"], *(() if strangers is None else strangers[1:])]
    if len({part.shape for part in rows}) > 1 or rows[0].ndim != 1:
        raise ValueError("rows of different lengths")
    return Calibration(_confidence(found, "model"), rows[0], rows[1], rows[2], setting, strangers)


def _confidence(arrays: dict[str, np.ndarray], name: str) -> Confidence:
    names = tuple(str(one) for one in arrays[f"{name}.names"])
    low, high, mean, scale, weights = (
        arrays[f"{name}.{field}"] for field in ("low", "high", "mean", "scale", "weights")
    )
    if not names or not len(names) == len(low) == len(high) == len(mean) == len(scale) <= len(weights):
        raise ValueError("scores of different numbers")
    return Confidence(names, low, high, mean, scale, weights, float(arrays[f"{name}.bias"]))
