"""Loading: payloads from the fastest tier that has them, checked and promoted.

The end of the pipeline that `Cache.load` calls, in the threads of its callers. Reads a tier without a lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from erllama._runtime.log import logger
from erllama.cache.blocks.block import Block
from erllama.cache.blocks.match import Loaded
from erllama.cache.catalog.catalog import BlockCatalog
from erllama.cache.catalog.counters import Counters
from erllama.cache.catalog.ledger import TierLedger
from erllama.cache.pipeline.evictor import Evictor
from erllama.cache.pipeline.tier_writer import TierWriter
from erllama.cache.pipeline.write_queue import WriteQueue
from erllama.cache.tiers.tier import Tier
from erllama.cache.uninterrupted import uninterrupted
from erllama.errors import CacheFormatError

log = logger("erllama.cache")


class Loader:
    """Loads the blocks of one cache.

    Args:
        lock: the cache's lock. It guards `catalog`.
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

    @uninterrupted
    def load(self, block: Block) -> Loaded | None:
        """Read the payload of a block; see `Cache.load`."""
        with self._counters.timing("load"):
            with self._lock:
                in_memory = self._in_memory(block)
                holders = [holder for holder in self._catalog.holders(block.key) if holder[0].write_behind]
            if in_memory is not None:
                return in_memory
            for ledger, tier in holders:
                loaded = self._load_from(ledger, tier, block)
                if loaded is not None:
                    return loaded
        return None

    def load_each(self, blocks: Sequence[Block]) -> Iterator[Loaded | None]:
        """Load several blocks; reads the next one while the caller uses the last."""
        if self._n_to_read(blocks) < 2:
            yield from map(self.load, blocks)
            return
        with ThreadPoolExecutor(1, "erllama-cache-reader") as reader:
            ahead = self._submit(reader, blocks[0])
            for block, following in zip(blocks, [*blocks[1:], None], strict=True):
                present, ahead = ahead, self._submit(reader, following) if following is not None else None
                yield present.result() if present is not None else self.load(block)

    @uninterrupted
    def _n_to_read(self, blocks: Sequence[Block]) -> int:
        """Return the number of blocks that are not in memory."""
        with self._lock:
            return sum(self._in_memory(block) is None for block in blocks)

    def _submit(self, reader: ThreadPoolExecutor, block: Block) -> Future[Loaded | None] | None:
        try:
            return reader.submit(self.load, block)
        except RuntimeError:  # no thread can start, or the interpreter is exiting
            return None

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

    def _in_memory(self, block: Block) -> Loaded | None:
        """Return the payload in RAM or in the write queue. The caller holds the cache's lock."""
        in_ram = self._catalog.read_from_ram(block)
        if in_ram is not None:
            return Loaded("ram", in_ram[1].toreadonly(), in_ram[0])
        pending = self._queue.get(block.key)
        return Loaded("ram", pending.payload.toreadonly(), pending.block) if pending is not None else None

    def _load_from(self, ledger: TierLedger, tier: Tier, block: Block) -> Loaded | None:
        """Read a block from one tier. On a failure, drop it there or mark it as unreadable."""
        try:
            found, payload = tier.read(block)
            if found.key != block.key:
                raise CacheFormatError("the tier returned a different block")
        except CacheFormatError as error:
            log.warning("%s: %s; not used", tier.location_of(block), error)
            self._counters.add("corrupt_files")
            self._evictor.remove_later(tier, block, damaged=True)
        except FileNotFoundError:
            log.info("%s is gone", tier.location_of(block))
            self._evictor.remove_later(tier, block)
        except Exception as error:
            log.warning("%s cannot be read: %s", tier.location_of(block), error)
            self._counters.add("disk_errors")
            with self._lock:
                # A later read may succeed. If not, the next save of the block writes it again.
                if ledger.root_of(block.key) is tier:
                    ledger.unreadable.add(block.key)
        else:
            self._promote(ledger, tier, found, payload)
            return Loaded(ledger.name, payload.toreadonly(), found)
        return None

    def _promote(self, ledger: TierLedger, tier: Tier, block: Block, payload: memoryview) -> None:
        """Store a block in the faster tiers, unless a newer version was saved while it was read."""
        with self._lock:
            ledger.unreadable.discard(block.key)
            if ledger.root_of(block.key) is tier and self._in_memory(block) is None:
                self._catalog.update_version(ledger.name, block)
                if self._catalog.store_in_ram(block, payload):
                    self._counters.add("promotions")
                self._writer.promote(block, payload, ledger)
