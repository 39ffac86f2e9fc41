"""Changes from outside this cache: of other processes, of files, and of tiers that were lost.

The fourth link of the pipeline, after the evictor. Other processes write to shared directories, people copy
files into them, and disks go away. Requests call `poll`, which never waits; the rest runs in the queue's
thread. `TierSet.sync`, which eviction needs as well, brings the catalog in line.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from functools import partial

from erllama.cache.catalog.catalog import BlockCatalog
from erllama.cache.pipeline.evictor import Evictor
from erllama.cache.pipeline.tier_set import TierSet
from erllama.cache.pipeline.write_queue import WriteQueue
from erllama.cache.tiers.tier import Changes, Tier
from erllama.errors import CacheError

_POLL_SECONDS = 0.25  # between two polls for the changes of other processes
_EXAMINE_SECONDS = 0.2  # files change in bursts, and the index row of a file follows a moment later


class ChangeFeed:
    """Polls the tiers of one cache for changes, and opens them.

    Args:
        lock: the cache's lock. It guards `catalog`.
    """

    def __init__(
        self,
        lock: threading.RLock,
        catalog: BlockCatalog,
        queue: WriteQueue,
        tiers: TierSet,
        evictor: Evictor,
    ) -> None:
        self._lock, self._catalog, self._queue, self._tiers, self._evictor = lock, catalog, queue, tiers, evictor
        self._next_poll = 0.0  # by time.monotonic()

    # --- opening -------------------------------------------------------------------------------

    def open_all(self) -> None:
        """Open the tiers slower than RAM. A tier that fails keeps its error and is tried again later."""
        for tier in self._tiers.write_behind_tiers():
            if self._tiers.open(tier, self._callback_for(tier)):
                self._evictor.fit_to_budget(tier)

    def add(self, tier: Tier) -> None:
        """Open a new tier, and add it as the fastest of those that the queue's thread writes.

        Other threads see the tier once its content is in the catalog.

        Raises:
            Exception: as of `Tier.open` and `Tier.rows`. The cache does not have the tier then.
            CacheError: the cache was closed.
        """
        try:
            tier.open()
            rows = list(tier.rows())
            with self._lock:
                if not self._tiers.usable(tier):
                    raise CacheError(f"the cache was closed while {tier.location} was opened")
                self._catalog.add_root(tier, fastest=True)
                self._tiers.add_fastest(tier)
                self._tiers.apply_changes(tier, Changes(rows, [], complete=True))
                self._tiers.read_pins(tier)
        except BaseException:
            tier.close()
            raise
        tier.watch(self._callback_for(tier))
        self._queue.defer(partial(self._evictor.fit_to_budget, tier))

    def ensure_open(self, tier: Tier) -> bool:
        """Open a lost tier, unless an attempt failed a moment ago. Return whether it can be written to."""
        if self._tiers.usable(tier):
            return True
        if not self._tiers.reopen(tier, self._callback_for(tier)):
            return False
        self._evictor.fit_to_budget(tier)
        return True

    def _reopen_all(self) -> None:
        with self._tiers.locked():
            for tier in self._tiers.write_behind_tiers():
                self.ensure_open(tier)

    # --- other processes -------------------------------------------------------------------------

    def poll(self, *, at_once: bool = False) -> None:
        """Record what other processes changed since the last poll, at most four times a second.

        Never waits for storage: work that could wait runs in the queue's thread. The caller holds the cache's lock.

        Args:
            at_once: poll now, even if the last poll was a moment ago.
        """
        now = time.monotonic()
        if now < self._next_poll and not at_once:
            return
        self._next_poll = now + _POLL_SECONDS
        for tier in self._tiers.write_behind_tiers():
            if not self._tiers.readable(tier):
                if self._tiers.reopen_due(tier):
                    self._queue.defer(self._reopen_all)
            elif not self._tiers.in_sync(tier):
                self._queue.defer(self._sync_all)
            else:
                with self._tiers.guard("reading the index", tier):
                    self._tiers.apply_new_changes(tier)

    def _sync_all(self) -> None:
        for tier in self._tiers.write_behind_tiers():
            if not self._tiers.in_sync(tier) and self._tiers.readable(tier):
                with self._tiers.locked(), self._tiers.guard("reading the index", tier):
                    self._tiers.sync(tier)

    def in_flight(self, key: bytes) -> bool:
        """Return whether another process is writing a block now. Never waits for storage."""
        for tier in self._tiers.write_behind_tiers():
            if self._tiers.readable(tier):
                with self._tiers.guard("reading the index", tier):
                    if tier.in_flight(key):
                        return True
        return False

    # --- watch events ------------------------------------------------------------------------------

    def _callback_for(self, tier: Tier) -> Callable[[], None]:
        """Return a function that a tier calls on a change. It keeps neither the cache nor the tier alive."""
        weak_feed, weak_tier = weakref.ref(self), weakref.ref(tier)

        def on_change() -> None:
            feed, changed = weak_feed(), weak_tier()
            if feed is not None and changed is not None:
                feed.notify(changed)

        return on_change

    def notify(self, tier: Tier) -> None:
        """Defer an examination of a tier to the queue's thread."""
        self._queue.defer(_Examination(self, tier), _EXAMINE_SECONDS, background=True)

    def examine(self, tier: Tier) -> None:
        """Record files that were added to a tier or removed by hand, and evict if they exceed its budget."""
        with self._tiers.locked():
            if self._tiers.readable(tier):
                self._examine(tier)

    def _examine(self, tier: Tier) -> None:
        with self._tiers.guard("examining files", tier):
            if tier.examine():
                self.notify(tier)
        with self._tiers.guard("reading the index", tier):
            self._tiers.sync(tier)
            with self._lock:
                over = self._catalog.ledger(tier.name).n_bytes(tier) > tier.budget
            if over:
                self._evictor.fit_to_budget(tier)


class _Examination:
    """A task that equals another of the same tier, so that the queue merges a burst of events."""

    def __init__(self, feed: ChangeFeed, tier: Tier) -> None:
        self._feed, self._tier = feed, tier

    def __call__(self) -> None:
        self._feed.examine(self._tier)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Examination) and other._tier is self._tier

    def __hash__(self) -> int:
        return id(self._tier)
