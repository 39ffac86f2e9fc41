"""Blocks in a tar file: taken out of one cache directory, and put into another.

    blocks/<key>.kvc      one .kvc file a block, the blocks that it follows before it; and nothing else

The members are plain files, with headers of the kind ustar or GNU; extended
headers are refused before they are read.

An archive may come from anywhere, so nothing in it is believed. No name of it
becomes a path; a member is a plain file with a block's name, no longer than the
archive has bytes for; its content is a .kvc file that checks out, of the block
that the name says. What passes is stored by `CacheFiles.put`, as any process
stores a block. As with every cache directory, checksums find accidents, not
forgers: import what comes from somebody who may write there.
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

import numpy as np
import xxhash

from erllama.cache.admin.maintenance import CacheFiles
from erllama.cache.blocks import kvc
from erllama.cache.blocks.block import Block
from erllama.cache.tiers.tier import Problem
from erllama.errors import CacheFormatError

_NAME = re.compile(r"blocks/([0-9a-f]{64})\.kvc")
_MOST_BYTES = 1 << 36  # of one member: far above any block; where a stream cannot tell its own length
_CHUNK = 1 << 20

Told = Callable[[float], object]


class Exported(NamedTuple):
    """What went into an archive, and what could not: damaged blocks, and those that go on from them."""

    n_blocks: int
    n_bytes: int
    left_out: list[Problem]


class Imported(NamedTuple):
    """What was stored, how many blocks were there already, and what was refused."""

    n_blocks: int
    n_bytes: int
    n_there: int
    refused: list[Problem]


def export_blocks(
    files: CacheFiles, to: IO[bytes], namespaces: Collection[bytes] | None = None, on_done: Told = lambda done: None
) -> Exported:
    """Write stored blocks to a tar stream.

    Args:
        namespaces: of these alone; None for all.
        on_done: called with the fraction written.

    Raises:
        OSError: it cannot be written.
    """
    rows = [row for row in files.rows() if namespaces is None or row.block.namespace in namespaces]
    n_all = max(sum(row.n_bytes for row in rows), 1)
    written: set[bytes] = set()
    n_bytes, seen = 0, 0
    left_out: list[Problem] = []
    with tarfile.open(fileobj=to, mode="w|", format=tarfile.GNU_FORMAT) as tar:
        for row in rows:
            seen += row.n_bytes
            name = f"blocks/{row.block.key.hex()}{kvc.SUFFIX}"
            if row.block.parent != row.block.namespace and row.block.parent not in written:
                left_out.append(Problem(files.tier, name, "what it goes on from is not there"))
                continue
            try:
                block, payload = files.read(row.block)
            except FileNotFoundError:
                continue  # evicted meanwhile
            except CacheFormatError as error:
                left_out.append(Problem(files.tier, name, str(error)))
                continue
            member = tarfile.TarInfo(name)
            content = kvc.encode_header(block, payload) + payload
            member.size, member.mode, member.mtime = len(content), 0o600, row.last_used // 10**9
            tar.addfile(member, io.BytesIO(content))
            written.add(block.key)
            n_bytes += len(content)
            on_done(seen / n_all)
    return Exported(len(written), n_bytes, left_out)


def import_blocks(files: CacheFiles, source: IO[bytes], on_done: Told = lambda done: None) -> Imported:
    """Store the blocks of a tar stream.

    A member that is not what an archive of blocks has ends it. From a file, that is found before
    anything is stored; from a stream, what came before is sound, and stays. A block that is damaged is
    refused alone.

    Args:
        source: a file or a stream, opened for reading bytes.
        on_done: called with the fraction read, of a file.

    Raises:
        CacheFormatError: it is no archive of blocks.
        CacheError, OSError: a block cannot be stored.
    """
    n_all = _length(source)
    if n_all is not None:
        for _ in _members(source, n_all):
            pass
        source.seek(0)
    n_blocks = n_bytes = n_there = 0
    refused: list[Problem] = []
    for member in _members(source, n_all):
        try:
            block, payload = _content(member)
        except _ArchiveError:
            raise
        except CacheFormatError as error:
            refused.append(Problem(files.tier, member.name, str(error)))
            continue
        if files.put(block, payload):
            n_blocks, n_bytes = n_blocks + 1, n_bytes + member.size
        else:
            n_there += 1
        if n_all:
            on_done(min(member.end / n_all, 1.0))
    return Imported(n_blocks, n_bytes, n_there, refused)


class _ArchiveError(CacheFormatError):
    """The archive as a whole is refused, not one block of it."""


class _Member:
    """One block of an archive that is being read.

    Attributes:
        name: as the archive has it; a block's.
        key: that the name says.
        size: bytes.
        end: where it ends in the archive.
    """

    def __init__(self, source: IO[bytes], header: tarfile.TarInfo, start: int) -> None:
        self.name, self.size, self.end = header.name, header.size, start + header.size
        self.key = bytes.fromhex(_NAME.fullmatch(header.name)[1])  # type: ignore[index]  # it was checked
        self._source, self._left = source, header.size

    def read(self, n: int) -> bytes:
        """The next `n` bytes, or as many as are left of the member."""
        found = _read(self._source, min(n, self._left), f"within {self.name!r}")
        self._left -= len(found)
        return found

    def skip(self, *, seeking: bool) -> None:
        """Skip the rest of the member and its padding."""
        n = self._left + -self.size % tarfile.BLOCKSIZE
        self._left = 0
        if seeking:
            self._source.seek(n, os.SEEK_CUR)
        while n and not seeking:
            n -= len(_read(self._source, min(n, _CHUNK), f"within {self.name!r}"))


def _members(source: IO[bytes], n_all: int | None) -> Iterator[_Member]:
    """The members in turn, each checked as far as its header tells.

    Reads header by header, and refuses every kind but plain files. `tarfile` would first read the whole content of
    an extended header, of any length, and parse it in quadratic time.
    """
    at = 0
    while True:
        record = _read(source, tarfile.BLOCKSIZE, "without its end mark")
        at += tarfile.BLOCKSIZE
        if not any(record):
            break
        header = _header(record)
        most = _MOST_BYTES if n_all is None else max(n_all - at, 0)
        if not 0 < header.size <= most:
            raise _ArchiveError(f"{header.name!r} of {header.size} bytes cannot be in this archive")
        member = _Member(source, header, at)
        yield member
        member.skip(seeking=n_all is not None)
        at = member.end + -member.size % tarfile.BLOCKSIZE
    if at == tarfile.BLOCKSIZE:
        raise _ArchiveError("the archive is empty")
    if n_all is None:
        source.read(-at % tarfile.RECORDSIZE)  # whoever writes the stream writes whole records


def _header(record: bytes) -> tarfile.TarInfo:
    """What a header says, if it is one of a plain file with a block's name."""
    try:
        header = tarfile.TarInfo.frombuf(record, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise _ArchiveError(f"it is no tar file that can be read: {error}") from None
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise _ArchiveError(f"{header.name!r} is no plain file; an archive of blocks has nothing else")
    if _NAME.fullmatch(header.name) is None:
        raise _ArchiveError(f"{header.name!r} is no block; an archive of blocks has nothing else")
    return header


def _content(member: _Member) -> tuple[Block, memoryview]:
    """The checked block and payload of a member; memory is allocated only after the header has been checked."""
    block, payload_bytes, checksum = kvc.read_header_from(member.read, member.size)
    if block.key != member.key:
        raise CacheFormatError("the file holds another block than its name says")
    try:
        payload = np.empty(payload_bytes, np.uint8).data  # not touched before it is filled
    except MemoryError:
        raise _ArchiveError(f"{member.name!r} of {member.size} bytes is more than memory holds") from None
    done = 0
    while done < payload_bytes:
        piece = member.read(_CHUNK)
        payload[done : done + len(piece)] = piece
        done += len(piece)
    if xxhash.xxh3_128_digest(payload) != checksum:
        raise CacheFormatError("the payload's checksum does not match")
    return block, payload.toreadonly()


def _read(source: IO[bytes], n: int, where: str) -> bytes:
    """Exactly `n` bytes; a pipe may give fewer at a time."""
    found = source.read(n)
    while len(found) < n:
        piece = source.read(n - len(found))
        if not piece:
            raise _ArchiveError(f"the archive ends {where}")
        found += piece
    return found


def _length(source: IO[bytes]) -> int | None:
    """The bytes of a regular file; None for a stream."""
    with suppress(OSError, ValueError):
        status = os.fstat(source.fileno())
        return status.st_size if stat.S_ISREG(status.st_mode) else None
    return None
