"""Fetching: blocks of a remote tier read in the background, for a request that waits for them in the queue.

`Cache.fetch` calls it. The thread of the model never waits for the network: the scheduler leaves a request waiting
until its fetch is done, and computes other requests meanwhile. A fetch is done when all its blocks were read, when
one could not be read, or at its deadline. Computing a prefix has a price, so waiting for it has one, too: a fetch
that should take longer than computing is not begun.

Each block is read once for all fetches that wait for it. A read that has not begun ends with the last of them.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import takewhile

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
# Of the blocks that all fetches of a cache keep. Until their requests have restored them, they are outside of the
# budget of the RAM tier. Blocks beyond the limit are computed.
_LIMIT_BYTES = 1 << 30


class _Read:
    """The read of one block, which the fetches that wait for it share. They keep it.

    Attributes:
        began: when a thread began to read, by time.monotonic(); None before.
        answered: whether the service has begun to answer.
        ended: whether it is over.
        source: the block, once it was read.
        fetches: those that wait for it.
    """

    def __init__(self, block: Block, ledger: TierLedger, tier: RemoteTier) -> None:
        self.block, self.ledger, self.tier = block, ledger, tier
        self.n_bytes = ledger.size_of(block.key)
        self.began: float | None = None
        self.answered = self.ended = False
        self.source: Source | None = None
        self.fetches: weakref.WeakSet[Fetch] = weakref.WeakSet()

    def note_response(self) -> None:
        """Record that the service has begun to answer."""
        self.answered = True


class Fetch:
    """Blocks that are being fetched. They can be loaded while this object exists.

    Args:
        reads: of the blocks, in order; none for a fetch that is done.
        in_flight: all reads that threads work on now, those of other fetches included.
        seconds: how long to wait.
        patience: how long to wait for a service that does not answer.
    """

    def __init__(
        self,
        reads: Sequence[_Read] = (),
        in_flight: Collection[_Read] = (),
        seconds: float = 0.0,
        patience: float = 0.0,
    ) -> None:
        self._reads, self._in_flight, self._patience = tuple(reads), in_flight, patience
        self._awaited = [read for read in reads if not read.ended]
        self._created = time.monotonic()
        self._deadline = self._created + seconds
        self._n_stored = 0
        for read in reads:
            read.fetches.add(self)

    @property
    def done(self) -> bool:
        """Whether to wait no longer."""
        missing = self._missing()
        if not missing:
            return True
        now, tier = time.monotonic(), missing[0].tier
        silent_since = self._silent_since(tier)
        late = now >= self._deadline or (silent_since is not None and now >= silent_since + self._patience)
        if not late and (tier.serves or any(read.began is not None for read in missing)):
            return False
        if late:
            began = min((read.began for read in self._awaited if read.began is not None), default=now)
            n_bytes, waited = sum(read.n_bytes for read in self._awaited), now - max(self._created, began)
            tier.record_late(n_bytes, len(self._awaited), waited, silent=silent_since is not None)
        # The rest is not needed any more. Reads that have not begun are cancelled, unless other fetches want them.
        self._reads = tuple(takewhile(lambda read: read.ended, self._reads))
        self._awaited = []
        return True

    def _missing(self) -> list[_Read]:
        """Return the reads to wait for: those before the first block that could not be read."""
        needed = takewhile(lambda read: not read.ended or read.source is not None, self._reads)
        return [read for read in needed if not read.ended]

    def _silent_since(self, tier: RemoteTier) -> float | None:
        """Return since when the service has not answered this fetch; None if it has, or was not asked."""
        # Its reads may wait for a thread: then those of other fetches show whether the service answers.
        in_flight = [read for read in tuple(self._in_flight) if read.tier is tier]
        if any(read.answered for read in (*in_flight, *self._awaited)):
            return None
        began = [read.began for read in in_flight if read.began is not None]
        return max(self._created, min(began)) if began else None

    @property
    def ended(self) -> bool:
        """Whether all its reads are over."""
        return all(read.ended for read in self._reads)

    def new_sources(self) -> list[Source]:
        """Return the blocks that were read since the last call, in order, up to the first that was not."""
        found = self.sources()
        new, self._n_stored = found[self._n_stored :], max(self._n_stored, len(found))
        return new

    def sources(self) -> list[Source]:
        """Return the blocks that were read, in order, up to the first that was not."""
        found = []
        for read in self._reads:
            if read.source is None:
                break
            found.append(read.source)
        return found


class Fetcher:
    """Fetches the blocks of one cache.

    Args:
        lock: the cache's lock. It guards `catalog`.
    """

    def __init__(self, lock: threading.RLock, catalog: BlockCatalog, loader: Loader) -> None:
        self._lock, self._catalog, self._loader = lock, catalog, loader
        self._measure_after = 0.0  # by time.monotonic()
        # By key: all reads that fetches keep. Guarded by the lock.
        self._reads: weakref.WeakValueDictionary[bytes, _Read] = weakref.WeakValueDictionary()
        self._in_flight: set[_Read] = set()
        self._background: set[Fetch] = set()  # no request waits for them
        loader.fetched = partial(_source_of, self._reads)  # not a method: the loader must not keep this object

    def fetch(self, blocks: Sequence[Block], seconds_per_token: float | None, n_tokens: int | None = None) -> Fetch:
        """Begin to fetch the blocks that only a remote tier has; see `Cache.fetch`."""
        with self._lock:
            reads = self._find_reads(blocks)
            if not reads or not reads[0].tier.serves:
                return Fetch()
            end = blocks[-1].end
            n_fitting = self._n_fitting(reads)
            if n_fitting == 0:
                reads[0].tier.record_skipped()
                return Fetch()
            if n_fitting < len(reads):
                end, reads = reads[n_fitting].block.start, reads[:n_fitting]
            if all(read.ended for read in reads):
                return Fetch(reads)
            if n_tokens is None:
                # Without the first missing block, all blocks from there on are computed.
                n_tokens = end - reads[0].block.start
            return self._fetch(reads, n_tokens * (seconds_per_token or _DEFAULT_SECONDS_PER_TOKEN))

    def _fetch(self, reads: list[_Read], computing: float) -> Fetch:
        """Begin to read, if that is worth it. The caller holds the lock.

        Args:
            computing: seconds that computing takes instead.
        """
        tier, now = reads[0].tier, time.monotonic()
        queued = [read for read in {*self._reads.values(), *reads} if not read.ended]
        expected = tier.expected_seconds(sum(read.n_bytes for read in queued), len(queued))
        if expected >= computing:
            tier.record_skipped()
            if now >= self._measure_after:
                self._measure_after = now + _MEASURE_SECONDS
                self._begin_in_background(reads[:1])
            return Fetch()
        patience = _SHARE_IN_VAIN * computing
        if tier.round_trip_seconds >= patience:
            # Not worth the risk of a wait in vain. The next request will find the blocks in a faster tier.
            tier.record_skipped()
            self._begin_in_background(reads)
            return Fetch()
        fetch = Fetch(reads, self._in_flight, min(computing, max(_SLACK * expected, patience)), patience)
        self._begin(reads)
        return fetch

    def _find_reads(self, blocks: Sequence[Block]) -> list[_Read]:
        """Return the reads of the blocks that only a remote tier has. The caller holds the lock."""
        found = []
        for block in blocks:
            if self._loader.in_memory(block) is not None:
                continue
            holders = [holder for holder in self._catalog.holders(block.key) if holder[0].write_behind]
            if not holders or not isinstance(holders[0][1], RemoteTier):
                continue
            read = self._reads.get(block.key)
            if read is None or (read.ended and read.source is None):
                read = _Read(block, holders[0][0], holders[0][1])
            found.append(read)
        return found

    def _n_fitting(self, reads: Sequence[_Read]) -> int:
        """Return how many of the reads, from the first on, the limit has room for. The caller holds the lock."""
        kept = set(self._reads.values())
        room = _LIMIT_BYTES - sum(read.n_bytes for read in kept)
        for number, read in enumerate(reads):
            if read not in kept:
                room -= read.n_bytes
                if room < 0:
                    return number
        return len(reads)

    def _begin_in_background(self, reads: list[_Read]) -> None:
        fetch = Fetch(reads)
        self._background.add(fetch)
        self._begin(reads)
        if fetch.ended:
            self._background.discard(fetch)

    def _begin(self, reads: Sequence[_Read]) -> None:
        """Begin the reads that no other fetch has begun. The caller holds the lock."""
        for read in reads:
            if self._reads.get(read.block.key) is not read:
                self._reads[read.block.key] = read
                reference = weakref.ref(read)
                read.tier.run(partial(self._run, reference)).add_done_callback(partial(self._end, reference))

    def _run(self, reference: weakref.ref[_Read]) -> None:
        """Read a block, in a thread of the tier, if a fetch still wants it."""
        read = reference()
        if read is None:
            return
        read.began = time.monotonic()
        self._in_flight.add(read)
        try:
            now = partial(read.tier.read_now, on_response=read.note_response)
            read.source = self._loader.read_from(read.ledger, read.tier, read.block, now)
        finally:
            self._in_flight.discard(read)

    def _end(self, reference: weakref.ref[_Read], _: Future[None]) -> None:
        """Record the end of a read. Blocks that were read are stored in faster tiers, parents first."""
        read = reference()
        if read is None:
            return
        with self._lock:
            read.ended = True
            for fetch in list(read.fetches):
                self._loader.promote(fetch.new_sources())
                if fetch.ended:
                    self._background.discard(fetch)


def _source_of(reads: weakref.WeakValueDictionary[bytes, _Read], key: bytes) -> Source | None:
    """Return a block that was fetched, and still belongs to a request. The caller holds the cache's lock."""
    read = reads.get(key)
    return read.source if read is not None else None
