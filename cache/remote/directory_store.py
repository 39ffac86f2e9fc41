"""Objects as files of a directory: one that several machines mount, or a local one.

An object is written under a temporary name, made durable, and published with link(2), which never replaces a file.
On a file system without hard links, rename(2) publishes it: blocks are named after their content, so replacing one
changes nothing. Directories have the mode 0700 and files 0600, as those of the disk tier.

A file system that is not mounted leaves an empty directory, which must not look like a store without objects: all
machines would lose theirs. So a store has a marker, and without it, each call fails.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from erllama.cache.remote.stores import Content, Stored, do_nothing
from erllama.errors import CacheFormatError, RemoteAccessError, RemoteUnreachable

MARKER = "erllama-store"
_MARKER_TEXT = b"Marks a remote tier of erllama. Without this file, the directory is not used.\n"
_PARTIAL = ".partial"
_LEFTOVER_SECONDS = 24 * 3600.0  # far longer than a write takes
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}


class DirectoryStore:
    """The object store in a directory. Does not follow a link in the place of an object."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._existed = False

    def create(self) -> None:
        if self._existed:
            return
        with self._errors(MARKER):
            self.root.parent.mkdir(parents=True, exist_ok=True)
            _make_private(self.root, self.root)
            with suppress(FileExistsError):
                descriptor = os.open(self.root / MARKER, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "wb", 0) as file:
                    file.write(_MARKER_TEXT)
                    os.fsync(file.fileno())
        self._check()

    def _check(self) -> None:
        """Raise RemoteUnreachable if the store is not there."""
        with self._errors(MARKER):
            try:
                os.lstat(self.root / MARKER)
            except FileNotFoundError:
                raise RemoteUnreachable(
                    f"{self.root} has no file {MARKER}, so it is no remote tier; mount the file system. A machine "
                    "that may write creates the file when it opens its cache"
                ) from None
        self._existed = True

    def get(self, name: str, limit: int, on_response: Callable[[], None] = do_nothing) -> memoryview:
        with self._errors(name):
            try:
                descriptor = os.open(self.root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                self._check()
                raise
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                on_response()
                if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
                    raise CacheFormatError(f"not a file of at most {limit} bytes")
                content = np.empty(status.st_size, np.uint8)
                done = 0
                while done < content.nbytes:
                    n = file.readinto(content.data[done:])
                    if not n:
                        raise CacheFormatError("the file ended while it was read")
                    done += n
                return content.data
        raise AssertionError  # `_errors` raises

    def put(self, name: str, parts: Sequence[Content], *, replace: bool = False) -> bool:
        self._check()
        with self._errors(name):
            final = self.root / name
            if not replace and os.path.lexists(final):
                return False
            partial = self.root / _PARTIAL / secrets.token_hex(16)
            try:
                for directory in (partial.parent, final.parent):
                    _make_private(directory, self.root)
                with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", 0) as file:
                    for part in parts:
                        left = memoryview(part).cast("B")
                        while left.nbytes:
                            left = left[file.write(left) :]
                    getattr(os, "fdatasync", os.fsync)(file.fileno())
                return _publish(partial, final, replace)
            except FileNotFoundError as error:  # a directory is gone
                raise RemoteUnreachable(f"{self.root}: {error.strerror} ({name})") from error
            finally:
                partial.unlink(missing_ok=True)
        raise AssertionError

    def delete(self, names: Iterable[str]) -> None:
        self._check()
        for name in names:
            with self._errors(name):
                (self.root / name).unlink(missing_ok=True)

    def list(self, prefix: str) -> Iterator[Stored]:
        self._check()
        self._remove_leftovers()
        waiting = [self.root / prefix]
        while waiting:
            directory = waiting.pop()
            found: list[Stored] = []
            with self._errors(prefix), suppress(FileNotFoundError), os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(directory / entry.name)
                        continue
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        name = (directory / entry.name).relative_to(self.root).as_posix()
                        found.append(Stored(name, status.st_size, status.st_mtime))
            yield from found
        self._check()  # it may have gone meanwhile

    def _remove_leftovers(self) -> None:
        """Remove temporary files that ended processes left long ago."""
        before = time.time() - _LEFTOVER_SECONDS
        with suppress(OSError), os.scandir(self.root / _PARTIAL) as entries:
            for entry in entries:
                if entry.stat(follow_symlinks=False).st_mtime < before:
                    os.unlink(entry.path)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in _REFUSED:
                raise RemoteAccessError(
                    f"{self.root}: {error.strerror} ({name}); make the directory writable for this user, or pass "
                    "read_only=True"
                ) from error
            raise RemoteUnreachable(f"{self.root}: {error.strerror or error} ({name})") from error


def _make_private(directory: Path, root: Path) -> None:
    """Create a directory and those above it, below the root. Only their owner can read them."""
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        return
    except FileNotFoundError:
        if directory.parent == root:
            raise  # it exists while the store does
        _make_private(directory.parent, root)
        with suppress(FileExistsError):
            os.mkdir(directory, 0o700)


def _publish(partial: Path, final: Path, replace: bool) -> bool:
    """Give a temporary file its name; False if the name exists and not `replace`."""
    if not replace:
        try:
            os.link(partial, final)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            return True
    os.rename(partial, final)
    return True
