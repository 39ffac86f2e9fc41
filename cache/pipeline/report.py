"""The report of a cache: the state of its tiers and its counters, by name.

`Cache.tiers` and `Cache.counters` call it, also without the cache's lock from a signal handler.
"""

from __future__ import annotations

from erllama.cache.blocks.match import TierStatus
from erllama.cache.catalog.catalog import BlockCatalog
from erllama.cache.catalog.counters import TIERS, Counters
from erllama.cache.pipeline.tier_set import TierSet
from erllama.cache.pipeline.write_queue import WriteQueue


class CacheReport:
    """Reads the state of one cache without changing it."""

    def __init__(self, catalog: BlockCatalog, counters: Counters, queue: WriteQueue, tiers: TierSet) -> None:
        self._catalog, self._counters, self._queue, self._tiers = catalog, counters, queue, tiers

    def statuses(self) -> list[TierStatus]:
        """Return the state of every root of every tier, from fast to slow."""
        return [
            TierStatus(
                ledger.name,
                root.location,
                root.budget,
                ledger.n_bytes(root),
                ledger.n_blocks(root),
                self._tiers.error_of(root),
                root.read_only,
            )
            for ledger in self._catalog.ledgers().values()
            for root in list(ledger.roots)
        ]

    def counts(self) -> dict[str, int | float]:
        """Return the counters, and the bytes and blocks of each tier."""
        found = self._counters.snapshot()
        found["corrupt_files"] += sum(tier.damaged for tier in self._tiers)
        ledgers = self._catalog.ledgers()
        for name in dict.fromkeys((*TIERS, *ledgers)):
            ledger = ledgers.get(name)
            found[f"bytes_{name}"] = ledger.n_bytes() if ledger else 0
            found[f"blocks_{name}"] = len(ledger) if ledger else 0
        found["read_only_directories"] = sum(tier.read_only for tier in self._tiers)
        found["bytes_pending"] = self._queue.n_bytes
        return found
