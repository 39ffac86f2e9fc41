"""What the cache knows of a block without its payload, and why it was saved."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from erllama.cache.blocks.keys import KEY_BYTES, TOKEN_BYTES, child_key
from erllama.errors import OptionError

RECIPE_BYTES = 16
MAX_POSITION = 2**63  # what the index can hold


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
        tokens: the tokens as little-endian u32, at least one.
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
        """The block of `tokens` after `parent`, its key computed.

        Raises:
            OptionError: a part has the wrong length or range.
        """
        lengths = (len(parent), len(namespace), len(recipe))
        if lengths != (KEY_BYTES, KEY_BYTES, RECIPE_BYTES):
            raise OptionError(f"parent, namespace and recipe of {lengths} bytes; they have 32, 32 and 16")
        if not tokens or len(tokens) % TOKEN_BYTES:
            raise OptionError(f"tokens of {len(tokens)} bytes; give at least one, as u32: see token_bytes")
        if not (0 <= start < MAX_POSITION and 0 <= slice_end < MAX_POSITION):
            raise OptionError(f"start={start}, slice_end={slice_end}; both are positions")
        return cls(child_key(parent, tokens), parent, namespace, start, tokens, reason, recipe, slice_end)

    @classmethod
    def chain(
        cls, tokens: bytes, namespace: bytes, size: int, reason: SaveReason, recipe: bytes = bytes(RECIPE_BYTES)
    ) -> list[Block]:
        """The blocks that a context is saved as from its beginning: of `size` tokens each, and a tail.

        Raises:
            OptionError: as of `following`; no tokens give no blocks.
        """
        blocks: list[Block] = []
        for at in range(0, len(tokens), size * TOKEN_BYTES):
            parent = blocks[-1].key if blocks else namespace
            part = tokens[at : at + size * TOKEN_BYTES]
            blocks.append(cls.following(parent, namespace, at // TOKEN_BYTES, part, reason, recipe))
        return blocks

    @property
    def n_tokens(self) -> int:
        """How many tokens it has."""
        return len(self.tokens) // TOKEN_BYTES

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + self.n_tokens
