"""Exports blocks of a cache directory to a tar file, and imports them into another directory.

    blocks/<key>.kvc      one .kvc file per block, after the blocks that it follows; no other members

The archive of an encrypted directory is encrypted: its members are named and encrypted as the files of the
directory. Importing them needs the key, and encrypts them again with the current key of the receiving directory.

The members are plain files with headers of the type ustar or GNU. Extended headers are refused before they are
read.

An archive may come from an untrusted place, so everything in it is checked. No name in it is used as a path. A
member must be a plain file with the name of a block, no longer than the archive has bytes for, and its content must
be a valid .kvc file of the block in the name. `CacheFiles.put` then stores the block, as any process stores one.
Checksums detect accidental damage, but not forgery: import only from people who may write to the directory. The
commands `erllama cache export` and `import` call this module.
"""

from __future__ import annotations

import io
import os
import re
import stat
import tarfile
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import IO, NamedTuple

from erllama.cache.admin.maintenance import CacheFiles
from erllama.cache.blocks import kvc
from erllama.cache.blocks.block import Block
from erllama.cache.tiers.file_names import block_name, is_encrypted_name
from erllama.cache.tiers.tier import Problem
from erllama.errors import CacheFormatError

_NAME = re.compile(r"blocks/([0-9a-f]{64}|[0-9a-f]{96})\.kvc")
_MAX_BYTES = 1 << 36  # of one member, if the length of the archive is unknown: far above any block
_CHUNK = 1 << 20

OnProgress = Callable[[float], object]


class ExportResult(NamedTuple):
    """Result of an export. `left_out` lists damaged blocks and their successors."""

    n_blocks: int
    n_bytes: int
    left_out: list[Problem]


class ImportResult(NamedTuple):
    """Result of an import: stored blocks and bytes, blocks that existed already, and refused blocks."""

    n_blocks: int
    n_bytes: int
    n_existing: int
    refused: list[Problem]


def export_blocks(
    files: CacheFiles,
    to: IO[bytes],
    namespaces: Collection[bytes] | None = None,
    on_done: OnProgress = lambda done: None,
) -> ExportResult:
    """Write stored blocks to a tar stream.

    Args:
        namespaces: keys of the namespaces to export; None for all.
        on_done: called with the fraction written.

    Raises:
        OSError: the stream cannot be written.
    """
    rows = [row for row in files.rows() if namespaces is None or row.block.namespace in namespaces]
    n_all = max(sum(row.n_bytes for row in rows), 1)
    written: set[bytes] = set()
    n_bytes, seen = 0, 0
    left_out: list[Problem] = []
    # Names of encrypted files are too long for GNU's headers. Those of ustar limit members to 8 GiB.
    header_format = tarfile.GNU_FORMAT if files.keys is None else tarfile.USTAR_FORMAT
    with tarfile.open(fileobj=to, mode="w|", format=header_format) as tar:
        for row in rows:
            seen += row.n_bytes
            file_name, content_key = files.file_name(row.block)
            name = f"blocks/{file_name}"
            if row.block.parent != row.block.namespace and row.block.parent not in written:
                left_out.append(Problem(files.tier, name, "the block before it is missing"))
                continue
            try:
                block, payload = files.read(row.block)
            except FileNotFoundError:
                continue  # evicted meanwhile
            except CacheFormatError as error:
                left_out.append(Problem(files.tier, name, str(error)))
                continue
            member = tarfile.TarInfo(name)
            content = b"".join(bytes(piece) for piece in kvc.encode(block, payload, content_key))
            member.size, member.mode, member.mtime = len(content), 0o600, row.last_used // 10**9
            tar.addfile(member, io.BytesIO(content))
            written.add(block.key)
            n_bytes += len(content)
            on_done(seen / n_all)
    return ExportResult(len(written), n_bytes, left_out)


def import_blocks(files: CacheFiles, source: IO[bytes], on_done: OnProgress = lambda done: None) -> ImportResult:
    """Store the blocks of a tar stream.

    A member that does not belong in an archive of blocks ends the import with an error. For a file, this is
    checked before any block is stored. For a stream, the blocks before that member are valid and stay stored. A
    damaged block is refused without effect on the others.

    Args:
        source: a file or a stream, opened for reading bytes.
        on_done: called with the fraction read; not called for a stream.

    Raises:
        CacheFormatError: it is not an archive of blocks.
        CacheKeyError: it is encrypted, and the directory is not or has other keys.
        CacheError, OSError: a block cannot be stored.
    """
    n_all = _length(source)
    if n_all is not None:
        for _ in _members(source, n_all):
            pass
        source.seek(0)
    n_blocks = n_bytes = n_existing = 0
    refused: list[Problem] = []
    for member in _members(source, n_all):
        try:
            block, payload = _content(files, member)
        except _ArchiveError:
            raise
        except CacheFormatError as error:
            refused.append(Problem(files.tier, member.name, str(error)))
            continue
        if files.put(block, payload):
            n_blocks, n_bytes = n_blocks + 1, n_bytes + member.size
        else:
            n_existing += 1
        if n_all:
            on_done(min(member.end / n_all, 1.0))
    return ImportResult(n_blocks, n_bytes, n_existing, refused)


