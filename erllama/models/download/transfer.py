"""Gets one file over HTTP: resumed where an earlier attempt ended, and checked before it has its name.

The bytes go to a partial file beside the target. A process that ends leaves it, and the next call continues it. The
digest is checked over all of it. A partial file with the wrong digest is deleted, and the target never exists with
wrong content. A digest is a SHA-256, or the SHA-1 by which git names small files.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Protocol

from erllama.cache.sizes import format_size
from erllama.errors import DownloadError

_CHUNK = 1 << 20  # bytes of one read of the partial file
_ATTEMPTS = 5  # in a row that bring no byte
_PAUSE = 1.0  # seconds before another attempt; doubled each time
_RESERVE = 64 << 20  # bytes that stay free on the disk

Progress = Callable[[int], None]


class Source(Protocol):
    """Where a file comes from."""

    def open(self, offset: int) -> AbstractContextManager[tuple[int, Callable[[], bytes]]]:
        """Ask for the file from an offset.

        Returns:
            A context manager of the HTTP status, and of a function that returns the next piece of the body, empty
            at its end.

        Raises:
            TransferError: the connection fails, here or while pieces are read. Another attempt may succeed.
            DownloadError: another attempt would fail, too.
        """
        ...


class TransferError(Exception):
    """A connection failed. Another attempt may succeed."""


def get_file(source: Source, target: Path, partial: Path, n_bytes: int, digest: str, on_progress: Progress) -> None:
    """Get a file, and rename it to `target` when it is complete and its digest is right.

    Args:
        partial: the partial file, on the file system of `target`. Continued if it exists.
        digest: in hex: a SHA-256, or git's SHA-1 of a blob.
        on_progress: called with the bytes that exist, and may raise to end the transfer.

    Raises:
        DownloadError: the connection fails again and again, the disk is full, another process gets the same file,
            or the digest is wrong.
        OSError: the directory cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise DownloadError(f"another process downloads {target.name}; wait until it has ended") from None
        if not partial.exists():  # another process has got it in between
            return
        if has_digest(target, n_bytes, digest):
            partial.unlink()
            return
        _check_space(partial.parent, n_bytes - _size(file), target.name)
        _Transfer(source, file, target.name, n_bytes, on_progress).run()
        file.flush()
        file.seek(0)
        if (found := _digest(file, n_bytes, digest)) != digest:
            partial.unlink(missing_ok=True)
            kind = "sha1" if _is_of_git(digest) else "sha256"
            raise DownloadError(
                f"{target.name} has {kind} {found}, expected {digest}; it is deleted. Download it again"
            )
        file.flush()
        os.fsync(file.fileno())
        partial.replace(target)


class _Transfer:
    """The attempts to complete one partial file."""

    def __init__(self, source: Source, file: IO[bytes], name: str, n_bytes: int, on_progress: Progress) -> None:
        self._source, self._file, self._name = source, file, name
        self._n_bytes, self._on_progress = n_bytes, on_progress

    def run(self) -> None:
        """Attempt until the file has all its bytes."""
        if _size(self._file) > self._n_bytes:  # of another version, or of a server that sent too much
            self._file.truncate(0)
        failures = 0
        while (size := _size(self._file)) < self._n_bytes:
            self._on_progress(size)
            try:
                self._attempt(size)
                problem = "the server ended the connection early"
            except TransferError as error:
                problem = str(error)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise DownloadError(f"the disk is full; {self._name} continues once there is space") from None
                raise
            failures = 0 if _size(self._file) > size else failures + 1
            if failures >= _ATTEMPTS:
                raise DownloadError(
                    f"{self._name} cannot be downloaded: {problem}. {format_size(size)} of "
                    f"{format_size(self._n_bytes)} are kept; the next attempt continues there"
                )
            if failures:
                time.sleep(_PAUSE * 2 ** (failures - 1))
        self._on_progress(self._n_bytes)

    def _attempt(self, size: int) -> None:
        """Append what one response brings."""
        with self._source.open(size) as (status, next_piece):
            if status == 416 or (status == 200 and size):  # the server cannot continue: begin again
                self._file.truncate(0)
                size = 0
                if status == 416:
                    return
            while piece := next_piece():
                if size + len(piece) > self._n_bytes:
                    self._file.truncate(0)
                    raise TransferError(f"the server sends more than {self._n_bytes} bytes")
                self._file.write(piece)
                self._file.flush()  # so that a process that is killed leaves them
                size += len(piece)
                self._on_progress(size)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def has_digest(path: Path, n_bytes: int, digest: str) -> bool:
    """Return whether a file exists and has this size and this digest."""
    if not path.exists() or path.stat().st_size != n_bytes:
        return False
    with path.open("rb") as file:
        return _digest(file, n_bytes, digest) == digest


def _digest(file: IO[bytes], n_bytes: int, like: str) -> str:
    """Return the digest of a file from its position on, of the kind that `like` is."""
    git_header = b"blob %d\0" % n_bytes
    digest = hashlib.sha1(git_header, usedforsecurity=False) if _is_of_git(like) else hashlib.sha256()
    while piece := file.read(_CHUNK):
        digest.update(piece)
    return digest.hexdigest()


def _is_of_git(digest: str) -> bool:
    return len(digest) == 40


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _check_space(directory: Path, needed: int, name: str) -> None:
    free = shutil.disk_usage(directory).free
    if needed + _RESERVE > free:
        raise DownloadError(
            f"{name} needs {format_size(needed)} in {directory}, where {format_size(free)} are free; free some "
            "space, or choose another directory with HF_HUB_CACHE"
        )
