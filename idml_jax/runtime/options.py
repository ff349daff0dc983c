"""The help of commands, with the default of every option; limits that the environment sets."""

import argparse
import os
from collections.abc import Callable

from idml_jax.errors import UserError


class LateText(str):
    """A help text with a part that is only made when the text is shown.

    Args:
      text: the text, with ``{}`` where the part belongs.
      part: gives the part.
    """

    part: Callable[[], str]

    def __new__(cls, text: str, part: Callable[[], str]) -> "LateText":
        made = super().__new__(cls, text)
        made.part = part
        return made


def limit(name: str, default: int) -> int:
    """A limit that an environment variable may set.

    Raises:
      UserError: if its value is not a whole number above 0.
    """
    value = os.environ.get(name)
    if value is None:
        return default
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise UserError(f"{name}={value!r} in the environment: must be a whole number above 0")
    return int(value)


class Help(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of an option, where it has one that its help does not name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if isinstance(text, LateText):
            text = text.format(text.part())
        if "default" in text or action.default in (None, "", False, argparse.SUPPRESS):
            return text or None
        return f"{text} (default: %(default)s)"
