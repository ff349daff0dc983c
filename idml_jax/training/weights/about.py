"""The settings that weights were made with, from the files beside them: of timm, transformers, and this package.

* timm's ``config.json``: ``architecture`` and ``pretrained_cfg`` (size, crop, mean, deviation);
* transformers' ``config.json`` (``model_type`` and sizes) with ``preprocessor_config.json`` (size, crop, mean);
* the ``config.json`` of a run of this package, and the metadata of the ``.safetensors`` files it writes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from idml_jax.errors import UserError
from idml_jax.models import MODELS, catalogue
from idml_jax.runtime.files import first_line
from idml_jax.training.weights.tensors import Native

__all__ = ["Native", "metadata_of", "native_of", "native_of_run", "of_catalogue"]

# timm's names of what it does with the last feature map; "map" is the attention pooling of SigLIP.
_POOLING = {"avg": "avg", "max": "max", "token": "token", "map": "token"}
# Shorter side before the central crop, relative to the crop, where nothing says otherwise.
_MARGIN = 256 / 224


def native_of(folder: Path | None, metadata: Mapping[str, str], path: Path) -> Native:
    """The settings that weights were made with; empty if no file says so.

    Args:
      folder: folder with ``config.json``, if there is one.
      metadata: of the ``.safetensors`` file.
      path: the file of the weights.

    Raises:
      UserError: if a file of settings is damaged.
    """
    if "network" in metadata:
        return _of_metadata(metadata, path)
    settings = _json(folder / "config.json") if folder and (folder / "config.json").is_file() else {}
    if folder and "architecture" in settings:
        return _of_timm(settings, folder / "config.json")
    if folder and "model_type" in settings:
        images = next((p for n in _IMAGES if (p := folder / n).is_file()), None)
        return _of_transformers(settings, _json(images) if images else {}, folder / "config.json")
    return Native()


_IMAGES = ("preprocessor_config.json", "processor_config.json")


def of_catalogue(network: str) -> Native:
    """The settings of a network's best-known weights; of its name alone if it is not in the catalogue."""
    entry = catalogue.CATALOGUE.get(network)
    if entry is None:
        return Native(network=network, called=network)
    size, pooling = entry.image_size, entry.pooling
    return Native(network, network, size, round(size * _MARGIN), entry.mean, entry.std, pooling, "the catalogue")


def native_of_run(config: ConfigDict, told_by: str) -> Native:
    """The settings of a run of this package."""
    data, name = config.data, config.model.name
    mean, std = tuple(data.mean), tuple(data.std)
    return Native(name, name, data.image_size, data.resize, mean, std, config.model.pooling, told_by)


def metadata_of(native: Native, origin: str) -> dict[str, str]:
    """Metadata for a ``.safetensors`` file, which ``native_of`` reads again."""
    values = {n: getattr(native, n) for n in ("network", "image_size", "resize", "mean", "std", "pooling")}
    kept = {n: v if isinstance(v, str) else json.dumps(v) for n, v in values.items() if v}
    return {**kept, "origin": origin}


def _of_metadata(metadata: Mapping[str, str], path: Path) -> Native:
    numbers: dict[str, Any] = {}
    for name in ("image_size", "resize", "mean", "std"):
        try:
            numbers[name] = json.loads(metadata.get(name, "null"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: {name} of its metadata is not JSON ({first_line(error)})") from error
    network, pooling = metadata["network"], metadata.get("pooling", "")
    native = Native(network if network in MODELS else "", network, pooling=pooling, told_by=str(path))
    return _with_images(native, _size(numbers["image_size"]), _size(numbers["resize"]), numbers["mean"], numbers["std"])


def _of_timm(settings: Mapping[str, Any], path: Path) -> Native:
    images = {**settings, **_mapping(settings.get("pretrained_cfg"))}
    architecture, tag = str(settings["architecture"]), str(images.get("tag") or "")
    architecture, _, own_tag = architecture.partition(".")
    if why := catalogue.another_function(architecture):
        raise UserError(f"{path}: {architecture} of timm {why}")
    network = catalogue.for_timm(architecture, tag or own_tag) or ""
    shape = images.get("input_size")
    size = _size(shape[-1] if isinstance(shape, list) and shape else shape)
    if isinstance(shape, list) and len(shape) == 3 and shape[1] != shape[2]:
        size = 0  # images here are square; the catalogue knows a size
    share = images.get("crop_pct")
    resize = math.floor(size / share) if isinstance(share, int | float) and share > 0 else 0
    pooling = _POOLING.get(str(settings.get("global_pool", images.get("global_pool", ""))), "")
    native = Native(network, f"{architecture} of timm", pooling=pooling, told_by=str(path))
    return _with_images(native, size, resize, images.get("mean"), images.get("std"))


def _of_transformers(settings: Mapping[str, Any], images: Mapping[str, Any], path: Path) -> Native:
    network = catalogue.for_transformers(settings) or ""
    kind = str(settings["model_type"])
    tower = _mapping(settings.get("vision_config")) or settings
    dims = ", ".join(f"{n} {tower[n]}" for n in ("hidden_size", "num_hidden_layers", "patch_size") if n in tower)
    entry = catalogue.CATALOGUE.get(network)
    images = _mapping(images.get("image_processor")) or images
    crop = _size(images.get("crop_size")) if images.get("do_center_crop", True) else 0
    side = _size(images.get("size"))
    size = crop or side or _size(tower.get("image_size"))
    share = images.get("crop_pct")  # of a ConvNeXt
    if isinstance(share, int | float) and 0 < share < 1 and not crop:
        side = math.floor(size / share)
    native = Native(
        network, f"{kind} of transformers{f' ({dims})' if dims else ''}", pooling=entry.pooling if entry else "",
        told_by=str(path),
    )  # fmt: skip
    return _with_images(native, size, max(side, size), images.get("image_mean"), images.get("image_std"))


def _with_images(native: Native, size: int, resize: int, mean: object, std: object) -> Native:
    """The settings of images, as far as they are usable."""
    mean, std = _channels(mean), _channels(std)
    if not (mean and std) or len(mean) != len(std) or min(std) <= 0:
        mean = std = ()
    return replace(native, image_size=size, resize=max(resize, size) if resize else size, mean=mean, std=std)


def _channels(value: object) -> tuple[float, ...]:
    numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    if len(numbers) not in (1, 3) or not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
        return ()
    return tuple(float(n) for n in numbers)


def _size(value: Any) -> int:
    """A side in pixels: a number, or transformers' ``{"shortest_edge": ...}`` or ``{"height": ..., "width": ...}``."""
    if isinstance(value, Mapping):
        value = value.get("shortest_edge") or value.get("height")
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({first_line(error)})") from error
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: holds no settings")
    return value
