"""Files of a folder, a tar or a zip, one after the other: nothing is unpacked and no more than one file is in memory.

Archives inside folders, and tars inside tars (ImageNet), are entered like folders. An archive is foreign: names that
lead out of it, links and devices are refused, and so is a file of unreasonable size.
"""

import contextlib
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from idml_jax.errors import UserError

ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".zip")
MAX_FILE_BYTES = 2**29
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


class Entry(NamedTuple):
    """A file somewhere in a source.

    Attributes:
      name: its path from the source on, with ``/``; an archive counts as a folder.
      read: its bytes; only until the next entry is asked for.
    """

    name: str
    read: Callable[[], bytes]


def is_archive(name: str) -> bool:
    """Whether a file name has an archive's ending."""
    return name.lower().endswith(ARCHIVES)


def walk(source: Path, enter: Callable[[str], bool] = lambda name: True) -> Iterator[Entry]:
    """All files of a source in an order that depends on the source alone.

    Args:
      source: a folder or an archive.
      enter: for every archive, given its name, whether to enter it; else it is an entry itself.

    Yields:
      Entries; folders sorted by name, archives in their own order.

    Raises:
      UserError: if the source is missing, damaged or holds what it should not (see the module's docstring).
    """
    if source.is_dir():
        yield from _walk_folder(source, "", enter, ())
    elif not source.exists():
        raise UserError(f"{source}: no such file or folder (--source)")
    elif is_archive(source.name):
        with open(source, "rb") as file:
            yield from _walk_archive(file, source.name, str(source), enter, seekable=True)
    else:
        raise UserError(f"{source}: neither a folder nor an archive ({', '.join(e[1:] for e in ARCHIVES)})")


def _walk_folder(folder: Path, prefix: str, enter: Callable[[str], bool], above: tuple[Path, ...]) -> Iterator[Entry]:
    above = (*above, folder.resolve())
    with os.scandir(folder) as found:
        items = sorted(found, key=lambda item: item.name)
    for item in items:
        name, path = prefix + item.name, Path(item.path)
        if _is_litter(item.name):
            continue
        if item.is_dir():
            if path.resolve() not in above:  # a link to where we come from
                yield from _walk_folder(path, name + "/", enter, above)
        elif is_archive(item.name) and enter(name):
            with open(path, "rb") as file:
                yield from _walk_archive(file, name, str(path), enter, seekable=True)
        else:
            yield Entry(name, partial(_read_file, path))


def _is_litter(name: str) -> bool:
    """Hidden files, and what macOS adds."""
    return name.startswith(".") or name == "__MACOSX"


def _read_file(path: Path) -> bytes:
    try:
        _check_size(path.stat().st_size, str(path))
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _check_size(size: int, where: str) -> None:
    if size > MAX_FILE_BYTES:
        raise UserError(f"{where}: {size:,} bytes are more than the limit of {MAX_FILE_BYTES:,} for one file")


def _walk_archive(
    file: IO[bytes], name: str, where: str, enter: Callable[[str], bool], seekable: bool
) -> Iterator[Entry]:
    members = _zip_members if name.lower().endswith(".zip") else _tar_members
    count = 0
    try:
        for member, read, open_member, member_seekable in members(file, where, seekable):
            inner = f"{name}/{member}"
            if is_archive(member) and enter(inner):
                with open_member() as opened:
                    yield from _walk_archive(opened, inner, f"{where}: {member}", enter, member_seekable)
            else:
                yield Entry(inner, read)
            count += 1
    except _DAMAGE as error:
        raise UserError(f"{where}: damaged or cut short after {count:,} files ({error}); get it again") from error


def _safe_name(name: str, where: str) -> str | None:
    """A member's name in plain form, ``None`` for litter; one that leads out of the archive is refused."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        raise UserError(f"{where}: member {name!r} leads out of the archive; refused")
    return None if not path.parts or any(map(_is_litter, path.parts)) else str(path)


Member = tuple[str, Callable[[], bytes], Callable[[], IO[bytes]], bool]


def _tar_members(file: IO[bytes], where: str, seekable: bool) -> Iterator[Member]:
    with _open_tar(file, where, seekable) as tar:
        plain = tar.fileobj is file

        def _opened(info: tarfile.TarInfo) -> IO[bytes]:
            opened = tar.extractfile(info)
            assert opened is not None  # of a regular file it is there
            return opened

        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else the headers of the whole archive stay in memory
            if info.isdir():
                continue
            name = _safe_name(info.name, where)
            if not info.isfile():
                raise UserError(f"{where}: member {info.name!r} is a link or a device; refused")
            if name is None:
                continue

            def read(info: tarfile.TarInfo = info) -> bytes:
                _check_size(info.size, f"{where}: {info.name}")
                data = _opened(info).read()
                if len(data) != info.size:
                    raise tarfile.ReadError("unexpected end of data")
                return data

            yield name, read, partial(_opened, info), seekable and plain


def _open_tar(file: IO[bytes], where: str, seekable: bool) -> tarfile.TarFile:
    if not seekable:
        return tarfile.open(fileobj=file, mode="r|*")
    try:
        # Not compressed: files that nobody reads are jumped over.
        return tarfile.open(fileobj=file, mode="r:")
    except tarfile.ReadError:
        file.seek(0)
        return tarfile.open(fileobj=file, mode="r|*")


def _zip_members(file: IO[bytes], where: str, seekable: bool) -> Iterator[Member]:
    with contextlib.ExitStack() as stack:
        if not seekable:
            # A zip's table stands at its end, so a zip within an archive has to be copied first.
            copy = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, copy)
            file = copy
        archive = stack.enter_context(zipfile.ZipFile(file))
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            if info.is_dir():
                continue
            name = _safe_name(info.filename, where)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                raise UserError(f"{where}: member {info.filename!r} is a link or a device; refused")
            if name is None:
                continue
            if info.flag_bits & 1:
                raise UserError(f"{where}: member {info.filename!r} is encrypted; unpack it with its password first")

            def read(info: zipfile.ZipInfo = info) -> bytes:
                _check_size(info.file_size, f"{where}: {info.filename}")
                with archive.open(info) as opened:
                    data = opened.read(info.file_size + 1)
                if len(data) != info.file_size:
                    raise zipfile.BadZipFile(f"{info.filename}: not as long as its header says")
                return data

            yield name, read, partial(archive.open, info), False


def read_small(
    source: Path, names: Callable[[str], bool], enter: Callable[[str], bool] = lambda name: True
) -> tuple[list[str], dict[str, bytes]]:
    """One pass over a source before its images are read.

    Args:
      source: folder or archive.
      names: which files to read, by their base name.
      enter: as in ``walk``.

    Returns:
      The names of all files, and the content of the wanted ones by name.
    """
    everything, contents = [], {}
    for entry in walk(source, enter):
        everything.append(entry.name)
        if names(entry.name.rsplit("/", 1)[-1]):
            contents[entry.name] = entry.read()
    return everything, contents
