"""The one exception that the command line turns into a single line."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A file, a setting or a value that the user can mend. The message names it and says what would be right."""


def run_command(action: Callable[[], None], stopped: str = "stopped") -> None:
    """Runs what a command line asks for: errors of the user become one line and exit status 1, Ctrl-C one and 130."""
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    try:
        action()
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        sys.exit(1)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.exit(130)
