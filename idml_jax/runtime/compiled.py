"""The start of a command: imports, compiled programs kept between processes, and the time that compiling takes.

The commands keep them by JAX's persistent cache, in ``$XDG_CACHE_HOME/idml_jax/compiled`` (default ``~/.cache``). What
compiles in a process of one's own, that has loaded jax by itself, is left to that process.
"""

import contextlib
import gc
import hashlib
import os
import platform
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from idml_jax.runtime.files import cache_home

LEAST_SECONDS = 0.0  # compile time of programs worth keeping: reading one takes less than compiling the smallest
MOST_BYTES = 2 * 2**30  # what is kept; the programs longest unused go first


_ours = False  # whether a command, and not a program of the user's own, loads jax in this process


def keeps_results() -> bool:
    """Whether this process is a command of this package, which may keep what it computed for the next one."""
    return _ours and os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "1").lower() not in ("0", "false", "no", "off")


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Imports of a command: what compiles later is kept, and Python does not look for cycles of garbage meanwhile.

    That search takes a fifth of the time of the imports, and what they load is kept anyway.
    """
    global _ours
    _ours = _ours or "jax" not in sys.modules
    if not _ours or not gc.isenabled():
        yield
        return
    keep_compiled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def keep_compiled() -> None:
    """Lets jax, which must not be loaded yet, keep compiled programs for the next process.

    JAX's own variables win: ``JAX_COMPILATION_CACHE_DIR`` names another folder, ``JAX_ENABLE_COMPILATION_CACHE=0``
    turns this off. Where the folder cannot be written, nothing is kept.
    """
    if "jax" in sys.modules:
        return
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(LEAST_SECONDS))
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = cache_home() / "idml_jax" / "compiled" / _processor()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            return
        trim(folder, MOST_BYTES)
    except (OSError, RuntimeError):  # no home, or a folder that cannot be used
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    _drop_damaged(folder)


def _processor() -> str:
    """A name for this kind of processor: programs of one with more instructions would fail on another.

    A home may be shared by machines.
    """
    about = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", errors="replace") as file:
        lines = file.read(16384).split("\n\n")[0].splitlines()
        about += "".join(sorted(line for line in lines if line.startswith(("flags", "Features", "model name"))))
    return hashlib.sha256(about.encode()).hexdigest()[:12]


def trim(folder: Path, most: int) -> None:
    """Removes the files longest unused, until at most ``most`` bytes are left."""
    files = []
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):
            about = entry.stat(follow_symlinks=False)
            files.append((max(about.st_atime, about.st_mtime), about.st_size, entry.path))
    excess = sum(size for _, size, _ in files) - most
    for _, size, path in sorted(files):
        if excess <= 0:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
            excess -= size


def _drop_damaged(folder: Path) -> None:
    """Has the kept programs removed when jax warns about one: it would warn again in every later process."""
    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if "persistent compilation cache entry" not in str(message):
            shown(message, category, filename, lineno, file, line)
        elif str(message).startswith("Error reading"):
            trim(folder, 0)

    warnings.showwarning = show


class Compiling(NamedTuple):
    """Time spent on compiling, by the clock: what several threads do at once counts once.

    Attributes:
      seconds: seconds in which something was compiled.
      kept: number of programs that were kept by an earlier process.
      reading: seconds in which some of them were read.
    """

    seconds: float = 0.0
    kept: int = 0
    reading: float = 0.0

    def since(self, earlier: "Compiling") -> "Compiling":
        """What came after an earlier moment."""
        return Compiling(self.seconds - earlier.seconds, self.kept - earlier.kept, self.reading - earlier.reading)

    def __str__(self) -> str:
        read = f", {self.kept} kept programs read in {self.reading:.1f} s" if self.kept else ""
        return f"{self.seconds:.1f} s of it compiling{read}"


class _Busy:
    """The time in which at least one thread did something."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []  # apart from each other

    def add(self, start: float, end: float) -> None:
        """Adds a span of one thread."""
        touches = lambda span: span[0] <= end and span[1] >= start
        together = [(start, end), *filter(touches, self._spans)]
        self._spans = [span for span in self._spans if not touches(span)]
        self._spans.append((min(first for first, _ in together), max(last for _, last in together)))

    @property
    def seconds(self) -> float:
        """How long it was in all."""
        return sum(last - first for first, last in self._spans)


_so_far: Compiling | None = None
_compiled, _read = _Busy(), _Busy()
_adding = threading.Lock()  # several threads may compile
_this_thread = threading.local()  # ``reading``: seconds of reading within the compilation that has not ended yet


def compiling() -> Compiling:
    """The time since the first call in this process, which asks jax to tell it."""
    global _so_far
    if _so_far is None:
        from jax import monitoring

        monitoring.register_event_duration_secs_listener(_note)
        _so_far = Compiling()
    return _so_far


def _note(event: str, duration_secs: float, **_: str | int) -> None:
    """Receives from jax what has just ended, in the thread that did it."""
    global _so_far
    now = time.monotonic()
    with _adding:
        before = _so_far or Compiling()
        if event == "/jax/compilation_cache/cache_retrieval_time_sec":  # part of the event below, at its end
            _read.add(now - duration_secs, now)
            _this_thread.reading = getattr(_this_thread, "reading", 0.0) + duration_secs
            _so_far = before._replace(kept=before.kept + 1, reading=_read.seconds)
        elif event == "/jax/core/compile/backend_compile_duration":
            reading, _this_thread.reading = getattr(_this_thread, "reading", 0.0), 0.0
            _compiled.add(now - duration_secs, max(now - reading, now - duration_secs))
            _so_far = before._replace(seconds=_compiled.seconds)
