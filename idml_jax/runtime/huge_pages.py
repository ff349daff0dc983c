"""Huge pages for computing on a CPU under Linux.

XLA takes gigabytes of memory anew for every step. In pages of 4 KiB, their first use costs a fifth of a step, in pages
of 2 MiB hardly anything. glibc's malloc (2.35 and later) asks the kernel for huge pages if ``GLIBC_TUNABLES`` says so
when a process starts.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

VARIABLE, VALUE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
OLDEST = (2, 35)  # of glibc
ACCELERATORS = ("nvidia[0-9]*", "accel[0-9]*", "kfd", "vfio/[0-9]*")  # device files of GPUs and TPUs
DEBUGGERS = ("debugpy", "pydevd")


def start_again() -> None:
    """Starts this command again in the same process with huge pages, where that is useful; otherwise returns.

    To be called first in a command that computes, before it loads jax: what the process has done is lost. It returns
    if the process is not that command from its start (a script, a notebook or another module runs it), if
    ``GLIBC_TUNABLES`` is set, to whatever value, or if the command line only asks for help or the version.
    """
    asks = not {"--help", "-h", "--version"}.isdisjoint(sys.argv)
    own = is_command(sys.orig_argv) and not _debugged()
    if own and useful(os.environ, _glibc()) and sys.executable and not asks:
        command = [sys.executable, *sys.orig_argv[1:]]
        try:
            os.execve(sys.executable, command, {**os.environ, VARIABLE: VALUE})
        except OSError:  # too long a command line, an executable that is gone: the command runs as it is
            return


def is_command(words: Sequence[str]) -> bool:
    """Whether a process runs a command of this package and nothing else.

    Args:
      words: its command line, as in ``sys.orig_argv``: ``python -m idml_jax.main``, or the installed ``idml-jax``.
    """
    rest = iter(words[1:])
    for word in rest:
        if not word.startswith("-") or word == "-":
            return Path(word).name in ("idml-jax", "idml-jax-script.py")
        for place, letter in enumerate(word[1:], 1):  # options of one letter may be written together
            if letter in "cmWX" and not word.startswith("--"):
                value = word[place + 1 :] or next(rest, "")
                if letter in "cm":
                    return letter == "m" and value.split(".")[0] == "idml_jax"
                break
    return False


def useful(
    environment: Mapping[str, str],
    glibc: tuple[int, ...] | None,
    kernel: Path = KERNEL,
    devices: Path = Path("/dev"),
) -> bool:
    """Whether a process would gain: a CPU computes, nobody has chosen, and malloc has to ask the kernel.

    Args:
      environment: the process's variables.
      glibc: version of the C library; ``None`` for another library or system.
      kernel: file with the kernel's setting, such as ``always [madvise] never``.
      devices: folder of the device files.
    """
    if VARIABLE in environment or glibc is None or glibc < OLDEST:
        return False
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms not in ("", "cpu"):
        return False
    try:
        if "[madvise]" not in kernel.read_text():
            return False
    except OSError:
        return False
    return platforms == "cpu" or not any(any(devices.glob(pattern)) for pattern in ACCELERATORS)


def _glibc() -> tuple[int, ...] | None:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(map(int, version.split("."))) if name == "glibc" else None
    except (AttributeError, ValueError, OSError):  # not Linux, or another C library
        return None


def _debugged() -> bool:
    return sys.gettrace() is not None or any(name in sys.modules for name in DEBUGGERS)
