"""The relation of a run's classes beside same and different: from their names, or from a file."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int8
from ml_collections import ConfigDict

from idml_jax.errors import UserError, printable
from idml_jax.losses.class_relation import ClassRelation, levels_of_names
from idml_jax.runtime.files import user_path
from idml_jax.training.tasks.terms import is_number

_CELLS = {"1": 1, "0": 0, "": -1}


def relation_of(config: ConfigDict, class_names: Sequence[str]) -> ClassRelation | None:
    """The relation that ``config.loss.levels`` or ``config.loss.relation`` asks for; ``None`` by default.

    Raises:
      UserError: if the names have no levels, or the file does not relate all training classes.
    """
    loss = config.loss
    if config.task != "retrieval" and (loss.levels or loss.relation):
        field = "levels" if loss.levels else "relation"
        raise UserError(f"config.loss.{field} is for config.task = 'retrieval', not {config.task!r}")
    if not loss.levels and not loss.relation:
        if loss.level_weights:
            raise UserError(
                "config.loss.level_weights needs config.loss.levels, the text between levels in class names"
            )
        return None
    if loss.levels and loss.relation:
        raise UserError("config.loss.levels and config.loss.relation are two relations of the classes; give one")
    if config.loss.class_share < 1:
        raise UserError("config.loss.class_share draws classes; with config.loss.levels or relation all are compared")
    if loss.relation:
        if loss.level_weights:
            raise UserError("config.loss.level_weights is for config.loss.levels; config.loss.relation has one level")
        return ClassRelation(matrix=matrix_from(user_path(loss.relation), class_names))
    try:
        levels = levels_of_names(list(map(str, class_names)), loss.levels)
    except ValueError as error:
        raise UserError(
            f"config.loss.levels = {loss.levels!r}: {error}; name the classes by their levels, such as "
            f"'family{loss.levels}genus{loss.levels}species'"
        ) from error
    count = levels.shape[1]
    weights = tuple(loss.level_weights) or (1.0 / count,) * count
    if len(weights) != count:
        raise UserError(
            f"config.loss.level_weights = {weights} must be one number for each of the {count} levels of the classes, "
            "from coarse to fine, or empty"
        )
    if any(not is_number(weight) or not 0 <= weight < float("inf") for weight in weights):
        raise UserError(f"config.loss.level_weights = {weights} must be finite numbers of at least 0")
    if not any(weights):
        raise UserError(f"config.loss.level_weights = {weights}: one of them must be above 0")
    return ClassRelation(levels=levels, weights=weights)


def matrix_from(path: Path, class_names: Sequence[str]) -> Int8[np.ndarray, "c c"]:
    """The matrix of a CSV file for the given classes.

    The first line and the first column hold names of classes. A cell is 1 for classes whose images are positives of
    each other, 0 for negatives, and empty for neither. Classes that are not asked for are ignored.

    Raises:
      UserError: naming the file and the line or the class.
    """
    field = f"config.loss.relation = {str(path)!r}"
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [line for line in csv.reader(file) if line]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{field}: cannot be read as a CSV file ({error})") from error
    if len(lines) < 2:
        raise UserError(f"{field}: needs a line of class names and a line for each class")
    columns = [name.strip() for name in lines[0][1:]]
    rows: dict[str, list[str]] = {}
    for number, line in enumerate(lines[1:], start=2):
        name = line[0].strip()
        if name in rows:
            raise UserError(f"{field}: line {number} has the class {printable(name)} a second time")
        if len(line) != len(lines[0]):
            raise UserError(f"{field}: line {number} has {len(line)} cells, the first line {len(lines[0])}")
        rows[name] = [cell.strip() for cell in line[1:]]
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise UserError(f"{field}: the first line has the class {printable(twice[0])} twice")
    names = [str(name) for name in class_names]
    for where, known in (("lines", set(rows)), ("columns", set(columns))):
        if missing := [name for name in names if name not in known]:
            raise UserError(
                f"{field}: {len(missing)} of {len(names)} training classes are missing from its {where}, such as "
                f"{printable(missing[0])}"
            )
    places = [columns.index(name) for name in names]
    matrix = np.empty((len(names), len(names)), np.int8)
    for i, name in enumerate(names):
        for j, place in enumerate(places):
            cell = rows[name][place]
            if cell not in _CELLS:
                raise UserError(
                    f"{field}: {printable(name)} and {printable(names[j])} have {cell!r}; a cell is 1 (positive), 0 "
                    "(negative) or empty (neither)"
                )
            matrix[i, j] = 1 if i == j and not cell else _CELLS[cell]
    different = np.argwhere(matrix != matrix.T)
    if len(different):
        one, other = (printable(names[i]) for i in different[0])
        raise UserError(f"{field}: {one} and {other} are related in one way and {other} and {one} in another")
    if negative := np.flatnonzero(np.diag(matrix) != 1).tolist():
        raise UserError(
            f"{field}: {printable(names[negative[0]])} is not related to itself; the diagonal is 1 or empty"
        )
    return matrix
