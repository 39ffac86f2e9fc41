"""A block without its payload, and the reasons for which blocks are saved.

The engine creates blocks with `Block.following` and `Block.chain`; every part of the cache uses them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from erllama.cache.blocks.keys import KEY_BYTES, TOKEN_BYTES, child_key
from erllama.errors import OptionError

RECIPE_BYTES = 16
MAX_POSITION = 2**63  # the largest integer of the index plus one


class SaveReason(enum.IntEnum):
    """Why a block was saved. The numbers are part of the .kvc format."""

    COLD = 1
    CONTINUED = 2
    FINISH = 3
    EVICT = 4
    SHUTDOWN = 5


@dataclass(frozen=True, slots=True)
class Block:
    """One block: `n_tokens` tokens from position `start` on. `parent` identifies everything before them.

    Attributes:
        key, parent, namespace: 32 bytes each; `key` is `child_key(parent, tokens)`.
        start: position of the first token.
        tokens: the tokens as little-endian u32, at least one.
        reason: why it was saved.
        recipe: 16 bytes that identify how the engine computed the block (batch sizes, threads, build). Equal
            recipes and equal slices give equal bits. The cache stores it for the engine and does not interpret it.
        slice_end: end of the prefill slice that computed the first token, if that slice and all slices before it
            were canonical; 0 otherwise. Stored for the engine, too.
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
        """Return the block of `tokens` after `parent`, and compute its key.

        Raises:
            OptionError: an argument has the wrong length or range.
        """
        lengths = (len(parent), len(namespace), len(recipe))
        if lengths != (KEY_BYTES, KEY_BYTES, RECIPE_BYTES):
            raise OptionError(f"parent, namespace and recipe of {lengths} bytes; pass 32, 32 and 16 bytes")
        if not tokens or len(tokens) % TOKEN_BYTES:
            raise OptionError(f"tokens of {len(tokens)} bytes; pass at least one token as u32, see token_bytes")
        if not (0 <= start < MAX_POSITION and 0 <= slice_end < MAX_POSITION):
            raise OptionError(f"start={start}, slice_end={slice_end}; pass positions from 0 to 2**63 - 1")
        return cls(child_key(parent, tokens), parent, namespace, start, tokens, reason, recipe, slice_end)

    @classmethod
    def chain(
        cls, tokens: bytes, namespace: bytes, size: int, reason: SaveReason, recipe: bytes = bytes(RECIPE_BYTES)
    ) -> list[Block]:
        """Return the blocks of a context from its first token on: blocks of `size` tokens, and a shorter last one.

        Without tokens, the list is empty.

        Raises:
            OptionError: as of `following`.
        """
        blocks: list[Block] = []
        for at in range(0, len(tokens), size * TOKEN_BYTES):
            parent = blocks[-1].key if blocks else namespace
            part = tokens[at : at + size * TOKEN_BYTES]
            blocks.append(cls.following(parent, namespace, at // TOKEN_BYTES, part, reason, recipe))
        return blocks

    @property
    def n_tokens(self) -> int:
        """The number of tokens."""
        return len(self.tokens) // TOKEN_BYTES

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.start + self.n_tokens
