"""The list of the blocks of a remote tier, as one machine knows it, and the changes that the cache has yet to see.

Of two entries of a block, the later one counts. All machines that have read the same segments therefore have the
same list, in whatever order they read them. A block whose key this machine lacks is hidden: it stays in the
manifests, and counts as not stored. Thread-safe; no call waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence

from erllama.cache.blocks.block import Block
from erllama.cache.remote.manifest import Entry, Event
from erllama.cache.tiers.tier import Changes, TierRow

# A removal is remembered for as long as a segment with the older entry may be on its way.
_REMOVAL_NS = 24 * 3600 * 10**9


class BlockList:
    """Blocks by key, with the entry that counts for each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[bytes, Entry] = {}  # of stored and of removed blocks
        self._used: dict[bytes, int] = {}  # later uses than those in the entries, in ns since 1970
        self._uses_of_others: dict[bytes, int] = {}  # not returned by `take_uses` yet
        self._changed: set[bytes] = set()  # blocks whose change the cache has yet to see

    def __len__(self) -> int:
        with self._lock:
            return sum(entry.readable for entry in self._entries.values())

    # --- this machine's own changes ----------------------------------------------------------------

    def store(
        self, block: Block, n_bytes: int, version: bytes, object_name: str, key_id: bytes
    ) -> tuple[Entry, Entry | None]:
        """Record that this machine stores a block. Returns the new entry, and the old one if it can be read."""
        with self._lock:
            older = self._entries.get(block.key)
            at = self._next_time(older)
            used = min(at, time.time_ns())
            entry = Entry(Event.STORED, at, block.key, block, n_bytes, version, used, key_id, object_name)
            self._entries[block.key] = entry
            self._used.pop(block.key, None)
            self._changed.discard(block.key)
            return entry, older if older is not None and older.readable else None

    def remove(self, key: bytes) -> tuple[Entry, Entry] | None:
        """Record that this machine removes a block. Returns the new and the old entry; None if it is unknown."""
        with self._lock:
            older = self._entries.get(key)
            if older is None or not older.readable:
                return None
            entry = Entry(Event.REMOVED, self._next_time(older), key)
            self._entries[key] = entry
            self._used.pop(key, None)
            self._changed.discard(key)
            return entry, older

    def lose(self, entry: Entry) -> bool:
        """Forget a block whose object is not there, unless a newer version was stored. The cache will see that."""
        with self._lock:
            if self._entries.get(entry.key) is not entry:
                return False
            del self._entries[entry.key]
            self._changed.add(entry.key)
            return True

    def _next_time(self, older: Entry | None) -> int:
        """Return the time of a new entry: later than that of the older one, whose clock may have been ahead."""
        return max(time.time_ns(), older.at + 1 if older is not None else 0)

    def use(self, key: bytes, at: int, step_ns: int) -> Entry | None:
        """Record a use by this machine. Returns an entry for the other machines, if it is in a later step than the
        last.

        Args:
            step_ns: length of a step.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or not entry.readable or at <= (before := self._last_use(entry)):
                return None
            self._used[key] = at
            # Steps of the clock, so that many small differences add up.
            return Entry(Event.USED, at, key) if at // step_ns > before // step_ns else None

    # --- those of other machines --------------------------------------------------------------------

    def merge(self, entries: Iterable[Entry]) -> list[Entry]:
        """Apply entries of other machines.

        Returns:
            the entries of stored blocks that another version has replaced, in either order.
        """
        replaced: list[Entry] = []
        with self._lock:
            for entry in entries:
                if entry.event is Event.USED:
                    self._merge_use(entry)
                    continue
                known = self._entries.get(entry.key)
                older: Entry | None
                if known is not None and _order(known) >= _order(entry):
                    older = entry
                else:
                    older, self._entries[entry.key] = known, entry
                    self._changed.add(entry.key)
                newest = self._entries[entry.key]
                if older is None or older.block is None or newest.block is None:
                    continue
                if (older.version, older.key_id) != (newest.version, newest.key_id):
                    replaced.append(older)
        return replaced

    def _merge_use(self, entry: Entry) -> None:
        at = min(entry.at, time.time_ns())  # a clock that was ahead must not protect a block forever
        if at > self._used.get(entry.key, 0):
            self._used[entry.key] = self._uses_of_others[entry.key] = at

    def counts(self, entry: Entry) -> bool:
        """Return whether an entry must stay in the manifests: it is the one that counts for its block."""
        with self._lock:
            if entry.event is Event.USED:
                known = self._entries.get(entry.key)
                return known is not None and known.block is not None and self._used.get(entry.key, 0) <= entry.at
            if entry.event is Event.REMOVED and entry.at < time.time_ns() - _REMOVAL_NS:
                return False
            known = self._entries.get(entry.key)
            return known is not None and _order(known) == _order(entry)

    # --- reading --------------------------------------------------------------------------------------

    def get(self, key: bytes) -> Entry | None:
        """Return the entry of a stored block; None if it is not stored."""
        with self._lock:
            entry = self._entries.get(key)
            return entry if entry is not None and entry.readable else None

    def rows(self) -> list[TierRow]:
        """Return all stored blocks. `take_changes` then returns later changes only."""
        with self._lock:
            self._changed.clear()
            return [self._row(entry) for entry in self._entries.values() if entry.readable]

    def names(self) -> set[str]:
        """Return the names of the objects of all stored blocks."""
        with self._lock:
            return {entry.object_name for entry in self._entries.values() if entry.readable}

    def unused_since(self, before: int) -> list[bytes]:
        """Return the keys of the blocks that were last used before a time, in ns since 1970."""
        with self._lock:
            stored = [entry for entry in self._entries.values() if entry.readable]
            return [entry.key for entry in stored if self._last_use(entry) < before]

    def expire_removals(self) -> None:
        """Forget removals that every machine has read long ago."""
        before = time.time_ns() - _REMOVAL_NS
        with self._lock:
            for key in [k for k, entry in self._entries.items() if entry.block is None and entry.at < before]:
                del self._entries[key]

    def mark_changed(self, key: bytes) -> None:
        """Let `take_changes` return a block, whose change this machine made by itself."""
        with self._lock:
            self._changed.add(key)

    @property
    def has_changes(self) -> bool:
        """Whether `take_changes` has changes to return."""
        return bool(self._changed)

    def take_changes(self) -> Changes | None:
        """Return the changes since the last call, or the last call of `rows`; None for none."""
        if not self._changed:
            return None
        with self._lock:
            stored: list[TierRow] = []
            removed: list[bytes] = []
            for key in self._changed:
                entry = self._entries.get(key)
                if entry is not None and entry.readable:
                    stored.append(self._row(entry))
                else:
                    removed.append(key)
            self._changed.clear()
        stored.sort(key=lambda row: row.block.start)  # parents first
        return Changes(stored, removed, complete=False)

    def take_uses(self) -> Sequence[tuple[bytes, int]]:
        """Return the uses by other machines since the last call: pairs of key and ns since 1970."""
        with self._lock:
            uses = list(self._uses_of_others.items())
            self._uses_of_others.clear()
            return uses

    def _row(self, entry: Entry) -> TierRow:
        assert entry.block is not None
        return TierRow(entry.block, entry.n_bytes, self._last_use(entry))

    def _last_use(self, entry: Entry) -> int:
        return max(entry.used, self._used.get(entry.key, 0))


def _order(entry: Entry) -> tuple[int, bool, bytes, bytes]:
    """Return what orders the entries of a block: time, then removals last, then the version and the key."""
    return entry.at, entry.block is None, entry.version, entry.key_id
