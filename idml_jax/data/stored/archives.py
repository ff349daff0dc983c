"""Files of a folder, a tar or a zip, one after the other: nothing is unpacked and no more than one file is in memory.

Archives inside folders, and tars inside tars (ImageNet), are entered like folders. An archive is foreign: names that
lead out of it, links and devices are refused, and so is a file of unreasonable size. Checksums are verified, and an
archive has to end as its format says: what is cut short or damaged is told, not taken for the end.
"""

import bz2
import contextlib
import copy
import gzip
import lzma
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast

from idml_jax.data import folders
from idml_jax.data.files import FileError, check_size, open_file, read_file, shown
from idml_jax.errors import UserError

ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".zip")
# A zip inside another archive is copied to the disk first.
MAX_INNER_BYTES = 2**31
# Zeros behind the end of a tar, which tape drives want, and other padding.
_MAX_PADDING = 2**30
# Long names and attributes stand in headers of their own.
_MAX_HEADER = 2**20
_MAX_DEPTH = 4
_CHUNK = 2**20


class Entry(NamedTuple):
    """A file somewhere in a source.

    Attributes:
      name: its path from the source on, with ``/``; an archive counts as a folder.
      read: its bytes, or a ``FileError`` that names file and archive; only until the next entry is asked for.
    """

    name: str
    read: Callable[[], bytes]


def is_archive(name: str) -> bool:
    """Whether a file name has an archive's ending."""
    return name.lower().endswith(ARCHIVES)


def _enter_all(name: str) -> bool:
    return True


class _Walk(NamedTuple):
    """What a walk is told: which archives to enter, and who hears what it leaves out."""

    enter: Callable[[str], bool]
    passed: folders.Passed


def walk(
    source: Path, enter: Callable[[str], bool] = _enter_all, passed: folders.Passed | None = None
) -> Iterator[Entry]:
    """All files of a source in an order that depends on the source alone.

    Args:
      source: a folder or an archive.
      enter: for every archive, given its name, whether to enter it; else it is an entry itself.
      passed: receives what is left out: hidden and system files, links that lead round in circles.

    Yields:
      Entries; folders sorted by name, archives in their own order.

    Raises:
      UserError: if the source is missing, damaged or holds what it should not (see the module's docstring).
    """
    told = _Walk(enter, passed or folders.Passed())
    if source.is_dir():
        for name, path in folders.walk(source, told.passed):
            if is_archive(name) and enter(name):
                with open_file(path) as file:
                    yield from _walk_archive(file, name, shown(path), told, seekable=True, depth=1)
            else:
                yield Entry(name, partial(read_file, path))
    elif not source.exists():
        raise UserError(f"{shown(source)}: no such file or folder (--source)")
    elif is_archive(source.name):
        with open_file(source) as file:
            yield from _walk_archive(file, source.name, shown(source), told, seekable=True, depth=1)
    else:
        raise UserError(f"{shown(source)}: neither a folder nor an archive ({', '.join(e[1:] for e in ARCHIVES)})")


def _walk_archive(
    file: IO[bytes], name: str, where: str, told: _Walk, *, seekable: bool, depth: int
) -> Iterator[Entry]:
    if depth > _MAX_DEPTH:
        raise UserError(f"{where}: archives within archives more than {_MAX_DEPTH} deep; refused")
    members = _zip_members if name.lower().endswith(".zip") else _tar_members
    count, last = 0, ""
    try:
        for member in members(file, where, seekable):
            if member.name is None:
                told.passed.add(folders.HIDDEN, f"{name}/{member.raw}")
                continue
            inner = f"{name}/{member.name}"
            if is_archive(member.name) and told.enter(inner):
                with member.open() as opened:
                    yield from _walk_archive(
                        opened, inner, f"{where}: {member.name}", told, seekable=member.seekable, depth=depth + 1
                    )
            else:
                yield Entry(inner, partial(_read_member, member, where))
            count, last = count + 1, member.name
    except UserError:
        raise
    except Exception as error:  # what damaged archives lead to is without end
        after = f", the last {shown(last)}" if last else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{where}: damaged or cut short after {count:,} files{after} ({reason}); get it again, or pack it again"
        ) from error


class _Member(NamedTuple):
    """A file in an archive.

    Attributes:
      raw: its name as it stands there.
      name: that in plain form; ``None`` for hidden and system files.
      size: in bytes, as its header says.
      open: opens it.
      chunk: how much to read at a time.
      seekable: whether, opened, it can be read at any place.
      crc: checksum to verify, where opening it does not see to that.
    """

    raw: str
    name: str | None
    size: int
    open: Callable[[], IO[bytes]]
    chunk: int
    seekable: bool
    crc: int | None = None


def _read_member(member: _Member, where: str) -> bytes:
    check_size(member.size, f"{where}: {shown(member.raw)}")
    parts, left = [], member.size + 1
    try:
        with member.open() as opened:
            while left > 0 and (part := opened.read(min(left, member.chunk))):
                parts.append(part)
                left -= len(part)
        if left != 1:
            raise ValueError("not as long as its header says")
        data = b"".join(parts)
        if member.crc is not None and zlib.crc32(data) != member.crc:
            raise ValueError("Bad CRC-32")
        return data
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileError(f"{where}: {shown(member.raw)}: cannot be read from the archive ({reason})") from error


