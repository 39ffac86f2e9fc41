"""Writing to the tiers slower than RAM: saves queued, room reserved, blocks written.

The fifth link of the pipeline, after the change feed. `Saver` and `Loader` queue saves under the cache's
lock; the queue's thread calls `write`. A save that no tier has room for is dropped and counted.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Collection, Mapping
from enum import Enum, auto
from typing import NamedTuple

from erllama.cache.blocks.block import Block
from erllama.cache.catalog.catalog import BlockCatalog
from erllama.cache.catalog.counters import Counters
from erllama.cache.catalog.ledger import TierLedger
from erllama.cache.pipeline.change_feed import ChangeFeed
from erllama.cache.pipeline.evictor import Evictor
from erllama.cache.pipeline.tier_set import TierSet
from erllama.cache.pipeline.write_queue import (
    SHARED_TAIL_DELAY_SECONDS,
    TAIL_DELAY_SECONDS,
    PendingSave,
    WriteQueue,
)
from erllama.cache.tiers.tier import Tier

_SHARED_CHECK_SECONDS = 0.5  # between two checks for other processes while tails wait


class _Room(Enum):
    """The result of making room for a block."""

    RESERVED = auto()
    NONE = auto()  # pinned blocks take the rest, or the block would be unreachable
    ALREADY_STORED = auto()
    WRITTEN_BY_ANOTHER = auto()  # another process is writing the block


class _MissingAncestor(NamedTuple):
    """A block that some tiers lack, and the names of those tiers."""

    block: Block
    tiers: tuple[str, ...]


class TierWriter:
    """Queues and writes the saves of one cache.

    Args:
        lock: the cache's lock. It guards `catalog`. The caller of `enqueue` and `promote` holds it.
    """

    def __init__(
        self,
        lock: threading.RLock,
        catalog: BlockCatalog,
        counters: Counters,
        queue: WriteQueue,
        tiers: TierSet,
        evictor: Evictor,
        feed: ChangeFeed,
    ) -> None:
        self._lock, self._catalog, self._counters = lock, catalog, counters
        self._queue, self._tiers, self._evictor, self._feed = queue, tiers, evictor, feed
        self._shared: frozenset[str] = frozenset()  # `TierSet.shared_tiers` at the last check
        self._last_check = -math.inf  # by time.monotonic()

    # --- queueing, under the cache's lock ------------------------------------------------------------

    def enqueue(
        self,
        block: Block,
        payload: memoryview,
        tiers: tuple[str, ...],
        replace: bool,
        superseded: tuple[bytes, ...],
        full: bool,
    ) -> bool:
        """Queue a save for slower tiers. Ancestors that a tier lacks are queued before it, from memory.

        Leaves out a tier that lacks an ancestor which is not in memory: lookups there would not reach the block.

        Args:
            superseded: keys of tails to remove once the block is written.
            full: whether the block is full. A shorter one, a tail, is written after a delay.

        Returns:
            False if the save was queued for no tier.
        """
        targets = tiers
        for ancestor in self._missing_ancestors(block, tiers):
            lacking = tuple(name for name in ancestor.tiers if name in targets)
            if lacking and not self._queue_from_memory(ancestor.block, lacking):
                targets = tuple(name for name in targets if name not in lacking)
        if not targets:
            return False
        if targets != tiers:
            self._counters.add("saves_dropped")
        now = time.monotonic()
        dues = {name: 0.0 if full else now + self._tail_delay(name) for name in targets}
        queued = self._queue_save(block, payload, dues, replace, superseded)
        if not full:
            self._check_shared_soon()  # after queueing: a check that finds another process ends the delays
        return queued

    def _tail_delay(self, name: str) -> float:
        """Return the seconds that a tail waits until it is written to a tier."""
        return SHARED_TAIL_DELAY_SECONDS if name in self._shared else TAIL_DELAY_SECONDS

    def complete(self, block: Block, payload: memoryview, name: str) -> bool:
        """Queue a block for one tier that lacks it, to be written at once; False as of `enqueue`."""
        return self.enqueue(block, payload, (name,), False, (), True)

    def _queue_from_memory(self, block: Block, tiers: tuple[str, ...]) -> bool:
        """Queue a block that is in RAM or waits for other tiers; False if it is neither, or the queue is full."""
        found = self._catalog.read_from_ram(block)
        if found is None and (waiting := self._queue.get(block.key)) is not None:
            found = waiting.block, waiting.payload
        return found is not None and self._queue_save(*found, dict.fromkeys(tiers, 0.0), False, ())

    def promote(self, block: Block, payload: memoryview, slower: TierLedger) -> None:
        """Queue a block for the tiers that are faster than the one it was found in."""
        targets: list[str] = []
        for name, ledger in self._catalog.ledgers().items():
            if ledger is slower:
                break
            reachable = block.parent == block.namespace or block.parent in ledger or block.parent in self._queue
            if name in self._tiers.save_targets() and block.key not in ledger and reachable:
                targets.append(name)
        if targets and self._queue_save(block, payload, dict.fromkeys(targets, 0.0), False, ()):
            self._counters.add("promotions")

    def _queue_save(
        self,
        block: Block,
        payload: memoryview,
        tiers: Mapping[str, float],
        replace: bool,
        superseded: tuple[bytes, ...],
    ) -> bool:
        """Queue a save for some tiers, with the time to write to each, by time.monotonic()."""
        if not self._queue.offer(PendingSave(block, payload, tiers, replace, superseded)):
            return False
        self._catalog.add_pending(block)
        return True

    def _missing_ancestors(self, block: Block, tiers: tuple[str, ...]) -> list[_MissingAncestor]:
        """Return the ancestors that a tier neither has nor is about to get, from the first on."""
        missing: list[_MissingAncestor] = []
        parent = block.parent
        while parent != block.namespace:
            waiting = self._queue.get(parent)
            coming = waiting.tiers if waiting is not None else {}
            lacking = tuple(
                name for name in tiers if name not in coming and parent not in self._catalog.ledger(name)
            )
            ancestor = self._catalog.block(parent)
            if not lacking or ancestor is None:
                break
            missing.append(_MissingAncestor(ancestor, lacking))
            parent = ancestor.parent
        return missing[::-1]

    # --- other processes ---------------------------------------------------------------------------

    def _check_shared_soon(self) -> None:
        delay = self._last_check + _SHARED_CHECK_SECONDS - time.monotonic()
        self._queue.defer(self._check_shared, max(delay, 0.0), background=True)

    def _check_shared(self) -> None:
        """Write waiting tails now to the tiers in which another cache must see them within a second."""
        self._last_check = time.monotonic()
        with self._tiers.locked():
            self._shared = self._tiers.shared_tiers()
        if self._shared:
            self._queue.skip_delays(self._shared)
        if self._queue.n_bytes:
            # A process that starts while a tail waits must see it, too.
            self._queue.defer(self._check_shared, _SHARED_CHECK_SECONDS, background=True)

    # --- writing, in the queue's thread --------------------------------------------------------------

    def write(self, save: PendingSave) -> None:
        """Write one save to its tiers."""
        try:
            for name in save.tiers:
                with self._tiers.locked():
                    self._write_to_tier(self._catalog.ledger(name), save)
        finally:
            with self._lock:
                if not self._queue.is_waiting(save.block.key):  # a newer version
                    self._catalog.drop_pending(save.block.key)

    def _write_to_tier(self, ledger: TierLedger, save: PendingSave) -> None:
        """Write a save to the first root of a tier that takes it."""
        block, payload_bytes = save.block, save.payload.nbytes
        with self._lock:
            roots = self._catalog.roots_by_room(ledger, block, ledger.roots[0].size(block, payload_bytes))
        for tier in roots:
            if not self._feed.ensure_open(tier):
                continue
            with self._counters.timing("write"), self._tiers.guard("making room", tier):
                n_bytes = tier.size(block, payload_bytes)
                room = self._make_room(ledger, tier, save, n_bytes)
                if room is _Room.WRITTEN_BY_ANOTHER:
                    return
                if room is _Room.ALREADY_STORED or (
                    room is _Room.RESERVED and self._write_block(ledger, tier, save, n_bytes)
                ):
                    self._remove_superseded(ledger, save.superseded)
                    return
        self._counters.add("saves_dropped")

    def _make_room(self, ledger: TierLedger, tier: Tier, save: PendingSave, n_bytes: int) -> _Room:
        """Reserve room for a block, evicting others, within one transaction of the tier."""
        tier.release_stale_reservations()
        with tier.exclusive():
            self._evictor.remove_pending(tier)  # syncs the catalog first
            reserved = tier.reserved()
            if tier.in_flight(save.block.key):
                self._counters.add("duplicates_dropped")
                return _Room.WRITTEN_BY_ANOTHER
            with self._lock:
                if save.block.key in ledger and not save.replace:
                    self._counters.add("duplicates_dropped")
                    return _Room.ALREADY_STORED
                reachable = self._is_reachable(ledger, tier, save.block)
                room = tier.budget - reserved - self._evictor.pending_bytes(tier) - n_bytes
                if not reachable or room < 0:
                    return _Room.NONE
                if ledger.n_bytes(tier) > room:
                    self._adopt_uses(ledger, tier)
                # An older version of the block stays until the new one is in its place.
                victims = self._catalog.choose_victims(tier, room, keep=(save.block.parent, save.block.key))
                fits = ledger.n_bytes(tier) <= room
            self._evictor.remove(tier, victims)
            if not fits:
                return _Room.NONE
            return _Room.RESERVED if tier.reserve(save.block, n_bytes) else _Room.WRITTEN_BY_ANOTHER

    def _is_reachable(self, ledger: TierLedger, tier: Tier, block: Block) -> bool:
        """Return whether lookups in this tier alone would find a block: it is the first, or its parent is there."""
        return block.parent == block.namespace or block.parent in ledger or tier.in_flight(block.parent)

    def _adopt_uses(self, ledger: TierLedger, tier: Tier) -> None:
        """Adopt the uses of other processes, so that the blocks that they need are not evicted first."""
        now = time.time_ns()
        for key, at in tier.uses():
            ledger.record_use(key, min(at, now))

    def _write_block(self, ledger: TierLedger, tier: Tier, save: PendingSave, n_bytes: int) -> bool:
        block, before, written = save.block, None, False
        with self._lock:
            older = self._catalog.block(block.key)
            if older is not None and block.key in ledger:
                before = (ledger.root_of(block.key) or tier, older, ledger.size_of(block.key))
            # Recorded before the write: others may remove the block at once, and a poll must then find it here.
            self._catalog.put(tier, block, n_bytes, time.time_ns())
        with self._tiers.guard(f"writing a block of {block.n_tokens} tokens", tier, changes=False):
            tier.write(block, save.payload)
            self._counters.add("bytes_written", n_bytes)
            written = True
        with self._lock:
            if not written and before is None:
                self._catalog.drop(tier.name, block.key)
            elif not written and before is not None and ledger.root_of(block.key) is tier:
                self._catalog.put(*before, time.time_ns())
                # Another process may have removed the older version since: only a sync finds that.
                self._tiers.mark_out_of_sync(before[0])
        return written

    def _remove_superseded(self, ledger: TierLedger, keys: Collection[bytes]) -> None:
        """Remove tails from a tier that has their successor now."""
        with self._lock:
            roots = {root for key in keys if (root := ledger.root_of(key)) is not None and not root.read_only}
        for root in roots:
            with root.exclusive():  # no other process pins a tail meanwhile
                self._tiers.read_pins(root)
                with self._lock:
                    removed = [
                        key for key in keys if ledger.root_of(key) is root and self._catalog.may_supersede(key)
                    ]
                    for key in removed:
                        self._catalog.drop(ledger.name, key)
                        if key not in self._catalog:
                            self._counters.add("tails_superseded")
                if removed:
                    root.remove(removed)
