"""Texts and the tokens that they were computed as, in memory and in the directories of a cache.

`Cache.remember_text` and `Cache.longest_text` call it. Requests read directories and write to memory alone;
the queue's thread writes to the directories.
"""

from __future__ import annotations

import threading
import time
from functools import partial

import numpy as np
from numpy.typing import NDArray

from erllama.cache.pipeline.tier_set import TierSet
from erllama.cache.pipeline.write_queue import WriteQueue
from erllama.cache.texts.text_tokens import TextCache, TextDigests, TextRecord
from erllama.cache.tiers.file_tier import FileTier

_USES_SECONDS = 10.0  # uses are collected in memory; each transfer to a directory is a write


class TextMemory:
    """The texts of one cache. Thread-safe. Storage faults are counted and logged."""

    def __init__(self, queue: WriteQueue, tiers: TierSet) -> None:
        self._queue, self._tiers = queue, tiers
        self._cache = TextCache()
        self._lock = threading.Lock()  # guards `_uses`
        self._uses: dict[bytes, int] = {}  # uses not written yet: ns since 1970, by digest

    def remember(self, namespace: bytes, text: bytes, tokens: NDArray[np.int32]) -> None:
        """Remember the tokens, shape (n,), that a text was computed as."""
        record = TextDigests(namespace, text).record(tokens)
        self._cache.remember(record)
        for tier in self._tiers.file_tiers(writable=True):
            self._queue.defer(partial(self._write, tier, record.digest))

    def longest(self, namespace: bytes, text: bytes) -> TextRecord | None:
        """Return the longest remembered text that `text` begins with."""
        digests = TextDigests(namespace, text)
        best = self._cache.longest(digests)
        tiers = self._tiers.file_tiers()
        for tier in tiers:
            with self._tiers.guard("looking up a text", tier, changes=False):
                found = tier.longest_text(digests, best.n_bytes if best is not None else 0)
                if found is not None:
                    self._cache.remember(found)
                    best = found
        if best is not None and tiers:
            with self._lock:
                self._uses[best.digest] = time.time_ns()
            self._queue.defer(self._write_uses, _USES_SECONDS)
        return best

    def _write(self, tier: FileTier, digest: bytes) -> None:
        # The queue holds a digest: the tokens wait in `_cache`, which bounds them.
        record = self._cache.get(digest)
        if record is not None:
            with self._tiers.locked(), self._tiers.guard("writing a text", tier, changes=False):
                tier.remember_text(record)

    def _write_uses(self) -> None:
        with self._lock:
            uses, self._uses = self._uses, {}
        for tier in self._tiers.file_tiers(writable=True):
            with self._tiers.locked(), self._tiers.guard("recording uses of texts", tier, changes=False):
                tier.touch_texts(uses.items())