def _safe_name(name: str, where: str) -> str | None:
    """A member's name in plain form, ``None`` for litter; one that leads out of the archive is refused."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        raise UserError(f"{where}: member {name!r} leads out of the archive; refused")
    return None if not path.parts or any(map(folders.is_litter, path.parts)) else str(path)


class _StrictInfo(tarfile.TarInfo):
    """Headers of a tar, of which a bad one is an error; ``tarfile`` takes it for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictInfo":
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it stops without the mark of its end") from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} in a header") from error
        if info.size < 0:
            raise tarfile.ReadError("a file of negative size")
        if info.type in _LONG_HEADERS and info.size > _MAX_HEADER:
            raise tarfile.ReadError(f"a header of {info.size:,} bytes")
        return info


_LONG_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def _tar_members(file: IO[bytes], where: str, seekable: bool) -> Iterator[_Member]:
    with contextlib.ExitStack() as stack:
        stream = _uncompressed(file)
        plain = stream is file
        if not plain:
            stack.enter_context(stream)
        # Not compressed: files that nobody reads are jumped over.
        mode = "r:" if plain and seekable else "r|"
        # tarfile leaves the stream open that it is given.
        tar = stack.enter_context(tarfile.open(fileobj=stream, mode=mode, tarinfo=_StrictInfo))  # type: ignore[call-overload]

        def opened(info: tarfile.TarInfo) -> IO[bytes]:
            found = tar.extractfile(info)
            assert found is not None  # of a regular file it is there
            return found

        place = -1
        while (info := tar.next()) is not None:
            tar.members = []  # else the headers of the whole archive stay in memory
            if info.size < 0 or info.offset <= place:
                raise tarfile.ReadError(f"{info.name}: its headers lead backwards")
            place = info.offset
            if info.isdir():
                continue
            name = _safe_name(info.name, where)
            if not info.isfile():
                raise UserError(f"{where}: member {info.name!r} is a link or a device; refused")
            yield _Member(info.name, name, info.size, partial(opened, info), _CHUNK, seekable and plain)
        _check_end(tar)


def _uncompressed(file: IO[bytes]) -> IO[bytes]:
    """The file itself, or what it holds in compressed form, checksums verified at its end."""
    head = file.peek(6)[:6]  # type: ignore[attr-defined]
    if head.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if head.startswith(b"BZh"):
        return cast(IO[bytes], bz2.BZ2File(file))
    if head.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        return cast(IO[bytes], lzma.LZMAFile(file))
    return file


def _check_end(tar: tarfile.TarFile) -> None:
    """Reads on behind the end of a tar: there may be zeros only, and a compressed one has its checksum there."""
    rest = cast(IO[bytes], tar.fileobj)
    padding = 0
    while data := rest.read(_CHUNK):
        padding += len(data)
        if data.count(0) != len(data):
            raise tarfile.ReadError("more follows behind the mark of its end")
        if padding > _MAX_PADDING:
            raise tarfile.ReadError(f"more than {_MAX_PADDING:,} zeros behind the mark of its end")


def _zip_members(file: IO[bytes], where: str, seekable: bool) -> Iterator[_Member]:
    with contextlib.ExitStack() as stack:
        if not seekable:
            # A zip's table stands at its end, so a zip within an archive has to be copied first.
            file = _copied(file, stack.enter_context(tempfile.TemporaryFile()), where)
        archive = stack.enter_context(zipfile.ZipFile(file))
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            if info.is_dir():
                continue
            name = _safe_name(info.filename, where)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                raise UserError(f"{where}: member {info.filename!r} is a link or a device; refused")
            # LZMA makes megabytes of a few bytes, and zipfile does not bound what it makes of one read.
            chunk = 4096 if info.compress_type == zipfile.ZIP_LZMA else _CHUNK
            crc = info.CRC if info.compress_type == zipfile.ZIP_BZIP2 else None
            opened = partial(_open_zipped, archive, info)
            yield _Member(info.filename, name, info.file_size, opened, chunk, False, crc)


def _open_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    if info.flag_bits & 1 or info.compress_type == 99:
        raise ValueError("it is encrypted; unpack the archive with its password first")
    if info.compress_type != zipfile.ZIP_BZIP2:
        return archive.open(info)
    # bzip2 makes gigabytes of a few bytes: zipfile gives the compressed bytes, and the decoder what is asked for.
    packed = copy.copy(info)
    packed.compress_type, packed.file_size = zipfile.ZIP_STORED, info.compress_size
    del packed.CRC
    return cast(IO[bytes], bz2.BZ2File(archive.open(packed)))


def _copied(file: IO[bytes], target: IO[bytes], where: str) -> IO[bytes]:
    free, size = shutil.disk_usage(tempfile.gettempdir()).free, 0
    while data := file.read(2**13):
        size += len(data)
        if size > min(MAX_INNER_BYTES, free):
            raise UserError(
                f"{where}: a zip of more than {min(MAX_INNER_BYTES, free):,} bytes within an archive; unpack the outer "
                "archive first"
            )
        target.write(data)
    target.seek(0)
    return target


def read_small(
    source: Path, names: Callable[[str], bool], enter: Callable[[str], bool] = _enter_all
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
