"""A bounded log of the changes of blocks in the tiers of a cache, for one reader in another thread.

`Cache.open_block_log` returns a log. The catalog writes to it under the cache's lock, in constant time, and never
waits for the reader. `Cache.read_block_log` returns what was written. If the reader falls behind, the log forgets
its changes, and the reader gets the whole content instead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from erllama.cache.blocks.block import Block


class BlockChange(NamedTuple):
    """A block that a tier has stored or removed. `stored` is True again if a newer version replaces it."""

    tier: str
    block: Block
    stored: bool


class BlockChanges(NamedTuple):
    """What a reader gets: changes in order. If `complete` is set, they are the whole content of the tiers."""

    changes: list[BlockChange]
    complete: bool


class BlockLog:
    """The changes of full blocks of some namespaces since the last read.

    The owner of the catalog's lock calls all methods.

    Args:
        namespaces: root keys of the blocks to record.
        block_size: tokens of a full block. Shorter ones are not recorded.
        limit: maximum number of changes that wait. Beyond it, they are dropped and `complete` is set.
        wake: called when the first change after a read is recorded. Must not wait.
    """

    def __init__(
        self, namespaces: Collection[bytes], block_size: int, limit: int, wake: Callable[[], None]
    ) -> None:
        self._namespaces = frozenset(namespaces)
        self._block_size, self._limit, self._wake = block_size, limit, wake
        self._changes: list[BlockChange] = []
        self._complete_next = True  # the first read returns the whole content
        self.overflows = 0

    def wants(self, block: Block) -> bool:
        """Return whether the log records changes of a block."""
        return block.namespace in self._namespaces and block.n_tokens == self._block_size

    def record(self, tier: str, block: Block, *, stored: bool) -> None:
        """Record that a tier stores a block, or no longer does."""
        if self._complete_next or not self.wants(block):
            return
        if len(self._changes) >= self._limit:
            self.overflows += 1
            self.restart()
            return
        self._changes.append(BlockChange(tier, block, stored))
        if len(self._changes) == 1:
            self._wake()

    def add_namespaces(self, namespaces: Collection[bytes]) -> None:
        """Record the blocks of further namespaces. The next read returns the whole content."""
        if not self._namespaces.issuperset(namespaces):
            self._namespaces |= frozenset(namespaces)
            self.restart()

    def restart(self) -> None:
        """Forget the changes. The next read returns the whole content."""
        self._changes, self._complete_next = [], True
        self._wake()

    @property
    def is_restarted(self) -> bool:
        """Whether the next read returns the whole content."""
        return self._complete_next

    def take(self) -> list[BlockChange]:
        """Return the changes since the last call, and record further ones."""
        changes, self._changes, self._complete_next = self._changes, [], False
        return changes
