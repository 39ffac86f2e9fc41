"""The account of one tier: its blocks, the roots that hold them, their bytes, the eviction order.

`BlockCatalog` owns one ledger per tier name. All calls run under the cache's lock, unless a method says
otherwise. Does no input or output.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Iterator

from erllama.cache.blocks.block import Block
from erllama.cache.catalog.eviction_order import LeafLRU
from erllama.cache.tiers.tier import Tier


class TierLedger:
    """Blocks, sizes and uses of one tier, whose content may lie in several roots."""

    def __init__(self, name: str, write_mode: str) -> None:
        self.name = name
        self.write_behind = write_mode == "behind"  # written after the save, by the queue's thread
        self.external = write_mode == "external"  # cells of a context: the owner of the tier writes them
        self.roots: list[Tier] = []
        self.unreadable: set[bytes] = set()  # blocks that are listed and whose last read failed
        self._lru = LeafLRU()
        self._root_of: dict[bytes, Tier] = {}
        self._n_bytes: dict[Tier, int] = {}
        self._watched: dict[Tier, Container[bytes]] = {}
        self.watched_version = 0  # changes when a watched block is added, removed or replaced

    def add_root(self, root: Tier) -> None:
        self.roots.append(root)
        self._n_bytes[root] = 0

    def remove_root(self, root: Tier) -> None:
        for key in self.keys(root):
            self.remove(key)
        self.roots.remove(root)
        del self._n_bytes[root]
        self.watch(root, ())
        self.watched_version += 1  # what was computed from the blocks of the root is not valid any more

    def watch(self, owner: Tier, keys: Collection[bytes]) -> None:
        """Count the changes of these blocks in `watched_version`. Replaces the keys of an earlier call.

        Args:
            owner: the root on whose behalf they are watched; the blocks may lie in any root.
        """
        self._watched.pop(owner, None)
        if keys:
            self._watched[owner] = keys

    def _count_change(self, key: bytes) -> None:
        if any(key in keys for keys in self._watched.values()):
            self.watched_version += 1

    def __contains__(self, key: object) -> bool:
        return key in self._root_of

    def __len__(self) -> int:
        return len(self._root_of)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._lru)

    def keys(self, root: Tier) -> list[bytes]:
        """Return the keys of the blocks that a root holds."""
        return [key for key, holder in self._root_of.items() if holder is root]

    def sizes(self, root: Tier) -> dict[bytes, int]:
        """Return the size in bytes of each block that a root holds, by key."""
        return {key: self._lru.size_of(key) for key in self.keys(root)}

    def n_blocks(self, root: Tier) -> int:
        """Return the number of blocks that a root holds. May be called without the cache's lock."""
        return sum(holder is root for holder in list(self._root_of.values()))

    def root_of(self, key: bytes) -> Tier | None:
        """Return the root that holds a block."""
        return self._root_of.get(key)

    def size_of(self, key: bytes) -> int:
        """Return the size of a block in bytes."""
        return self._lru.size_of(key)

    def n_bytes(self, root: Tier | None = None) -> int:
        """Return the bytes of the blocks of a root; of all roots for None. 0 for a root that was detached."""
        return self._lru.n_bytes if root is None else self._n_bytes.get(root, 0)

    def free(self, root: Tier) -> int:
        """Return the bytes that the budget of a root leaves; negative if it is exceeded."""
        return root.budget - self._n_bytes[root]

    def add(self, root: Tier, block: Block, n_bytes: int, now: int) -> None:
        """Record that `root`, and no other root, holds the block."""
        self.remove(block.key)
        self._lru.add(block.key, block.parent, n_bytes, now, root)
        self._root_of[block.key] = root
        self._n_bytes[root] += n_bytes
        self._count_change(block.key)

    def remove(self, key: bytes) -> None:
        """Record that no root holds the block."""
        root = self._root_of.pop(key, None)
        self.unreadable.discard(key)
        if root is not None:
            self._n_bytes[root] -= self._lru.remove(key)
            self._count_change(key)

    def touch(self, keys: Iterable[bytes], now: int) -> None:
        """Record a use of blocks now, in ns since 1970. Ignores keys of blocks that the tier lacks."""
        self._lru.clamp(now)
        for key in keys:
            self._lru.touch(key, now)

    def record_use(self, key: bytes, used: int) -> None:
        """Record a use of a block at some time, in ns since 1970. Keeps a later one."""
        self._lru.touch(key, used)

    def clamp_uses(self, now: int) -> None:
        """Lower uses later than `now`, which a clock that was ahead recorded. Usually costs one comparison."""
        self._lru.clamp(now)

    def oldest_leaf(self, pinned: Container[bytes], root: Tier) -> bytes | None:
        """Return the next block of a root to evict; None if each candidate is pinned."""
        return self._lru.oldest_leaf(pinned, root)

    def last_used(self, key: bytes) -> int:
        """Return the last use of a block, in ns since 1970."""
        return self._lru.last_used(key)
