"""How many CPUs this process may use."""

import os
import sys


def available() -> int:
    """Number of CPUs that this process may run on, which a container or a scheduler can limit."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
