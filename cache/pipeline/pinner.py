"""Pins of prefixes: their blocks written to one tier and protected there, and read into memory when a model loads.

`Cache.pin_prefix`, `unpin`, `pins` and `warm_pins` call it. A pin is a row in the index of each directory of its
tier, so all processes that share a directory protect its blocks. Without a directory, pins are in the RAM tier.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from erllama._runtime.log import logger
from erllama.cache.blocks.block import Block
from erllama.cache.blocks.keys import TOKEN_BYTES
from erllama.cache.blocks.pins import Pin, PinRecord, PrefixNotStored, pinned_blocks
from erllama.cache.catalog.catalog import BlockCatalog
from erllama.cache.catalog.counters import Counters
from erllama.cache.catalog.ledger import TierLedger
from erllama.cache.pipeline.change_feed import ChangeFeed
from erllama.cache.pipeline.loader import Loader
from erllama.cache.pipeline.tier_set import TierSet
from erllama.cache.pipeline.tier_writer import TierWriter
from erllama.cache.pipeline.write_queue import WriteQueue
from erllama.cache.tiers.file_tier import FileTier
from erllama.errors import PinError, PinQuotaExceeded

log = logger("erllama.cache")

_TARGETS = ("disk", "ram_file")  # names of the tiers of files that may have the pins, in order


class _Found(NamedTuple):
    """The stored blocks of a prefix, and how many of its tokens they have."""

    blocks: list[Block]
    n_tokens: int


class Pinner:
    """The pins of one cache.

    Args:
        lock: the cache's lock. It guards `catalog`.
    """

    def __init__(
        self,
        lock: threading.RLock,
        catalog: BlockCatalog,
        counters: Counters,
        queue: WriteQueue,
        tiers: TierSet,
        feed: ChangeFeed,
        writer: TierWriter,
        loader: Loader,
    ) -> None:
        self._lock, self._catalog, self._counters, self._queue = lock, catalog, counters, queue
        self._tiers, self._feed, self._writer, self._loader = tiers, feed, writer, loader

    # --- pinning ---------------------------------------------------------------------------------

    def pin(
        self, namespace: bytes, raw: bytes, pin: PinRecord, whole: bool, share: float, flush: Callable[[], object]
    ) -> Pin:
        """Pin the prefix `raw`; see `Cache.pin_prefix`.

        Args:
            pin: the pin without its blocks.
            flush: writes all waiting saves.
        """
        target = self._target()
        if not self._is_stored(target, namespace, raw, whole):
            flush()
        with self._stored_prefix(namespace, raw, whole) as found:
            pin = replace(pin, blocks=pinned_blocks(found.blocks))
            self._check_quota(target, pin, found.blocks, share)
            if found.n_tokens < pin.n_tokens:
                raise PrefixNotStored(
                    f"{found.n_tokens} of the {pin.n_tokens} tokens of the prefix could be stored in the tier "
                    f"{target.name!r}; check its budget, and the policy's min_tokens"
                )
            if self._complete(target, found.blocks, flush):
                flush()
            try:
                self._store(target, pin, share)
            except (OSError, sqlite3.Error) as error:
                raise PinError(f"the pin {pin.name!r} could not be stored: {error}") from error
        for each in self.pins():
            if each.name == pin.name:
                return each
        raise PinError(f"the pin {pin.name!r} expired or was removed at once; pass a longer ttl")

    def _target(self) -> TierLedger:
        """Return the account of the tier that has the pins."""
        writable = [tier for tier in self._tiers if isinstance(tier, FileTier) and not tier.read_only]
        name = next((name for name in _TARGETS if any(tier.name == name for tier in writable)), "ram")
        if name != "ram" and not self._roots(name):
            tier = next(tier for tier in writable if tier.name == name)
            raise PinError(f"pins cannot be stored: {self._tiers.error_of(tier) or f'{tier.location} is not open'}")
        with self._lock:
            ledger = self._catalog.ledgers().get(name)
        if ledger is None:
            raise PinError("the cache has neither a RAM tier nor a directory that it may write to; add one of them")
        return ledger

    def _roots(self, name: str) -> list[FileTier]:
        """Return the directories of a tier that can be written now, in an order that all processes share."""
        roots = [tier for tier in self._tiers.file_tiers(writable=True) if tier.name == name]
        return sorted(roots, key=lambda tier: tier.location)

    @contextmanager
    def _stored_prefix(self, namespace: bytes, raw: bytes, whole: bool) -> Iterator[_Found]:
        """Find the blocks of a prefix. They are not evicted during the `with` block.

        With `whole`, finds those of the same prompt, too: its last token is computed, so it resumes one token
        before its end.
        """
        with self._lock:
            self._feed.poll(at_once=True)
            blocks, n_tokens = self._catalog.find_prefix(namespace, raw, whole, True)
            if whole:
                again = self._catalog.find_prefix(namespace, raw[:-TOKEN_BYTES], whole, True)
                blocks += [block for block in again.blocks if block not in blocks]
            unpin = self._catalog.pin(blocks)
        try:
            yield _Found(blocks, n_tokens)
        finally:
            unpin()

    def _is_stored(self, target: TierLedger, namespace: bytes, raw: bytes, whole: bool) -> bool:
        """Return whether a tier has a whole prefix."""
        with self._stored_prefix(namespace, raw, whole) as found, self._lock:
            complete = found.n_tokens * TOKEN_BYTES == len(raw)
            return complete and all(block.key in target for block in found.blocks)

    def _check_quota(self, target: TierLedger, pin: PinRecord, blocks: Sequence[Block], share: float) -> None:
        """Raise PinQuotaExceeded if the pin exceeds the bytes that pins may protect.

        Args:
            blocks: those of the pin that the tier may lack.
        """
        with self._lock:
            usage = self._catalog.pin_book.usage_with(target, pin, self._sizes(target, blocks))
        n_bytes, quota = usage.n_bytes, int(usage.quota * share)
        if n_bytes <= quota:
            return
        self._counters.add("pins_refused")
        remedy = "unpin others, pin a shorter prefix, or create the cache with a larger pin_quota or quota"
        raise PinQuotaExceeded(
            f"with the pin {pin.name!r}, pins would protect {n_bytes} bytes of the tier {target.name!r}, and they "
            f"may protect {quota}; {remedy}",
            n_bytes=n_bytes,
            quota=quota,
        )

    def _sizes(self, target: TierLedger, blocks: Iterable[Block]) -> dict[bytes, int]:
        """Return the size of each block in a tier, which may lack it. The caller holds the cache's lock."""
        sizes = {}
        for block in blocks:
            holders = [ledger for ledger, _ in self._catalog.holders(block.key) if not ledger.external]
            waiting = self._queue.get(block.key)
            if block.key in target:
                sizes[block.key] = target.size_of(block.key)
            elif waiting is not None:
                sizes[block.key] = target.roots[0].size(block, waiting.payload.nbytes)
            elif holders:
                sizes[block.key] = target.roots[0].size(block, holders[0].size_of(block.key))
        return sizes

    def _complete(self, target: TierLedger, blocks: Sequence[Block], flush: Callable[[], object]) -> bool:
        """Queue the blocks that a tier lacks. Return whether there are any."""
        missing = [block for block in blocks if block.key not in target]
        for block in missing:
            loaded = self._loader.load(block)  # also stores it in the RAM tier
            if loaded is None or target.name == "ram":
                continue
            with self._lock:
                queued = self._writer.complete(loaded.block, loaded.payload, target.name)
            if not queued:  # the queue is full
                flush()
                with self._lock:
                    self._writer.complete(loaded.block, loaded.payload, target.name)
        return bool(missing)

    def _store(self, target: TierLedger, pin: PinRecord, share: float) -> None:
        """Store the pin in each root of its tier, if the tier has all of its blocks now."""
        roots = self._roots(target.name)
        with self._tiers.locked(), ExitStack() as exclusive:
            for root in roots:
                exclusive.enter_context(root.exclusive())
                self._tiers.sync(root)
            with self._lock:
                lost = [block for block in pin.blocks if block.key not in target]
                if lost:
                    raise PrefixNotStored(
                        f"{len(lost)} of the {len(pin.blocks)} blocks of the prefix could not be stored in the "
                        f"tier {target.name!r}; check its budget"
                    )
                self._check_quota(target, pin, (), share)
                if target.name == "ram":
                    self._pin_in_ram(target, pin)
            for root in roots:
                root.put_pin(pin)
        for root in roots:
            self._tiers.read_pins(root)

    def _pin_in_ram(self, target: TierLedger, pin: PinRecord) -> None:
        book, (root,), now = self._catalog.pin_book, target.roots, time.time()
        others = [other for other in book.pins(root) if other.name != pin.name and not other.expired(now)]
        book.set(root, [*others, pin])

    # --- unpinning and listing ---------------------------------------------------------------------

    def unpin(self, name: str) -> bool:
        """Remove a pin. Return False if no pin has this name."""
        found = False
        for root in self._tiers.file_tiers(writable=True):
            with self._tiers.locked(), root.exclusive():
                found = root.remove_pin(name) or found
            self._tiers.read_pins(root)
        with self._lock:
            for root in getattr(self._catalog.ledgers().get("ram"), "roots", ()):
                pins = self._catalog.pin_book.pins(root)
                self._catalog.pin_book.set(root, [pin for pin in pins if pin.name != name])
                found = found or len(pins) != len(self._catalog.pin_book.pins(root))
        return found

    def pins(self) -> list[Pin]:
        """Return the pins that have not expired, the oldest first."""
        with self._lock:
            self._feed.poll(at_once=True)
            return self._catalog.pin_book.listed(self._catalog.ledgers().values())

    # --- warming -----------------------------------------------------------------------------------

    def warm(self, model_key: bytes) -> None:
        """Read the blocks of a model's pins into the fastest tier, in the queue's thread."""
        with self._lock:
            ledgers = self._catalog.ledgers()
            memory = ledgers.get("ram", ledgers.get("ram_file"))
            keys = [
                block.key
                for ledger in ledgers.values()
                for root in ledger.roots
                for pin in self._catalog.pin_book.admitted(ledger, root)
                if pin.model_key == model_key
                for block in pin.blocks
            ]
        if memory is not None and keys:
            budget = sum(root.budget for root in memory.roots if not root.read_only)
            first = partial(self._warm_next, memory, list(dict.fromkeys(keys))[::-1], budget)
            self._queue.defer(first, background=True)

    def _warm_next(self, memory: TierLedger, keys: list[bytes], room: int) -> None:
        """Read one block, and defer the next one, so that saves are written in between.

        Args:
            keys: the blocks that are left, the last one first.
            room: bytes that may still be read.
        """
        while keys:
            key = keys.pop()
            with self._lock:
                block, held = self._catalog.stored_block(key), key in memory
                n_bytes = next((ledger.size_of(key) for ledger, _ in self._catalog.holders(key)), 0)
            if block is None or n_bytes > room:
                continue
            room -= n_bytes
            if not held:
                self._loader.load(block)
                break
        if keys:
            self._queue.defer(partial(self._warm_next, memory, keys, room), background=True)