class _ArchiveError(CacheFormatError):
    """The whole archive is invalid, not one block of it."""


class _Member:
    """One block of an archive that is being read.

    Attributes:
        name: name in the archive.
        file_name: name without the folder.
        size: size in bytes.
        end: offset in the archive at which the member ends.
    """

    def __init__(self, source: IO[bytes], header: tarfile.TarInfo, start: int) -> None:
        self.name, self.size, self.end = header.name, header.size, start + header.size
        self.file_name = header.name.removeprefix("blocks/")
        self._source, self._left = source, header.size

    def read(self, n: int) -> bytes:
        """Read the next `n` bytes, or as many as the member has left."""
        found = _read(self._source, min(n, self._left), f"within {self.name!r}")
        self._left -= len(found)
        return found

    def read_into(self, buffer: memoryview) -> int:
        """Read the next bytes into a buffer; return how many."""
        found = self.read(min(buffer.nbytes, _CHUNK))
        buffer[: len(found)] = found
        return len(found)

    def skip(self, *, seeking: bool) -> None:
        """Skip the rest of the member and its padding."""
        n = self._left + -self.size % tarfile.BLOCKSIZE
        self._left = 0
        if seeking:
            self._source.seek(n, os.SEEK_CUR)
        while n and not seeking:
            n -= len(_read(self._source, min(n, _CHUNK), f"within {self.name!r}"))


def _members(source: IO[bytes], n_all: int | None) -> Iterator[_Member]:
    """Yield the members in order, after checking the header of each.

    Reads the headers itself, and refuses every type but plain files. `tarfile` would first read the whole content
    of an extended header, of any length, and parse it in quadratic time.
    """
    at = 0
    while True:
        record = _read(source, tarfile.BLOCKSIZE, "without its end mark")
        at += tarfile.BLOCKSIZE
        if not any(record):
            break
        header = _header(record)
        limit = _MAX_BYTES if n_all is None else max(n_all - at, 0)
        if not 0 < header.size <= limit:
            raise _ArchiveError(f"{header.name!r} of {header.size} bytes cannot be in this archive")
        member = _Member(source, header, at)
        yield member
        member.skip(seeking=n_all is not None)
        at = member.end + -member.size % tarfile.BLOCKSIZE
    if at == tarfile.BLOCKSIZE:
        raise _ArchiveError("the archive is empty")
    if n_all is None:
        source.read(-at % tarfile.RECORDSIZE)  # writers of tar files write whole records


def _header(record: bytes) -> tarfile.TarInfo:
    """Parse a header, and check that it is one of a plain file with the name of a block."""
    try:
        header = tarfile.TarInfo.frombuf(record, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise _ArchiveError(f"it is not a readable tar file: {error}") from None
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise _ArchiveError(f"{header.name!r} is not a plain file; an archive of blocks contains only plain files")
    if _NAME.fullmatch(header.name) is None:
        raise _ArchiveError(
            f"{header.name!r} is not the name of a block; an archive of blocks contains only blocks"
        )
    return header


def _content(files: CacheFiles, member: _Member) -> tuple[Block, memoryview]:
    """Read and verify the block and payload of a member. Allocates memory only after the header is verified."""
    key, content_key = block_name(member.file_name), None
    if key is not None and is_encrypted_name(key):
        key, content_key = files.key_of_name(key)
    header = kvc.read_header_from(member.read_into, member.size, content_key)
    if header.block.key != key:
        raise CacheFormatError("the file contains another block than its name says")
    try:
        return header.block, kvc.read_payload_from(member.read_into, header).data.toreadonly()
    except MemoryError:
        raise _ArchiveError(f"{member.name!r} of {member.size} bytes is more than memory holds") from None


def _read(source: IO[bytes], n: int, where: str) -> bytes:
    """Read exactly `n` bytes. One read of a pipe may return fewer."""
    found = source.read(n)
    while len(found) < n:
        piece = source.read(n - len(found))
        if not piece:
            raise _ArchiveError(f"the archive ends {where}")
        found += piece
    return found


def _length(source: IO[bytes]) -> int | None:
    """Return the size of a regular file; None for a stream."""
    with suppress(OSError, ValueError):
        status = os.fstat(source.fileno())
        return status.st_size if stat.S_ISREG(status.st_mode) else None
    return None
