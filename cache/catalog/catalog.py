"""What is stored where, in memory: the blocks, what each tier holds of them, sizes, uses and pins.

Owned by one `Cache` and used under its lock; does no input or output.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count

from erllama.cache.blocks.block import Block
from erllama.cache.blocks.keys import TOKEN_BYTES, child_key
from erllama.cache.blocks.match import Row
from erllama.cache.catalog.counters import Counters
from erllama.cache.catalog.lru import LeafLRU
from erllama.cache.catalog.prefix_tree import Entry, PrefixTree, any_entry
from erllama.cache.tiers.tier import Tier

PENDING = "pending"  # a place, too: a save on its way


class TierLedger:
    """The account of one tier: which of its roots holds which block, what that comes to, which goes next."""

    def __init__(self, name: str, write_mode: str) -> None:
        self.name = name
        self.behind = write_mode == "behind"  # written behind requests
        self.in_cells = write_mode == "external"
        self.roots: list[Tier] = []
        self.lru = LeafLRU()
        self.unreadable: set[bytes] = set()  # what is listed, and could not be read when that was last tried
        self._root_of: dict[bytes, Tier] = {}
        self._n_bytes: dict[Tier, int] = {}

    def add_root(self, root: Tier) -> None:
        self.roots.append(root)
        self._n_bytes[root] = 0

    def remove_root(self, root: Tier) -> None:
        for key in self.keys(root):
            self.remove(key)
        self.roots.remove(root)
        del self._n_bytes[root]

    def __contains__(self, key: object) -> bool:
        return key in self._root_of

    def __len__(self) -> int:
        return len(self._root_of)

    def keys(self, root: Tier) -> list[bytes]:
        return [key for key, holder in self._root_of.items() if holder is root]

    def n_blocks(self, root: Tier) -> int:
        """How many blocks a root holds; may be called without the cache's lock."""
        return sum(holder is root for holder in list(self._root_of.values()))

    def root_of(self, key: bytes) -> Tier | None:
        return self._root_of.get(key)

    def n_bytes(self, root: Tier | None = None) -> int:
        return self.lru.n_bytes if root is None else self._n_bytes.get(root, 0)  # a root may be detached meanwhile

    def free(self, root: Tier) -> int:
        return root.budget - self._n_bytes[root]

    def add(self, root: Tier, block: Block, n_bytes: int, now: int) -> None:
        """Note that `root` holds the block, and no other root does."""
        self.remove(block.key)
        self.lru.add(block.key, block.parent, n_bytes, now, root)
        self._root_of[block.key] = root
        self._n_bytes[root] += n_bytes

    def remove(self, key: bytes) -> None:
        root = self._root_of.pop(key, None)
        self.unreadable.discard(key)
        if root is not None:
            self._n_bytes[root] -= self.lru.remove(key)


