"""Eviction: tiers kept within their budgets, bytes freed on request, refused blocks removed.

The third link of the pipeline, after the tier set. The catalog chooses the victims; the evictor drops them
there and removes them from the tier, in the transaction of a tier that several processes share.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from erllama.cache.blocks.block import Block
from erllama.cache.catalog.catalog import BlockCatalog, Victim
from erllama.cache.pipeline.tier_set import TierSet
from erllama.cache.pipeline.write_queue import WriteQueue
from erllama.cache.tiers.tier import Changes, Tier


class _PendingRemoval(NamedTuple):
    """A pending removal of a block from a tier. The bytes of the block count until it is removed."""

    block: Block
    damaged: bool
    n_bytes: int


class Evictor:
    """Removes blocks from the tiers of one cache.

    Args:
        lock: the cache's lock. It guards `catalog` and the pending removals.
    """

    def __init__(self, lock: threading.RLock, catalog: BlockCatalog, queue: WriteQueue, tiers: TierSet) -> None:
        self._lock, self._catalog, self._queue, self._tiers = lock, catalog, queue, tiers
        self._pending: dict[Tier, dict[bytes, _PendingRemoval]] = {}

    # --- budgets ---------------------------------------------------------------------------------

    def fit_to_budget(self, tier: Tier) -> None:
        """Evict from a tier until it is within its budget, which may be smaller than when it was filled."""
        if tier.read_only:
            return
        with self._tiers.locked(), self._tiers.guard("evicting", tier), tier.exclusive():
            self._tiers.read_pins(tier)
            with self._lock:
                victims = self._catalog.choose_victims(tier, tier.budget)
            self.remove(tier, victims)

    def evict_bytes(self, n_bytes: int, names: Iterable[str]) -> int:
        """Free at least `n_bytes`, least recently used first, in these tiers, in this order.

        Returns:
            the bytes freed: fewer if the rest is pinned.
        """
        freed = 0
        for name in names:
            ledger = self._catalog.ledgers().get(name)
            gained = 1
            # Repeat while that frees more: evicting from one root can turn blocks of another into leaves.
            while ledger is not None and gained and freed < n_bytes:
                gained = 0
                for root in list(ledger.roots):
                    if freed + gained < n_bytes:
                        gained += self._evict(root, n_bytes - freed - gained)
                freed += gained
        return freed

    def _evict(self, tier: Tier, n_bytes: int) -> int:
        """Free at least `n_bytes` of a tier if it has them. Returns the bytes freed."""
        if tier.write_mode != "behind":
            return self._evict_under_lock(tier, n_bytes)
        if tier.read_only or not self._tiers.readable(tier):
            return 0
        victims: list[Victim] = []
        with self._tiers.locked():
            with self._tiers.guard("evicting", tier), tier.exclusive():
                self._tiers.sync(tier)
                with self._lock:
                    victims = self._choose(tier, n_bytes)
                self.remove(tier, victims)
            return self._bytes_freed(tier, victims)

    def _evict_under_lock(self, tier: Tier, n_bytes: int) -> int:
        """Free bytes as `_evict` does, of a tier that is written, and so changed, under the cache's lock."""
        if tier.read_only:
            return 0
        with self._lock:
            victims = self._choose(tier, n_bytes)
            try:
                self.remove(tier, victims)
            except BaseException:
                if tier.write_mode == "through":
                    self._tiers.apply_changes(tier, Changes(list(tier.rows()), [], complete=True))
                raise
        return sum(victim.n_bytes for victim in victims)

    def _choose(self, tier: Tier, n_bytes: int) -> list[Victim]:
        """Drop blocks of at least `n_bytes` from the catalog. The caller holds the cache's lock."""
        return self._catalog.choose_victims(tier, self._catalog.ledger(tier.name).n_bytes(tier) - n_bytes)

    def _bytes_freed(self, tier: Tier, victims: Sequence[Victim]) -> int:
        """Return the bytes of the victims that are gone. Excludes those that the tier failed to remove."""
        if not self._tiers.in_sync(tier):
            with self._tiers.guard("listing the blocks that are left", tier):
                self._tiers.sync(tier)
            if not self._tiers.in_sync(tier):
                return 0
        with self._lock:
            ledger = self._catalog.ledger(tier.name)
            return sum(victim.n_bytes for victim in victims if ledger.root_of(victim.key) is not tier)

    def remove(self, tier: Tier, victims: Sequence[Victim]) -> None:
        """Remove blocks from a tier that the catalog has dropped already."""
        if victims:
            tier.remove([victim.key for victim in victims])

    # --- pending removals --------------------------------------------------------------------------

    def remove_later(self, tier: Tier, block: Block, *, damaged: bool = False) -> None:
        """Drop a block of a tier now and remove it in the queue's thread. Never waits for storage."""
        with self._lock:
            # Rows that were written up to now, by this process too, must not look stored anew to `remove_pending`.
            if self._tiers.in_sync(tier):
                with self._tiers.guard("reading the index", tier):
                    self._tiers.apply_new_changes(tier)
            ledger = self._catalog.ledger(tier.name)
            if ledger.root_of(block.key) is not tier:
                return
            removal = _PendingRemoval(block, damaged, ledger.size_of(block.key))
            self._pending.setdefault(tier, {})[block.key] = removal
            self._catalog.drop(tier.name, block.key)
        self._queue.defer(self._remove_all_pending)

    def _remove_all_pending(self) -> None:
        for tier in list(self._pending):
            if self._tiers.readable(tier):
                with self._tiers.locked(), self._tiers.guard("removing blocks", tier), tier.exclusive():
                    self.remove_pending(tier)

    def remove_pending(self, tier: Tier) -> None:
        """Carry out the pending removals of a tier, before other blocks use their room. Called in `exclusive`.

        Skips a block that is in the catalog again: another process has stored it anew since.
        """
        self._tiers.sync(tier)
        with self._lock:
            ledger = self._catalog.ledger(tier.name)
            pending = self._pending.pop(tier, {})
            removals = {key: removal for key, removal in pending.items() if ledger.root_of(key) is not tier}
        try:
            for block, damaged, _ in removals.values():
                if damaged:
                    tier.quarantine(block)
                else:
                    tier.remove([block.key])
        except BaseException:
            self._tiers.mark_out_of_sync(tier)  # `sync` lists and counts the remaining blocks again
            raise

    def pending_bytes(self, tier: Tier) -> int:
        """Return the bytes of the pending removals of a tier. The caller holds the cache's lock."""
        return sum(removal.n_bytes for removal in self._pending.get(tier, {}).values())

    def is_pending(self, tier: Tier, key: bytes) -> bool:
        """Return whether a removal of a block is pending. The caller holds the cache's lock."""
        return key in self._pending.get(tier, {})
