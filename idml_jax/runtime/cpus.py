"""How many CPUs this process may use."""

import math
import os
import sys
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container, as "400000 100000": microseconds in so many


def available() -> int:
    """Number of CPUs that this process may run on, at most what the quota of its container amounts to."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    try:
        quota, period = QUOTA.read_text().split()
        return max(1, min(count, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no quota ("max"), or another system
        return count
