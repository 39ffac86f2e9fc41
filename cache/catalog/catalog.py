"""The catalog of a cache: its blocks, the tiers that hold them, and their sizes, uses and pins.

One `Cache` owns it and calls it under its lock. Lookups read only the catalog. It does no input or output:
the tiers it calls are those that are written under the cache's lock, in memory.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import NamedTuple

from erllama.cache.blocks.block import Block
from erllama.cache.blocks.keys import TOKEN_BYTES, child_key
from erllama.cache.blocks.match import Row
from erllama.cache.catalog.block_log import BlockChange, BlockLog, LoggedBlocks
from erllama.cache.catalog.counters import Counters
from erllama.cache.catalog.ledger import TierLedger
from erllama.cache.catalog.pin_book import PinBook
from erllama.cache.catalog.prefix_tree import Entry, PrefixTree, any_entry
from erllama.cache.tiers.tier import Changes, Tier, TierRow

_PENDING = "pending"  # the place of a block whose save waits in the write queue


class Victim(NamedTuple):
    """A block that was chosen for removal, and its size in bytes."""

    key: bytes
    n_bytes: int


class _Union(Container[bytes]):
    """The keys that any of several containers has. Copies none of them: pins may name a hundred thousand keys."""

    def __init__(self, *parts: Container[bytes]) -> None:
        self._parts = parts

    def __contains__(self, key: object) -> bool:
        return any(key in part for part in self._parts)


class Prefix(NamedTuple):
    """The blocks of a stored prefix, and its length in tokens."""

    blocks: list[Block]
    n_tokens: int


class BlockCatalog:
    """The places of every block: the names of its tiers, and `pending` for a save in the write queue.

    Two kinds of pins keep blocks from eviction: those of lookups, in all tiers until the lookup's match is
    released; and those of prefixes, in one tier.

    Attributes:
        pin_book: the pins of prefixes.
    """

    def __init__(
        self, block_size: int, counters: Counters, tiers: Sequence[Tier], pin_quota: int | None = None
    ) -> None:
        self.pin_book = PinBook(pin_quota)
        self._tree = PrefixTree()
        self._counters = counters
        # From fast to slow. Replaced and never changed, so that threads without the lock can read it.
        self._ledgers: dict[str, TierLedger] = {}
        self._pins: Counter[bytes] = Counter()
        self._matches: dict[int, list[bytes]] = {}  # the keys that each call of `pin` pinned, by its number
        self._released: deque[int] = deque()  # numbers of the calls whose pins ended
        self._numbers = count()
        self._block_size = block_size
        self._external: frozenset[str] = frozenset()  # names of the tiers that are cells of a context
        self._logs: tuple[BlockLog, ...] = ()
        for tier in tiers:
            self.add_root(tier)

    def add_root(self, tier: Tier, *, fastest: bool = False) -> None:
        """Add a tier, or a root of a tier that is known by its name.

        Args:
            fastest: add a new tier before those that are written behind if it is one of them, before all tiers
                otherwise. False to add it as the slowest.
        """
        ledger = self._ledgers.get(tier.name)
        if ledger is None:
            self._counters.add_tier(tier.name)
            ledger = TierLedger(tier.name, tier.write_mode)
            if ledger.external:
                self._external |= {tier.name}
            names = list(self._ledgers)
            if not fastest:
                names.append(tier.name)
            else:
                n_before = sum(not other.write_behind for other in self._ledgers.values())
                names.insert(n_before if ledger.write_behind else 0, tier.name)
            self._ledgers = {name: self._ledgers.get(name, ledger) for name in names}
        ledger.add_root(tier)

    def remove_root(self, tier: Tier) -> None:
        """Remove a root and its blocks."""
        ledger = self._ledgers[tier.name]
        for key in ledger.keys(tier):
            self.drop(tier.name, key)
        ledger.remove_root(tier)

    def ledger(self, name: str) -> TierLedger:
        """Return the account of a tier."""
        return self._ledgers[name]

    def ledgers(self) -> Mapping[str, TierLedger]:
        """Return the accounts of all tiers by name, from fast to slow. May be called without the cache's lock."""
        return self._ledgers

    # --- finding ---------------------------------------------------------------------------

    def find_prefix(self, namespace: bytes, raw: bytes, whole: bool, loadable: bool) -> Prefix:
        """Find the longest stored prefix of the tokens `raw`.

        Args:
            whole: match only blocks whose last token agrees, too.
            loadable: skip blocks that only the cells of a context hold.
        """
        usable = self._has_payload if loadable else any_entry
        blocks: list[Block] = []
        parent, at, step = namespace, 0, self._block_size * TOKEN_BYTES
        while at < len(raw):
            full = raw[at : at + step]
            entry = self._tree.get(child_key(parent, full)) if len(full) == step else None
            shared = self._block_size
            if entry is not None and not usable(entry):
                entry = None
            if entry is None and whole:
                entry = self._tree.longest_whole(parent, raw[at:], usable)
                shared = entry.block.n_tokens if entry else 0
            elif entry is None:
                entry, shared = self._tree.longest_shared(parent, raw[at:], usable) or (None, 0)
            if entry is None or entry.block.namespace != namespace or entry.block.start != at // TOKEN_BYTES:
                break
            blocks.append(entry.block)
            at += shared * TOKEN_BYTES
            if shared < entry.block.n_tokens:
                break
            parent = entry.block.key
        return Prefix(blocks, at // TOKEN_BYTES)

    def path(self, key: bytes) -> list[Block]:
        """Return the blocks of a context from its first token to the block of this key; empty if one is missing."""
        blocks: list[Block] = []
        entry = self._tree.get(key)
        while entry is not None:
            blocks.append(entry.block)
            if entry.block.parent == entry.block.namespace:
                return blocks[::-1]
            entry = self._tree.get(entry.block.parent)
        return []

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and self._tree.get(key) is not None

    def block(self, key: bytes) -> Block | None:
        """Return the block of a key in any place, those of a context's cells included."""
        entry = self._tree.get(key)
        return entry.block if entry is not None else None

    def stored_block(self, key: bytes) -> Block | None:
        """Return the block of a key, if its payload is stored or waits to be written."""
        entry = self._tree.get(key)
        return entry.block if entry is not None and self._has_payload(entry) else None

    def _has_payload(self, entry: Entry) -> bool:
        """Return whether a block is in any place but the cells of a context, which keep no payload."""
        return not entry.places <= self._external

    def superseded_by(self, block: Block) -> list[Block]:
        """Return the shorter tails whose tokens are a prefix of those of a block."""
        return self._tree.superseded_by(block)

    def holders(self, key: bytes) -> list[tuple[TierLedger, Tier]]:
        """Return the tiers and roots that hold a block, fastest first."""
        return [(ledger, root) for ledger in self._ledgers.values() if (root := ledger.root_of(key)) is not None]

    def rows(self) -> list[Row]:
        """Return one row per stored block and tier."""
        pins, ledgers = self._current_pins(), self._ledgers.values()
        return [_row(e.block, ledger, pins) for e in self._tree for ledger in ledgers if e.block.key in ledger]

    def memory_rows(self) -> list[Row]:
        """Return the rows of the tiers whose content ends with this process: contexts and RAM."""
        pins = self._current_pins()
        ledgers = [ledger for ledger in self._ledgers.values() if not ledger.write_behind]
        found = [(self._tree.get(key), ledger) for ledger in ledgers for key in ledger]
        return [_row(entry.block, ledger, pins) for entry, ledger in found if entry is not None]

    # --- changing --------------------------------------------------------------------------

    def put(self, root: Tier, block: Block, n_bytes: int, now: int) -> None:
        """Record that a root holds a block of this size. Replaces an older version."""
        self._ledgers[root.name].add(root, block, n_bytes, now)
        self._tree.add(block, root.name)
        self.update_version(root.name, block)
        for log in self._logs:
            log.record(root.name, block, stored=True)

    def update_version(self, place: str, block: Block) -> None:
        """Adopt the version of a block in this place, unless a faster place has a version of its own."""
        entry = self._tree.get(block.key)
        if entry is not None and place == self._fastest(entry):
            entry.block = block

    def _fastest(self, entry: Entry) -> str | None:
        for name, ledger in self._ledgers.items():
            if ledger.write_behind and _PENDING in entry.places:
                return _PENDING
            # Payloads are not restored from cells, so the version in the cells may differ from that of a payload.
            if name in entry.places and not ledger.external:
                return name
        return _PENDING if _PENDING in entry.places else None

    def drop(self, place: str, key: bytes) -> None:
        """Record that a place no longer holds a block."""
        if place in self._ledgers:
            entry = self._tree.get(key) if self._logs else None
            if entry is not None and place in entry.places:
                for log in self._logs:
                    log.record(place, entry.block, stored=False)
            self._ledgers[place].remove(key)
        self._tree.discard(key, place)

    def add_pending(self, block: Block) -> None:
        """Record that the save of a block waits in the write queue."""
        self._tree.add(block, _PENDING)
        self.update_version(_PENDING, block)

    def drop_pending(self, key: bytes) -> None:
        """Record that the save of a block no longer waits."""
        self.drop(_PENDING, key)

    def apply_changes(self, tier: Tier, changes: Changes) -> list[Block]:
        """Record changes that others made to a tier.

        Returns:
            blocks that another root of the same tier holds already: one of the two copies can be removed.
        """
        ledger = self._ledgers[tier.name]
        stored = {row.block.key for row in changes.stored}
        removed = [key for key in ledger.keys(tier) if key not in stored] if changes.complete else changes.removed
        for key in removed:
            if ledger.root_of(key) is tier:
                self.drop(tier.name, key)
        return [row.block for row in changes.stored if not self._apply_row(ledger, tier, row)]

    def _apply_row(self, ledger: TierLedger, tier: Tier, row: TierRow) -> bool:
        """Record one stored block; False if another root has it and keeps it."""
        holder, key = ledger.root_of(row.block.key), row.block.key
        used = min(row.last_used, time.time_ns())  # a clock that was ahead must not protect a block forever
        if holder is not None and holder is not tier:
            if not holder.read_only or tier.read_only:
                return False
            self.put(tier, row.block, row.n_bytes, used)  # saved after the read-only root was read
        elif holder is None:
            self.put(tier, row.block, row.n_bytes, used)
        else:
            if ledger.size_of(key) != row.n_bytes:
                self.put(tier, row.block, row.n_bytes, used)
            ledger.record_use(key, used)
            self.update_version(tier.name, row.block)
        return True

    # --- logs of changes --------------------------------------------------------------------

    def add_log(self, log: BlockLog) -> None:
        """Record the changes of blocks in a log from now on."""
        log.restart()
        self._logs = (*self._logs, log)

    def remove_log(self, log: BlockLog) -> None:
        """Record no further changes in a log. Ignores one that was not added."""
        self._logs = tuple(other for other in self._logs if other is not log)

    def entries(self) -> list[Entry]:
        """Return the entries of all blocks. One whose block is removed later has no places from then on."""
        return list(self._tree)

    # --- evicting --------------------------------------------------------------------------

    def choose_victims(self, root: Tier, target: int, keep: Iterable[bytes] = ()) -> list[Victim]:
        """Drop the least recently used blocks of a root until it holds `target` bytes or the rest is pinned.

        Args:
            keep: keys to treat as pinned.

        Returns:
            the dropped blocks. The caller removes them from the root.
        """
        ledger = self._ledgers[root.name]
        victims: list[Victim] = []
        if ledger.n_bytes(root) <= target:
            return victims
        pinned = _Union(self._current_pins(), frozenset(keep), self.pin_book.protected(ledger, root))
        ledger.clamp_uses(time.time_ns())
        while ledger.n_bytes(root) > max(target, 0) and (key := ledger.oldest_leaf(pinned, root)) is not None:
            victims.append(Victim(key, ledger.size_of(key)))
            self.drop(root.name, key)
        if victims:
            self._counters.add(f"evictions_{root.name}", len(victims))
        return victims

    def drop_unreachable(self, root: Tier, pending: Container[bytes]) -> list[Victim]:
        """Drop the blocks of a root whose parent its tier lacks. A process with this tier alone cannot find them.

        Args:
            pending: keys of saves that wait. A block that follows one of them stays, and so does a pinned block.

        Returns:
            the dropped blocks. The caller removes them from the root.
        """
        ledger = self._ledgers[root.name]
        victims: list[Victim] = []
        protected = self.pin_book.protected(ledger, root)
        entries = {key: self._tree.get(key) for key in ledger.keys(root) if key not in protected}
        while True:
            unreachable = [
                key
                for key, entry in entries.items()
                if entry is not None
                and entry.block.parent != entry.block.namespace
                and entry.block.parent not in ledger
                and entry.block.parent not in pending
                and not self.is_pinned(key)
            ]
            if not unreachable:
                return victims
            for key in unreachable:
                victims.append(Victim(key, ledger.size_of(key)))
                self.drop(root.name, key)
                del entries[key]

    def roots_by_room(self, ledger: TierLedger, block: Block, n_bytes: int) -> list[Tier]:
        """Return the roots to try for a block, in order.

        A writable root that has the block is the only one. Otherwise the root with the most free room is first. If
        no root has enough room, the root whose next victim was used longest ago is first.
        """
        holder = ledger.root_of(block.key)
        if holder is not None and not holder.read_only:
            return [holder]
        roots = sorted((root for root in ledger.roots if not root.read_only), key=ledger.free, reverse=True)
        if len(roots) < 2 or ledger.free(roots[0]) >= n_bytes:
            return roots
        pinned, keep = self._current_pins(), (block.parent,)
        oldest = {
            root: ledger.oldest_leaf(_Union(pinned, keep, self.pin_book.protected(ledger, root)), root)
            for root in roots
        }
        return sorted(roots, key=lambda root: ledger.last_used(key) if (key := oldest[root]) else 2**63)

    def make_room(self, root: Tier, block: Block, n_bytes: int) -> bool:
        """Evict from a root that is written under the lock until a block fits; False if it cannot.

        The block may replace an older version, whose bytes do not count.
        """
        ledger = self._ledgers[root.name]
        replaced = ledger.size_of(block.key) if ledger.root_of(block.key) is root else 0
        target = root.budget - n_bytes + replaced
        if n_bytes <= root.budget:
            victims = self.choose_victims(root, target, keep=(block.parent, block.key))
            root.remove([victim.key for victim in victims])
        return n_bytes <= root.budget and ledger.n_bytes(root) <= target

    # --- the RAM tier ----------------------------------------------------------------------------

    def store_in_ram(self, block: Block, payload: memoryview) -> bool:
        """Store a payload in the RAM tier, after evicting others; False if it does not fit the budget.

        Replaces an older version. If the new one does not fit, the older one stays.
        """
        ledger = self._ledgers.get("ram")
        if ledger is None:
            return False
        tier = ledger.roots[0]
        if not self.make_room(tier, block, payload.nbytes):
            return False
        tier.write(block, payload)
        self.put(tier, block, payload.nbytes, time.time_ns())
        return True

    def read_from_ram(self, block: Block) -> tuple[Block, memoryview] | None:
        """Return the block and its payload in the RAM tier, if it is there."""
        ledger = self._ledgers.get("ram")
        return ledger.roots[0].read(block) if ledger is not None and block.key in ledger else None

    def remove_from_ram(self, key: bytes) -> None:
        """Remove a block from the RAM tier, if it is there."""
        ledger = self._ledgers.get("ram")
        if ledger is not None and key in ledger:
            self.drop("ram", key)
            ledger.roots[0].remove([key])

    # --- using ---------------------------------------------------------------------------------

    def touch(self, blocks: Iterable[Block], now: int) -> None:
        """Record a use of blocks, in every tier that holds them."""
        keys = [block.key for block in blocks]
        for ledger in self._ledgers.values():
            ledger.touch(keys, now)

    def pin(self, blocks: Sequence[Block]) -> Callable[[], None]:
        """Pin blocks: they are not evicted. Returns the function that unpins them.

        That function may be called more than once, in any thread and without the lock:
        the garbage collector and signal handlers call it at any moment.
        """
        self._unpin_released()
        number = next(self._numbers)
        self._matches[number] = [block.key for block in blocks]
        self._pins.update(self._matches[number])
        return partial(self._released.append, number)

    def _unpin_released(self) -> None:
        while self._released:
            for key in self._matches.pop(self._released.popleft(), ()):
                self._pins[key] -= 1
                if self._pins[key] <= 0:
                    del self._pins[key]

    def _current_pins(self) -> Mapping[bytes, int]:
        """Return the number of pins of each pinned block."""
        self._unpin_released()
        return self._pins

    def is_pinned(self, key: bytes) -> bool:
        """Return whether a lookup has pinned a block."""
        return key in self._current_pins()

    def may_supersede(self, key: bytes) -> bool:
        """Return whether a tail may be removed when a longer block with its tokens is stored."""
        if self.is_pinned(key):
            return False
        roots = [(ledger, root) for ledger in self._ledgers.values() for root in ledger.roots]
        return not any(self.pin_book.protects(ledger, root, key) for ledger, root in roots)

    # --- checking ------------------------------------------------------------------------------

    def contradictions(self) -> Iterator[str]:
        """Yield each inconsistency within the catalog."""
        for entry in self._tree:
            key = entry.block.key
            holders = {name for name, ledger in self._ledgers.items() if key in ledger}
            if entry.places - {_PENDING} != holders:
                yield f"block {key.hex()} has the places {sorted(entry.places)}; {sorted(holders)} list it"
            if child_key(entry.block.parent, entry.block.tokens) != key:
                yield f"block {key.hex()} has tokens that do not match its key"
        for name, ledger in self._ledgers.items():
            for root in ledger.roots:
                n_bytes = sum(ledger.sizes(root).values())
                if n_bytes != ledger.n_bytes(root):
                    yield f"{root.location} counts {ledger.n_bytes(root)} bytes; its blocks have {n_bytes}"
                if n_bytes > root.budget and not root.read_only:
                    yield f"{root.location} has {n_bytes} bytes; its budget is {root.budget}"
            for key in ledger:
                if self._tree.get(key) is None:
                    yield f"{name} lists block {key.hex()}, which lookups cannot find"
        yield from self._tree.contradictions()


def _row(block: Block, ledger: TierLedger, pins: Mapping[bytes, int]) -> Row:
    key = block.key
    return Row(key, ledger.name, block.start, block.n_tokens, ledger.size_of(key), pins.get(key, 0))


def places_of(entries: Iterable[Entry], logged: LoggedBlocks) -> list[BlockChange]:
    """Return the tiers that hold the logged blocks of some entries, as changes. Needs the catalog's lock."""
    return [
        BlockChange(place, entry.block, stored=True)
        for entry in entries
        if logged.has(entry.block)
        for place in entry.places
        if place != _PENDING and logged.reports(place)
    ]
