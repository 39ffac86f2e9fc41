"""The members of a cache: other processes that use its directories for a model, and what they report of it.

The engine adds a member to a cache for each model that runs in its own process. A member has what only its process
has: counts, parked cells, a RAM tier. `Members` collects the reports. If a member fails, its last report counts,
and the caller sees no exception.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple, Protocol

from erllama._runtime.log import logger
from erllama.cache.blocks.match import Row, TierStatus
from erllama.cache.catalog.counters import Counters
from erllama.errors import CacheError

log = logger("erllama.cache")

# Counters of states. The others count events or seconds since a cache was created.
_STATE_PREFIXES = ("bytes_", "blocks_")
_STATES = ("read_only_directories",)
_WRITTEN, _PENDING = "bytes_written", "bytes_pending"


@dataclass(frozen=True, slots=True)
class MemberReport:
    """What another process reports of a cache.

    Attributes:
        counters: as of `Cache.counters`.
        tiers: the tiers whose content ends with that process: contexts and RAM.
        rows: the blocks of those tiers.
    """

    counters: Mapping[str, int | float] = field(default_factory=dict)
    tiers: tuple[TierStatus, ...] = ()
    rows: tuple[Row, ...] = ()

    def as_plain(self) -> dict[str, Any]:
        """Return the fields as mappings, lists, tuples, numbers, texts, bytes and booleans. Errors become texts."""
        return {
            "counters": dict(self.counters),
            "tiers": [
                tier._asdict() | {"error": None if tier.error is None else str(tier.error)} for tier in self.tiers
            ],
            "rows": [tuple(row) for row in self.rows],
        }

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> MemberReport:
        """Return the report that `as_plain` was called on. Its errors are of the type `CacheError`."""
        tiers = [TierStatus(**tier) for tier in plain["tiers"]]
        return cls(
            plain["counters"],
            tuple(tier if tier.error is None else tier._replace(error=CacheError(tier.error)) for tier in tiers),
            tuple(Row(*row) for row in plain["rows"]),
        )


class CacheMember(Protocol):
    """A process that uses the directories of a cache for a model. The engine implements it.

    A member stands for one process, so its counts never fall. The process that replaces an ended one is another
    member. Any thread and signal handlers may call a member, several at once. No call waits for a process that has
    ended or hangs. A process that has ended has no tiers any more.
    """

    def report(self, wait: bool) -> MemberReport:
        """Return the report of the process: the present one, or, if not `wait`, the last one at once."""

    def flush(self, timeout: float | None) -> bool:
        """Write all blocks that wait there, as `Cache.flush` does."""

    def evict_bytes(self, n_bytes: int, tiers: Sequence[str]) -> int:
        """Free at least `n_bytes` of these tiers there, as `Cache.evict_bytes` does. Returns the bytes freed."""


class _Entry:
    """A member, its last report, and whether its last call failed."""

    def __init__(self, member: CacheMember) -> None:
        self.member = member
        self.report = MemberReport()
        self.numbers = count(1)
        self.number = 0  # of the call that returned `report`
        self.failed = False


class _State(NamedTuple):
    """The members, and the counts of those that were removed. Replaced and never changed: readers need no lock."""

    entries: tuple[_Entry, ...]
    removed: MemberReport


class Members:
    """The members of one cache. Thread-safe."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._lock = threading.RLock()  # reentrant, for calls from signal handlers
        self._state = _State((), MemberReport())

    def add(self, member: CacheMember) -> None:
        """Add a member, unless it was added already."""
        with self._lock:
            if self._entry_of(member) is None:
                self._state = self._state._replace(entries=(*self._state.entries, _Entry(member)))

    def remove(self, member: CacheMember) -> None:
        """Remove a member. Its counts stay. Ignores one that was not added."""
        entry = self._entry_of(member)
        if entry is None:
            return
        self._ask(entry, wait=False)
        with self._lock:
            entries, removed = self._state
            if entry in entries:
                left = tuple(other for other in entries if other is not entry)
                self._state = _State(left, MemberReport(add_counts(removed.counters, entry.report)))

    def clear(self) -> None:
        """Remove all members."""
        for entry in self._state.entries:
            self.remove(entry.member)

    def _entry_of(self, member: CacheMember) -> _Entry | None:
        return next((entry for entry in self._state.entries if entry.member is member), None)

    # --- calling them ------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._state.entries)

    def last_reports(self) -> list[MemberReport]:
        """Return the last report of each member, without calling it."""
        return [entry.report for entry in self._state.entries]

    def reports(self, *, wait: bool) -> list[MemberReport]:
        """Return one report of each member, and one with the counts of those that were removed.

        Args:
            wait: ask for present reports; False for the last ones, at once.
        """
        entries, removed = self._state
        return [*(self._ask(entry, wait) for entry in entries), removed]

    def _ask(self, entry: _Entry, wait: bool) -> MemberReport:
        """Return the report of a member; the last one if that fails."""
        number = next(entry.numbers)
        try:
            report = entry.member.report(wait)
            if not isinstance(report, MemberReport):
                raise TypeError(f"a report of type {type(report).__name__}")
        except Exception as error:
            self._note_failure(entry, "reporting", error)
            return entry.report
        with self._lock:
            entry.failed = False
            if number > entry.number:
                entry.report, entry.number = report, number
        return report

    def flush(self, timeout: float | None) -> bool:
        """Write all blocks that wait in the members; False if one failed or `timeout` seconds were not enough."""
        deadline = None if timeout is None else time.monotonic() + timeout
        complete = True
        for entry in self._state.entries:
            try:
                left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                complete = entry.member.flush(left) and complete
            except Exception as error:
                self._note_failure(entry, "flushing", error)
                complete = False
        return complete

    def evict_bytes(self, n_bytes: int, tiers: Sequence[str]) -> int:
        """Free at least `n_bytes` of these tiers in the members. Returns the bytes freed."""
        freed = 0
        for entry in self._state.entries:
            if freed < n_bytes:
                try:
                    freed += entry.member.evict_bytes(n_bytes - freed, tiers)
                except Exception as error:
                    self._note_failure(entry, "evicting", error)
        return freed

    def _note_failure(self, entry: _Entry, action: str, error: Exception) -> None:
        """Count and log the first of successive failures of a member."""
        with self._lock:
            first, entry.failed = not entry.failed, True
        if first:
            self._counters.add("faults")
            log.warning("%s of a process that uses the cache failed: %r; using its last report", action, error)


def add_counts(
    counts: Mapping[str, int | float], report: MemberReport, *, pending: bool = False
) -> dict[str, int | float]:
    """Return the sums of counts and of those of a report. Leaves out the bytes and blocks of tiers.

    Args:
        pending: include the bytes that wait to be written.
    """
    found = dict(counts)
    for name, n in report.counters.items():
        is_state = name in _STATES or name.startswith(_STATE_PREFIXES)
        if not is_state or name == _WRITTEN or (pending and name == _PENDING):
            found[name] = found.get(name, 0) + n
    return found
