"""Gets payloads out of the tiers: from the fastest that has them, checked, and promoted on the way."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from erllama._runtime.log import logger
from erllama.cache.blocks.block import Block
from erllama.cache.blocks.match import Loaded
from erllama.cache.catalog.catalog import PENDING, BlockCatalog, TierLedger
from erllama.cache.catalog.counters import Counters
from erllama.cache.pipeline.tier_set import Upkeep
from erllama.cache.tiers.tier import Tier
from erllama.cache.uninterrupted import uninterrupted
from erllama.errors import CacheFormatError

log = logger("erllama.cache")


class Loader:
    """Loads for one cache. Runs in the threads of those who ask; `lock` guards `residents`."""

    def __init__(self, lock: threading.RLock, residents: BlockCatalog, upkeep: Upkeep, counters: Counters) -> None:
        self._lock, self._residents, self._upkeep, self._counters = lock, residents, upkeep, counters

    @uninterrupted
    def load(self, block: Block) -> Loaded | None:
        with self._counters.timing("load"):
            with self._lock:
                at_hand = self._at_hand(block)
                holders = [held for held in self._residents.holders(block.key) if held[0].behind]
            if at_hand is not None:
                return at_hand
            for shelf, tier in holders:
                loaded = self._load_from(shelf, tier, block)
                if loaded is not None:
                    return loaded
        return None

    def load_each(self, blocks: Sequence[Block]) -> Iterator[Loaded | None]:
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
        with self._lock:
            return sum(self._at_hand(block) is None for block in blocks)

    def _submit(self, reader: ThreadPoolExecutor, block: Block) -> Future[Loaded | None] | None:
        try:
            return reader.submit(self.load, block)
        except RuntimeError:  # no thread to be had, or the interpreter is ending
            return None

    def reject(self, block: Block, error: Exception) -> None:
        log.warning("a stored block of %d tokens could not be restored: %s; dropped", block.n_tokens, error)
        self._counters.add("restore_errors")
        with self._lock:
            self._residents.drop_from_ram(block.key)
            if self._upkeep.writer.cancel(block.key):
                self._residents.drop(PENDING, block.key)
            for shelf, tier in list(self._residents.holders(block.key)):
                if shelf.behind:
                    self._upkeep.remove(tier, block)

    def _at_hand(self, block: Block) -> Loaded | None:
        """What is in RAM, or waits there to be written; under the lock."""
        in_ram = self._residents.in_ram(block)
        if in_ram is not None:
            return Loaded("ram", in_ram[1].toreadonly(), in_ram[0])
        pending = self._upkeep.writer.get(block.key)
        return Loaded("ram", pending.payload.toreadonly(), pending.block) if pending is not None else None

    def _load_from(self, shelf: TierLedger, tier: Tier, block: Block) -> Loaded | None:
        try:
            found, payload = tier.read(block)
            if found.key != block.key:
                raise CacheFormatError("another block is in its place")
        except CacheFormatError as error:
            log.warning("%s: %s; not used", tier.where(block), error)
            self._counters.add("corrupt_files")
            self._upkeep.remove(tier, block, damaged=True)
        except FileNotFoundError:
            log.info("%s is gone", tier.where(block))
            self._upkeep.remove(tier, block)
        except Exception as error:
            log.warning("%s cannot be read: %s", tier.where(block), error)
            self._counters.add("disk_errors")
            with self._lock:
                # It may be readable again. If not, the block is written anew where it is saved again.
                if shelf.root_of(block.key) is tier:
                    shelf.unreadable.add(block.key)
        else:
            with self._lock:
                # Unless a newer version was saved while this one was read.
                shelf.unreadable.discard(block.key)
                if shelf.root_of(block.key) is tier and self._at_hand(block) is None:
                    self._residents.learn(shelf.name, found)
                    if self._residents.keep_in_ram(found, payload):
                        self._counters.add("promotions")
                    self._upkeep.persister.promote(found, payload, shelf)
            return Loaded(shelf.name, payload.toreadonly(), found)
        return None
