"""Which tokens texts were computed as, so that a conversation that comes back as text goes on where it was.

What a model wrote may be other tokens than its text gives. A text that was
computed is remembered by digests alone, with its tokens; a longer one then finds
the longest remembered that it begins with. Texts are found through anchors, the
digests of their whole chunks, and the lengths known at each: the work goes with
the text's bytes and those lengths, at most `CHUNK_BYTES` an anchor, and not with
how many texts are remembered. Nothing here is KV, and whatever is lost costs
warmth only. Thread-safe.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama.cache.texts.token_chain import PiecesInMemory

# Bytes between two places at which a text can be found: remembered texts share these digests, and end between them.
CHUNK_BYTES = 512
# Of all texts kept in memory: about two million distinct tokens.
_MEMORY_BYTES = 16 << 20
# Of a text in memory, beside its tokens: three entries of dicts, two digests, the objects that hold them.
_TEXT_OVERHEAD = 600


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


class TextDigests:
    """The digests of a text's beginnings, within a namespace; none is computed before it is asked for."""

    def __init__(self, namespace: bytes, text: bytes) -> None:
        self._namespace = namespace
        self._text = text

    @cached_property
    def _states(self) -> list[hashlib._Hash]:
        states = [hashlib.sha256(self._namespace)]
        for at in range(0, len(self._text) - CHUNK_BYTES + 1, CHUNK_BYTES):
            state = states[-1].copy()
            state.update(self._text[at : at + CHUNK_BYTES])
            states.append(state)
        return states

    @cached_property
    def anchors(self) -> list[bytes]:
        """Of the beginnings of whole chunks, the empty one first."""
        return [state.digest() for state in self._states]

    def of(self, lengths: Iterable[int]) -> list[tuple[int, bytes]]:
        """Lengths in bytes and the digests of the beginnings, the longest first; no beginning, no digest.

        Each byte is read once, however many lengths end in its chunk.
        """
        found: list[tuple[int, bytes]] = []
        at, whole, state = 0, -1, self._states[0]
        for n_bytes in sorted(lengths):
            if not 0 <= n_bytes <= len(self._text):
                continue
            if n_bytes // CHUNK_BYTES != whole:
                whole = n_bytes // CHUNK_BYTES
                at, state = whole * CHUNK_BYTES, self._states[whole].copy()
            state.update(self._text[at:n_bytes])
            at = n_bytes
            found.append((n_bytes, state.digest()))
        return found[::-1]

    def known_as(self, tokens: NDArray[np.int32]) -> KnownText:
        """The whole text, as these tokens."""
        [(n_bytes, digest)] = self.of([len(self._text)])
        return KnownText(digest, self.anchors[-1], n_bytes, np.asarray(tokens, np.int32))


class _Entry(NamedTuple):
    anchor: bytes
    n_bytes: int
    head: bytes


class KnownTexts:
    """The texts used last, as many as fit."""

    def __init__(self, limit_bytes: int = _MEMORY_BYTES) -> None:
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._texts: OrderedDict[bytes, _Entry] = OrderedDict()  # by digest, the least recently used first
        self._lengths: dict[bytes, dict[int, int]] = {}  # by anchor: how many texts have which length
        self._pieces = PiecesInMemory()

    @property
    def n_bytes(self) -> int:
        """What all of it takes."""
        return self._pieces.n_bytes + len(self._texts) * _TEXT_OVERHEAD

    def remember(self, known: KnownText) -> None:
        with self._lock:
            head = self._pieces.hold(known.tokens)  # first, so that what stays is not made anew
            self._forget(known.digest)
            self._texts[known.digest] = _Entry(known.anchor, known.n_bytes, head)
            lengths = self._lengths.setdefault(known.anchor, {})
            lengths[known.n_bytes] = lengths.get(known.n_bytes, 0) + 1
            while self.n_bytes > self._limit:
                self._forget(next(iter(self._texts)))

    def get(self, digest: bytes) -> KnownText | None:
        """A text by its digest, if it is still remembered."""
        with self._lock:
            return self._known(digest) if digest in self._texts else None

    def longest(self, digests: TextDigests) -> KnownText | None:
        """The longest that a text begins with."""
        with self._lock:
            if not self._texts:
                return None
            for anchor in reversed(digests.anchors):
                for _, digest in digests.of(self._lengths.get(anchor, ())):
                    if digest in self._texts:
                        self._texts.move_to_end(digest)
                        return self._known(digest)
        return None

    def _known(self, digest: bytes) -> KnownText:
        entry = self._texts[digest]
        return KnownText(digest, entry.anchor, entry.n_bytes, self._pieces.tokens(entry.head))

    def _forget(self, digest: bytes) -> None:
        entry = self._texts.pop(digest, None)
        if entry is None:
            return
        self._pieces.release(entry.head)
        lengths = self._lengths[entry.anchor]
        lengths[entry.n_bytes] -= 1
        if not lengths[entry.n_bytes]:
            del lengths[entry.n_bytes]
        if not lengths:
            del self._lengths[entry.anchor]
