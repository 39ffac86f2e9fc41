"""The report of a cache: the state of its tiers and its counters, by name, with those of other processes.

`Cache.tiers`, `counters` and `rows` call it, the first two also without the cache's lock from a signal handler.
"""

from __future__ import annotations

from collections.abc import Sequence

from erllama.cache.blocks.match import Row, TierStatus
from erllama.cache.catalog.catalog import BlockCatalog
from erllama.cache.catalog.counters import TIERS, Counters
from erllama.cache.catalog.ledger import TierLedger
from erllama.cache.pipeline.tier_set import TierSet
from erllama.cache.pipeline.write_queue import WriteQueue
from erllama.cache.sharing.members import MemberReport, add_counts


class CacheReport:
    """Reads the state of one cache without changing it.

    The reports of members, which are other processes, are added. All have the directories in common, whose content
    counts once. A member adds what only its process has: events, and the tiers whose content ends with it.
    """

    def __init__(self, catalog: BlockCatalog, counters: Counters, queue: WriteQueue, tiers: TierSet) -> None:
        self._catalog, self._counters, self._queue, self._tiers = catalog, counters, queue, tiers

    def names(self, members: Sequence[MemberReport] = ()) -> tuple[str, ...]:
        """Return the names of the tiers, from fast to slow."""
        ledgers = self._catalog.ledgers().values()
        theirs = [status.tier for report in members for status in report.tiers]
        return tuple(
            dict.fromkeys(
                [
                    *(ledger.name for ledger in ledgers if ledger.external),
                    *(name for name in theirs if name != "ram"),
                    *(ledger.name for ledger in ledgers if not ledger.external and not ledger.write_behind),
                    *(name for name in theirs if name == "ram"),
                    *(ledger.name for ledger in ledgers if ledger.write_behind),
                ]
            )
        )

    def statuses(self, members: Sequence[MemberReport] = ()) -> list[TierStatus]:
        """Return the state of every root of every tier, from fast to slow."""
        ledgers = self._catalog.ledgers()
        theirs = [status for report in members for status in report.tiers]
        found: list[TierStatus] = []
        for name in self.names(members):
            found += self._statuses_of(ledgers[name]) if name in ledgers else []
            found += [status for status in theirs if status.tier == name]
        return found

    def _statuses_of(self, ledger: TierLedger) -> list[TierStatus]:
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
            for root in list(ledger.roots)
        ]

    def counts(self, members: Sequence[MemberReport] = ()) -> dict[str, int | float]:
        """Return the counters, and the bytes and blocks of each tier."""
        found = self._counters.snapshot()
        found["corrupt_files"] += sum(tier.damaged for tier in self._tiers)
        for tier in self._tiers:
            for name, n in tier.counts().items():
                found[name] = found.get(name, 0) + n
        ledgers = self._catalog.ledgers()
        for name in dict.fromkeys((*TIERS, *ledgers)):
            ledger = ledgers.get(name)
            found[f"bytes_{name}"] = ledger.n_bytes() if ledger else 0
            found[f"blocks_{name}"] = len(ledger) if ledger else 0
        found["bytes_pinned"] = sum(self._catalog.pin_book.usage(ledger).n_bytes for ledger in ledgers.values())
        found["read_only_directories"] = sum(tier.read_only for tier in self._tiers)
        found["bytes_pending"] = self._queue.n_bytes
        for report in members:
            found = add_counts(found, report, pending=True)
            for status in report.tiers:
                added = {f"bytes_{status.tier}": status.n_bytes, f"blocks_{status.tier}": status.n_blocks}
                found |= {name: found.get(name, 0) + n for name, n in added.items()}
        return found

    def rows(self, members: Sequence[MemberReport] = ()) -> list[Row]:
        """Return one row per stored block and tier. The caller holds the cache's lock."""
        return [*self._catalog.rows(), *(row for report in members for row in report.rows)]

    def as_member(self) -> MemberReport:
        """Return what this process adds to the cache of another process. The caller holds the cache's lock."""
        in_memory = [ledger for ledger in self._catalog.ledgers().values() if not ledger.write_behind]
        statuses = [status for ledger in in_memory for status in self._statuses_of(ledger)]
        return MemberReport(self.counts(), tuple(statuses), tuple(self._catalog.memory_rows()))
