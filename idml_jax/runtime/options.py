"""The help of commands: their description as it is written, and the default of every option."""

import argparse


class Help(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of an option, where it has one that its help does not name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if "default" in text or action.default in (None, "", False, argparse.SUPPRESS):
            return action.help
        return f"{text} (default: %(default)s)"
