"""Checks of single fields of the settings."""

import math
from typing import Any

from ml_collections import ConfigDict

from idml_jax.errors import UserError


def choice(config: ConfigDict, field: str, known: tuple[str, ...]) -> None:
    value = value_of(config, field)
    if value not in known:
        raise UserError(f"config.{field} = {value!r}; known: {', '.join(known)}")


def at_least(config: ConfigDict, field: str, low: float) -> None:
    value = value_of(config, field)
    if not low <= value < math.inf:  # false for NaN too
        raise UserError(f"config.{field} = {value} must be at least {low:g}{'' if value < low else ', and finite'}")


def value_of(config: ConfigDict, field: str) -> Any:
    for part in field.split("."):
        config = config[part]
    return config
