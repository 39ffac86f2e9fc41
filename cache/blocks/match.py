"""Results of lookups and loads, and rows of reports. `Cache` returns them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from erllama.cache.blocks.block import Block
from erllama.errors import CacheError


class Match:
    """The longest stored prefix of some tokens.

    Attributes:
        blocks: blocks from the first token on, each following the one before. If the last one has tokens beyond
            `n_tokens`, the caller must cut them off after restoring it.
        n_tokens: number of tokens that agree.

    The blocks are pinned, so that they are not evicted, until `release()` or the end of a `with`.
    """

    __slots__ = ("_unpin", "blocks", "n_tokens")

    def __init__(self, blocks: tuple[Block, ...], n_tokens: int, unpin: Callable[[], None]) -> None:
        self.blocks = blocks
        self.n_tokens = n_tokens
        self._unpin = unpin

    def release(self) -> None:
        """Unpin the blocks. Idempotent."""
        self._unpin()

    def __del__(self) -> None:
        # A match that was never released must not pin its blocks forever.
        if hasattr(self, "_unpin"):
            self.release()

    def __enter__(self) -> Match:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Loaded(NamedTuple):
    """A block's payload, the tier that it was read from, and the block as saved with it.

    The block has the requested key. Its recipe and slice end may differ from the lookup's, if another process saved
    the block again in between.
    """

    tier: str
    payload: memoryview
    block: Block


class Row(NamedTuple):
    """One stored block in one tier."""

    key: bytes
    tier: str
    start: int
    n_tokens: int
    n_bytes: int
    pins: int


class TierStatus(NamedTuple):
    """One root of a tier: its location, budget and content, and the error if it cannot be used.

    A `read_only` root is never written, and its budget is not enforced.
    """

    tier: str
    location: str
    budget: int
    n_bytes: int
    n_blocks: int
    error: CacheError | None
    read_only: bool = False
