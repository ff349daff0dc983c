"""Reads the files of a folder, tar or zip one by one: nothing is unpacked, and only one file is in memory at a time.

Archives inside folders, and tars inside tars (ImageNet), are entered like folders. Archives are not trusted: names that
point outside, links, devices and overly large files are refused. Checksums are verified, and the end of an archive must
be as its format requires: a truncated or damaged archive is reported, not silently accepted.
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
# A zip inside another archive is copied to disk first.
MAX_INNER_BYTES = 2**31
# Zeros after the end of a tar (written for tape drives) and other padding.
_MAX_PADDING = 2**30
# Long names and attributes are stored in separate headers.
_MAX_HEADER = 2**20
_MAX_DEPTH = 4
_CHUNK = 2**20


class Entry(NamedTuple):
    """A file in a source.

    Attributes:
      name: path relative to the source, with ``/``; an archive counts as a folder.
      read: returns the file's bytes, or raises a ``FileError`` that names file and archive; valid only until the next
        entry is requested.
    """

    name: str
    read: Callable[[], bytes]


def is_archive(name: str) -> bool:
    """Whether a file name has the extension of an archive."""
    return name.lower().endswith(ARCHIVES)


def _enter_all(name: str) -> bool:
    return True


class _Walk(NamedTuple):
    """Options of a walk: which archives to enter, and the record of what it leaves out."""

    enter: Callable[[str], bool]
    passed: folders.Passed


def walk(
    source: Path, enter: Callable[[str], bool] = _enter_all, passed: folders.Passed | None = None
) -> Iterator[Entry]:
    """Yields all files of a source in an order that depends on the source only.

    Args:
      source: folder or archive.
      enter: decides from the name of an archive whether to enter it; otherwise the archive itself is an entry.
      passed: records what is left out: hidden and system files, cyclic links.

    Yields:
      Entries; folders sorted by name, archives in their own order.

    Raises:
      UserError: if the source is missing, damaged, or holds something that is refused (see the module's docstring).
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
    except Exception as error:  # damaged archives can raise anything
        after = f", the last {shown(last)}" if last else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{where}: damaged or cut short after {count:,} files{after} ({reason}); download or pack it again"
        ) from error


class _Member(NamedTuple):
    """A file in an archive.

    Attributes:
      raw: name as stored in the archive.
      name: normalised name; ``None`` for hidden and system files.
      size: size in bytes according to the header.
      open: opens the file.
      chunk: number of bytes to read at a time.
      seekable: whether the opened file supports random access.
      crc: checksum to verify, if opening the file does not verify it.
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
            raise ValueError("its length differs from its header")
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
    """The normalised name of a member, ``None`` for system files; a name that points outside is refused."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        raise UserError(f"{where}: member {name!r} points outside the archive; refused")
    return None if not path.parts or any(map(folders.is_litter, path.parts)) else str(path)


class _StrictInfo(tarfile.TarInfo):
    """Tar header that makes a bad header an error; ``tarfile`` would take it as the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_StrictInfo":
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError("its end mark is missing") from error
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
        # Not compressed: unread files are skipped by seeking.
        mode = "r:" if plain and seekable else "r|"
        # tarfile does not close a stream that is passed in.
        tar = stack.enter_context(tarfile.open(fileobj=stream, mode=mode, tarinfo=_StrictInfo))  # type: ignore[call-overload]

        def opened(info: tarfile.TarInfo) -> IO[bytes]:
            found = tar.extractfile(info)
            assert found is not None  # a regular file has content
            return found

        place = -1
        while (info := tar.next()) is not None:
            tar.members = []  # otherwise the headers of the whole archive stay in memory
            if info.size < 0 or info.offset <= place:
                raise tarfile.ReadError(f"{info.name}: its headers point backwards")
            place = info.offset
            if info.isdir():
                continue
            name = _safe_name(info.name, where)
            if not info.isfile():
                raise UserError(f"{where}: member {info.name!r} is a link or a device; refused")
            yield _Member(info.name, name, info.size, partial(opened, info), _CHUNK, seekable and plain)
        _check_end(tar)


def _uncompressed(file: IO[bytes]) -> IO[bytes]:
    """The file itself, or its decompressed content, with checksums verified at the end."""
    head = file.peek(6)[:6]  # type: ignore[attr-defined]
    if head.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if head.startswith(b"BZh"):
        return cast(IO[bytes], bz2.BZ2File(file))
    if head.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        return cast(IO[bytes], lzma.LZMAFile(file))
    return file


def _check_end(tar: tarfile.TarFile) -> None:
    """Reads past the end of a tar: only zeros may follow, and a compressed tar has its checksum there."""
    rest = cast(IO[bytes], tar.fileobj)
    padding = 0
    while data := rest.read(_CHUNK):
        padding += len(data)
        if data.count(0) != len(data):
            raise tarfile.ReadError("more data follow its end mark")
        if padding > _MAX_PADDING:
            raise tarfile.ReadError(f"more than {_MAX_PADDING:,} zeros follow its end mark")


def _zip_members(file: IO[bytes], where: str, seekable: bool) -> Iterator[_Member]:
    with contextlib.ExitStack() as stack:
        if not seekable:
            # The table of a zip is at its end, so a zip inside an archive must be copied first.
            file = _copied(file, stack.enter_context(tempfile.TemporaryFile()), where)
        archive = stack.enter_context(zipfile.ZipFile(file))
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            if info.is_dir():
                continue
            name = _safe_name(info.filename, where)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                raise UserError(f"{where}: member {info.filename!r} is a link or a device; refused")
            # LZMA expands a few bytes to megabytes, and zipfile does not limit the output of one read.
            chunk = 4096 if info.compress_type == zipfile.ZIP_LZMA else _CHUNK
            crc = info.CRC if info.compress_type == zipfile.ZIP_BZIP2 else None
            opened = partial(_open_zipped, archive, info)
            yield _Member(info.filename, name, info.file_size, opened, chunk, False, crc)


def _open_zipped(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    if info.flag_bits & 1 or info.compress_type == 99:
        raise ValueError("it is encrypted; unpack the archive with its password first")
    if info.compress_type != zipfile.ZIP_BZIP2:
        return archive.open(info)
    # bzip2 expands a few bytes to gigabytes: zipfile yields compressed bytes, and the decoder only what is requested.
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
    """Lists a source and reads small files from it, in one pass before the images are read.

    Args:
      source: folder or archive.
      names: decides from the base name of a file whether to read it.
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
