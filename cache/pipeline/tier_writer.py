"""How saves reach the slower tiers: queued with a request, written behind it, with room made and reserved first."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from erllama.cache.blocks.block import Block
from erllama.cache.catalog.catalog import PENDING, BlockCatalog, TierLedger
from erllama.cache.catalog.counters import Counters
from erllama.cache.pipeline.write_queue import SHARED_TAIL_DELAY_SECONDS, TAIL_DELAY_SECONDS, Pending
from erllama.cache.tiers.tier import Tier

_SHARED_LOOK_SECONDS = 0.5  # between two looks for other processes while tails wait to be written

if TYPE_CHECKING:
    from erllama.cache.pipeline.tier_set import Upkeep


class TierWriter:
    """Queues and writes the saves of one cache; `persist` runs in the writer, the rest under the lock."""

    def __init__(self, upkeep: Upkeep, lock: threading.RLock, residents: BlockCatalog, counters: Counters) -> None:
        self._upkeep, self._lock, self._residents, self._counters = upkeep, lock, residents, counters
        self._shared = False  # other processes use a tier, too, as of the last look
        self._looked_who_shares = -math.inf  # when, by time.monotonic()

    def offer(
        self,
        block: Block,
        payload: memoryview,
        to: tuple[str, ...],
        replace: bool,
        overtaken: tuple[bytes, ...],
        full: bool,
    ) -> bool:
        """Queue a save for slower tiers; under the lock. Ancestors that one lacks go before it, from RAM."""
        if not to:
            return False
        for ancestor, where in self._missing_ancestors(block, to):
            held = self._residents.in_ram(ancestor)
            if held is None or not self._queue(*held, where, False, (), 0.0):
                return False
        if full:
            return self._queue(block, payload, to, replace, overtaken, 0.0)
        delay = SHARED_TAIL_DELAY_SECONDS if self._shared else TAIL_DELAY_SECONDS
        queued = self._queue(block, payload, to, replace, overtaken, delay)
        self._look_who_shares_soon()  # now that it is queued: a look that finds somebody hurries what waits
        return queued

    def _queue(
        self,
        block: Block,
        payload: memoryview,
        to: tuple[str, ...],
        replace: bool,
        overtaken: tuple[bytes, ...],
        delay: float,
    ) -> bool:
        if not self._upkeep.writer.offer(Pending(block, payload, to, replace, overtaken, time.monotonic() + delay)):
            return False
        self._residents.tree.add(block, PENDING)
        self._residents.learn(PENDING, block)
        return True

    def _missing_ancestors(self, block: Block, to: tuple[str, ...]) -> list[tuple[Block, tuple[str, ...]]]:
        """Blocks before this one that a tier neither holds nor is about to get, and those tiers; in order."""
        missing: list[tuple[Block, tuple[str, ...]]] = []
        parent = block.parent
        while parent != block.namespace and parent not in self._upkeep.writer:
            where = tuple(name for name in to if parent not in self._residents.shelves[name])
            entry = self._residents.tree.get(parent)
            if not where or entry is None:
                break
            missing.append((entry.block, where))
            parent = entry.block.parent
        return missing[::-1]

    def _look_who_shares_soon(self) -> None:
        again = self._looked_who_shares + _SHARED_LOOK_SECONDS - time.monotonic()
        self._upkeep.writer.defer(self._look_who_shares, max(again, 0.0), patient=True)

    def _look_who_shares(self) -> None:
        self._looked_who_shares = time.monotonic()
        with self._upkeep.tending:
            self._shared = any(tier.shared for tier in self._upkeep.behind if self._upkeep.ready(tier))
        if self._shared:
            self._upkeep.writer.hurry()
        elif self._upkeep.writer.n_bytes:
            # Who comes while a tail waits is to see it, too.
            self._upkeep.writer.defer(self._look_who_shares, _SHARED_LOOK_SECONDS, patient=True)

    def promote(self, block: Block, payload: memoryview, slower: TierLedger) -> None:
        """Queue a block for those tiers written behind that are faster than where it was found; under the lock."""
        to: list[str] = []
        for name, shelf in self._residents.shelves.items():
            if shelf is slower:
                break
            follows = (
                block.parent == block.namespace or block.parent in shelf or block.parent in self._upkeep.writer
            )
            if name in self._upkeep.tiers_behind and block.key not in shelf and follows:
                to.append(name)
        if to and self._queue(block, payload, tuple(to), False, (), 0.0):
            self._counters.add("promotions")

    def persist(self, pending: Pending) -> None:
        """Write one save to its tiers; the writer's thread calls it."""
        try:
            for name in pending.to:
                with self._upkeep.tending:
                    self._persist_in(self._residents.shelves[name], pending)
        finally:
            with self._lock:
                if not self._upkeep.writer.waits(pending.block.key):  # a newer version
                    self._residents.drop(PENDING, pending.block.key)

    def _persist_in(self, shelf: TierLedger, pending: Pending) -> None:
        block, n_payload = pending.block, pending.payload.nbytes
        with self._lock:
            roots = self._residents.roots_by_room(shelf, block, shelf.roots[0].size(block, n_payload))
        for tier in roots:
            if not self._upkeep.usable(tier):
                continue
            with self._counters.timing("write"), self._upkeep.guarding("making room", tier):
                n_bytes = tier.size(block, n_payload)
                room = self._make_room(shelf, tier, pending, n_bytes)
                if room == "elsewhere":
                    return
                if room == "there" or (room == "made" and self._write(shelf, tier, pending, n_bytes)):
                    self._drop_overtaken(shelf, pending.overtaken)
                    return
        self._counters.add("saves_dropped")

    def _write(self, shelf: TierLedger, tier: Tier, pending: Pending, n_bytes: int) -> bool:
        block, before, written = pending.block, None, False
        with self._lock:
            entry = self._residents.tree.get(block.key)
            if entry is not None and block.key in shelf:
                before = (shelf.root_of(block.key) or tier, entry.block, shelf.lru.size_of(block.key))
            # Before it is written: as soon as it is, others may remove it, and `look` then tells us.
            self._residents.put(tier, block, n_bytes, time.time_ns())
        with self._upkeep.guarding(f"writing a block of {block.n_tokens} tokens", tier, changes=False):
            tier.write(block, pending.payload)
            self._counters.add("bytes_written", n_bytes)
            written = True
        with self._lock:
            if not written and before is None:
                self._residents.drop(tier.name, block.key)
            elif not written and before is not None:
                self._residents.put(*before, time.time_ns())
        return written

    def _make_room(
        self, shelf: TierLedger, tier: Tier, pending: Pending, n_bytes: int
    ) -> Literal["made", "none", "there", "elsewhere"]:
        """Reserve room for a block, evicting others.

        Returns:
            "made"; "none", where nothing that may go is left; "there", where the block
            is stored already; "elsewhere", where another process is writing it.
        """
        block = pending.block
        tier.tidy()
        with tier.exclusive():
            self._upkeep.remove_doomed(tier)
            self._upkeep.catch_up(tier)
            reserved = tier.reserved()
            if tier.in_flight(block.key):
                self._counters.add("duplicates_dropped")
                return "elsewhere"
            with self._lock:
                residents = self._residents
                if block.key in shelf and not pending.replace:
                    self._counters.add("duplicates_dropped")
                    return "there"
                first = block.parent == block.namespace
                reachable = first or block.parent in shelf or tier.in_flight(block.parent)
                room = tier.budget - reserved - self._upkeep.doomed_bytes(tier) - n_bytes
                if not reachable or room < 0:
                    return "none"
                if shelf.n_bytes(tier) > room:
                    self._learn_uses(shelf, tier)
                # An older version of the block stays until the new one is in its place.
                victims = residents.choose_victims(tier, room, keep=(block.parent, block.key))
                fits = shelf.n_bytes(tier) <= room
            self._upkeep.forget(tier, victims)
            if not fits:
                return "none"
            return "made" if tier.reserve(block, n_bytes) else "elsewhere"

    def _learn_uses(self, shelf: TierLedger, tier: Tier) -> None:
        """What another process needs is no older than it is to that one."""
        now = time.time_ns()
        for key, at in tier.uses():
            shelf.lru.touch(key, min(at, now))

    def _drop_overtaken(self, shelf: TierLedger, keys: Iterable[bytes]) -> None:
        """Drop tails whose successor this tier has now."""
        superfluous: dict[Tier, list[bytes]] = {}
        with self._lock:
            for key in keys:
                root = shelf.root_of(key)
                if root is not None and not root.read_only and not self._residents.pinned(key):
                    superfluous.setdefault(root, []).append(key)
                    self._residents.drop(shelf.name, key)
                    if self._residents.tree.get(key) is None:
                        self._counters.add("tails_superseded")
        for root, gone in superfluous.items():
            root.remove(gone)
