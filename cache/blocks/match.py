"""What lookups and loads answer with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from erllama.cache.blocks.block import Block
from erllama.errors import CacheError


class Match:
    """The longest stored prefix of some tokens.

    Attributes:
        blocks: from the first token on, each following the one before. The last
            may reach beyond `n_tokens`, and is then to be cut after restoring.
        n_tokens: how many tokens agree.

    The blocks are pinned, so not evicted, until `release()` or the end of a `with`.
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
        # A forgotten match must not pin for ever.
        if hasattr(self, "_unpin"):
            self.release()

    def __enter__(self) -> Match:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Loaded(NamedTuple):
    """A block's payload, the tier that gave it, and the block as saved with it.

    Its key is the one asked for; how it was computed may differ from what the
    lookup said, where another process saved the block anew.
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
    """One root of a tier: where it is, what it may hold and holds, and why it cannot be used, if so.

    A root that is `read_only` is read and never written; its budget is not enforced.
    """

    tier: str
    place: str
    budget: int
    n_bytes: int
    n_blocks: int
    error: CacheError | None
    read_only: bool = False
