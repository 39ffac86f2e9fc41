"""Tiers that their owners write: KV that is still in the cells of a context.

`Cache.attach`, `detach`, `report_stored` and `report_removed` call it. The catalog records what their owners
report. The cache does not read or write payloads there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from erllama.cache.blocks.block import Block
from erllama.cache.catalog.catalog import BlockCatalog
from erllama.cache.pipeline.tier_set import TierSet
from erllama.cache.tiers.tier import Tier
from erllama.errors import OptionError


class AttachedTiers:
    """The tiers with `write_mode="external"` of one cache.

    Args:
        lock: the cache's lock. It guards `catalog`.
    """

    def __init__(self, lock: threading.RLock, catalog: BlockCatalog, tiers: TierSet) -> None:
        self._lock, self._catalog, self._tiers = lock, catalog, tiers

    def attach(self, tier: Tier) -> None:
        """Add a tier, as the fastest."""
        if tier.write_mode != "external":
            raise OptionError(
                f"tier {tier.name!r} has write_mode={tier.write_mode!r}; "
                "attach takes tiers with write_mode='external'"
            )
        with self._lock:
            self._catalog.add_root(tier, fastest=True)
            self._tiers.add_fastest(tier)

    def detach(self, tier: Tier) -> None:
        """Remove a tier and its blocks. Ignores one that is not attached."""
        with self._lock:
            ledger = self._catalog.ledgers().get(tier.name)
            if ledger is None or tier not in ledger.roots:
                return
            self._tiers.remove(tier)
            self._catalog.remove_root(tier)

    def report_stored(self, tier: Tier, block: Block, n_bytes: int) -> bool:
        """Record that a tier has a block; False if its budget has no room after evicting others."""
        with self._lock:
            fits = self._catalog.make_room(tier, block, n_bytes)
            if fits:
                self._catalog.put(tier, block, n_bytes, time.time_ns())
            return fits

    def report_removed(self, tier: Tier, keys: Sequence[bytes]) -> None:
        """Record that a tier no longer has these blocks."""
        with self._lock:
            ledger = self._catalog.ledger(tier.name)
            for key in keys:
                if ledger.root_of(key) is tier:
                    self._catalog.drop(tier.name, key)
