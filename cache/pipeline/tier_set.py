"""What happens behind requests: tiers are opened, keep to their budgets, and others' work in them is seen.

Runs in the write-behind thread, or in an operator's own. Nothing here raises
because storage failed: it is counted and logged, the tier is opened anew, and
what was to be stored is not.
"""

from __future__ import annotations

import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from erllama._runtime.log import logger
from erllama.cache.blocks.block import Block
from erllama.cache.catalog.catalog import BlockCatalog, TierLedger
from erllama.cache.catalog.counters import Counters
from erllama.cache.pipeline.tier_writer import TierWriter
from erllama.cache.pipeline.write_queue import WriteQueue
from erllama.cache.tiers.tier import Changes, Problem, Tier, TierRow
from erllama.errors import CacheError

log = logger("erllama.cache")

_LOOK_SECONDS = 0.25  # between two looks at what other processes did
_REOPEN_SECONDS = 5.0  # between two tries to open a tier that cannot be used
_ALARM_SECONDS = 0.2  # what comes or goes does so in bursts; and a file's row follows it by a moment
_CLOSE_SECONDS = 120.0  # a hung disk must not hang the interpreter's end
_TOUCH_SECONDS = 2.0  # uses are noted in memory, and told to the tiers that often at most


class Upkeep:
    """Keeps the tiers of one cache.

    Args:
        lock: the cache's; guards `residents`.
        tiers: from fast to slow.
        queue_bytes: most bytes of saves that may wait.
    """

    def __init__(
        self,
        lock: threading.RLock,
        residents: BlockCatalog,
        counters: Counters,
        tiers: Sequence[Tier],
        queue_bytes: int,
    ) -> None:
        self._lock, self.residents, self._counters = lock, residents, counters
        self.tiers = list(tiers)
        self.errors: dict[Tier, CacheError] = {}  # why a tier cannot be used
        self.persister = TierWriter(self, lock, residents, counters)
        self.writer = WriteQueue(self.persister.persist, queue_bytes)
        self.tending = threading.RLock()  # one thread at a time calls a tier, to read apart
        self._closing = threading.RLock()  # one thread at a time closes
        self._closed = False
        self._touched: dict[bytes, int] = {}
        self._look_again = 0.0  # by time.monotonic()
        self._reopen_after: dict[Tier, float] = {}
        self._out_of_step: set[Tier] = set()  # a fault left memory and tier apart
        self._doomed: dict[Tier, dict[bytes, tuple[Block, bool, int]]] = {}  # to go; whether damaged; bytes
        for tier in self.behind:
            self.open(tier)

    @property
    def behind(self) -> list[Tier]:
        """The tiers slower than RAM."""
        return [tier for tier in self.tiers if tier.write_mode == "behind"]

    @property
    def tiers_behind(self) -> tuple[str, ...]:
        """The names of the tiers slower than RAM that take saves."""
        return tuple(dict.fromkeys(tier.name for tier in self.behind if not tier.read_only))

    # --- tiers that open, fail, and open again ----------------------------------------------------

    def open(self, tier: Tier) -> bool:
        """Open a tier and take in what it holds; False, with the reason in `errors`, when that cannot be done."""
        if self._closed:
            return False
        self._reopen_after[tier] = time.monotonic() + _REOPEN_SECONDS
        self._out_of_step.add(tier)  # until all of it is taken in
        try:
            tier.open()
            rows = tier.rows()
            tier.watch(_alarm(weakref.ref(self), tier))
        except Exception as error:
            tier_error = (
                error
                if isinstance(error, CacheError)
                else CacheError(f"the cache directory {tier.place} cannot be used: {error}; give a writable one")
            )
            if str(tier_error) != str(self.errors.get(tier)):
                log.warning("%s. Going on without it", tier_error)
            self.errors[tier] = tier_error
            self._counters.add("disk_errors")
            return False
        self.errors.pop(tier, None)
        with self._lock:
            self._take_in(tier, Changes(list(rows), [], complete=True))
        self._out_of_step.discard(tier)
        self._fit(tier)
        return True

    def usable(self, tier: Tier) -> bool:
        """Whether a tier can be written to; tries to open one that was lost, now and then."""
        if self._closed:
            return False
        if tier not in self.errors and tier.usable:
            return True
        if tier not in self.errors:  # lost just now: what it held is gone, as far as anybody knows
            with self._lock:
                self._take_in(tier, Changes([], [], complete=True))
            return self.open(tier)
        return time.monotonic() >= self._reopen_after[tier] and self.open(tier)

    def ready(self, tier: Tier) -> bool:
        """Whether a tier can be read from; never waits."""
        return tier not in self.errors and tier.usable

    @contextmanager
    def guarding(self, action: str, tier: Tier, *, changes: bool = True) -> Iterator[None]:
        """Count and log a storage fault instead of letting it reach a request.

        Whatever else is raised, as KeyboardInterrupt, leaves the tier marked as out of step, too.

        Args:
            changes: the fault may leave memory and tier apart.
        """
        try:
            yield
        except (OSError, sqlite3.Error, CacheError, MemoryError) as error:
            if changes:
                self._out_of_step.add(tier)
            self._counters.add("disk_errors")
            log.warning("%s failed: %s", action, error)
        except (Exception, SystemExit):
            self._out_of_step.add(tier)
            self._counters.add("faults")
            log.exception("%s in tier %s failed unexpectedly", action, tier.place)
        except BaseException:  # nobody knows how far the change went
            self._out_of_step.add(tier)
            raise

    # --- evicting and removing ---------------------------------------------------------------------

    def forget(self, tier: Tier, victims: list[tuple[bytes, int]]) -> None:
        """Have a tier remove what was chosen to go."""
        if victims:
            tier.remove([key for key, _ in victims])

    def _fit(self, tier: Tier) -> None:
        """Bring a tier down to its budget, which may be smaller than the last time."""
        if tier.read_only:
            return
        with self.tending, self.guarding("evicting", tier), tier.exclusive():
            with self._lock:
                victims = self.residents.choose_victims(tier, tier.budget)
            self.forget(tier, victims)

    def evict(self, tier: Tier, n_bytes: int) -> int:
        """Free at least `n_bytes` of a tier, if it has them; returns the bytes freed."""
        if tier.read_only or (tier.write_mode == "behind" and not self.ready(tier)):
            return 0
        victims: list[tuple[bytes, int]] = []
        if tier.write_mode != "behind":  # written under the lock, so removed under it
            with self._lock:
                victims = self.residents.choose_victims(tier, self._shelf(tier).n_bytes(tier) - n_bytes)
                try:
                    self.forget(tier, victims)
                except BaseException:
                    if tier.write_mode == "through":
                        self._take_in(tier, Changes(list(tier.rows()), [], complete=True))
                    raise
            return sum(size for _, size in victims)
        with self.tending:
            with self.guarding("evicting", tier), tier.exclusive():
                self.catch_up(tier)
                with self._lock:
                    victims = self.residents.choose_victims(tier, self._shelf(tier).n_bytes(tier) - n_bytes)
                self.forget(tier, victims)
            return self._freed(tier, victims)

    def _freed(self, tier: Tier, victims: Sequence[tuple[bytes, int]]) -> int:
        """The bytes of blocks that were to be removed and are gone; those that a tier failed to remove are not."""
        if tier in self._out_of_step:
            with self.guarding("reading what is left", tier):
                self.catch_up(tier)
            if tier in self._out_of_step:
                return 0
        with self._lock:
            shelf = self._shelf(tier)
            return sum(size for key, size in victims if shelf.root_of(key) is not tier)

    def remove(self, tier: Tier, block: Block, *, damaged: bool = False) -> None:
        """Have a block taken out of a tier, later: a request waits for nothing."""
        with self._lock:
            shelf = self._shelf(tier)
            if shelf.root_of(block.key) is not tier:
                return
            # Its bytes count until it is really gone.
            self._doomed.setdefault(tier, {})[block.key] = (block, damaged, shelf.lru.size_of(block.key))
            self.residents.drop(tier.name, block.key)
        self.writer.defer(self._remove_all_doomed)

    def _remove_all_doomed(self) -> None:
        for tier in list(self._doomed):
            if self.ready(tier):
                with self.tending, self.guarding("removing blocks", tier), tier.exclusive():
                    self.remove_doomed(tier)

    def doomed_bytes(self, tier: Tier) -> int:
        """Bytes of what is to be removed and still there; under the lock."""
        return sum(size for _, _, size in self._doomed.get(tier, {}).values())

    def remove_doomed(self, tier: Tier) -> None:
        """Remove what is to be removed, before its room is given to others; within `exclusive`."""
        with self._lock:
            doomed = self._doomed.pop(tier, {})
        try:
            for block, damaged, _ in doomed.values():
                if damaged:
                    tier.set_aside(block)
                else:
                    tier.remove([block.key])
        except BaseException:
            self._out_of_step.add(tier)  # what was not removed is listed, and counts, again
            raise

    # --- seeing what others did ------------------------------------------------------------------

    def look_around(self, *, at_once: bool = False) -> None:
        """Take in what other processes did since the last look; under the lock, and without waiting."""
        now = time.monotonic()
        if now < self._look_again and not at_once:
            return
        self._look_again = now + _LOOK_SECONDS
        for tier in self.behind:
            if not self.ready(tier):
                if tier not in self.errors or now >= self._reopen_after[tier]:
                    self.writer.defer(self._reopen)
            elif tier in self._out_of_step:
                self.writer.defer(self._catch_up_all)
            else:
                with self.guarding("reading the index", tier):
                    self._look(tier)

    def _look(self, tier: Tier) -> None:
        """Take in what is new in a tier."""
        with self._lock:
            if (changes := tier.changes()) is not None:
                self._take_in(tier, changes)

    def catch_up(self, tier: Tier) -> None:
        """Bring the picture in memory in line with a tier, all of it after a fault; not for requests."""
        if tier not in self._out_of_step:
            self._look(tier)
            return
        # Read without the lock. Nobody takes in changes meanwhile: the tier is out of step until this is done.
        rows = list(tier.rows())
        with self._lock:
            self._take_in(tier, Changes(rows, [], complete=True))
            self._out_of_step.discard(tier)

    def _catch_up_all(self) -> None:
        for tier in list(self._out_of_step):
            if self.ready(tier):
                with self.tending, self.guarding("reading the index", tier):
                    self.catch_up(tier)

    def in_flight(self, key: bytes) -> bool:
        """Whether another process is writing a block now."""
        for tier in self.behind:
            if self.ready(tier):
                with self.guarding("reading the index", tier):
                    if tier.in_flight(key):
                        return True
        return False

    def _reopen(self) -> None:
        with self.tending:
            for tier in self.behind:
                self.usable(tier)

    def _take_in(self, tier: Tier, changes: Changes) -> None:
        residents, shelf = self.residents, self.residents.shelves[tier.name]
        there = {row.block.key for row in changes.stored}
        gone = [k for k in shelf.keys(tier) if k not in there] if changes.complete else changes.removed
        for key in gone:
            if shelf.root_of(key) is tier:
                residents.drop(tier.name, key)
        for row in changes.stored:
            self._take_in_row(shelf, tier, row)

    def _take_in_row(self, shelf: TierLedger, tier: Tier, row: TierRow) -> None:
        holder, key = shelf.root_of(row.block.key), row.block.key
        used = min(row.last_used, time.time_ns())  # a clock that was ahead must not keep a block for ever
        if holder is None:
            self.residents.put(tier, row.block, row.n_bytes, used)
        elif holder is not tier and holder.read_only and not tier.read_only:
            self.residents.put(tier, row.block, row.n_bytes, used)  # saved after it was read there
        elif holder is not tier:
            self.writer.defer(lambda: self._remove_double(shelf, tier, row.block))
        else:
            if shelf.lru.size_of(key) != row.n_bytes:
                self.residents.put(tier, row.block, row.n_bytes, used)
            shelf.lru.touch(key, used)
            self.residents.learn(tier.name, row.block)

    def _remove_double(self, shelf: TierLedger, tier: Tier, block: Block) -> None:
        """One of a tier's roots is enough for a block."""
        if tier.read_only:
            return
        with self._lock:
            double = shelf.root_of(block.key) not in (None, tier)
        if double:
            with self.tending, self.guarding("removing a double", tier):
                tier.remove([block.key])

    def examine(self, tier: Tier) -> None:
        """Follow up an alarm that something changed behind our back."""
        with self.tending:
            if self.ready(tier):
                self._examine(tier)

    def _examine(self, tier: Tier) -> None:
        with self.guarding("looking at files", tier):
            if tier.examine():
                self.alarm(tier)
        # What was put there by hand counts, too.
        with self.guarding("reading the index", tier):
            self.catch_up(tier)
            with self._lock:
                over = self.residents.shelves[tier.name].n_bytes(tier) > tier.budget
            if over:
                self._fit(tier)

    def alarm(self, tier: Tier) -> None:
        self.writer.defer(_Examination(self, tier), _ALARM_SECONDS, patient=True)

    def used(self, block: Block, now: int) -> None:
        """Note a use; under the lock."""
        self.residents.touch(block.key, now)
        if not self.behind:
            return
        if not self._touched:
            self.writer.defer(self.tell_uses, _TOUCH_SECONDS)
        self._touched[block.key] = now

    def tell_uses(self) -> None:
        """Tell the tiers of the uses noted since."""
        with self._lock:
            touched, self._touched = self._touched, {}
            told = [
                (tier, uses)
                for tier in self.behind
                if (uses := [(k, at) for k, at in touched.items() if self._shelf(tier).root_of(k) is tier])
            ]
        for tier, uses in told:
            if self.ready(tier):
                with self.tending, self.guarding("noting uses", tier):
                    tier.touch(uses)

    def _shelf(self, tier: Tier) -> TierLedger:
        return self.residents.shelves[tier.name]

    # --- an operator's ---------------------------------------------------------------------------

    def mend(self) -> int:
        """Bring tiers, budgets and memory in line; drop what nobody can reach. Returns the bytes freed."""
        freed = 0
        self.tell_uses()
        for tier in self.behind:
            with self.tending:
                if self.usable(tier):
                    with self.guarding("mending", tier):
                        tier.mend()
                        self.catch_up(tier)
                        freed += 0 if tier.read_only else self._drop_unreachable(tier)
                    self._fit(tier)
        return freed

    def _drop_unreachable(self, tier: Tier) -> int:
        """Blocks whose parent this tier lacks can be found by nobody who starts with it alone."""
        shelf = self._shelf(tier)
        victims: list[tuple[bytes, int]] = []
        with tier.exclusive():
            self.catch_up(tier)
            with self._lock:
                held = {key: self.residents.tree.get(key) for key in shelf.keys(tier)}
                while True:
                    lost = [
                        key
                        for key, entry in held.items()
                        if entry is not None
                        and entry.block.parent != entry.block.namespace
                        and entry.block.parent not in shelf
                        and entry.block.parent not in self.writer
                        and not self.residents.pinned(key)
                    ]
                    for key in lost:
                        victims.append((key, shelf.lru.size_of(key)))
                        self.residents.drop(tier.name, key)
                        del held[key]
                    if not lost:
                        break
            self.forget(tier, victims)
        return sum(size for _, size in victims)

    def verify(self) -> list[Problem]:
        problems: list[Problem] = []
        for tier in self.behind:
            if self.ready(tier):
                try:
                    problems.extend(tier.verify())
                except (OSError, sqlite3.Error, CacheError) as error:
                    problems.append(Problem(tier.name, tier.place, str(error)))
            else:
                problems.append(Problem(tier.name, tier.place, str(self.errors.get(tier, "it is not open"))))
        return problems

    def contradictions(self) -> Iterator[str]:
        """Where memory, the tiers' own lists and what is really there do not agree."""
        with self._lock:
            yield from list(self.residents.contradictions())
        for tier in self.tiers:
            try:
                if tier.write_mode == "through":
                    with self._lock:
                        yield from list(self._differences(tier))
                elif tier.write_mode == "behind" and self.ready(tier):
                    with self.tending, tier.exclusive():
                        self.catch_up(tier)
                        with self._lock:
                            found = list(self._differences(tier))
                        found += [f"{problem.place}: {problem.what}" for problem in tier.check()]
                    yield from found
            except (OSError, sqlite3.Error, CacheError) as error:
                yield f"{tier.place} cannot be compared: {error}"

    def _differences(self, tier: Tier) -> Iterator[str]:
        """Between what memory says of a tier and what it lists; under the lock."""
        shelf, going = self._shelf(tier), self._doomed.get(tier, {})
        held = {key: shelf.lru.size_of(key) for key in shelf.keys(tier)}
        for row in tier.rows():
            key = row.block.key
            n_bytes = held.pop(key, None)
            if n_bytes is None:
                # Another root may have it, too; what cannot be written to has no budget.
                if key not in going and key not in shelf and not tier.read_only:
                    yield f"{tier.where(row.block)} takes {row.n_bytes} bytes that are not counted"
            elif n_bytes != row.n_bytes:
                yield f"{tier.where(row.block)} takes {row.n_bytes} bytes and counts for {n_bytes}"
        for key in held:
            yield f"{tier.place} does not have block {key.hex()}, which counts for it"

    def close(self) -> None:
        """Write what waits, unless that takes too long, and let go of the tiers. Idempotent."""
        # A caller that was interrupted left this to a thread of its own: who calls again waits for that.
        if not self._closing.acquire(timeout=2 * _CLOSE_SECONDS):
            return
        try:
            if not self._closed:
                self._close()
        finally:
            self._closing.release()

    def _close(self) -> None:
        if not self.writer.flush(_CLOSE_SECONDS):
            log.warning("%d bytes could not be written in time; lost", self.writer.n_bytes)
        self.tell_uses()
        self.writer.abandon()
        self._closed = True  # nothing is opened any more
        if not self.tending.acquire(timeout=_CLOSE_SECONDS):
            log.warning("a tier hangs; left as it is")
            return
        try:
            for tier in self.tiers:
                with suppress(Exception):
                    tier.close()
        finally:
            self.tending.release()


class _Examination:
    """A chore that is equal to another of the same tier, so that a burst of alarms is one."""

    def __init__(self, upkeep: Upkeep, tier: Tier) -> None:
        self._upkeep, self._tier = upkeep, tier

    def __call__(self) -> None:
        self._upkeep.examine(self._tier)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Examination) and other._tier is self._tier

    def __hash__(self) -> int:
        return id(self._tier)


def _alarm(upkeep: weakref.ref[Upkeep], tier: Tier) -> Callable[[], None]:
    """Raise an alarm without keeping anything alive."""
    watched = weakref.ref(tier)

    def alarm() -> None:
        keeper, found = upkeep(), watched()
        if keeper is not None and found is not None:
            keeper.alarm(found)

    return alarm
