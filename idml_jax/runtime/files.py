"""Writes files and folders completely or not at all; JSON; the first line of an error.

This module writes all files of the package: to a new temporary file with an unpredictable name in the same folder,
which is then flushed to disk and renamed. An existing target must be a plain file: a device, pipe, socket,
folder or link is refused and left unchanged.
"""

import contextlib
import fcntl
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from idml_jax.errors import UserError

TEMPORARY = ".tmp"  # ending of temporary files and folders
_KINDS = (
    (stat.S_ISLNK, "a link; name the file that it points to"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def cache_home() -> Path:
    """The folder for caches of this user: ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def user_path(given: str | Path) -> Path:
    """Makes a path typed by a user absolute, expands ``~`` and resolves ``..``.

    Raises:
      UserError: for what is no path, an empty one, or the home folder of an unknown user.
    """
    if not isinstance(given, str | os.PathLike):
        raise UserError(f"{given!r} is not a path, but {type(given).__name__}")
    if not str(given) or "\0" in str(given):
        raise UserError(f"{str(given)!r} is not a path")
    try:
        return Path(without_dots(str(Path(given).expanduser().absolute())))
    except RuntimeError as error:
        raise UserError(f"{given}: {first_line(error)}") from error


def without_dots(path: str) -> str:
    """An absolute path without ``..``, so that a file has one name; a folder before one may be a link, so resolved."""
    parts = path.split(os.sep)
    if ".." not in parts:
        return path
    end = len(parts) - parts[::-1].index("..")
    return os.path.join(os.path.realpath(os.sep.join(parts[:end])), *parts[end:])


@contextlib.contextmanager
def claimed(folder: Path, what: str) -> Iterator[None]:
    """Holds a folder, so that no other process that asks may have it. Nothing is written into it.

    Where the file system knows no locks, nothing is checked.

    Args:
      folder: an existing folder.
      what: what another process does that has it, for the error.

    Raises:
      UserError: if another process has it.
    """
    opened = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder}: another process {what}") from None
        yield
    finally:
        os.close(opened)


def check_target(path: Path) -> bool:
    """Checks that a file may be written, and returns whether it replaces one.

    Raises:
      UserError: if the path exists and is not a plain file.
    """
    try:
        mode = os.lstat(path).st_mode
    except OSError:  # absent, or inaccessible, which writing will report
        return False
    if stat.S_ISREG(mode):
        return True
    found = next((name for is_kind, name in _KINDS if is_kind(mode)), "not a file")
    raise UserError(f"{path}: is {found}; only a file is replaced")


def check_result(path: Path, reads: Iterable[str | Path] = (), suffixes: Collection[str] = ()) -> None:
    """Checks that a file may be written as a result: before the work starts, and so that no input is lost.

    Args:
      path: the file.
      reads: files and folders that the command reads; empty ones do not count.
      suffixes: how the name must end; without any, it may end in anything.

    Raises:
      UserError: if the name ends otherwise, the path is no plain file, or the file is one of those that are read.
    """
    if suffixes and path.suffix not in suffixes:
        raise UserError(f"--out={path}: the name must end in {', '.join(suffixes)}")
    if not check_target(path):
        return
    for read in (read for read in reads if read):
        with contextlib.suppress(OSError):
            if os.path.samefile(user_path(read), path):
                raise UserError(f"{path}: is read by this command and would be overwritten; give another name")


def _make_parents(folder: Path) -> list[Path]:
    """Creates a folder and its parents and returns those that were missing, the innermost first."""
    missing = []
    for parent in (folder, *folder.parents):
        if parent.exists():
            break
        missing.append(parent)
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _temporary(folder: Path) -> Path:
    return folder / f".idml_jax-{secrets.token_hex(12)}{TEMPORARY}"


def _flush_folder(folder: Path) -> None:
    """Makes a rename durable; some file systems do not support this."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _writing(path: Path, kept: str) -> Iterator[Path]:
    """Yields a temporary path next to ``path``; on an error it is removed, and so are new folders."""
    made: list[Path] = []
    temporary = _temporary(path.parent)
    try:
        made = _make_parents(path.parent)
        yield temporary
    except OSError as error:
        reason = error.strerror or first_line(error)
        if error.filename and str(temporary) not in str(
            error.filename
        ):  # from reading another file in the block, or from a folder
            reason += f": {error.filename}"
        raise UserError(f"{path}: cannot be written ({reason}); {kept}") from error
    else:
        made = []
    finally:
        if temporary.is_dir() and not temporary.is_symlink():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to that is renamed to ``path`` when the block ends without an error.

    Missing folders are created. The file has the usual permissions of a new file (``umask``).

    Args:
      path: file to write; an existing plain file is replaced.

    Yields:
      The temporary file, open for writing bytes and seekable.

    Raises:
      UserError: if ``path`` is not a plain file, or cannot be written (disk full, permission denied).
    """
    path = Path(path)
    kept = "the existing file is kept" if check_target(path) else "nothing is left behind"
    with _writing(path, kept) as temporary:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        with os.fdopen(os.open(temporary, flags, 0o666), "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        check_target(path)
        os.replace(temporary, path)
        _flush_folder(path.parent)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file completely or not at all; see ``atomic``."""
    with atomic(path) as file:
        file.write(content)


def write_text(path: str | Path, content: str) -> None:
    """Writes text as UTF-8, completely or not at all; undecodable bytes of file names are kept."""
    write_bytes(path, content.encode("utf-8", "surrogateescape"))


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as JSON, completely or not at all; see ``atomic``."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """A new folder that is renamed to ``path`` when the block ends without an error.

    Args:
      path: folder to create; must not exist.

    Yields:
      A temporary folder to fill.

    Raises:
      UserError: if ``path`` exists, or cannot be written.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise UserError(f"{path} already exists")
    with _writing(path, "nothing is left behind") as temporary:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        if os.path.lexists(path):
            raise UserError(f"{path} already exists")
        os.rename(temporary, path)
        _flush_folder(path.parent)


@contextlib.contextmanager
def locked(path: str | Path, busy: str) -> Iterator[None]:
    """Holds a lock file, so that two processes do not write the same thing at the same time.

    The operating system holds the lock and releases it when the process ends for any reason; the file only names the
    owner.

    Args:
      path: lock file; removed at the end.
      busy: message if another process holds the lock; the process number is appended.

    Raises:
      UserError: with ``busy``, or if the lock file cannot be written.
    """
    path = Path(path)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    made: list[Path] = []
    try:
        made = _make_parents(path.parent)
        while True:
            handle = os.open(path, flags, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(handle, 32).decode("ascii", "replace").strip()
                os.close(handle)
                raise UserError(f"{busy} (process {owner})") from None
            except OSError:  # a file system without locks
                break
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path, follow_symlinks=False).st_ino == os.fstat(handle).st_ino:
                    break
            os.close(handle)  # its owner has just removed it
        if os.read(handle, 32).strip(b"0123456789\n"):
            os.close(handle)
            raise UserError(f"{path}: is not a lock of this package")
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        os.write(handle, f"{os.getpid()}\n".encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(handle)
        for folder in made:  # those that are still empty
            with contextlib.suppress(OSError):
                folder.rmdir()


def without_nan(value: Any) -> Any:
    """A JSON-able value with ``None`` in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
