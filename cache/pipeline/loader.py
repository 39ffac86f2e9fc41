"""Loading: payloads from the fastest tier that has them, checked and promoted.

The end of the pipeline that `Cache.load` calls, in the threads of its callers. Reads a tier without a lock.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import takewhile
from typing import NamedTuple

from erllama._runtime.log import logger
from erllama.cache.blocks.block import Block
from erllama.cache.blocks.match import Loaded
from erllama.cache.catalog.catalog import BlockCatalog
from erllama.cache.catalog.counters import Counters
from erllama.cache.catalog.ledger import TierLedger
from erllama.cache.pipeline.evictor import Evictor
from erllama.cache.pipeline.tier_writer import TierWriter
from erllama.cache.pipeline.write_queue import WriteQueue
from erllama.cache.remote.tier import RemoteTier
from erllama.cache.tiers.tier import Tier
from erllama.cache.uninterrupted import uninterrupted
from erllama.errors import CacheFormatError, RemoteError

log = logger("erllama.cache")

# Small files are read in batches of this size, because handing each one from thread to thread would cost more than
# reading it. The caller waits for the first batch, which takes less than a millisecond from memory.
_BATCH_BYTES = 1 << 20
_BATCHES_AHEAD = 2  # one is read while the caller uses the last, and one waits, so that the reader never does


class Source(NamedTuple):
    """A loaded block, and where it was read from if it was not in memory."""

    loaded: Loaded
    ledger: TierLedger | None
    tier: Tier | None


class Loader:
    """Loads the blocks of one cache.

    Args:
        lock: the cache's lock. It guards `catalog`.

    Attributes:
        fetched: returns a block that was fetched for a request, by its key. The fetcher sets it. Needs the lock.
    """

    def __init__(
        self,
        lock: threading.RLock,
        catalog: BlockCatalog,
        counters: Counters,
        queue: WriteQueue,
        evictor: Evictor,
        writer: TierWriter,
    ) -> None:
        self._lock, self._catalog, self._counters = lock, catalog, counters
        self._queue, self._evictor, self._writer = queue, evictor, writer
        # One thread for all loads of this cache, started by the first one that reads ahead. Ends with this object.
        self._reader = self._new_reader()
        self.fetched: Callable[[bytes], Source | None] = lambda key: None

    @uninterrupted
    def load(self, block: Block, local: bool = False) -> Loaded | None:
        """Read the payload of a block; see `Cache.load`."""
        loaded = self.promote(self._read([block], local))
        return loaded[0] if loaded else None

    def load_batches(self, blocks: Sequence[Block], local: bool = False) -> Generator[list[Loaded], None, None]:
        """Load blocks in order, a batch at a time; see `Cache.load_batches`."""
        if local:
            with self._lock:
                blocks = list(takewhile(self._is_local, blocks))
        batches, process = self._batches(blocks), os.getpid()
        ahead: deque[Future[list[Source]] | None] = deque()
        try:
            for number, batch in enumerate(batches):
                if os.getpid() != process:
                    return
                loaded = self._take(ahead.popleft() if ahead else None, batch, local)
                for following in batches[number + 1 + len(ahead) : number + 1 + _BATCHES_AHEAD]:
                    ahead.append(self._read_ahead(following, local))
                if loaded:
                    yield loaded
                if len(loaded) < len(batch):
                    return
        finally:
            if os.getpid() == process:  # a forked child has no reader
                self._withdraw(ahead)

    @uninterrupted
    def _take(self, ahead: Future[list[Source]] | None, batch: list[Block], local: bool) -> list[Loaded]:
        """Return the blocks of a batch, which may be read ahead."""
        # Promoted here, not by the reader, because tiers get a block after its parent. A read that has not begun is
        # withdrawn: the reader is busy with another load.
        if ahead is None or ahead.cancel():
            return self.promote(self._read(batch, local))
        return self.promote(ahead.result())

    @uninterrupted
    def _withdraw(self, reads: Iterable[Future[list[Source]] | None]) -> None:
        """Cancel reads, and wait for those that have begun: the caller unpins the blocks next."""
        wait([read for read in reads if read is not None and not read.cancel()])

    @uninterrupted
    def _batches(self, blocks: Sequence[Block]) -> list[list[Block]]:
        """Divide blocks into batches to read at once. Blocks in memory count nothing."""
        batches: list[list[Block]] = []
        room = 0
        with self._lock:
            for block in blocks:
                in_memory = self.fetched(block.key) is not None or self.in_memory(block) is not None
                n_bytes = 0 if in_memory else self._bytes_to_read(block)
                if not batches or n_bytes > room:
                    batches.append([])
                    room = _BATCH_BYTES
                batches[-1].append(block)
                room -= n_bytes
        return batches

    def _bytes_to_read(self, block: Block) -> int:
        """Return the size of a block in the tier that it will be read from. The caller holds the cache's lock."""
        return next((ledger.size_of(block.key) for ledger, _ in self._slow_holders(block)), 0)

    def _is_local(self, block: Block) -> bool:
        """Return whether a block can be loaded without waiting for a network. The caller holds the cache's lock."""
        in_memory = self.fetched(block.key) is not None or self.in_memory(block) is not None
        return in_memory or bool(self._slow_holders(block, local=True))

    def _slow_holders(self, block: Block, local: bool = False) -> list[tuple[TierLedger, Tier]]:
        """Return the tiers slower than RAM that hold a block. The caller holds the cache's lock.

        Args:
            local: without remote tiers.
        """
        holders = [holder for holder in self._catalog.holders(block.key) if holder[0].write_behind]
        return [holder for holder in holders if not (local and isinstance(holder[1], RemoteTier))]

    @uninterrupted
    def _read_ahead(self, batch: list[Block], local: bool) -> Future[list[Source]] | None:
        try:
            return self._reader.submit(self._read, batch, local)
        except RuntimeError:  # no thread can start, or the interpreter is exiting
            self._reader = self._new_reader()  # the old one keeps the read in its queue
            return None

    def _new_reader(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "erllama-cache-reader")

    @uninterrupted
    def _read(self, blocks: Sequence[Block], local: bool) -> list[Source]:
        """Read blocks up to the first one that cannot be read. With `local`, do not read remote tiers."""
        read: list[Source] = []
        with self._counters.timing("load"):
            with self._lock:
                places = [
                    self.fetched(block.key) or self.in_memory(block) or self._slow_holders(block, local)
                    for block in blocks
                ]
            for block, place in zip(blocks, places, strict=True):
                if isinstance(place, Source):  # its fetch stores it in faster tiers
                    read.append(Source(place.loaded, None, None))
                elif isinstance(place, Loaded):
                    read.append(Source(place, None, None))
                else:
                    found = next(filter(None, (self.read_from(*holder, block) for holder in place)), None)
                    if found is None:
                        break
                    read.append(found)
        return read

    def reject(self, block: Block, error: Exception) -> None:
        """Drop a block whose payload the backend refused, from all tiers."""
        log.warning("a stored block of %d tokens could not be restored: %s; dropped", block.n_tokens, error)
        self._counters.add("restore_errors")
        with self._lock:
            self._catalog.remove_from_ram(block.key)
            if self._queue.cancel(block.key):
                self._catalog.drop_pending(block.key)
            for ledger, tier in self._catalog.holders(block.key):
                if ledger.write_behind:
                    self._evictor.remove_later(tier, block)

    def in_memory(self, block: Block) -> Loaded | None:
        """Return the payload in RAM or in the write queue. The caller holds the cache's lock."""
        in_ram = self._catalog.read_from_ram(block)
        if in_ram is not None:
            return Loaded("ram", in_ram[1].toreadonly(), in_ram[0])
        pending = self._queue.get(block.key)
        return Loaded("ram", pending.payload.toreadonly(), pending.block) if pending is not None else None

    def read_from(
        self,
        ledger: TierLedger,
        tier: Tier,
        block: Block,
        read: Callable[[Block], tuple[Block, memoryview]] | None = None,
    ) -> Source | None:
        """Read a block from one tier. On a failure, drop it there or mark it as unreadable.

        Args:
            read: reads it; None for `Tier.read`.
        """
        try:
            found, payload = (read or tier.read)(block)
            if found.key != block.key:
                raise CacheFormatError("the tier returned a different block")
        except CacheFormatError as error:
            log.warning("%s: %s; not used", tier.location_of(block), error)
            self._counters.add("corrupt_files")
            self._evictor.remove_later(tier, block, damaged=True)
        except FileNotFoundError:
            log.info("%s is gone", tier.location_of(block))
            self._evictor.remove_later(tier, block)
        except RemoteError as error:
            # The tier reports the service's failure itself. The block is still there.
            log.info("%s cannot be read: %s", tier.location_of(block), error)
            self._counters.add("disk_errors")
        except Exception as error:
            log.warning("%s cannot be read: %s", tier.location_of(block), error)
            self._counters.add("disk_errors")
            with self._lock:
                # A later read may succeed. If not, the next save of the block writes it again.
                if ledger.root_of(block.key) is tier:
                    ledger.unreadable.add(block.key)
        else:
            return Source(Loaded(ledger.name, payload.toreadonly(), found), ledger, tier)
        return None

    @uninterrupted
    def promote(self, blocks: Sequence[Source]) -> list[Loaded]:
        """Store blocks in the faster tiers, unless a newer version was saved while they were read; return them."""
        read = [(source.loaded, source.ledger, source.tier) for source in blocks if source.ledger is not None]
        if read:
            with self._lock:
                for loaded, ledger, tier in read:
                    block = loaded.block
                    ledger.unreadable.discard(block.key)
                    if ledger.root_of(block.key) is tier and self.in_memory(block) is None:
                        self._catalog.update_version(ledger.name, block)
                        if self._catalog.store_in_ram(block, loaded.payload):
                            self._counters.add("promotions")
                        self._writer.promote(block, loaded.payload, ledger)
        return [source.loaded for source in blocks]
