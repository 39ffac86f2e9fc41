"""Saving: blocks stored in RAM at once and queued for slower tiers; lookups that wait for a save.

The end of the pipeline that `Cache.save` calls, in the threads of its callers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from erllama.cache.blocks.block import Block
from erllama.cache.catalog.catalog import BlockCatalog
from erllama.cache.catalog.counters import Counters
from erllama.cache.pipeline.change_feed import ChangeFeed
from erllama.cache.pipeline.tier_set import TierSet
from erllama.cache.pipeline.tier_writer import TierWriter
from erllama.cache.pipeline.write_queue import WriteQueue
from erllama.cache.uninterrupted import uninterrupted
from erllama.errors import OptionError

_WAIT_STEP_SECONDS = 0.05  # between two polls for a save of another process


class _Announcement:
    """An announced save. `ended` is True once it has completed or failed."""

    ended = False


class Saver:
    """Saves the blocks of one cache.

    Args:
        lock: the cache's lock. It guards `catalog`.
        block_size: tokens of a full block.
    """

    def __init__(
        self,
        lock: threading.RLock,
        catalog: BlockCatalog,
        counters: Counters,
        queue: WriteQueue,
        tiers: TierSet,
        feed: ChangeFeed,
        writer: TierWriter,
        block_size: int,
    ) -> None:
        self._lock, self._catalog, self._counters = lock, catalog, counters
        self._queue, self._tiers, self._feed, self._writer = queue, tiers, feed, writer
        self._block_size = block_size
        self._saved = threading.Condition(lock)  # notified of every save
        self._announced: dict[bytes, list[_Announcement]] = {}

    # --- saving ----------------------------------------------------------------------------------

    def save(self, block: Block, payload: object, replace: bool, trimmable: bool, kept_tail: bytes | None) -> bool:
        """Store a block; see `Cache.save`."""
        content = _bytes_of(payload)
        if block.n_tokens > self._block_size:
            raise OptionError(f"a block of {block.n_tokens} tokens; block_size is {self._block_size}")
        with self._lock:
            try:
                return self._save(block, content, replace, trimmable, kept_tail)
            finally:
                self._saved.notify_all()

    def _save(
        self, block: Block, payload: memoryview, replace: bool, trimmable: bool, kept_tail: bytes | None
    ) -> bool:
        tiers = self._tiers.save_targets() if replace else self._tiers_lacking(block.key)
        if not replace and not self.wants(block.key):
            self._counters.add("duplicates_dropped")
            return False
        replace = replace or any(block.key in self._catalog.ledger(name).unreadable for name in tiers)
        if block.parent != block.namespace and not self._is_stored(block.parent):
            self._counters.add("saves_dropped")  # its parent was evicted: lookups could not find it
            return False
        full = block.n_tokens >= self._block_size
        superseded: tuple[bytes, ...] = ()
        if trimmable or full:
            tails = self._catalog.superseded_by(block)
            superseded = tuple(tail.key for tail in tails if tail.key != kept_tail)
        in_ram = self._catalog.store_in_ram(block, payload)
        queued = self._writer.enqueue(block, payload, tiers, replace, superseded, full)
        if queued and not in_ram:
            self._catalog.remove_from_ram(block.key)  # an older version, if any
        if not queued and (tiers or not in_ram):
            self._counters.add("saves_dropped")
        if not in_ram and not queued:
            return False
        self._counters.add(f"saves_{block.reason.name.lower()}")
        for key in superseded:
            if self._catalog.may_supersede(key):
                self._supersede(key)
        return True

    def wants(self, key: bytes) -> bool:
        """Return whether a save would store a block in a tier that lacks it. The caller holds the cache's lock."""
        if self._tiers.save_targets():
            return bool(self._tiers_lacking(key))
        ram = self._catalog.ledgers().get("ram")
        return ram is not None and key not in ram

    def _tiers_lacking(self, key: bytes) -> tuple[str, ...]:
        """Return the slower tiers that neither have a readable copy of a block nor are about to get one."""
        pending = self._queue.get(key)
        queued_for: Collection[str] = pending.tiers if pending is not None else ()
        return tuple(
            name
            for name in self._tiers.save_targets()
            if name not in queued_for
            and (key not in (ledger := self._catalog.ledger(name)) or key in ledger.unreadable)
        )

    def _supersede(self, key: bytes) -> None:
        """Drop a tail whose successor is in RAM or in the queue. `TierWriter` removes it from slower tiers."""
        self._catalog.remove_from_ram(key)
        if self._queue.cancel(key):
            self._catalog.drop_pending(key)
        if key not in self._catalog:
            self._counters.add("tails_superseded")

    def _is_stored(self, key: bytes) -> bool:
        """Return whether a block is stored or waits to be, or another process writes it or has just written it."""
        if key not in self._catalog:
            if self._feed.in_flight(key):
                return True
            self._feed.poll(at_once=True)
        return self._catalog.stored_block(key) is not None

    # --- waiting for a save ------------------------------------------------------------------------

    @contextmanager
    def expecting(self, key: bytes) -> Iterator[None]:
        """Announce the save of a block for the duration of the `with` block."""
        announcement = _Announcement()
        try:
            self._announce(key, announcement)
            yield
        finally:
            # Set first: an interrupted `_announce` completes in the background, perhaps after `_withdraw`.
            announcement.ended = True
            self._withdraw(key, announcement)

    @uninterrupted
    def _announce(self, key: bytes, announcement: _Announcement) -> None:
        with self._lock:
            if not announcement.ended:
                self._announced.setdefault(key, []).append(announcement)

    @uninterrupted
    def _withdraw(self, key: bytes, announcement: _Announcement) -> None:
        with self._lock:
            left = [other for other in self._announced.pop(key, ()) if other is not announcement]
            if left:
                self._announced[key] = left
            self._saved.notify_all()

    def awaits(self, key: bytes) -> bool:
        """Return whether a block is not stored yet and a save of it is announced or in flight."""
        with self._lock:
            if key in self._catalog:
                return False
            return key in self._announced or self._feed.in_flight(key)

    def wait_for(self, key: bytes, seconds: float) -> None:
        """Wait until a block is stored or no save of it is in flight, at most `seconds`."""
        deadline = time.monotonic() + seconds
        with self._saved:
            while key not in self._catalog and (left := deadline - time.monotonic()) > 0:
                if key in self._announced:
                    self._saved.wait(left)
                elif self._feed.in_flight(key):
                    self._saved.wait(min(left, _WAIT_STEP_SECONDS))
                    self._feed.poll(at_once=True)
                else:
                    # It may have been stored since the last poll.
                    self._feed.poll(at_once=True)
                    return


def _bytes_of(payload: object) -> memoryview:
    try:
        content = memoryview(payload)  # type: ignore[arg-type]
    except TypeError:
        raise OptionError(f"a payload of type {type(payload).__name__}; pass bytes or an array of uint8") from None
    if not content.c_contiguous or content.itemsize != 1 or not content.nbytes:
        raise OptionError(
            f"a payload of {content.nbytes} bytes with items of {content.itemsize}; "
            "pass at least one byte, contiguous, with items of one byte"
        )
    return content.cast("B") if content.format != "B" or content.ndim != 1 else content