class BlockCatalog:
    """The places of every block: its tiers' names, and `pending`."""

    def __init__(self, block_size: int, counters: Counters, tiers: Sequence[Tier]) -> None:
        self.tree = PrefixTree()
        self._counters = counters
        self.shelves: dict[str, TierLedger] = {}  # from fast to slow
        self._pins: Counter[bytes] = Counter()
        self._matches: dict[int, list[bytes]] = {}  # what each call of `pin` pinned, by its number
        self._released: deque[int] = deque()  # numbers of those that ended
        self._numbers = count()
        self._block_size = block_size
        self._cells: frozenset[str] = frozenset()  # names of the tiers that are cells
        for tier in tiers:
            self.add_root(tier)

    def add_root(self, tier: Tier, *, fastest: bool = False) -> None:
        shelf = self.shelves.get(tier.name)
        if shelf is None:
            self._counters.know_tier(tier.name)
            shelf = TierLedger(tier.name, tier.write_mode)
            if shelf.in_cells:
                self._cells |= {tier.name}
            self.shelves = {tier.name: shelf, **self.shelves} if fastest else {**self.shelves, tier.name: shelf}
        shelf.add_root(tier)

    # --- finding ---------------------------------------------------------------------------

    def walk(self, namespace: bytes, raw: bytes, whole: bool, loadable: bool) -> tuple[list[Block], int]:
        """The blocks of the longest stored prefix of the tokens `raw`, and its length in tokens.

        Args:
            whole: only blocks that match to their last token.
            loadable: no blocks that are only in cells.
        """
        usable = self.kept if loadable else any_entry
        blocks: list[Block] = []
        parent, at, step = namespace, 0, self._block_size * TOKEN_BYTES
        while at < len(raw):
            full = raw[at : at + step]
            entry = self.tree.get(child_key(parent, full)) if len(full) == step else None
            shared = self._block_size
            if entry is not None and not usable(entry):
                entry = None
            if entry is None and whole:
                entry = self.tree.longest_whole(parent, raw[at:], usable)
                shared = entry.block.n_tokens if entry else 0
            elif entry is None:
                entry, shared = self.tree.longest_shared(parent, raw[at:], usable) or (None, 0)
            if entry is None or entry.block.namespace != namespace or entry.block.start != at // TOKEN_BYTES:
                break
            blocks.append(entry.block)
            at += shared * TOKEN_BYTES
            if shared < entry.block.n_tokens:
                break
            parent = entry.block.key
        return blocks, at // TOKEN_BYTES

    def path(self, key: bytes) -> list[Block]:
        """The blocks of the context that a key names, from its first token; none where one is missing."""
        blocks: list[Block] = []
        entry = self.tree.get(key)
        while entry is not None:
            blocks.append(entry.block)
            if entry.block.parent == entry.block.namespace:
                return blocks[::-1]
            entry = self.tree.get(entry.block.parent)
        return []

    def kept(self, entry: Entry) -> bool:
        """Whether a block is anywhere but in cells, which keep nothing."""
        return not entry.places <= self._cells

    def holders(self, key: bytes) -> Iterator[tuple[TierLedger, Tier]]:
        """Who holds a block, fastest first."""
        for shelf in self.shelves.values():
            root = shelf.root_of(key)
            if root is not None:
                yield shelf, root

    def rows(self) -> list[Row]:
        pins = self.pins
        return [
            Row(
                e.block.key,
                name,
                e.block.start,
                e.block.n_tokens,
                shelf.lru.size_of(e.block.key),
                pins.get(e.block.key, 0),
            )
            for e in self.tree
            for name, shelf in self.shelves.items()
            if e.block.key in shelf
        ]

    # --- changing --------------------------------------------------------------------------

    def put(self, root: Tier, block: Block, n_bytes: int, now: int) -> None:
        """Note that a root holds a block of this many bytes, in place of an older one of the same key."""
        self.shelves[root.name].add(root, block, n_bytes, now)
        self.tree.add(block, root.name)
        self.learn(root.name, block)

    def learn(self, place: str, block: Block) -> None:
        """Take over how a place's block was computed, unless a faster place has its own."""
        entry = self.tree.get(block.key)
        if entry is not None and place == self._fastest(entry):
            entry.block = block

    def _fastest(self, entry: Entry) -> str | None:
        for name, shelf in self.shelves.items():
            if shelf.behind and PENDING in entry.places:
                return PENDING
            # What is in cells is not restored from, so how that was computed tells nothing.
            if name in entry.places and not shelf.in_cells:
                return name
        return PENDING if PENDING in entry.places else None

    def drop(self, place: str, key: bytes) -> None:
        """Note that a place no longer holds a block."""
        if place in self.shelves:
            self.shelves[place].remove(key)
        self.tree.discard(key, place)

    def choose_victims(self, root: Tier, target: int, keep: Iterable[bytes] = ()) -> list[tuple[bytes, int]]:
        """Drop a root's least recently used blocks until it holds `target` bytes, or only pinned ones are left.

        Args:
            keep: keys that stay, as if they were pinned.

        Returns:
            keys and sizes of what was dropped, for the root to remove.
        """
        shelf = self.shelves[root.name]
        victims: list[tuple[bytes, int]] = []
        if shelf.n_bytes(root) <= target:
            return victims
        passed_over = {*self.pins, *keep}
        shelf.lru.clamp(time.time_ns())
        while (
            shelf.n_bytes(root) > max(target, 0) and (key := shelf.lru.oldest_leaf(passed_over, root)) is not None
        ):
            victims.append((key, shelf.lru.size_of(key)))
            self.drop(root.name, key)
        if victims:
            self._counters.add(f"evictions_{root.name}", len(victims))
        return victims

    def roots_by_room(self, shelf: TierLedger, block: Block, n_bytes: int) -> list[Tier]:
        """The roots to try for a block: the one that has it; else by free room, or by the age of what would go."""
        holder = shelf.root_of(block.key)
        if holder is not None and not holder.read_only:
            return [holder]
        roots = sorted((root for root in shelf.roots if not root.read_only), key=shelf.free, reverse=True)
        if len(roots) < 2 or shelf.free(roots[0]) >= n_bytes:
            return roots
        oldest = {root: shelf.lru.oldest_leaf({*self.pins, block.parent}, root) for root in roots}
        return sorted(roots, key=lambda root: shelf.lru.last_used(key) if (key := oldest[root]) else 2**63)

    def make_room(self, root: Tier, block: Block, n_bytes: int) -> bool:
        """Evict from a root that is written at once until a block, or its new version, fits; False if it cannot."""
        shelf = self.shelves[root.name]
        held = shelf.lru.size_of(block.key) if shelf.root_of(block.key) is root else 0
        target = root.budget - n_bytes + held
        if n_bytes <= root.budget:
            victims = self.choose_victims(root, target, keep=(block.parent, block.key))
            root.remove([key for key, _ in victims])
        return n_bytes <= root.budget and shelf.n_bytes(root) <= target

    # --- the RAM tier ----------------------------------------------------------------------------

    def keep_in_ram(self, block: Block, payload: memoryview) -> bool:
        """Store a payload in place of an older version, if it fits the budget after evicting others.

        Where it does not, an older version stays.
        """
        shelf = self.shelves.get("ram")
        if shelf is None:
            return False
        tier = shelf.roots[0]
        if not self.make_room(tier, block, payload.nbytes):
            return False
        tier.write(block, payload)
        self.put(tier, block, payload.nbytes, time.time_ns())
        return True

    def in_ram(self, block: Block) -> tuple[Block, memoryview] | None:
        shelf = self.shelves.get("ram")
        return shelf.roots[0].read(block) if shelf is not None and block.key in shelf else None

    def drop_from_ram(self, key: bytes) -> None:
        shelf = self.shelves.get("ram")
        if shelf is not None and key in shelf:
            self.drop("ram", key)
            shelf.roots[0].remove([key])

    # --- using ---------------------------------------------------------------------------------

    def touch(self, key: bytes, now: int) -> None:
        for shelf in self.shelves.values():
            shelf.lru.clamp(
                now
            )  # a clock that was ahead has noted uses that are later; else this is one comparison
            shelf.lru.touch(key, now)

    def pin(self, blocks: Sequence[Block]) -> Callable[[], None]:
        """Keep blocks from being evicted; the function returned ends that.

        That function may be called again, in any thread, and without the lock:
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

    @property
    def pins(self) -> Mapping[bytes, int]:
        """How often each pinned block is pinned."""
        self._unpin_released()
        return self._pins

    def pinned(self, key: bytes) -> bool:
        return key in self.pins

    # --- checking ------------------------------------------------------------------------------

    def contradictions(self) -> Iterator[str]:
        """What does not add up."""
        for entry in self.tree:
            key = entry.block.key
            where = {name for name, shelf in self.shelves.items() if key in shelf}
            if entry.places - {PENDING} != where:
                yield f"block {key.hex()} is noted in {sorted(entry.places)} and held by {sorted(where)}"
            if child_key(entry.block.parent, entry.block.tokens) != key:
                yield f"block {key.hex()} is not what its key says"
        for name, shelf in self.shelves.items():
            for root in shelf.roots:
                held = sum(shelf.lru.size_of(key) for key in shelf.keys(root))
                if held != shelf.n_bytes(root):
                    yield f"{root.place} counts {shelf.n_bytes(root)} bytes and holds {held}"
                if held > root.budget and not root.read_only:
                    yield f"{root.place} holds {held} bytes; its budget is {root.budget}"
            for key in shelf.lru:
                if self.tree.get(key) is None:
                    yield f"{name} holds {key.hex()}, which nobody can find"
        yield from self.tree.contradictions()
