"""Settings stored in the folder of a run."""

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from idml_jax.errors import UserError
from idml_jax.runtime.files import first_line, user_path, write_json
from idml_jax.training.config import default_config

# Fields that affect how a run is executed but not its result: a resumed run may change them.
FREE_FIELDS = (
    "data.root", "data.image_root", "data.data_dir", "data.threads", "data.prefetch", "data.workers", "log.every_steps",
    "log.tensorboard", "log.trackers", "log.project", "log.name", "checkpoint.keep_latest", "checkpoint.keep_best",
    "eval.batch_size", "debug",
)  # fmt: skip

# Fields of ``data`` that say where the images are.
PLACES = ("root", "image_root", "data_dir")

# Fields that a run writes itself; where they are empty, nothing is claimed.
RECORDED = "model.init_origin."


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings to ``{"a.b": value}``."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def differences(config: ConfigDict, workdir: Path) -> dict[str, str]:
    """The settings in which a run in a workdir differs, each with a phrase; without ``FREE_FIELDS``."""
    old, new = (flatten(one | {"loss": _absolute(one["loss"])}) for one in (read(workdir).to_dict(), config.to_dict()))
    missing = "(not set)"
    return {
        field: f"config.{field} = {old.get(field, missing)!r} there, {new.get(field, missing)!r} here"
        for field in sorted(set(old) | set(new))
        if field not in FREE_FIELDS and old.get(field, missing) != new.get(field, missing)
        if not (field.startswith(RECORDED) and not (old.get(field) and new.get(field)))
    }


def refuse(differing: Sequence[str], workdir: Path) -> None:
    """Raises ``UserError`` if settings differ, naming up to three."""
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"{workdir} holds a run with other settings: {'; '.join(differing[:3])}{more}. "
            "Use the same settings or another --workdir"
        )


def remember(config: ConfigDict, workdir: Path, free: tuple[str, ...] = ()) -> list[str]:
    """Writes ``config.json`` into a new workdir, or checks that an existing one holds the same settings.

    Args:
      config: settings.
      workdir: folder of the run.
      free: beginnings of the names of fields that may differ.

    Returns:
      A phrase for each of those that do.

    Raises:
      UserError: naming up to three fields that differ.
    """
    path = workdir / "config.json"
    if path.exists():
        differing = differences(config, workdir)
        own = {field: line for field, line in differing.items() if free and field.startswith(free)}
        refuse([line for field, line in differing.items() if field not in own], workdir)
        return list(own.values())
    values = config.to_dict()
    write_json(path, values | {"data": values["data"] | _places(config), "loss": _absolute(values["loss"])})
    return []


def _absolute(loss: dict[str, Any]) -> dict[str, Any]:
    """Settings of the loss with the absolute path of the file of relations, so that a run finds it from any folder."""
    return loss | {"relation": str(user_path(loss["relation"]))} if loss.get("relation") else loss


def _places(config: ConfigDict) -> dict[str, str]:
    """Where the images are, absolute, so that a run finds them from any folder."""
    return {field: str(user_path(config.data[field])) if config.data[field] else "" for field in PLACES}


@contextlib.contextmanager
def finding_images(config: ConfigDict, workdir: Path) -> Iterator[None]:
    """Reads the images of a run; an error says how the run learns where they are now, if they are gone from there."""
    try:
        yield
    except UserError as error:
        gone = [field for field, place in _places(config).items() if place and not os.path.exists(place)]
        if not gone:
            raise
        raise UserError(
            f"{error}; if the run's images have moved, python -m idml_jax.main --mode=eval "
            f"--workdir={shlex.quote(str(workdir))} --config.data.{gone[0]}=PATH writes their place into config.json"
        ) from error


def remember_places(config: ConfigDict, workdir: Path) -> list[str]:
    """Writes where the same images of a run are now into its settings, unless they are at the old place too.

    Args:
      config: settings as wanted now.
      workdir: folder of the run.

    Returns:
      A phrase for each place that is new.
    """
    stored, now = read(workdir), _places(config)
    old = {field: stored.data[field] for field in PLACES}
    gone = any(place and not os.path.exists(user_path(place)) for place in old.values())
    changed = [field for field in PLACES if old[field] != now[field]]
    if not gone or not changed:
        return []
    path = workdir / "config.json"
    values = json.loads(path.read_text())
    write_json(path, values | {"data": values["data"] | now})
    return [f"config.data.{field} = {now[field]} in place of {old[field]}" for field in changed]


def read(workdir: str | Path) -> ConfigDict:
    """Reads the settings of the run in a workdir.

    Raises:
      UserError: if there are no valid settings.
    """
    workdir = user_path(workdir)
    path = workdir / "config.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{workdir} holds no run (no config.json)") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({first_line(error)})") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    # Settings that did not exist when the run started take their defaults.
    config = default_config()
    # What older runs did, whatever the default is today.
    config.model.semantic_init, config.sharding.partners = "random", "any"
    try:
        _check_types(values, config.to_dict())
        with config.unlocked():
            config.update(_tuples(values))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{path} does not hold the settings of a run ({first_line(error)})") from error
    return config


def _check_types(value: object, default: object, name: str = "config") -> None:
    """Raises ``TypeError`` if a stored value has another type than the default; ``ConfigDict`` accepts some."""
    if default is None:
        return
    kinds = (int, float) if isinstance(default, float) else type(default)
    if isinstance(default, list | tuple):
        kinds = (list, tuple)
    if not isinstance(value, kinds) or isinstance(value, bool) is not isinstance(default, bool):
        raise TypeError(f"{name} = {value!r}, but a {type(default).__name__} is expected")
    if isinstance(default, dict) and isinstance(value, dict):
        for key in default.keys() & value.keys():
            _check_types(value[key], default[key], f"{name}.{key}")
    elif isinstance(default, list | tuple) and isinstance(value, list | tuple) and default:
        for part in value:
            _check_types(part, default[0], f"{name}, in part")


def _tuples(value: Any) -> Any:
    """Converts JSON's lists back to tuples."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(value) if isinstance(value, list) else value
