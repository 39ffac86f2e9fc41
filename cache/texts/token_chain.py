"""Tokens in pieces that follow one another, each kept once, whatever number of texts has it.

A conversation's turns begin with the same tokens. So tokens are cut every
`PIECE_TOKENS`, and a piece has the key of the chain that it ends, as blocks of KV
have (`erllama.cache.blocks.keys`): equal keys mean equal tokens up to there, and whoever
reads a piece can tell whether it is the one that was written. The texts of one
conversation, whether they begin with one another or not, then take about the
bytes of its distinct tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama.cache.blocks.keys import KEY_BYTES, TOKEN_BYTES, child_key

# A turn wastes half a piece, where its tokens end; a piece costs its keys: few of the one, few of the other.
PIECE_TOKENS = 128
# The parent of a first piece, and the key of no tokens.
ROOT = bytes(KEY_BYTES)
# Of a piece in memory, beside its tokens: entries of two dicts, its key, two headers of objects.
_PIECE_OVERHEAD = 250


class Piece(NamedTuple):
    """Up to `PIECE_TOKENS` tokens, as little-endian i32.

    Attributes:
        key: of this and everything before it.
        parent: the key of what is before it.
    """

    key: bytes
    parent: bytes
    tokens: bytes

    @property
    def is_sound(self) -> bool:
        """Whether this is what was stored under its key."""
        parts = (self.parent, self.tokens)
        whole = all(isinstance(part, bytes) for part in parts) and len(self.tokens) % TOKEN_BYTES == 0
        return whole and child_key(*parts) == self.key


def pieces_of(tokens: NDArray[np.int32]) -> list[Piece]:
    """Tokens, int32, shape (n,), cut in pieces."""
    raw, pieces, parent = tokens.astype("<i4").tobytes(), [], ROOT
    step = PIECE_TOKENS * TOKEN_BYTES
    for at in range(0, len(raw), step):
        part = raw[at : at + step]
        pieces.append(Piece(child_key(parent, part), parent, part))
        parent = pieces[-1].key
    return pieces


def head_of(pieces: Sequence[Piece]) -> bytes:
    """The key of all of them."""
    return pieces[-1].key if pieces else ROOT


def tokens_of(parts: Sequence[bytes]) -> NDArray[np.int32]:
    """Tokens, int32, shape (n,), read-only, from those of their pieces."""
    tokens = np.frombuffer(b"".join(parts), "<i4").astype(np.int32, copy=False)
    tokens.flags.writeable = False
    return tokens


class PiecesInMemory:
    """Pieces, and how often each is needed. Not thread-safe.

    Attributes:
        n_bytes: what they take.
    """

    def __init__(self) -> None:
        self._pieces: dict[bytes, Piece] = {}
        self._needs: dict[bytes, int] = {}  # by heads, and by pieces that follow
        self.n_bytes = 0

    def hold(self, tokens: NDArray[np.int32]) -> bytes:
        """Keep tokens until they are released; returns their key."""
        pieces = pieces_of(tokens)
        for piece in pieces:
            if piece.key not in self._pieces:
                self._pieces[piece.key] = piece
                self._needs[piece.key] = 0
                self._need(piece.parent)
                self.n_bytes += len(piece.tokens) + _PIECE_OVERHEAD
        head = head_of(pieces)
        self._need(head)
        return head

    def release(self, head: bytes) -> None:
        """Undo one `hold`; what nobody else needs goes."""
        while head != ROOT:
            self._needs[head] -= 1
            if self._needs[head]:
                return
            piece = self._pieces.pop(head)
            del self._needs[head]
            self.n_bytes -= len(piece.tokens) + _PIECE_OVERHEAD
            head = piece.parent

    def tokens(self, head: bytes) -> NDArray[np.int32]:
        """What is held under a key."""
        parts = []
        while head != ROOT:
            piece = self._pieces[head]
            parts.append(piece.tokens)
            head = piece.parent
        return tokens_of(parts[::-1])

    def _need(self, key: bytes) -> None:
        if key != ROOT:
            self._needs[key] += 1
