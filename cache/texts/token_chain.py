"""Token sequences in chunks, so that a prefix which several texts share is stored once.

The turns of a conversation begin with the same tokens. So tokens are split every `CHUNK_TOKENS`, and the key of a
chunk covers the chunk and all chunks before it, as for blocks of KV (`erllama.cache.blocks.keys`). Equal keys mean
equal tokens up to there, and a reader can verify that a chunk is the one that was written. The texts of one
conversation then take about the bytes of its distinct tokens. `TextCache` stores chunks in memory, `TextTable` in
the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama.cache.blocks.keys import KEY_BYTES, TOKEN_BYTES, child_key

# A compromise: a turn wastes half a chunk on average at its end, and every chunk costs 64 bytes of keys.
CHUNK_TOKENS = 128
# The parent of a first chunk, and the key of an empty sequence.
ROOT = bytes(KEY_BYTES)
# Bytes of a chunk in memory, without its tokens: two dict entries, its key, two object headers.
_CHUNK_OVERHEAD = 250


class TokenChunk(NamedTuple):
    """Up to `CHUNK_TOKENS` tokens, as little-endian i32.

    Attributes:
        key: key of this chunk and everything before it.
        parent: key of everything before it.
    """

    key: bytes
    parent: bytes
    tokens: bytes

    @property
    def is_sound(self) -> bool:
        """Whether parent and tokens match the key."""
        parts = (self.parent, self.tokens)
        whole = all(isinstance(part, bytes) for part in parts) and len(self.tokens) % TOKEN_BYTES == 0
        return whole and child_key(*parts) == self.key


def split_tokens(tokens: NDArray[np.int32]) -> list[TokenChunk]:
    """Split tokens, int32, shape (n,), into chunks."""
    raw, chunks, parent = tokens.astype("<i4").tobytes(), [], ROOT
    step = CHUNK_TOKENS * TOKEN_BYTES
    for at in range(0, len(raw), step):
        part = raw[at : at + step]
        chunks.append(TokenChunk(child_key(parent, part), parent, part))
        parent = chunks[-1].key
    return chunks


def chain_key(chunks: Sequence[TokenChunk]) -> bytes:
    """Return the key of a sequence of chunks."""
    return chunks[-1].key if chunks else ROOT


def join_tokens(parts: Sequence[bytes]) -> NDArray[np.int32]:
    """Join the tokens of chunks to a read-only array, int32, shape (n,)."""
    tokens = np.frombuffer(b"".join(parts), "<i4").astype(np.int32, copy=False)
    tokens.flags.writeable = False
    return tokens


class ChunkStore:
    """Chunks in memory, with reference counts. Not thread-safe.

    Attributes:
        n_bytes: bytes of all chunks.
    """

    def __init__(self) -> None:
        self._chunks: dict[bytes, TokenChunk] = {}
        self._references: dict[bytes, int] = {}  # from acquired sequences, and from chunks that follow
        self.n_bytes = 0

    def acquire(self, tokens: NDArray[np.int32]) -> bytes:
        """Store tokens, add a reference to them, and return their key."""
        chunks = split_tokens(tokens)
        for chunk in chunks:
            if chunk.key not in self._chunks:
                self._chunks[chunk.key] = chunk
                self._references[chunk.key] = 0
                self._add_reference(chunk.parent)
                self.n_bytes += len(chunk.tokens) + _CHUNK_OVERHEAD
        head = chain_key(chunks)
        self._add_reference(head)
        return head

    def release(self, head: bytes) -> None:
        """Drop one reference, and remove the chunks that have none left."""
        while head != ROOT:
            self._references[head] -= 1
            if self._references[head]:
                return
            chunk = self._chunks.pop(head)
            del self._references[head]
            self.n_bytes -= len(chunk.tokens) + _CHUNK_OVERHEAD
            head = chunk.parent

    def tokens(self, head: bytes) -> NDArray[np.int32]:
        """Return the tokens of a key."""
        parts = []
        while head != ROOT:
            chunk = self._chunks[head]
            parts.append(chunk.tokens)
            head = chunk.parent
        return join_tokens(parts[::-1])

    def _add_reference(self, key: bytes) -> None:
        if key != ROOT:
            self._references[key] += 1
