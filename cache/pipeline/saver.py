"""Puts blocks into the tiers: into RAM at once, into the rest behind the caller; and tells who waits for one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from erllama.cache.blocks.block import Block
from erllama.cache.catalog.catalog import PENDING, BlockCatalog
from erllama.cache.catalog.counters import Counters
from erllama.cache.pipeline.tier_set import Upkeep
from erllama.cache.uninterrupted import uninterrupted
from erllama.errors import OptionError

_WAIT_STEP_SECONDS = 0.05  # between two looks for a save of another process


class _Expectation:
    """An announcement of a save, until it has ended."""

    ended = False


class Saver:
    """Saves for one cache. Runs in the threads of those who ask; `lock` guards `residents`."""

    def __init__(
        self, lock: threading.RLock, residents: BlockCatalog, upkeep: Upkeep, counters: Counters, block_size: int
    ) -> None:
        self._lock, self._residents, self._upkeep, self._counters = lock, residents, upkeep, counters
        self._block_size = block_size
        self._saved = threading.Condition(lock)  # told of every save
        self._expected: dict[bytes, list[_Expectation]] = {}  # saves that were announced

    def save(self, block: Block, payload: object, replace: bool, trimmable: bool) -> bool:
        content = _bytes_of(payload)
        if block.n_tokens > self._block_size:
            raise OptionError(f"a block of {block.n_tokens} tokens; block_size is {self._block_size}")
        with self._lock:
            try:
                return self._save(block, content, replace, trimmable)
            finally:
                self._saved.notify_all()

    def _save(self, block: Block, payload: memoryview, replace: bool, trimmable: bool) -> bool:
        residents, upkeep = self._residents, self._upkeep
        to = upkeep.tiers_behind if replace else self._lacking(block.key)
        if not replace and not self.wants(block.key):
            self._counters.add("duplicates_dropped")
            return False
        replace = replace or any(block.key in residents.shelves[name].unreadable for name in to)
        if block.parent != block.namespace and not self._is_stored(block.parent):
            self._counters.add("saves_dropped")  # what it follows was evicted: nobody could find it
            return False
        full = block.n_tokens >= self._block_size
        overtaken = tuple(tail.key for tail in residents.tree.overtaken_by(block)) if trimmable or full else ()
        in_ram = residents.keep_in_ram(block, payload)
        queued = upkeep.persister.offer(block, payload, to, replace, overtaken, full)
        if queued and not in_ram:
            residents.drop_from_ram(block.key)  # an older version, if any
        if not queued and (to or not in_ram):
            self._counters.add("saves_dropped")
        if not in_ram and not queued:
            return False
        self._counters.add(f"saves_{block.reason.name.lower()}")
        for key in overtaken:
            if not residents.pinned(key):
                self._overtake(key)
        return True

    def wants(self, key: bytes) -> bool:
        """Whether saving this block would store it anywhere where it is not yet; under the lock."""
        if self._upkeep.tiers_behind:
            return bool(self._lacking(key))
        return "ram" in self._residents.shelves and key not in self._residents.shelves["ram"]

    def _lacking(self, key: bytes) -> tuple[str, ...]:
        """The slower tiers that neither have a block, as far as that can be read, nor are about to get it."""
        pending = self._upkeep.writer.get(key)
        coming = pending.to if pending is not None else ()
        return tuple(
            name
            for name in self._upkeep.tiers_behind
            if name not in coming
            and (key not in (shelf := self._residents.shelves[name]) or key in shelf.unreadable)
        )

    def _overtake(self, key: bytes) -> None:
        """Drop a tail whose successor is stored; from slower tiers only once that is there, too."""
        self._residents.drop_from_ram(key)
        if self._upkeep.writer.cancel(key):
            self._residents.drop(PENDING, key)
        if self._residents.tree.get(key) is None:
            self._counters.add("tails_superseded")

    def _is_stored(self, key: bytes) -> bool:
        """Whether a block is stored or waits, or another process writes it now or has just written it."""
        residents = self._residents
        if residents.tree.get(key) is None:
            if self._upkeep.in_flight(key):
                return True
            self._upkeep.look_around(at_once=True)
        entry = residents.tree.get(key)
        return entry is not None and residents.kept(entry)

    @contextmanager
    def expecting(self, key: bytes) -> Iterator[None]:
        expectation = _Expectation()
        try:
            self._announce(key, expectation)
            yield
        finally:
            # At once: an interrupted announcement completes behind its caller, perhaps after this.
            expectation.ended = True
            self._withdraw(key, expectation)

    @uninterrupted
    def _announce(self, key: bytes, expectation: _Expectation) -> None:
        with self._lock:
            if not expectation.ended:
                self._expected.setdefault(key, []).append(expectation)

    @uninterrupted
    def _withdraw(self, key: bytes, expectation: _Expectation) -> None:
        with self._lock:
            left = [other for other in self._expected.pop(key, ()) if other is not expectation]
            if left:
                self._expected[key] = left
            self._saved.notify_all()

    def awaits(self, key: bytes) -> bool:
        with self._lock:
            if self._residents.tree.get(key) is not None:
                return False
            return key in self._expected or self._upkeep.in_flight(key)

    def wait_for(self, key: bytes, seconds: float) -> None:
        """Wait until a block is stored, as long as somebody is saving it."""
        deadline = time.monotonic() + seconds
        with self._saved:
            while self._residents.tree.get(key) is None and (left := deadline - time.monotonic()) > 0:
                if key in self._expected:
                    self._saved.wait(left)
                elif self._upkeep.in_flight(key):
                    self._saved.wait(min(left, _WAIT_STEP_SECONDS))
                    self._upkeep.look_around(at_once=True)
                else:
                    # It may have been stored since the last look.
                    self._upkeep.look_around(at_once=True)
                    return


def _bytes_of(payload: object) -> memoryview:
    try:
        content = memoryview(payload)  # type: ignore[arg-type]
    except TypeError:
        raise OptionError(f"a payload of type {type(payload).__name__}; give bytes, or an array of uint8") from None
    if not content.c_contiguous or content.itemsize != 1 or not content.nbytes:
        raise OptionError(
            f"a payload of {content.nbytes} bytes, items of {content.itemsize}; give at least one byte, contiguous"
        )
    return content.cast("B") if content.format != "B" or content.ndim != 1 else content
