"""Which tokens texts were computed as, so that a conversation that comes back as text goes on where it was.

What a model wrote may be other tokens than its text gives. A text that was
computed is remembered by digests alone, with its tokens; a longer one then finds
the longest remembered that it begins with, by as many steps as it has chunks,
however many are remembered. Nothing here is KV, and whatever is lost costs
warmth only. Thread-safe.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Bytes between two places at which a text can be found: remembered texts share these digests, and end between them.
CHUNK_BYTES = 512
# Tokens kept in memory, in bytes: about a hundred conversations of 32,000 tokens.
_MEMORY_BYTES = 16 << 20


class KnownText(NamedTuple):
    """A text, and the tokens it was computed as.

    Attributes:
        digest: of namespace and text.
        anchor: the same, of its whole chunks.
        n_bytes: its length.
        tokens: int32, shape (n,).
    """

    digest: bytes
    anchor: bytes
    n_bytes: int
    tokens: NDArray[np.int32]


def text_seal(digest: bytes, tokens: bytes) -> bytes:
    """What tells that tokens are those that were stored with a text."""
    return hashlib.sha256(digest + tokens).digest()


class TextDigests:
    """The digests of a text's beginnings, within a namespace."""

    def __init__(self, namespace: bytes, text: bytes) -> None:
        self._text = text
        self._states = [hashlib.sha256(namespace)]
        for at in range(0, len(text) - CHUNK_BYTES + 1, CHUNK_BYTES):
            state = self._states[-1].copy()
            state.update(text[at : at + CHUNK_BYTES])
            self._states.append(state)

    @cached_property
    def anchors(self) -> list[bytes]:
        """Of the beginnings of whole chunks, the empty one first."""
        return [state.digest() for state in self._states]

    def of(self, n_bytes: int) -> bytes:
        """Of the first `n_bytes`."""
        whole = n_bytes // CHUNK_BYTES
        state = self._states[whole].copy()
        state.update(self._text[whole * CHUNK_BYTES : n_bytes])
        return state.digest()

    def known_as(self, tokens: NDArray[np.int32]) -> KnownText:
        """The whole text, as these tokens."""
        n_bytes = len(self._text)
        kept = np.array(tokens, np.int32)
        kept.flags.writeable = False
        return KnownText(self.of(n_bytes), self.anchors[-1], n_bytes, kept)

    def begins_with(self, digest: bytes, n_bytes: int) -> bool:
        return n_bytes <= len(self._text) and self.of(n_bytes) == digest


class KnownTexts:
    """The texts used last, as many as fit."""

    def __init__(self, limit_bytes: int = _MEMORY_BYTES) -> None:
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._texts: OrderedDict[bytes, KnownText] = OrderedDict()  # by digest, the least recently used first
        self._by_anchor: dict[bytes, set[bytes]] = {}
        self._n_bytes = 0

    def remember(self, known: KnownText) -> None:
        with self._lock:
            self._forget(known.digest)
            self._texts[known.digest] = known
            self._by_anchor.setdefault(known.anchor, set()).add(known.digest)
            self._n_bytes += known.tokens.nbytes
            while self._n_bytes > self._limit:
                self._forget(next(iter(self._texts)))

    def longest(self, digests: TextDigests) -> KnownText | None:
        """The longest that a text begins with."""
        with self._lock:
            for anchor in reversed(digests.anchors):
                here = [self._texts[digest] for digest in self._by_anchor.get(anchor, ())]
                found = [known for known in here if digests.begins_with(known.digest, known.n_bytes)]
                if found:
                    best = max(found, key=lambda known: known.n_bytes)
                    self._texts.move_to_end(best.digest)
                    return best
        return None

    def _forget(self, digest: bytes) -> None:
        known = self._texts.pop(digest, None)
        if known is not None:
            self._n_bytes -= known.tokens.nbytes
            digests = self._by_anchor[known.anchor]
            digests.discard(digest)
            if not digests:
                del self._by_anchor[known.anchor]
