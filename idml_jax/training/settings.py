"""The table of all settings - name, default, choices, meaning - and the check of settings against it.

The meanings are the comments of ``config.default_config`` and, for the options of losses, the docstrings of the losses.
``docs/settings.md`` and ``python -m idml_jax.main --help`` show the table. The help reads it from ``settings.txt``:
making it loads jax and all losses.
"""

import ast
import difflib
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from idml_jax.errors import UserError
from idml_jax.losses import LOSSES
from idml_jax.training.config import default_config
from idml_jax.training.config_checks import CHOICES
from idml_jax.training.tasks import TASKS
from idml_jax.training.workdir import flatten

HELP = Path(__file__).with_suffix(".txt")  # what ``as_text`` gives, written by docs/settings_page.py


class Setting(NamedTuple):
    """A setting.

    Attributes:
      name: as in ``config.name``.
      default: its default.
      choices: its possible values, where they are a list.
      meaning: what it does, in words.
    """

    name: str
    default: Any
    choices: tuple[str, ...]
    meaning: str


def table() -> list[Setting]:
    """All settings, in the order of ``default_config``."""
    meanings = _comments()
    choices = {"task": tuple(TASKS), **CHOICES}
    return [
        Setting(name, default, choices.get(name, ()), meanings.get(name) or _of_loss(name))
        for name, default in flatten(default_config().to_dict()).items()
    ]


def as_text() -> str:
    """The table for a terminal: each setting as it is typed, with its default, its choices and its meaning."""
    lines = []
    for setting in table():
        told = "; ".join(filter(None, [" | ".join(setting.choices), setting.meaning]))
        lines.append(f"  --config.{setting.name}={shown(setting.default)}")
        lines += textwrap.wrap(told, 110, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A default as it is typed."""
    if isinstance(value, tuple | list):
        return f"({', '.join(shown(part) for part in value)}{',' if len(value) == 1 else ''})"
    return f"{value:.6g}" if isinstance(value, float) and value != int(value) else str(value)


def _comments() -> dict[str, str]:
    """The comment at each assignment of ``default_config``, or else the lines of comments above it."""
    source = textwrap.dedent(inspect.getsource(default_config))
    lines = source.splitlines()
    comments: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
            continue
        name = ast.unparse(node.targets[0]).removeprefix("config.")
        own = [comments[line] for line in range(node.lineno, (node.end_lineno or node.lineno) + 1) if line in comments]
        if not own:
            line = node.lineno - 1
            while line in comments and lines[line - 1].lstrip().startswith("#"):
                own.insert(0, comments[line])
                line -= 1
        found[name] = " ".join(own)
    return found


def _of_loss(name: str) -> str:
    """The meaning of an option of a loss, from the loss's docstring."""
    parts = name.split(".")
    if len(parts) != 3 or parts[0] != "loss" or parts[1] not in LOSSES:
        return ""
    doc = inspect.getdoc(LOSSES[parts[1]].function) or ""
    match = re.search(rf"^ +{parts[2]}: (.+?)(?=\n +\w+: |\n\n|\Z)", doc, re.MULTILINE | re.DOTALL)
    return " ".join(match.group(1).split()).removesuffix(".") if match else ""


def check_known(config: Any) -> None:
    """Checks that settings are a ``ConfigDict`` with known names and values of the right types.

    Raises:
      UserError: naming the first wrong setting, with the nearest known name or the type that is expected.
    """
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"the settings are {type(config).__name__}, not a ConfigDict; idml_jax.default_config() makes one"
        )
    known = default_config().to_dict()
    _check_names(config.to_dict(), known, "", list(flatten(known)))
    _check_types(config.to_dict(), known, "")


def _check_names(values: dict[str, Any], known: dict[str, Any], prefix: str, every: list[str]) -> None:
    for name, value in values.items():
        full = f"{prefix}{name}"
        if name not in known:
            raise UserError(f"config.{full} is no setting; {_nearest(full, prefix, known, every)}")
        if isinstance(value, dict) and isinstance(known[name], dict):
            _check_names(value, known[name], f"{full}.", every)


def check_named(names: Iterable[str]) -> None:
    """Checks the names of single settings, such as ``optim.learning_rate``.

    Raises:
      UserError: naming the first that is unknown, with the nearest known name.
    """
    every = list(flatten(default_config().to_dict()))
    for name in names:
        known, prefix = default_config().to_dict(), ""
        for part in name.split("."):
            if not isinstance(known, dict):
                raise UserError(f"config.{name} is no setting; did you mean config.{prefix.removesuffix('.')}?")
            _check_names({part: None}, known, prefix, every)
            known, prefix = known[part], f"{prefix}{part}."
        if isinstance(known, dict):
            more = f"did you mean config.{name}.name?" if "name" in known else f"it has {', '.join(known)}"
            raise UserError(f"config.{name} is a group of settings; {more}")


def _nearest(full: str, prefix: str, known: dict[str, Any], every: list[str]) -> str:
    own = full.removeprefix(prefix)
    short = lambda name: own == "".join(word[:1] for word in name.split("_"))  # lr: learning_rate
    if near := list(filter(short, known)) or difflib.get_close_matches(own, known, 1):
        return f"did you mean config.{prefix}{near[0]}?"
    same = [name for name in every if (leaf := name.split(".")[-1]) == full.split(".")[-1] or short(leaf)]
    if near := same or ([] if prefix else difflib.get_close_matches(full, every, 1, 0.5)):
        return f"did you mean config.{near[0]}?"
    return f"config.{prefix.removesuffix('.')} has {', '.join(known)}" if prefix else f"there are {', '.join(known)}"


_KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "text"),
    tuple: ((tuple, list), "a tuple"),
    dict: ((dict,), "a group of settings"),
}


def _check_types(values: dict[str, Any], known: dict[str, Any], prefix: str) -> None:
    for name, default in known.items():
        if name not in values:
            raise UserError(
                f"config.{prefix}{name} is missing; start from idml_jax.default_config() or get_config(name)"
            )
        value, kind = values[name], type(default)
        _check_type(value, kind, f"config.{prefix}{name}")
        if kind is dict:
            _check_types(value, default, f"{prefix}{name}.")
        elif kind is tuple and default:
            for part in value:
                _check_type(part, type(default[0]), f"config.{prefix}{name}, in part")


def _check_type(value: Any, kind: type, name: str) -> None:
    kinds, told = _KINDS[kind]
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{name} = {value!r} must be {told}")
