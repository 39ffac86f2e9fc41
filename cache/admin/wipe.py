"""Removes the whole content of a cache directory. Needs no key. The command `erllama cache wipe` calls it."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from erllama.cache.admin.maintenance import BlockTotals
from erllama.cache.tiers.directory import CacheDirectory, is_cache
from erllama.cache.tiers.file_names import INDEX_NAME
from erllama.errors import CacheError

# Files that a server keeps in the directory beside the blocks, with what SQLite keeps beside them.
_SERVER_FILES = ("responses.sqlite", "responses.sqlite-journal", "responses.sqlite-wal", "responses.sqlite-shm")


def wipe(root: Path) -> BlockTotals:
    """Remove all content of a cache directory: blocks, pins, texts, stored responses and damaged files.

    Needs no key. The directory stays, as an empty cache that may have another key or none. Files are removed, and
    not overwritten: docs/encryption.md says what that means on SSDs and journaling file systems.

    Returns:
        the block files that were removed.

    Raises:
        CacheError: it holds no cache, or another process has it open.
        OSError: a file cannot be removed.
    """
    if not is_cache(root):
        raise CacheError(f"{root} holds no cache; use the directory of one")
    directory = CacheDirectory(root)
    try:
        if directory.sharers():
            raise CacheError(f"{root} is in use by another process, which would store content again; stop it first")
        n_blocks = n_bytes = 0
        for path in [*directory.blocks.iterdir(), *directory.partial.iterdir(), *directory.damaged.iterdir()]:
            n_bytes += path.lstat().st_size
            n_blocks += path.parent == directory.blocks
            _remove(path)
        for path in [*root.glob(f"{INDEX_NAME}*"), *(root / name for name in _SERVER_FILES)]:
            _remove(path)
        for path in (directory.blocks, directory.partial, directory.damaged, root):
            _sync(path)
    finally:
        directory.leave()
    return BlockTotals(n_blocks, n_bytes)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(directory: Path) -> None:
    """Make the removal of files durable, where the file system supports it."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
