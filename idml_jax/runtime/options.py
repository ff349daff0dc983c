"""The help of commands: their description as it is written, and the default of every option."""

import argparse
from collections.abc import Callable


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


class Help(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of an option, where it has one that its help does not name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if isinstance(text, LateText):
            text = text.format(text.part())
        if "default" in text or action.default in (None, "", False, argparse.SUPPRESS):
            return text or None
        return f"{text} (default: %(default)s)"
