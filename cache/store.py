"""The cache: finds, loads and saves blocks across its tiers, within their budgets.

Callers are the engine's model threads; any number of models and threads may
share one cache. Lookups touch memory, and the index where another process has
written to it. Loads may read a file. Saves land in RAM and are written behind
to the slower tiers. Nothing here raises at a request because storage failed:
it is a miss or an unsaved block, counted and logged.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Never

import numpy as np
from numpy.typing import NDArray

from erllama._runtime.log import logger
from erllama._runtime.reentry import reentered
from erllama.cache.blocks.block import Block
from erllama.cache.blocks.keys import TOKEN_BYTES, token_bytes
from erllama.cache.blocks.match import Loaded, Match, Row, TierStatus
from erllama.cache.catalog.catalog import BlockCatalog
from erllama.cache.catalog.counters import TIERS, Counters
from erllama.cache.options import OPTIONS, Directories, directories, file_tiers, known_tiers
from erllama.cache.pipeline.loader import Loader
from erllama.cache.pipeline.saver import Saver
from erllama.cache.pipeline.text_memory import TextMemory, lasting_tiers, writable_tiers
from erllama.cache.pipeline.tier_set import Upkeep
from erllama.cache.pressure.pressure import Pressure, PressureWatch
from erllama.cache.sizes import parse_bytes
from erllama.cache.tiers.file_tier import FileTier
from erllama.cache.tiers.tier import Problem, RamTier, Tier
from erllama.cache.uninterrupted import run_behind, uninterrupted
from erllama.errors import (
    CacheError,
    IntegrityError,
    OptionError,
    boolean,
    integer,
    reject_unknown,
)

log = logger("erllama.cache")

_open_caches: weakref.WeakSet[Cache] = weakref.WeakSet()
# Of caches that were dropped, too: what waits keeps its upkeep alive.
_open_upkeeps: weakref.WeakSet[Upkeep] = weakref.WeakSet()


class Cache:
    """A store of KV blocks: in memory and, where directories are given, in files.

    Safe to share between models and threads, and to call from a signal handler. A
    handler's exception, such as KeyboardInterrupt, ends a call without leaving it
    half done: the call completes behind the caller. Close it, use it in a `with`, or
    leave it to the interpreter's exit: what waits to be written is written.

    Args:
        ram: budget of the RAM tier, as "2GiB" or in bytes; 0 or None turns it off.
        ram_file: directory on a tmpfs, for blocks that outlive this process and not the machine's
            uptime; True for one of this user's in /dev/shm; None for none. Several: as for `disk`.
        ram_file_quota: budget of each such directory.
        disk: directory of the disk tier, made if missing, private to its owner;
            True for the user's cache directory; None for no disk. Several
            directories are one tier: a sequence of them, or a mapping to their quotas.
        disk_quota: budget of each such directory.
        read_only: read the directories and never write to them. A directory that holds a cache and cannot
            be written, as one on a read-only mount, is read in any case.
        tiers: tiers of your own, slower than all these, from fast to slow.
        block_size: tokens of one block; a power of two from 16 to 4096.
        write_queue: most bytes that may wait for the slower tiers; saves beyond are dropped and counted.
        pressure: evicts when memory runs short: a `Pressure`, a mapping of its options, or the name of a source.
        watch: notice files that others put into, or take out of, the directories.

    Raises:
        OptionError: an option is unknown, ill-typed or out of range.

    A directory that cannot be used does not raise: the cache goes on without
    it, logs the reason, keeps it in `disk_error`, and tries again now and then.
    """

    def __init__(
        self,
        *,
        ram: str | int | None = "2GiB",
        ram_file: Directories = None,
        ram_file_quota: str | int = "4GiB",
        disk: Directories = None,
        disk_quota: str | int = "50GiB",
        read_only: bool = False,
        tiers: Sequence[Tier] = (),
        block_size: int = 256,
        write_queue: str | int = "512MiB",
        pressure: Pressure | Mapping[str, object] | str | None = None,
        watch: bool = True,
        **unknown: Never,
    ) -> None:
        reject_unknown(unknown, OPTIONS, "Cache")
        self.ram_budget = parse_bytes("ram", 0 if ram is None else ram)
        self.block_size = integer("block_size", block_size, 16, 4096)
        if self.block_size & (self.block_size - 1):
            raise OptionError(f"block_size={block_size}; it must be a power of two from 16 to 4096")
        queue_bytes = parse_bytes("write_queue", write_queue)
        roots = directories("ram_file", ram_file, ram_file_quota) + directories("disk", disk, disk_quota)
        found: list[Tier] = [RamTier(self.ram_budget)] if self.ram_budget else []
        found += file_tiers(roots, boolean("watch", watch), boolean("read_only", read_only))
        found += known_tiers(tiers)
        # Made before anything is opened, since it may find that it cannot be had.
        self._pressure = self._pressure_watch(Pressure.of(pressure))

        self._lock = threading.RLock()
        self._counters = Counters()
        self._closing = False
        self._opening = threading.Lock()
        try:
            self._open(found, queue_bytes)
        except BaseException:
            # The caller was interrupted and never gets this cache: it must not keep the directories.
            with suppress(RuntimeError):
                run_behind(self._give_up)
            raise

    @uninterrupted
    def _open(self, tiers: Sequence[Tier], queue_bytes: int) -> None:
        with self._opening:
            if self._closing:
                return
            self._assemble(tiers, queue_bytes)
            if self._pressure is not None:
                self._pressure.start()
            _open_caches.add(self)

    def _give_up(self) -> None:
        with self._opening:
            self._closing = True
            if hasattr(self, "_upkeep"):
                self.close()

    def _assemble(self, tiers: Sequence[Tier], queue_bytes: int) -> None:
        self._residents = BlockCatalog(self.block_size, self._counters, tiers)
        self._upkeep = Upkeep(self._lock, self._residents, self._counters, tiers, queue_bytes)
        if tiers:
            _open_upkeeps.add(self._upkeep)
        self._texts = TextMemory(self._upkeep)
        self._loader = Loader(self._lock, self._residents, self._upkeep, self._counters)
        self._saver = Saver(self._lock, self._residents, self._upkeep, self._counters, self.block_size)

    def _pressure_watch(self, wanted: Pressure | None) -> PressureWatch | None:
        if wanted is None:
            return None
        owner = weakref.ref(self)

        def living() -> Cache:
            cache = owner()
            if cache is None or cache.closed:
                raise ReferenceError("the cache is gone")
            return cache

        def evict(n_bytes: int, tiers: tuple[str, ...]) -> int:
            cache = living()
            cache._counters.add("pressure_evictions")
            cache._upkeep.writer.hurry()  # what waits to be written holds memory, too
            return cache.evict_bytes(n_bytes, tiers)

        return PressureWatch(wanted, evict, lambda _: living().count_fault())

    # --- what the engine calls ----------------------------------------------------------

    @uninterrupted
    def lookup(
        self,
        namespace: bytes,
        tokens: Sequence[int] | NDArray[np.integer],
        *,
        whole: bool = False,
        loadable: bool = False,
        parent_key: bytes | None = None,
        wait_ms: int = 0,
        count: bool = True,
    ) -> Match:
        """Find the longest stored prefix of `tokens`.

        Args:
            namespace: the root key, from `namespace_key`.
            tokens: ids, shape (n,).
            whole: only blocks that match to their last token; for memory that cannot be cut.
            loadable: only blocks that `load` can give: none that are only in a context's cells.
            parent_key: the key of a context that `tokens` go on from; where it is still being
                saved, that is waited for.
            wait_ms: the longest to wait for it, in milliseconds.
            count: count a hit or a miss; False for a caller that tells with `count_request` what came of it.

        Returns:
            a Match whose blocks are pinned until its `release()`; use it in a `with`.
        """
        raw = token_bytes(tokens)
        if parent_key is not None and wait_ms > 0:
            self._saver.wait_for(parent_key, wait_ms / 1000)
        with self._counters.timing("lookup"), self._lock:
            self._upkeep.look_around()
            blocks, n_tokens = self._residents.walk(namespace, raw, whole, loadable)
            unpin = self._residents.pin(blocks)
            now = time.time_ns()
            for block in blocks:
                self._upkeep.used(block, now)
            resumed = parent_key is not None and any(block.key == parent_key for block in blocks)
        if count:
            kind = "cold" if not n_tokens else "exact" if n_tokens * TOKEN_BYTES == len(raw) else "partial"
            self.count_request(kind, n_tokens, resumed=resumed)
        return Match(tuple(blocks), n_tokens, unpin)

    def load(self, block: Block) -> Loaded | None:
        """The payload of a block, from the fastest place that has it.

        Returns:
            what was found, with the block as it was saved with that payload;
            None when no place can give it undamaged: it is then forgotten.
        """
        return self._loader.load(block)

    def load_each(self, blocks: Sequence[Block]) -> Iterator[Loaded | None]:
        """As `load`, for each of several blocks in turn; while one is used, the next is read."""
        return self._loader.load_each(blocks)

    @uninterrupted
    def save(
        self, block: Block, payload: NDArray[np.uint8] | bytes, *, replace: bool = False, trimmable: bool = True
    ) -> bool:
        """Store a block: in RAM at once, in slower tiers behind the caller's back.

        Args:
            block: its parent is stored already, or is the namespace.
            payload: bytes, contiguous, at least one; not changed by the caller afterwards.
            replace: store it even where a block of this key is stored.
            trimmable: whether its payload can be cut after restoring. Then it takes
                the place of shorter tails; otherwise only a full block does.

        Returns:
            False when it is stored already, or nowhere has room.

        Raises:
            OptionError: the payload is not bytes, or empty, or the block is longer than `block_size`.
        """
        return not self._closing and self._saver.save(block, payload, replace, trimmable)

    @uninterrupted
    def wants(self, key: bytes) -> bool:
        """Whether saving the block of this key would store it anywhere where it is not yet."""
        with self._lock:
            return not self._closing and self._saver.wants(key)

    def contains(self, key: bytes) -> bool:
        """Whether a block is stored anywhere."""
        return self.stored(key) is not None

    @uninterrupted
    def stored(self, key: bytes) -> Block | None:
        """The stored block of this key, if any; one that is only in a context is not stored."""
        with self._lock:
            entry = self._residents.tree.get(key)
            return entry.block if entry and self._residents.kept(entry) else None

    @uninterrupted
    def context(self, key: bytes) -> NDArray[np.uint32] | None:
        """The tokens of the stored context that ends with this block, shape (n,); None when it is not stored."""
        with self._lock:
            blocks = self._residents.path(key)
        return np.frombuffer(b"".join(block.tokens for block in blocks), "<u4") if blocks else None

    @contextmanager
    def packing(self) -> Iterator[None]:
        """Time spent in a `with` counts as spent packing."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent("pack", time.perf_counter() - began)

    @uninterrupted
    def _spent(self, name: str, seconds: float) -> None:
        self._counters.add_seconds(name, seconds)

    @uninterrupted
    def count_request(self, kind: str, tokens_reused: int, *, resumed: bool = False) -> None:
        """Count how a request was served: "exact", "partial" or "cold"; `resumed`: from its parent's key."""
        name = "misses" if kind == "cold" else "hits_resume" if resumed else _HIT_COUNTS[kind]
        self._counters.add(name)
        self._counters.add("tokens_reused", tokens_reused)

    @uninterrupted
    def count_fault(self) -> None:
        """Count that the cache could not serve a request for a reason that nobody foresaw."""
        self._counters.add("faults")

    @uninterrupted
    def reject(self, block: Block, error: Exception) -> None:
        """Forget a block whose payload the backend refused."""
        self._loader.reject(block, error)

    def expecting(self, key: bytes) -> AbstractContextManager[None]:
        """Announce the save of a block within a `with`: lookups that go on from it wait for that."""
        return self._saver.expecting(key)

    @uninterrupted
    def awaits(self, key: bytes) -> bool:
        """Whether a block is not stored yet, but being saved."""
        return self._saver.awaits(key)

    # --- live tiers -------------------------------------------------------------------------

    @uninterrupted
    def attach(self, tier: Tier) -> None:
        """Add a tier that its owner feeds, as the fastest: KV that is still in a context.

        Its owner tells with `hold` and `let_go` what it has. Lookups find those
        blocks; `load` does not read from it; `evict_bytes` calls its `remove`.
        """
        if tier.write_mode != "external":
            raise OptionError(
                f"tier {tier.name!r} has write_mode={tier.write_mode!r}; "
                "attach takes tiers with write_mode='external'"
            )
        with self._lock:
            self._residents.add_root(tier, fastest=True)
            self._upkeep.tiers.insert(0, tier)

    @uninterrupted
    def detach(self, tier: Tier) -> None:
        """Forget an attached tier and what it holds."""
        with self._lock:
            shelf = self._residents.shelves.get(tier.name)
            if shelf is None or tier not in shelf.roots:
                return
            for key in shelf.keys(tier):
                self._residents.drop(tier.name, key)
            self._upkeep.tiers.remove(tier)
            shelf.remove_root(tier)

    @uninterrupted
    def hold(self, tier: Tier, block: Block, n_bytes: int) -> bool:
        """Note that an attached tier has a block; False when its budget has no room, after evicting others."""
        with self._lock:
            fits = self._residents.make_room(tier, block, n_bytes)
            if fits:
                self._residents.put(tier, block, n_bytes, time.time_ns())
            return fits

    @uninterrupted
    def let_go(self, tier: Tier, keys: Sequence[bytes]) -> None:
        """Note that an attached tier no longer has these blocks."""
        with self._lock:
            for key in keys:
                if self._residents.shelves[tier.name].root_of(key) is tier:
                    self._residents.drop(tier.name, key)

    # --- fingerprints ---------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it was closed, or belongs to the process that forked this one; it then stores nothing."""
        return self._closing

    @property
    def persistent(self) -> bool:
        """Whether blocks that are saved survive this process."""
        return any(
            tier.persistent and not tier.read_only and self._upkeep.ready(tier) for tier in self._upkeep.tiers
        )

    @property
    def disk_error(self) -> CacheError | None:
        """Why a directory, or a tier of your own, cannot be used; None when all can."""
        return next(iter(self._upkeep.errors.values()), None)

    @uninterrupted
    def fingerprint(self, identity: str) -> str | None:
        """The digest remembered for a file's identity."""
        for tier in lasting_tiers(self._upkeep):
            with self._upkeep.guarding("reading a fingerprint", tier):
                digest = tier.fingerprint(identity)
                if digest is not None:
                    return digest
        return None

    @uninterrupted
    def remember_fingerprint(self, identity: str, sha256: str) -> None:
        """Remember a file's digest where blocks survive the process."""
        for tier in writable_tiers(self._upkeep):
            with self._upkeep.guarding("noting a fingerprint", tier):
                tier.remember_fingerprint(identity, sha256)

    # --- texts -------------------------------------------------------------------------------

    @uninterrupted
    def remember_text(self, namespace: bytes, text: bytes, tokens: NDArray[np.int32]) -> None:
        """Remember which tokens, shape (n,), a text was computed as, where blocks survive the process, too.

        Only digests of the text are kept.
        """
        if not self._closing:
            self._texts.remember(namespace, text, tokens)

    @uninterrupted
    def longest_text(self, namespace: bytes, text: bytes) -> tuple[int, NDArray[np.int32]] | None:
        """The longest remembered text that this one begins with.

        Returns:
            its bytes, and the tokens that it was computed as, read-only; None where there is none.
        """
        known = self._texts.longest(namespace, text)
        return None if known is None else (known.n_bytes, known.tokens)

    # --- what an operator calls --------------------------------------------------------------

    @property
    def tier_names(self) -> tuple[str, ...]:
        """The tiers, from fast to slow."""
        return tuple(self._residents.shelves)

    def tiers(self) -> list[TierStatus]:
        """Every root of every tier, from fast to slow, and how it is. Safe in signal handlers."""
        return self._statuses() if reentered() else self._statuses_now()

    @uninterrupted
    def _statuses_now(self) -> list[TierStatus]:
        with self._lock:
            return self._statuses()

    def _statuses(self) -> list[TierStatus]:
        return [
            TierStatus(
                shelf.name,
                root.place,
                root.budget,
                shelf.n_bytes(root),
                shelf.n_blocks(root),
                self._upkeep.errors.get(root),
                root.read_only,
            )
            for shelf in self._residents.shelves.values()
            for root in list(shelf.roots)
        ]

    def counters(self) -> Mapping[str, int | float]:
        """Counts since this cache was made, seconds spent, and bytes and blocks held now, by name.

        Safe in signal handlers: one that interrupts a call of this library gets the counts as they are, without
        what other processes have done since the last look.
        """
        return self._counts() if reentered() else self._counts_now()

    @uninterrupted
    def _counts_now(self) -> dict[str, int | float]:
        with self._lock:
            self._upkeep.look_around(at_once=True)
            return self._counts()

    def _counts(self) -> dict[str, int | float]:
        found = self._counters.snapshot()
        found["corrupt_files"] += sum(tier.damaged for tier in list(self._upkeep.tiers))
        shelves = self._residents.shelves
        for name in dict.fromkeys((*TIERS, *shelves)):
            shelf = shelves.get(name)
            found[f"bytes_{name}"] = shelf.n_bytes() if shelf else 0
            found[f"blocks_{name}"] = len(shelf) if shelf else 0
        found["read_only_directories"] = sum(tier.read_only for tier in list(self._upkeep.tiers))
        found["bytes_pending"] = self._upkeep.writer.n_bytes
        return found

    @uninterrupted
    def rows(self) -> list[Row]:
        """Every block that is stored: key, tier, position, tokens, bytes and pins."""
        with self._lock:
            self._upkeep.look_around(at_once=True)
            return self._residents.rows()

    @uninterrupted
    def evict_bytes(self, n_bytes: int | str, tiers: Sequence[str] | None = None) -> int:
        """Free at least `n_bytes`, least recently used first, of the tiers in memory, or of those given.

        Returns:
            the bytes freed: fewer when the rest is pinned.
        """
        wanted = parse_bytes("n_bytes", n_bytes)
        if tiers is None:
            tiers = tuple(name for name in self.tier_names if name in ("ram", "ram_file"))
        self._check_tiers(tiers, "tiers")
        freed = 0
        for name in tiers:
            shelf = self._residents.shelves.get(name)
            gained = 1
            # Again, as long as that frees more: what one root gives up may have kept another's blocks from going.
            while shelf is not None and gained and freed < wanted:
                gained = 0
                for root in list(shelf.roots):
                    if freed + gained < wanted:
                        gained += self._upkeep.evict(root, wanted - freed - gained)
                freed += gained
        return freed

    def _check_tiers(self, tiers: object, option: str) -> None:
        known = {"ram", "ram_file", "disk", "live", *self.tier_names}
        if not isinstance(tiers, tuple | list) or not known.issuperset(tiers):
            raise OptionError(f"{option}={tiers!r}; give a tuple of {', '.join(map(repr, sorted(known)))}")

    @uninterrupted
    def gc(self) -> int:
        """Bring everything in line: write what waits, mend the directories, keep to the budgets.

        Files that came or went are taken in or forgotten, what dead processes
        left is removed, and so are blocks that follow one that is gone.

        Returns:
            the bytes freed, those of evictions apart.
        """
        self.flush()
        return self._upkeep.mend()

    @uninterrupted
    def verify(self) -> list[Problem]:
        """Read every stored file and tell what is wrong, without changing anything; empty when all is well."""
        return self._upkeep.verify()

    @uninterrupted
    def check_integrity(self) -> None:
        """Check that memory, the index of each directory and its files agree: every byte on disk is counted.

        Reads no payloads. A file that others removed or damaged is `verify`'s to find.

        Raises:
            IntegrityError: they do not; the message says where.
        """
        wrong = list(self._upkeep.contradictions())
        if wrong:
            raise IntegrityError(f"{len(wrong)} contradictions: {'; '.join(wrong[:5])}")

    def flush(self, timeout: float | None = None) -> bool:
        """Write everything that waits when this is called; False when `timeout` seconds were not enough.

        What others save meanwhile is not waited for.
        """
        return self._upkeep.writer.flush(timeout)

    @uninterrupted
    def close(self) -> None:
        """Write what waits and let go of the directories. Idempotent; lookups then miss."""
        with self._lock:
            self._closing = True
        if self._pressure is not None:
            self._pressure.stop()
        # Interrupted here, close() can be called again; what others ask meanwhile is a miss.
        self._upkeep.close()
        with self._lock:
            self._forget_everything()
        _open_caches.discard(self)

    @uninterrupted
    def abandon(self) -> None:
        """End as if the process had been killed: nothing more is written, nothing is tidied up. For tests."""
        with self._lock:
            upkeep = self._upkeep
            self._forget_everything()
        upkeep.writer.abandon()
        for tier in upkeep.tiers:
            (tier.abandon if isinstance(tier, FileTier) else tier.close)()
        _open_caches.discard(self)

    def _forget_everything(self) -> None:
        """Be an empty cache that stores nothing."""
        self._closing = True
        self._assemble([], 0)

    def _forked(self) -> None:
        """In a forked child: an empty cache that saves nothing, without touching what the parent holds."""
        self._lock = threading.RLock()
        self._counters = Counters()
        self._pressure = None
        # Closing the parent's connections here could damage its databases: never let them be collected.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._upkeep))
        for tier in self._upkeep.tiers:
            if isinstance(tier, FileTier):
                tier.forked()
        self._forget_everything()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_HIT_COUNTS = {"exact": "hits_exact", "partial": "hits_longest_prefix"}


def close_all() -> None:
    """Close every cache, at exit. One that fails is logged, and the rest are closed."""
    for close in [*(cache.close for cache in _open_caches), *(upkeep.close for upkeep in _open_upkeeps)]:
        try:
            close()
        except BaseException:  # of one cache: the others are closed all the same
            log.exception("a cache was not closed well at exit")


def _after_fork_in_child() -> None:
    # The connections, the threads and the locks stayed with the parent.
    for cache in list(_open_caches):
        cache._forked()
    _open_caches.clear()
    _open_upkeeps.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
