"""Reads the record of a run, ``metrics.jsonl`` and ``result.json``, as untrusted input."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from idml_jax.errors import UserError, warn
from idml_jax.runtime.files import first_line

# Parts of result.json that are shown; each is a dictionary of metrics.
METRICS = ("best", "final", "untrained")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _text(path: Path) -> str | None:
    """The text of a file; ``None`` if it does not exist."""
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({first_line(error)})") from error


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers by name; undefined metrics, stored as ``null``, are left out."""
    return {name: value for name, value in values.items() if _is_number(value) and math.isfinite(value)}


def _row(line: str) -> dict[str, float] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return _numbers(row) if isinstance(row, dict) and _is_number(row.get("step")) else None


def read_record(
    workdir: Path, warning: Callable[[str], None] = warn
) -> tuple[list[dict[str, float]], dict[str, dict[str, float]]]:
    """Reads the record of a run.

    Args:
      workdir: folder of the run.
      warning: receives a line about lines that are left out.

    Returns:
      The rows of ``metrics.jsonl``, each with a ``step``, and the parts ``METRICS`` of ``result.json``; empty if the
      files are missing. Unreadable lines are left out, since a killed process may leave a truncated line.

    Raises:
      UserError: if ``result.json`` is truncated or has another structure.
    """
    path = workdir / "metrics.jsonl"
    lines = [line for line in (_text(path) or "").splitlines() if line.strip()]
    rows = [row for line in lines if (row := _row(line)) is not None]
    if len(rows) < len(lines):
        warning(f"{path}: {len(lines) - len(rows):,} of {len(lines):,} lines are not rows of numbers and are left out")
    path = workdir / "result.json"
    content = _text(path)
    if content is None:
        return rows, {}
    cure = "delete it and rerun the training command to write it again"
    try:
        result = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({first_line(error)}); {cure}") from error
    if not isinstance(result, dict):
        raise UserError(f"{path}: holds {type(result).__name__}, not the metrics of a run; {cure}")
    found = {name: result[name] for name in METRICS if result.get(name) is not None}
    for name, values in found.items():
        if not isinstance(values, dict):
            raise UserError(f"{path}: {name} is {type(values).__name__}, not metrics by name; {cure}")
    return rows, {name: _numbers(values) for name, values in found.items()}
