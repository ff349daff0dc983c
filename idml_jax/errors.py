"""The one exception that the command line turns into a single line, and how it does."""

import os
import sys
from typing import NoReturn


class UserError(Exception):
    """A file, a setting or a value that the user can mend. The message names it and says what would be right."""


def stop(error: Exception) -> NoReturn:
    """Ends a command with the error as one line and exit code 1, or with its traceback where that is asked for.

    It is asked for by the flag ``--traceback`` of ``idml_jax.main``, and everywhere by ``IDML_JAX_TRACEBACK=1``.
    """
    if "--traceback" in sys.argv or os.environ.get("IDML_JAX_TRACEBACK", "0") != "0":
        raise error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any("Traceback" in line for line in lines):  # ml_collections puts one into its message
        lines = lines[-1:]
    print(f"error: {' '.join(lines) or type(error).__name__}", file=sys.stderr)
    sys.exit(1)
