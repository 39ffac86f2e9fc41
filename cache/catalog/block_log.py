"""A bounded log of the changes of blocks in the tiers of a cache, for one reader in another thread.

`Cache.open_block_log` returns a log. The catalog writes to it under the cache's lock, in constant time, and never
waits for the reader. `Cache.read_block_log` returns what was written. If the reader falls behind, the log forgets
its changes, and the reader gets the whole content instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from erllama.cache.blocks.block import Block


class BlockChange(NamedTuple):
    """A block that a tier has stored or removed. `stored` is True again if a newer version replaces it."""

    tier: str
    block: Block
    stored: bool


class BlockChanges(NamedTuple):
    """What a reader gets.

    Attributes:
        changes: in order.
        complete: they are the whole content of the tiers.
        overflowed: too many changes waited, and were dropped.
    """

    changes: list[BlockChange]
    complete: bool
    overflowed: bool = False


class LoggedBlocks(NamedTuple):
    """What a log records.

    Attributes:
        namespace: root key of the blocks.
        block_size: tokens of a full block. Shorter ones are not recorded.
        reports: whether the changes of the tier with a name are recorded.
    """

    namespace: bytes
    block_size: int
    reports: Callable[[str], bool]

    def has(self, block: Block) -> bool:
        """Return whether changes of a block are recorded."""
        return block.namespace == self.namespace and block.n_tokens == self.block_size


class BlockLog:
    """The changes of full blocks of one namespace since the last read.

    The owner of the catalog's lock calls all methods.

    Args:
        logged: what to record.
        limit: maximum number of changes that wait. Beyond it, they are dropped and `complete` is set.
        wake: called when the first change after a read is recorded. Must not wait.

    Attributes:
        logged: what is recorded.
        overflowed: changes were dropped since the last read.
    """

    def __init__(self, logged: LoggedBlocks, limit: int, wake: Callable[[], None]) -> None:
        self.logged, self._limit, self._wake = logged, limit, wake
        self._changes: list[BlockChange] = []
        self._complete_next = True  # the first read returns the whole content
        self.overflowed = False

    def record(self, tier: str, block: Block, *, stored: bool) -> None:
        """Record that a tier stores a block, or no longer does."""
        if self._complete_next or not self.logged.reports(tier) or not self.logged.has(block):
            return
        if len(self._changes) >= self._limit:
            self.overflowed = True
            self.restart()
            return
        self._changes.append(BlockChange(tier, block, stored))
        if len(self._changes) == 1:
            self._wake()

    def use_namespace(self, namespace: bytes) -> None:
        """Record the blocks of another namespace. The next read returns the whole content."""
        if namespace != self.logged.namespace:
            self.logged = self.logged._replace(namespace=namespace)
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
        changes, self._changes, self._complete_next, self.overflowed = self._changes, [], False, False
        return changes
