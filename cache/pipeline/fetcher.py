"""Fetching: blocks of a remote tier read in the background, for a request that waits for them in the queue.

`Cache.fetch` calls it. The thread of the model never waits for the network: the scheduler leaves a request waiting
until its fetch is done, and computes other requests meanwhile. A fetch is done when all its blocks were read, when
one could not be read, or at its deadline. Computing a prefix has a price, so waiting for it has one, too: a fetch
that should take longer than computing is not begun.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from erllama.cache.blocks.block import Block
from erllama.cache.catalog.catalog import BlockCatalog
from erllama.cache.catalog.ledger import TierLedger
from erllama.cache.pipeline.loader import Loader, Source
from erllama.cache.remote.tier import RemoteTier

# A fetch may take this many times as long as recent reads: they vary.
_SLACK = 4.0
# The service must begin to answer within this part of the time that computing takes. If it is gone, that is what a
# request loses: with the poll of an idle scheduler, less than 5 %.
_SHARE_IN_VAIN = 0.03
# Seconds per token, until the model has computed a prompt: a fast model, so that the first wait is short.
_DEFAULT_SECONDS_PER_TOKEN = 0.0005
_MEASURE_SECONDS = 30.0  # between two reads that no request waits for, while waiting is not worth it


class _Wanted(NamedTuple):
    """A block to fetch, and where it is."""

    block: Block
    ledger: TierLedger
    tier: RemoteTier
    n_bytes: int


class Fetch:
    """Blocks that are being fetched. They can be loaded while this object exists.

    Args:
        wanted: the blocks; none for a fetch that is done.
        deadline: when to stop waiting, by time.monotonic().
        first_deadline: the same, if the service has not begun to answer by then.
    """

    def __init__(self, wanted: Sequence[_Wanted] = (), deadline: float = 0.0, first_deadline: float = 0.0) -> None:
        self._wanted, self._deadline, self._first_deadline = wanted, deadline, first_deadline
        self._answers = False
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._read: dict[bytes, Source] = {}
        self._n_left = len(wanted)
        self._n_needed = len(wanted)  # up to the first block that could not be read
        self._late = False

    @property
    def done(self) -> bool:
        """Whether to wait no longer."""
        if not self._n_left or self._late or all(each.block.key in self._read for each in self._needed):
            return True
        now = time.monotonic()
        if now < (self._deadline if self._answers else self._first_deadline):
            return False
        with self._lock:
            missing = [wanted for wanted in self._needed if wanted.block.key not in self._read]
            first, self._late = not self._late, True
        if missing and first:
            missing[0].tier.record_late(sum(wanted.n_bytes for wanted in missing), now - self._began)
        return True

    @property
    def _needed(self) -> Sequence[_Wanted]:
        return self._wanted[: self._n_needed]

    def note_response(self) -> None:
        """Record that the service has begun to answer."""
        self._answers = True

    def get(self, key: bytes) -> Source | None:
        """Return a block that was fetched."""
        return self._read.get(key)

    def add(self, wanted: _Wanted, source: Source | None) -> bool:
        """Record the end of one read. Returns whether it was the last."""
        with self._lock:
            self._n_left -= 1
            if source is None:
                self._n_needed = min(self._n_needed, self._wanted.index(wanted))
            else:
                self._read[wanted.block.key] = source
            return not self._n_left

    def sources(self) -> list[Source]:
        """Return the blocks that were read, in order, up to the first that was not."""
        found = []
        for wanted in self._wanted:
            source = self._read.get(wanted.block.key)
            if source is None:
                break
            found.append(source)
        return found


class Fetcher:
    """Fetches the blocks of one cache.

    Args:
        lock: the cache's lock. It guards `catalog`.
    """

    def __init__(self, lock: threading.RLock, catalog: BlockCatalog, loader: Loader) -> None:
        self._lock, self._catalog, self._loader = lock, catalog, loader
        self._measure_after = 0.0  # by time.monotonic()

    def fetch(self, blocks: Sequence[Block], seconds_per_token: float | None) -> Fetch:
        """Begin to fetch the blocks that only a remote tier has; see `Cache.fetch`."""
        with self._lock:
            wanted = [found for block in blocks if (found := self._wanted(block)) is not None]
        if not wanted or not wanted[0].tier.serves:
            return Fetch()
        tier, n_bytes = wanted[0].tier, sum(each.n_bytes for each in wanted)
        # Without the first missing block, all blocks from there on are computed.
        n_tokens = blocks[-1].end - wanted[0].block.start
        computing = n_tokens * (seconds_per_token or _DEFAULT_SECONDS_PER_TOKEN)
        expected = tier.expected_seconds(n_bytes, len(wanted))
        now = time.monotonic()
        if expected >= computing:
            tier.record_skipped()
            if now >= self._measure_after:
                self._measure_after = now + _MEASURE_SECONDS
                self._begin(Fetch(wanted[:1]), wanted[:1])
            return Fetch()
        first_limit = _SHARE_IN_VAIN * computing
        if tier.round_trip_seconds >= first_limit:
            # Not worth the risk of a wait in vain. The next request will find the blocks in a faster tier.
            tier.record_skipped()
            self._begin(Fetch(wanted), wanted)
            return Fetch()
        fetch = Fetch(wanted, now + min(computing, max(_SLACK * expected, first_limit)), now + first_limit)
        self._loader.fetches.add(fetch)
        self._begin(fetch, wanted)
        return fetch

    def _wanted(self, block: Block) -> _Wanted | None:
        """Return a block to fetch; None if a faster tier has it, or no remote tier. The caller holds the lock."""
        if self._loader.in_memory(block) is not None:
            return None
        holders = [holder for holder in self._catalog.holders(block.key) if holder[0].write_behind]
        if not holders:
            return None
        ledger, tier = holders[0]
        if not isinstance(tier, RemoteTier):
            return None
        return _Wanted(block, ledger, tier, ledger.size_of(block.key))

    def _begin(self, fetch: Fetch, wanted: Sequence[_Wanted]) -> None:
        for each in wanted:
            now = partial(each.tier.read_now, on_response=fetch.note_response)
            read = each.tier.run(partial(self._loader.read_from, each.ledger, each.tier, each.block, now))
            read.add_done_callback(partial(self._end, fetch, each))

    def _end(self, fetch: Fetch, wanted: _Wanted, read: Future[Source | None]) -> None:
        """Record the end of a read. After the last one, store the blocks in faster tiers, parents first."""
        source = read.result() if read.exception() is None else None
        if fetch.add(wanted, source):
            self._loader.promote(fetch.sources())
