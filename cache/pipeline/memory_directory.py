"""The directory in memory that a cache gains when a model runs in a process of its own.

A RAM tier ends with its process. So `Cache.share_with_process` adds a directory on a tmpfs, to which both processes
save. Its blocks outlive the other process, and its memory counts once.
"""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

from erllama._runtime.log import logger
from erllama.cache.options import Root, check_separate, directories
from erllama.cache.pipeline.change_feed import ChangeFeed
from erllama.cache.pipeline.tier_set import TierSet
from erllama.cache.tiers.file_tier import FileTier
from erllama.errors import CacheError, OptionError

log = logger("erllama.cache")

_MIN_BYTES = 64 << 20  # fewer bytes hold few blocks of a real model


class MemoryDirectory:
    """Adds a directory in memory to one cache.

    Args:
        watch: notice files that others add to the directory or remove from it.
        cache_id: the id of the cache.
        key_file: file of the keys that encrypt the directory; None for no encryption.
    """

    def __init__(self, tiers: TierSet, feed: ChangeFeed, watch: bool, cache_id: str, key_file: Path | None) -> None:
        self._tiers, self._feed, self._watch, self._cache_id = tiers, feed, watch, cache_id
        self._key_file = key_file

    def ensure(self, directory: str | Path | None, budget: int) -> bool:
        """Add the directory, unless the cache has a writable one. Logs why it cannot be used.

        Args:
            directory: on a tmpfs; None for the user's own.
            budget: that of the RAM tier. The directory gets at most half of its file system.

        Returns:
            whether there is a usable directory in memory now.

        Raises:
            OptionError: `directory` is not a directory.
        """
        files = [tier for tier in self._tiers if isinstance(tier, FileTier)]
        known = [tier for tier in files if tier.name == "ram_file" and not tier.read_only]
        try:
            if known:
                if not any(self._tiers.readable(tier) for tier in known):
                    raise self._tiers.error_of(known[0]) or CacheError(f"{known[0].location} is not open")
            else:
                self._add(_root(directory, budget), files)
        except CacheError as error:
            self._log_loss(error)
            return False
        return True

    def _add(self, root: Root, files: list[FileTier]) -> None:
        tier = FileTier(root.path, root.budget, name=root.tier, watch=self._watch, key_file=self._key_file)
        tier.use_for(self._cache_id)
        try:
            check_separate([*(Root(other.name, other.root, other.budget) for other in files), root])
            self._feed.add(tier)
        except (OSError, sqlite3.Error, OptionError) as error:
            raise CacheError(f"{root.path} cannot be used: {error}") from error

    def _log_loss(self, reason: CacheError) -> None:
        if any(tier.name == "disk" for tier in self._tiers.file_tiers(writable=True)):
            log.info("a model in its own process saves to its memory and to the disk: %s", reason)
        else:
            log.warning(
                "blocks that a model saves in its own process end with that process: %s. Pass ram_file= with a "
                "directory on a tmpfs, or disk=, to the cache",
                reason,
            )


def _root(directory: str | Path | None, budget: int) -> Root:
    """Return the directory to add, and its budget.

    Raises:
        OptionError: `directory` is not a directory.
        CacheError: there is no tmpfs, or it is too small.
    """
    if directory is None:
        try:
            (root,) = directories("ram_file", True, budget)
        except OptionError as error:
            raise CacheError(str(error)) from error
        if not root.path.parent.is_dir():
            raise CacheError(f"this system has no {root.path.parent}")
    else:
        (root,) = directories("ram_file", [directory], budget)
    try:
        half = _file_system_bytes(root.path) // 2  # other programs use it, too
    except OSError as error:
        raise CacheError(f"{root.path} cannot be used: {error}") from error
    if half < _MIN_BYTES:
        raise CacheError(
            f"{root.path} is on a file system of {2 * half} bytes; it needs at least {2 * _MIN_BYTES}, because a "
            "cache uses at most half of it"
        )
    return root._replace(budget=min(budget, half))


def _file_system_bytes(path: Path) -> int:
    """Return the size of the file system on which a directory is, or will be created."""
    existing = next(place for place in (path, *path.parents) if place.exists())
    return shutil.disk_usage(existing).total
