"""The tiers of one cache: which are open, why others are not, and how they are called.

The second link of the pipeline, after the write queue. It opens tiers, brings the catalog in line with them,
counts and logs storage faults, passes uses on, and closes the tiers. All other links call tiers through it
or within its `locked` and `guard`. Reading waits for no lock here.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial

from erllama._runtime.log import logger
from erllama.cache.blocks.block import Block
from erllama.cache.catalog.catalog import BlockCatalog
from erllama.cache.catalog.counters import Counters
from erllama.cache.pipeline.write_queue import WriteQueue
from erllama.cache.tiers.file_tier import FileTier
from erllama.cache.tiers.tier import Changes, Tier
from erllama.errors import CacheError

log = logger("erllama.cache")

_REOPEN_SECONDS = 5.0  # between two attempts to open a tier that cannot be used
_CLOSE_SECONDS = 120.0  # a disk that hangs must not keep the interpreter from exiting
_USES_SECONDS = 2.0  # uses are collected in memory; the tiers receive them at most this often


class TierSet:
    """The tiers of one cache, from fast to slow, and their state.

    Args:
        lock: the cache's lock. It guards `catalog`.
    """

    def __init__(
        self,
        lock: threading.RLock,
        catalog: BlockCatalog,
        counters: Counters,
        queue: WriteQueue,
        tiers: list[Tier],
    ) -> None:
        self._lock, self._catalog, self._counters, self._queue = lock, catalog, counters, queue
        self._tiers = list(tiers)
        self._errors: dict[Tier, CacheError] = {}  # why a tier cannot be used
        self._reopen_after: dict[Tier, float] = {}  # by time.monotonic()
        self._out_of_sync: set[Tier] = set()  # tiers that the catalog may not agree with, after a fault
        self._uses: dict[bytes, int] = {}  # uses that the tiers have not received: ns since 1970, by key
        self._call_lock = threading.RLock()
        self._close_lock = threading.RLock()
        self._closed = False

    # --- which tiers there are ---------------------------------------------------------------

    def __iter__(self) -> Iterator[Tier]:
        return iter(list(self._tiers))

    def write_behind_tiers(self) -> list[Tier]:
        """Return the tiers slower than RAM, which the queue's thread writes."""
        return [tier for tier in self._tiers if tier.write_mode == "behind"]

    def save_targets(self) -> tuple[str, ...]:
        """Return the names of the tiers slower than RAM to which blocks are saved."""
        return tuple(dict.fromkeys(tier.name for tier in self.write_behind_tiers() if not tier.read_only))

    def file_tiers(self, *, writable: bool = False) -> list[FileTier]:
        """Return the directories that can be read now; only those that are also written if `writable`."""
        return [
            tier
            for tier in self._tiers
            if isinstance(tier, FileTier) and self.readable(tier) and not (writable and tier.read_only)
        ]

    def shared_tiers(self) -> frozenset[str]:
        """Return the names of the tiers in which other caches must soon see what this one saves.

        For each other cache, that is the fastest tier of which it has every directory open. Called within `locked`.
        """
        needed: set[str] = set()
        served: set[str] = set()
        for name in self.save_targets():
            roots = [tier for tier in self._tiers if tier.name == name and not tier.read_only]
            sharers = [_sharers(tier) for tier in roots if self.readable(tier)]
            if not served.issuperset(set().union(*sharers)):
                needed.add(name)
            if sharers:
                served |= set.intersection(*sharers)
        return frozenset(needed)

    def add_fastest(self, tier: Tier) -> None:
        """Add a tier: before those that the queue's thread writes if it is one of them, before all tiers otherwise.

        The caller holds the cache's lock.
        """
        n_before = sum(other.write_mode != "behind" for other in self._tiers) if tier.write_mode == "behind" else 0
        # Replaced and never changed, so that threads without the lock can read it.
        self._tiers = [*self._tiers[:n_before], tier, *self._tiers[n_before:]]

    def remove(self, tier: Tier) -> None:
        """Remove a tier that its owner writes. The caller holds the cache's lock."""
        self._tiers = [other for other in self._tiers if other is not tier]

    # --- calling tiers -------------------------------------------------------------------------

    def locked(self) -> AbstractContextManager[object]:
        """Return the lock with which one thread at a time calls tiers.

        `Tier.read` and the methods that must not wait need no lock. The lock is taken before the transaction of
        `Tier.exclusive` and before the cache's lock. A thread may take it again.
        """
        return self._call_lock

    @contextmanager
    def guard(self, action: str, tier: Tier, *, changes: bool = True) -> Iterator[None]:
        """Count and log a storage fault in the `with` block instead of raising it.

        Counts other subclasses of `Exception`, and SystemExit, as faults. Raises KeyboardInterrupt and all others.
        Both mark the tier as out of sync.

        Args:
            action: what the block does, for the log.
            changes: a fault may leave the catalog and the tier different.
        """
        try:
            yield
        except (OSError, sqlite3.Error, CacheError, MemoryError) as error:
            if changes:
                self._out_of_sync.add(tier)
            self._counters.add("disk_errors")
            log.warning("%s failed: %s", action, error)
        except (Exception, SystemExit):
            self._out_of_sync.add(tier)
            self._counters.add("faults")
            log.exception("%s in tier %s failed unexpectedly", action, tier.location)
        except BaseException:  # the change may be half done
            self._out_of_sync.add(tier)
            raise

    # --- opening -------------------------------------------------------------------------------

    def open(self, tier: Tier, on_change: Callable[[], None]) -> bool:
        """Open a tier and record its content in the catalog.

        Args:
            on_change: the tier calls it when its content may have changed.

        Returns:
            False if the tier cannot be opened. `error_of` then returns the reason.
        """
        if self._closed:
            return False
        self._reopen_after[tier] = time.monotonic() + _REOPEN_SECONDS
        with self._lock:
            self._out_of_sync.add(tier)  # until the catalog has its content
        try:
            tier.open()
            rows = tier.rows()
            self.read_pins(tier)
            tier.watch(on_change)
        except Exception as error:
            self._record_error(tier, error)
            return False
        self._errors.pop(tier, None)
        with self._lock:
            self.apply_changes(tier, Changes(list(rows), [], complete=True))
        self._out_of_sync.discard(tier)
        return True

    def _record_error(self, tier: Tier, error: Exception) -> None:
        if not isinstance(error, CacheError):
            error = CacheError(f"cannot use the cache directory {tier.location}: {error}; use a writable one")
        if str(error) != str(self._errors.get(tier)):
            log.warning("%s. The cache continues without it", error)
        self._errors[tier] = error
        self._counters.add("disk_errors")

    def reopen(self, tier: Tier, on_change: Callable[[], None]) -> bool:
        """Open a tier that is not usable, unless an attempt failed a moment ago."""
        if self._closed or not self.reopen_due(tier):
            return False
        if tier not in self._errors:  # lost since the last call: its content may be lost, too
            with self._lock:
                self.apply_changes(tier, Changes([], [], complete=True))
                self._catalog.pin_book.set(tier, ())
        return self.open(tier, on_change)

    def reopen_due(self, tier: Tier) -> bool:
        """Return whether a tier that is not usable may be opened now."""
        return tier not in self._errors or time.monotonic() >= self._reopen_after[tier]

    def usable(self, tier: Tier) -> bool:
        """Return whether a tier can be written to."""
        return not self._closed and self.readable(tier)

    def readable(self, tier: Tier) -> bool:
        """Return whether a tier can be read from. Never waits."""
        return tier not in self._errors and tier.usable

    def error_of(self, tier: Tier) -> CacheError | None:
        """Return why a tier cannot be used, or does not serve now; None if it does."""
        return self._errors.get(tier) or tier.problem

    def first_error(self) -> CacheError | None:
        """Return why one of the tiers cannot be used, or does not serve now; None if all do."""
        return next(iter(self._errors.values()), None) or next(filter(None, (t.problem for t in self._tiers)), None)

    # --- keeping the catalog in line -------------------------------------------------------------

    def in_sync(self, tier: Tier) -> bool:
        """Return whether the catalog agrees with a tier, apart from changes that `Tier.changes` will return."""
        return tier not in self._out_of_sync

    def mark_out_of_sync(self, tier: Tier) -> None:
        """Make the next `sync` read the whole content of a tier."""
        self._out_of_sync.add(tier)

    def sync(self, tier: Tier) -> None:
        """Update the catalog from a tier; after a fault, from its whole content. Requests do not call it."""
        if tier not in self._out_of_sync:
            self.apply_new_changes(tier)
            return
        # Read without the lock. No thread applies changes meanwhile, because the tier is out of sync: a poll that
        # found it in sync holds the lock until it has applied its changes, and the mark waits for that.
        with self._lock:
            self._out_of_sync.add(tier)
        rows = list(tier.rows())
        with self._lock:
            self.apply_changes(tier, Changes(rows, [], complete=True))
            self.read_pins(tier)
            self._out_of_sync.discard(tier)

    def apply_new_changes(self, tier: Tier) -> None:
        """Record the changes that a tier reports. Never waits for storage."""
        with self._lock:
            if (changes := tier.changes()) is not None:
                self.apply_changes(tier, changes)
            self.read_pins(tier)

    def read_pins(self, tier: Tier) -> None:
        """Record the pins of a directory, if they were changed. Never waits for storage.

        Within `Tier.exclusive`, the record is up to date afterwards.
        """
        if isinstance(tier, FileTier):
            with self._lock:
                if (pins := tier.changed_pins()) is not None:
                    self._catalog.pin_book.set(tier, pins)

    def apply_changes(self, tier: Tier, changes: Changes) -> None:
        """Record changes that others made to a tier. The caller holds the cache's lock."""
        for block in self._catalog.apply_changes(tier, changes):
            self._queue.defer(partial(self._remove_duplicate, tier, block))

    def _remove_duplicate(self, tier: Tier, block: Block) -> None:
        """Remove a block from a root if another root of its tier holds it."""
        if tier.read_only:
            return
        with self._lock:
            duplicate = self._catalog.ledger(tier.name).root_of(block.key) not in (None, tier)
        if duplicate:
            with self.locked(), self.guard("removing a duplicate", tier):
                tier.remove([block.key])

    # --- uses ------------------------------------------------------------------------------------

    def record_uses(self, blocks: Sequence[Block], now: int) -> None:
        """Record a use of blocks, and pass it to the tiers later. The caller holds the cache's lock."""
        if not blocks:
            return
        self._catalog.touch(blocks, now)
        if not self.write_behind_tiers():
            return
        if not self._uses:
            self._queue.defer(self.write_uses, _USES_SECONDS)
        self._uses.update((block.key, now) for block in blocks)

    def write_uses(self) -> None:
        """Pass the recorded uses to the tiers."""
        with self._lock:
            uses, self._uses = self._uses, {}
            by_tier = [(tier, self._uses_of(tier, uses)) for tier in self.write_behind_tiers()]
        for tier, used in by_tier:
            if used and self.readable(tier):
                with self.locked(), self.guard("recording uses", tier):
                    tier.touch(used)

    def _uses_of(self, tier: Tier, uses: dict[bytes, int]) -> list[tuple[bytes, int]]:
        ledger = self._catalog.ledger(tier.name)
        return [(key, at) for key, at in uses.items() if ledger.root_of(key) is tier]

    # --- closing ---------------------------------------------------------------------------------

    def flush(self, timeout: float | None) -> bool:
        """Wait until the tiers have stored what they received; False if one fails, or `timeout` is too short."""
        deadline = None if timeout is None else time.monotonic() + timeout
        complete = True
        for tier in self.write_behind_tiers():
            with self.guard("flushing", tier, changes=False):
                left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                complete = (not self.readable(tier) or tier.flush(left)) and complete
        return complete

    def close(self) -> None:
        """Write the waiting saves, unless that takes too long, and close all tiers. Idempotent."""
        # An interrupted caller leaves closing to a thread of its own. A second caller waits for that thread.
        if not self._close_lock.acquire(timeout=2 * _CLOSE_SECONDS):
            return
        try:
            if not self._closed:
                self._close()
        finally:
            self._close_lock.release()

    def _close(self) -> None:
        if not self._queue.flush(_CLOSE_SECONDS):
            log.warning("%d bytes could not be written in time and are lost", self._queue.n_bytes)
        self.write_uses()
        self._queue.abandon()
        with self._lock:
            self._closed = True  # from here on, no tier is opened or added
        if not self._call_lock.acquire(timeout=_CLOSE_SECONDS):
            log.warning("a call of a tier hangs; the tiers stay open")
            return
        try:
            for tier in self._tiers:
                with suppress(Exception):
                    tier.close()
        finally:
            self._call_lock.release()


def _sharers(tier: Tier) -> set[str]:
    """Return the ids of the other caches that use a tier."""
    if isinstance(tier, FileTier):
        return tier.sharers()
    return {f"users of {tier.location}"} if tier.shared else set()
