"""Blocks in a tar file: taken out of one cache directory, and put into another.

    blocks/<key>.kvc      one .kvc file a block, the blocks that it follows before it; and nothing else

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
import secrets
import stat
import tarfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from erllama.cache import kvc
from erllama.cache.maintenance import CacheFiles
from erllama.cache.tier import Problem
from erllama.errors import CacheError, CacheFormatError

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
        for member in _members(source, n_all):
            _key_of(member)
        source.seek(0)
    n_blocks = n_bytes = n_there = 0
    refused: list[Problem] = []
    for member, content in _contents(source, n_all):
        try:
            block, payload = kvc.decode(content)
            if block.key != _key_of(member):
                raise CacheFormatError("the file holds another block than its name says")
        except CacheFormatError as error:
            refused.append(Problem(files.tier, member.name, str(error)))
            continue
        if files.put(block, payload):
            n_blocks, n_bytes = n_blocks + 1, n_bytes + content.nbytes
        else:
            n_there += 1
        if n_all:
            on_done(min((member.offset_data + member.size) / n_all, 1.0))
    return Imported(n_blocks, n_bytes, n_there, refused)


def _contents(source: IO[bytes], n_all: int | None) -> Iterator[tuple[tarfile.TarInfo, memoryview]]:
    for member, opened in _opened_members(source, n_all):
        _key_of(member)
        try:
            content = np.empty(member.size, np.uint8).data  # not touched before it is filled
        except MemoryError:
            raise CacheFormatError(f"{member.name!r} of {member.size} bytes is more than memory holds") from None
        done = 0
        while done < member.size:
            with _reading():
                piece = opened.read(min(_CHUNK, member.size - done))
            if not piece:
                raise CacheFormatError(f"the archive ends within {member.name!r}")
            content[done : done + len(piece)] = piece
            done += len(piece)
        yield member, content.toreadonly()


def _members(source: IO[bytes], n_all: int | None) -> Iterator[tarfile.TarInfo]:
    for member, _ in _opened_members(source, n_all):
        yield member


def _opened_members(source: IO[bytes], n_all: int | None) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """The members, each checked as far as its header tells, and what reads it."""
    found = False
    with _reading(), tarfile.open(fileobj=source, mode="r:" if n_all is not None else "r|") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # there may be very many, and they are kept
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                raise CacheFormatError(f"{member.name!r} is no plain file; an archive of blocks has nothing else")
            most = _MOST_BYTES if n_all is None else max(n_all - member.offset_data, 0)
            if not 0 < member.size <= most:
                raise CacheFormatError(f"{member.name!r} of {member.size} bytes cannot be in this archive")
            opened = tar.extractfile(member)
            assert opened is not None
            found = True
            yield member, opened
    if not found:
        raise CacheFormatError("the archive is empty")


@contextmanager
def _reading() -> Iterator[None]:
    """What a tar file that is none makes of its reader, as one error."""
    try:
        yield
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
        if isinstance(error, CacheFormatError):
            raise
        raise CacheFormatError(f"it is no tar file that can be read: {error}") from None


def _key_of(member: tarfile.TarInfo) -> bytes:
    found = _NAME.fullmatch(member.name)
    if found is None:
        raise CacheFormatError(f"{member.name!r} is no block; an archive of blocks has nothing else")
    return bytes.fromhex(found[1])


def _length(source: IO[bytes]) -> int | None:
    """The bytes of a regular file; None for a stream."""
    with suppress(OSError, ValueError):
        status = os.fstat(source.fileno())
        return status.st_size if stat.S_ISREG(status.st_mode) else None
    return None


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that only its owner can read, in place when it is complete and not before.

    Raises:
        CacheError: it cannot be made.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CacheError(f"{path} cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
