"""Maps texts to the tokens that they were computed as, so that a conversation sent as text reuses its KV.

A model may write other tokens than its tokenizer does for the same text. A computed text is therefore recorded by
its digest, with its tokens. For a longer text, `longest` finds the longest recorded text that it begins with. The
texts themselves are not stored.

Texts are found through anchors: digests of their prefixes at multiples of `ANCHOR_BYTES`, each with the lengths of
the texts that end before the next anchor. So a lookup takes time in proportion to the bytes of the text and to
those lengths, at most `ANCHOR_BYTES` per anchor, and not to the number of recorded texts. If records are lost,
prompts are computed again, and results stay the same. `TextMemory` of the pipeline and `TextTable` use this module.
Thread-safe.
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

from erllama.cache.texts.token_chain import ChunkStore

# Bytes between two anchors of a text.
ANCHOR_BYTES = 512
# Maximum bytes of all texts in memory: about two million distinct tokens.
_MEMORY_BYTES = 16 << 20
# Bytes of a text in memory, without its tokens: three dict entries, two digests, and the objects around them.
_TEXT_OVERHEAD = 600


class TextRecord(NamedTuple):
    """The digests of a text, and the tokens that it was computed as.

    Attributes:
        digest: digest of namespace and text.
        anchor: digest of namespace and text up to the last multiple of `ANCHOR_BYTES`.
        n_bytes: length of the text.
        tokens: int32, shape (n,).
    """

    digest: bytes
    anchor: bytes
    n_bytes: int
    tokens: NDArray[np.int32]


class TextDigests:
    """Digests of the prefixes of a text within a namespace, computed on first use."""

    def __init__(self, namespace: bytes, text: bytes) -> None:
        self._namespace = namespace
        self._text = text

    @cached_property
    def _states(self) -> list[hashlib._Hash]:
        states = [hashlib.sha256(self._namespace)]
        for at in range(0, len(self._text) - ANCHOR_BYTES + 1, ANCHOR_BYTES):
            state = states[-1].copy()
            state.update(self._text[at : at + ANCHOR_BYTES])
            states.append(state)
        return states

    @cached_property
    def anchors(self) -> list[bytes]:
        """Digests of the prefixes at multiples of `ANCHOR_BYTES`, the empty one first."""
        return [state.digest() for state in self._states]

    def prefixes(self, lengths: Iterable[int]) -> list[tuple[int, bytes]]:
        """Return lengths in bytes and the digests of these prefixes, the longest first. Skips lengths out of range.

        Reads each byte once, however many lengths there are between two anchors.
        """
        found: list[tuple[int, bytes]] = []
        at, whole, state = 0, -1, self._states[0]
        for n_bytes in sorted(lengths):
            if not 0 <= n_bytes <= len(self._text):
                continue
            if n_bytes // ANCHOR_BYTES != whole:
                whole = n_bytes // ANCHOR_BYTES
                at, state = whole * ANCHOR_BYTES, self._states[whole].copy()
            state.update(self._text[at:n_bytes])
            at = n_bytes
            found.append((n_bytes, state.digest()))
        return found[::-1]

    def record(self, tokens: NDArray[np.int32]) -> TextRecord:
        """Return the record of the whole text with these tokens."""
        [(n_bytes, digest)] = self.prefixes([len(self._text)])
        return TextRecord(digest, self.anchors[-1], n_bytes, np.asarray(tokens, np.int32))


class _TextEntry(NamedTuple):
    anchor: bytes
    n_bytes: int
    head: bytes


class TextCache:
    """LRU cache of text records in memory. Thread-safe."""

    def __init__(self, limit_bytes: int = _MEMORY_BYTES) -> None:
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._texts: OrderedDict[bytes, _TextEntry] = OrderedDict()  # by digest, least recently used first
        self._lengths: dict[bytes, dict[int, int]] = {}  # by anchor: the number of texts of each length
        self._chunks = ChunkStore()

    @property
    def n_bytes(self) -> int:
        """Bytes of all texts and their tokens."""
        return self._chunks.n_bytes + len(self._texts) * _TEXT_OVERHEAD

    def remember(self, record: TextRecord) -> None:
        """Add a record in place of one with the same digest, and evict the least recently used to make room."""
        with self._lock:
            head = self._chunks.acquire(record.tokens)  # first, so that chunks which stay are not created again
            self._remove(record.digest)
            self._texts[record.digest] = _TextEntry(record.anchor, record.n_bytes, head)
            lengths = self._lengths.setdefault(record.anchor, {})
            lengths[record.n_bytes] = lengths.get(record.n_bytes, 0) + 1
            while self.n_bytes > self._limit:
                self._remove(next(iter(self._texts)))

    def get(self, digest: bytes) -> TextRecord | None:
        """Return the record of a digest; None if it was evicted."""
        with self._lock:
            return self._record(digest) if digest in self._texts else None

    def longest(self, digests: TextDigests) -> TextRecord | None:
        """Return the longest recorded text that a text begins with; None if no text matches."""
        with self._lock:
            if not self._texts:
                return None
            for anchor in reversed(digests.anchors):
                for _, digest in digests.prefixes(self._lengths.get(anchor, ())):
                    if digest in self._texts:
                        self._texts.move_to_end(digest)
                        return self._record(digest)
        return None

    def _record(self, digest: bytes) -> TextRecord:
        entry = self._texts[digest]
        return TextRecord(digest, entry.anchor, entry.n_bytes, self._chunks.tokens(entry.head))

    def _remove(self, digest: bytes) -> None:
        entry = self._texts.pop(digest, None)
        if entry is None:
            return
        self._chunks.release(entry.head)
        lengths = self._lengths[entry.anchor]
        lengths[entry.n_bytes] -= 1
        if not lengths[entry.n_bytes]:
            del lengths[entry.n_bytes]
        if not lengths:
            del self._lengths[entry.anchor]
