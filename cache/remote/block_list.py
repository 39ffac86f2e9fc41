"""The list of the blocks of a remote tier, as one machine knows it, and the changes that the cache has yet to see.

Of two entries of a block, the later one counts. All machines that have read the same segments therefore have the
same list, in whatever order they read them. A block whose key this machine lacks is hidden: it stays in the
manifests, and counts as not stored. So does one whose object this machine cannot use although others may.
Thread-safe; no call waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence

from erllama.cache.blocks.block import Block
from erllama.cache.remote.manifest import Entry, Event
from erllama.cache.tiers.tier import Changes, TierRow

# A removal is remembered for at least as long as a segment with the older entry may be on its way.
_REMOVAL_NS = 24 * 3600 * 10**9


class BlockList:
    """Blocks by key, with the entry that counts for each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[bytes, Entry] = {}  # of stored and of removed blocks
        self._used: dict[bytes, int] = {}  # later uses than those in the entries, in ns since 1970
        self._uses_of_others: dict[bytes, int] = {}  # not returned by `take_uses` yet
        self._changed: set[bytes] = set()  # blocks whose change the cache has yet to see
        self._hidden: set[bytes] = set()  # blocks whose objects this machine cannot use; see `hide`

    def __len__(self) -> int:
        with self._lock:
            return sum(self._shown(entry) for entry in self._entries.values())

    # --- this machine's own changes ----------------------------------------------------------------

    def new_entry(self, block: Block, n_bytes: int, version: bytes, object_name: str, key_id: bytes) -> Entry:
        """Return an entry of a block that this machine stores, later than the one that counts. `store` lists it."""
        with self._lock:
            at = self._next_time(self._entries.get(block.key))
        used = min(at, time.time_ns())
        return Entry(Event.STORED, at, block.key, block, n_bytes, version, used, key_id, object_name)

    def store(self, entry: Entry) -> Entry | None:
        """Record that this machine stores a block. Returns the entry that no longer counts, if it can be read."""
        with self._lock:
            older = self._entries.get(entry.key)
            if older is not None and _order(older) > _order(entry):
                return entry  # another machine has stored it meanwhile
            shown = older is not None and self._shown(older)
            self._entries[entry.key] = entry
            self._used.pop(entry.key, None)
            self._changed.discard(entry.key)
            self._hidden.discard(entry.key)
            return older if shown else None

    def remove(self, key: bytes, *, gone: bool = False) -> tuple[Entry, Entry] | None:
        """Record that this machine removes a block. Returns the new and the old entry; None if it is unknown.

        Args:
            gone: because its object is missing. That says nothing of a version that others have stored since.
        """
        with self._lock:
            older = self._entries.get(key)
            if older is None or not self._shown(older):
                return None
            entry = Entry(Event.REMOVED, older.at if gone else self._next_time(older), key)
            self._entries[key] = entry
            self._used.pop(key, None)
            self._uses_of_others.pop(key, None)
            self._changed.discard(key)
            return entry, older

    def hide(self, key: bytes) -> None:
        """Do not use a block, until a later version of it is stored. For other machines, nothing changes."""
        with self._lock:
            if key in self._entries:
                self._hidden.add(key)
                self._changed.discard(key)

    @property
    def has_hidden(self) -> bool:
        """Whether there are stored blocks that this machine cannot use."""
        with self._lock:
            return bool(self._hidden) or any(entry.hidden for entry in self._entries.values())

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
            if entry is None or not self._shown(entry) or at <= (before := self._last_use(entry)):
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
                    self._hidden.discard(entry.key)
                    if entry.block is None:
                        self._used.pop(entry.key, None)
                        self._uses_of_others.pop(entry.key, None)
                newest = self._entries[entry.key]
                if older is None or older.block is None or newest.block is None:
                    continue
                if (older.version, older.key_id) != (newest.version, newest.key_id):
                    replaced.append(older)
        return replaced

    def _merge_use(self, entry: Entry) -> None:
        known = self._entries.get(entry.key)
        if known is not None and known.block is None:
            return
        at = min(entry.at, time.time_ns())  # a clock that was ahead must not protect a block forever
        if at > self._used.get(entry.key, 0):
            self._used[entry.key] = self._uses_of_others[entry.key] = at

    def counts(self, entry: Entry) -> bool:
        """Return whether an entry must stay in the manifests: it is the one that counts for its block."""
        with self._lock:
            if entry.event is Event.USED:
                known = self._entries.get(entry.key)
                return known is not None and known.block is not None and self._used.get(entry.key, 0) <= entry.at
            known = self._entries.get(entry.key)
            if known is None:  # it could not be uploaded again; that is no removal
                return entry.event is Event.STORED
            return _order(known) == _order(entry)

    def shared(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return the same entries, those that count as the objects of this list, so that memory has them once."""
        with self._lock:
            return [
                known
                if entry.event is not Event.USED
                and (known := self._entries.get(entry.key)) is not None
                and _order(known) == _order(entry)
                else entry
                for entry in entries
            ]

    # --- reading --------------------------------------------------------------------------------------

    def get(self, key: bytes) -> Entry | None:
        """Return the entry of a stored block; None if it is not stored."""
        with self._lock:
            entry = self._entries.get(key)
            return entry if entry is not None and self._shown(entry) else None

    def rows(self) -> list[TierRow]:
        """Return all stored blocks. `take_changes` then returns later changes only."""
        with self._lock:
            self._changed.clear()
            return [self._row(entry) for entry in self._entries.values() if self._shown(entry)]

    def names(self) -> set[str]:
        """Return the names of the objects of all stored blocks, hidden ones included."""
        with self._lock:
            return {entry.object_name for entry in self._entries.values() if entry.readable}

    def unused_since(self, before: int) -> list[bytes]:
        """Return the keys of the blocks that were last used before a time, in ns since 1970."""
        with self._lock:
            stored = [entry for entry in self._entries.values() if self._shown(entry)]
            return [entry.key for entry in stored if self._last_use(entry) < before]

    def old_removals(self) -> set[bytes]:
        """Return the keys of the blocks whose removal every machine has read long ago."""
        before = time.time_ns() - _REMOVAL_NS
        with self._lock:
            return {key for key, entry in self._entries.items() if entry.block is None and entry.at < before}

    def forget_removals(self, keys: Iterable[bytes]) -> None:
        """Forget removals, and the uses of blocks that are not listed."""
        with self._lock:
            for key in keys:
                known = self._entries.get(key)
                if known is not None and known.block is None:
                    del self._entries[key]
            for uses in (self._used, self._uses_of_others):
                for key in [key for key in uses if key not in self._entries]:
                    del uses[key]

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
                if entry is not None and self._shown(entry):
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

    def _shown(self, entry: Entry) -> bool:
        """Return whether an entry is of a stored block that this machine can use. Called with the lock."""
        return entry.readable and entry.key not in self._hidden

    def _row(self, entry: Entry) -> TierRow:
        assert entry.block is not None
        return TierRow(entry.block, entry.n_bytes, self._last_use(entry))

    def _last_use(self, entry: Entry) -> int:
        return max(entry.used, self._used.get(entry.key, 0))


def _order(entry: Entry) -> tuple[int, bool, bytes, bytes]:
    """Return what orders the entries of a block: time, then removals last, then the version and the key."""
    return entry.at, entry.block is None, entry.version, entry.key_id
