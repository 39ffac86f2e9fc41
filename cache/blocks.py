"""What the cache knows of a block without its payload, and why it was saved."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from erllama.cache.keys import TOKEN_BYTES, child_key

RECIPE_BYTES = 16


class SaveReason(enum.IntEnum):
    """Why a block was saved; the numbers stand in .kvc files."""

    COLD = 1
    CONTINUED = 2
    FINISH = 3
    EVICT = 4
    SHUTDOWN = 5


@dataclass(frozen=True, slots=True)
class Block:
    """One block: `n_tokens` tokens from position `start`, and everything before them by `parent`.

    Attributes:
        key, parent, namespace: 32 bytes each; `key` is `child_key(parent, tokens)`.
        start: position of the first token.
        tokens: the tokens as little-endian u32.
        reason: why it was saved.
        recipe: 16 bytes that name how the engine computes (batch sizes, threads,
            build); equal recipes and equal slices give equal bits. The cache
            keeps it and does not read it.
        slice_end: where the prefill slice ended that computed the first token,
            if that slice and all before it were canonical; 0 otherwise. Kept
            for the engine, too.
    """

    key: bytes
    parent: bytes
    namespace: bytes
    start: int
    tokens: bytes
    reason: SaveReason
    recipe: bytes = bytes(RECIPE_BYTES)
    slice_end: int = 0

    @classmethod
    def following(
        cls,
        parent: bytes,
        namespace: bytes,
        start: int,
        tokens: bytes,
        reason: SaveReason,
        recipe: bytes = bytes(RECIPE_BYTES),
        slice_end: int = 0,
    ) -> Block:
        """The block of `tokens` after `parent`, its key computed."""
        return cls(child_key(parent, tokens), parent, namespace, start, tokens, reason, recipe, slice_end)

    @property
    def n_tokens(self) -> int:
        return len(self.tokens) // TOKEN_BYTES

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + self.n_tokens
