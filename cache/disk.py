"""The disk tier: .kvc files under one private directory, and their index.

    <root>/index.db                    what is stored
    <root>/blocks/ab/abcdef….kvc       one file a block, named by its key
    <root>/partial/                    files being written
    <root>/damaged/                    the last few files that were not what they should be

A file is written under `partial/`, made durable, renamed into place and only
then indexed. What a crash leaves between those steps is put right when the
directory is next opened: a valid file that the index lacks is adopted, a row
without its file is dropped, a partial file of a dead process is removed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from erllama.cache import kvc
from erllama.cache.blocks import Block
from erllama.cache.index import Index
from erllama.cache.keys import KEY_BYTES
from erllama.errors import CacheError, CacheFormatError

log = logging.getLogger("erllama.cache")

INDEX_NAME = "index.db"
# What a directory may hold and still be ours to close: a cache, or what else the user's cache directory has.
_OURS = {"blocks", "partial", "damaged", "kv", "llama", "models"}
_STALE_PARTIAL_SECONDS = 3600
_DAMAGED_KEPT = 8  # enough to see what happened; they are outside every budget


class DiskTier:
    """Files and rows of one cache directory; the caller decides what to keep.

    Raises (from the constructor):
        CacheError: the directory is not private to us, is a link, or its index is of a newer release.
        OSError, sqlite3.Error: it cannot be used.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blocks = root / "blocks"
        self._partial = root / "partial"
        self._damaged = root / "damaged"
        for directory in (root, self._blocks, self._partial, self._damaged):
            _private_directory(directory)
        self.index = Index(root / INDEX_NAME)
        self._reap_partials()
        self._reconcile()

    def path_of(self, key: bytes) -> Path:
        name = key.hex()
        return self._blocks / name[:2] / f"{name}{kvc.SUFFIX}"

    def write(self, block: Block, payload: memoryview, now: int) -> int:
        """Store one block durably, replacing a file of the same key; returns the file's bytes."""
        final = self.path_of(block.key)
        _private_directory(final.parent)
        # The random part keeps apart caches of one process, and processes of one number in other containers.
        partial = self._partial / f"{os.getpid()}-{secrets.token_hex(8)}{kvc.SUFFIX}"
        published = False
        try:
            n_bytes = kvc.write(partial, block, payload)
            partial.rename(final)
            published = True
            self.index.put(block, n_bytes, now)
        except BaseException:
            # A file that is not in the index would be outside every budget.
            with contextlib.suppress(OSError):
                (final if published else partial).unlink()
            raise
        return n_bytes

    def read(self, block: Block) -> tuple[Block, NDArray[np.uint8]]:
        """A block as its file has it, and its payload.

        Raises:
            CacheFormatError: the file is damaged, or holds another block.
            OSError: it cannot be read.
        """
        found, payload = kvc.read(self.path_of(block.key))
        # The file checks out; what the index says of it must be the same, down to every token.
        if (found.key, found.parent, found.namespace, found.start, found.tokens) != (
            block.key,
            block.parent,
            block.namespace,
            block.start,
            block.tokens,
        ):
            raise CacheFormatError("the file holds another block than the index says")
        return found, payload

    def remove(self, keys: Iterable[bytes]) -> None:
        """Forget blocks: their rows first, so that no row is left without a file."""
        keys = list(keys)
        if not keys:
            return
        self.index.remove(keys)
        for key in keys:
            path = self.path_of(key)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s cannot be removed: %s", path, error)

    def set_aside(self, key: bytes) -> None:
        """Take a damaged file out of the way, kept for a look at what happened."""
        path = self.path_of(key)
        with contextlib.suppress(OSError):
            path.rename(self._damaged / f"{time.time_ns()}-{path.name}")
            for old in sorted(self._damaged.iterdir())[:-_DAMAGED_KEPT]:
                old.unlink()
        self.index.remove([key])

    def close(self) -> None:
        self.index.close()

    def _files(self) -> dict[bytes, Path]:
        found = {}
        for directory in sorted(self._blocks.iterdir()):
            if directory.is_symlink() or not directory.is_dir():
                continue
            for path in directory.iterdir():
                key = _key_of(path)
                if key is not None and directory.name == path.name[:2]:
                    found[key] = path
        return found

    def _reconcile(self) -> None:
        # Rows first: a block that another process publishes meanwhile is a file without a row, seen as such.
        rows = {row.block.key for row in self.index.rows()}
        files = self._files()
        missing = {key for key in rows - files.keys() if not self.path_of(key).exists()}
        if missing:
            log.warning("%d blocks of the index in %s have no file; dropped", len(missing), self.root)
            self.index.remove(missing)
        for key in files.keys() - rows:
            path = files[key]
            try:
                block, payload_bytes = kvc.read_header(path)
                if block.key != key:
                    raise CacheFormatError("the file holds another block than its name says")
            except (CacheFormatError, OSError) as error:
                log.warning("%s: %s; set aside", path, error)
                self.set_aside(key)
                continue
            self.index.put_new(block, kvc.header_bytes(block.n_tokens) + payload_bytes, time.time_ns())

    def _reap_partials(self) -> None:
        for path in self._partial.iterdir():
            with contextlib.suppress(OSError, ValueError):
                old = time.time() - path.lstat().st_mtime > _STALE_PARTIAL_SECONDS
                if old or not _alive(int(path.name.split("-", 1)[0])):
                    path.unlink()


def _private_directory(path: Path) -> None:
    """Make `path` a directory that nobody else may look into, or refuse one that is not."""
    try:
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        pass
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise CacheError(f"{path} is a link or a special file; give the directory itself")
    if found.st_uid != os.geteuid():
        raise CacheError(f"{path} belongs to another user; give a directory of your own")
    if stat.S_IMODE(found.st_mode) & 0o077:
        if all(entry.name in _OURS or entry.name.startswith(INDEX_NAME) for entry in path.iterdir()):
            path.chmod(0o700)
            return
        # Others' things are in it: it is not ours to close.
        raise CacheError(
            f"{path} is open to other users, and a cache holds people's prompts; "
            f"give an empty directory, or one that does not exist yet, or run: chmod 700 {path}"
        )


def _key_of(path: Path) -> bytes | None:
    if path.suffix != kvc.SUFFIX or len(path.stem) != 2 * KEY_BYTES:
        return None
    try:
        return bytes.fromhex(path.stem)
    except ValueError:
        return None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
