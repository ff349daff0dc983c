"""What the command lines say: errors, each as a single line, and how far a run has come."""

import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A file, a setting or a value that the user can mend. The message names it and says what would be right."""


def show_progress() -> None:
    """Lets training say how it goes on standard output, as ``python -m idml_jax.main`` does; for notebooks."""
    own = logging.getLogger("idml_jax")
    for handler in list(own.handlers):  # of an earlier call
        own.removeHandler(handler)
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s"))
    own.addHandler(console)
    own.setLevel(logging.INFO)
    own.propagate = False


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


def run_command(action: Callable[[], object], stopped: str = "stopped") -> None:
    """Runs what a command line asks for: errors of the user become one line and exit status 1, Ctrl-C one and 130."""
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    try:
        action()
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        sys.exit(1)
    except (UserError, OSError) as error:
        stop(error)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        sys.exit(130)
