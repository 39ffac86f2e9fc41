"""Checks of a cache: whether the catalog, the tiers' own lists and the stored content agree.

`Cache.verify` and `Cache.check_integrity` call it. Changes no stored block.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator

from erllama.cache.catalog.catalog import BlockCatalog
from erllama.cache.pipeline.evictor import Evictor
from erllama.cache.pipeline.tier_set import TierSet
from erllama.cache.tiers.tier import Problem, Tier
from erllama.errors import CacheError


class IntegrityChecker:
    """Compares the catalog of one cache with its tiers.

    Args:
        lock: the cache's lock. It guards `catalog`.
    """

    def __init__(self, lock: threading.RLock, catalog: BlockCatalog, tiers: TierSet, evictor: Evictor) -> None:
        self._lock, self._catalog, self._tiers, self._evictor = lock, catalog, tiers, evictor

    def verify(self) -> list[Problem]:
        """Read the whole content of the tiers slower than RAM and list each defect."""
        problems: list[Problem] = []
        for tier in self._tiers.write_behind_tiers():
            if self._tiers.readable(tier):
                try:
                    problems.extend(tier.verify())
                except (OSError, sqlite3.Error, CacheError) as error:
                    problems.append(Problem(tier.name, tier.location, str(error)))
            else:
                reason = self._tiers.error_of(tier) or "the tier is not open"
                problems.append(Problem(tier.name, tier.location, str(reason)))
        return problems

    def contradictions(self) -> Iterator[str]:
        """Yield each difference between the catalog, the tiers' lists and the stored content."""
        with self._lock:
            yield from list(self._catalog.contradictions())
        for tier in self._tiers:
            try:
                if tier.write_mode == "through":
                    with self._lock:
                        yield from list(self._differences(tier))
                elif tier.write_mode == "behind" and self._tiers.readable(tier):
                    with self._tiers.locked(), tier.exclusive():
                        self._tiers.sync(tier)
                        with self._lock:
                            found = list(self._differences(tier))
                        found += [f"{problem.location}: {problem.description}" for problem in tier.check()]
                    yield from found
            except (OSError, sqlite3.Error, CacheError) as error:
                yield f"{tier.location} cannot be compared: {error}"

    def _differences(self, tier: Tier) -> Iterator[str]:
        """Yield each difference between the catalog and the list of a tier. The caller holds the cache's lock."""
        ledger = self._catalog.ledger(tier.name)
        counted = ledger.sizes(tier)
        for row in tier.rows():
            key = row.block.key
            n_bytes = counted.pop(key, None)
            if n_bytes is None:
                # Another root may have the block, too. A read-only tier has no budget to count for.
                if key not in ledger and not tier.read_only and not self._evictor.is_pending(tier, key):
                    yield f"{tier.location_of(row.block)} takes {row.n_bytes} bytes that are not counted"
            elif n_bytes != row.n_bytes:
                yield f"{tier.location_of(row.block)} takes {row.n_bytes} bytes and counts for {n_bytes}"
        for key in counted:
            yield f"{tier.location} counts block {key.hex()}, which it does not have"
