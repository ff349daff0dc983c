"""Files from outside: paths as typed, and reads that neither hang nor exhaust memory."""

import os
import stat
from pathlib import Path
from typing import IO

from idml_jax.errors import UserError, printable
from idml_jax.runtime.files import user_path

MAX_FILE_BYTES = 2**29


class FileError(UserError):
    """A single file is unusable; where files may be skipped, it is skipped and counted."""


def expand(path: str | os.PathLike) -> Path:
    """Makes a typed path absolute: ``~`` is the home folder, other paths are relative to the current folder.

    Raises:
      UserError: for an empty path, or the home folder of an unknown user.
    """
    return user_path(os.fspath(path))


def shown(name: str | os.PathLike) -> str:
    """A file name for messages and lists; see ``errors.printable``."""
    return printable(os.fspath(name))


def check_size(size: int, where: str, limit: int = MAX_FILE_BYTES) -> None:
    """Refuses a file that is too large.

    Raises:
      FileError: naming the file and the limit.
    """
    if size > limit:
        raise FileError(f"{where}: {size:,} bytes are more than the limit of {limit:,} for one file")


def open_file(path: str | os.PathLike) -> IO[bytes]:
    """Opens a regular file for reading; pipes, sockets and devices, which could block forever, are refused.

    Raises:
      FileError: if the file does not exist or is not regular.
    """
    where = shown(path)
    try:
        # Checked before opening, as opening a device can have effects, and again after, as it may have been replaced.
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
                f"{where}: a link to {target}, which does not exist; remove the link or restore the file"
            ) from error
        raise FileError(f"{where}: cannot be read ({error.strerror})") from error
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise FileError(f"{where}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def read_text(path: str | os.PathLike, limit: int, problem: str) -> str:
    """The text of a regular file, without a byte order mark; bytes that are not UTF-8 become surrogate escapes.

    Args:
      path: file to read.
      limit: largest accepted size in bytes.
      problem: message about a file that is no text.

    Raises:
      UserError: ``problem``, if the file holds a zero byte; as ``read_file`` otherwise.
    """
    data = read_file(path, limit)
    if b"\0" in data:
        raise UserError(problem)
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def read_file(path: str | os.PathLike, limit: int = MAX_FILE_BYTES) -> bytes:
    """The content of a regular file.

    Args:
      path: file to read.
      limit: largest accepted size in bytes.

    Raises:
      FileError: if the file cannot be read, is not a regular file or is too large; names the file.
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
