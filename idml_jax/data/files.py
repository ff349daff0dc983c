"""Files that come from outside: paths as they are typed, and reads that neither hang nor fill the memory."""

import os
import stat
from pathlib import Path
from typing import IO

from idml_jax.errors import UserError, printable
from idml_jax.runtime.files import user_path

MAX_FILE_BYTES = 2**29


class FileError(UserError):
    """One file cannot be used; where files may be skipped, it is left out with a count."""


def expand(path: str | os.PathLike) -> Path:
    """A path as typed, made absolute: ``~`` is the home folder, all else is relative to the current folder.

    Raises:
      UserError: for an empty path, or the home folder of an unknown user.
    """
    return user_path(os.fspath(path))


def shown(name: str | os.PathLike) -> str:
    """The name of a file for messages and lists, see ``errors.printable``."""
    return printable(os.fspath(name))


def check_size(size: int, where: str, limit: int = MAX_FILE_BYTES) -> None:
    """Refuses a file of unreasonable size.

    Raises:
      FileError: naming the file and the limit.
    """
    if size > limit:
        raise FileError(f"{where}: {size:,} bytes are more than the limit of {limit:,} for one file")


def open_file(path: str | os.PathLike) -> IO[bytes]:
    """Opens a regular file for reading; pipes, sockets and devices, which could block for ever, are refused.

    Raises:
      FileError: if there is no such file, or it is not a regular one.
    """
    where = shown(path)
    try:
        # Looked at first, as opening a device can have effects; and again, as it may have been exchanged meanwhile.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileError(f"{where}: not a regular file")
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        file = os.fdopen(handle, "rb")
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            file.close()
            raise FileError(f"{where}: not a regular file")
        return file
    except FileNotFoundError as error:
        if os.path.islink(path):
            target = shown(os.readlink(os.fspath(path)))
            raise FileError(
                f"{where}: a link to {target}, which is not there; remove it or bring the file back"
            ) from error
        raise FileError(f"{where}: cannot be read ({error.strerror})") from error
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise FileError(f"{where}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def read_file(path: str | os.PathLike, limit: int = MAX_FILE_BYTES) -> bytes:
    """The content of a regular file.

    Args:
      path: of the file.
      limit: size in bytes above which it is refused.

    Raises:
      FileError: naming the file, if it cannot be read, is not a regular file or is too large.
    """
    with open_file(path) as file:
        try:
            check_size(os.fstat(file.fileno()).st_size, shown(path), limit)
            data = file.read(limit + 1)
        except (OSError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or "not enough memory"
            raise FileError(f"{shown(path)}: cannot be read ({reason})") from error
    check_size(len(data), shown(path), limit)  # it may have grown
    return data
