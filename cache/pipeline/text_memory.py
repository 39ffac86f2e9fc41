"""Texts remembered in memory and, where directories are given, on disk: what `Cache` calls.

Requests read, and write to memory alone; what goes to disk waits for the
write-behind thread.
"""

from __future__ import annotations

import threading
import time
from functools import partial

import numpy as np
from numpy.typing import NDArray

from erllama.cache.pipeline.upkeep import Upkeep
from erllama.cache.texts.text_tokens import TextCache, TextDigests, TextRecord
from erllama.cache.tiers.file_tier import FileTier

_USES_SECONDS = 10.0  # uses are told to the tiers that often at most: each telling is a write


def lasting_tiers(upkeep: Upkeep) -> list[FileTier]:
    """The tiers that outlive the process and can be read from now."""
    return [tier for tier in upkeep.tiers if isinstance(tier, FileTier) and upkeep.ready(tier)]


def writable_tiers(upkeep: Upkeep) -> list[FileTier]:
    """Those of them that are written, too."""
    return [tier for tier in lasting_tiers(upkeep) if not tier.read_only]


class TextMemory:
    """The texts of one cache. Thread-safe; storage faults are counted and logged."""

    def __init__(self, upkeep: Upkeep) -> None:
        self._upkeep = upkeep
        self._known = TextCache()
        self._lock = threading.Lock()
        self._uses: dict[bytes, int] = {}  # by digest: when, in ns since 1970; not yet told to the tiers

    def remember(self, namespace: bytes, text: bytes, tokens: NDArray[np.int32]) -> None:
        """Remember which tokens, shape (n,), a text was computed as."""
        known = TextDigests(namespace, text).record(tokens)
        self._known.remember(known)
        for tier in writable_tiers(self._upkeep):
            self._upkeep.writer.defer(partial(self._note, tier, known.digest))

    def longest(self, namespace: bytes, text: bytes) -> TextRecord | None:
        """The longest remembered text that this one begins with."""
        digests = TextDigests(namespace, text)
        best = self._known.longest(digests)
        tiers = lasting_tiers(self._upkeep)
        for tier in tiers:
            with self._upkeep.guarding("looking for a text", tier, changes=False):
                found = tier.longest_text(digests, best.n_bytes if best is not None else 0)
                if found is not None:
                    self._known.remember(found)
                    best = found
        if best is not None and tiers:
            with self._lock:
                self._uses[best.digest] = time.time_ns()
            self._upkeep.writer.defer(self._tell_uses, _USES_SECONDS)
        return best

    def _note(self, tier: FileTier, digest: bytes) -> None:
        # What waits is a digest: the tokens wait where they are bounded.
        known = self._known.get(digest)
        if known is not None:
            with self._upkeep.tending, self._upkeep.guarding("noting a text", tier, changes=False):
                tier.remember_text(known)

    def _tell_uses(self) -> None:
        with self._lock:
            uses, self._uses = self._uses, {}
        for tier in writable_tiers(self._upkeep):
            with self._upkeep.tending, self._upkeep.guarding("noting uses of texts", tier, changes=False):
                tier.touch_texts(uses.items())
