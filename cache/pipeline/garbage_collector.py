"""Garbage collection: repaired tiers, a synced catalog, and no unreachable blocks.

`Cache.gc` calls it, in the thread of its caller.
"""

from __future__ import annotations

import threading

from erllama._runtime.log import logger
from erllama.cache.catalog.catalog import BlockCatalog
from erllama.cache.pipeline.change_feed import ChangeFeed
from erllama.cache.pipeline.evictor import Evictor
from erllama.cache.pipeline.tier_set import TierSet
from erllama.cache.pipeline.write_queue import WriteQueue
from erllama.cache.tiers.tier import Tier

log = logger("erllama.cache")


class GarbageCollector:
    """Collects the garbage of the tiers slower than RAM.

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
        feed: ChangeFeed,
    ) -> None:
        self._lock, self._catalog, self._queue = lock, catalog, queue
        self._tiers, self._evictor, self._feed = tiers, evictor, feed

    def collect(self) -> int:
        """Repair each tier, remove unreachable blocks and enforce the budgets.

        Returns:
            the bytes of the unreachable blocks.
        """
        freed = 0
        self._tiers.write_uses()
        for tier in self._tiers.write_behind_tiers():
            with self._tiers.locked():
                if self._feed.ensure_open(tier):
                    with self._tiers.guard("repairing", tier):
                        tier.repair()
                        self._tiers.sync(tier)
                        freed += self._remove_unreachable(tier)
                    self._evictor.fit_to_budget(tier)
        return freed

    def _remove_unreachable(self, tier: Tier) -> int:
        if tier.read_only:
            return 0
        if tier.unlisted is not None:
            log.warning("%s: %s; no unreachable block is removed", tier.location, tier.unlisted)
            return 0
        with tier.exclusive():
            self._tiers.sync(tier)
            with self._lock:
                victims = self._catalog.drop_unreachable(tier, self._queue)
            self._evictor.remove(tier, victims)
        return sum(victim.n_bytes for victim in victims)
