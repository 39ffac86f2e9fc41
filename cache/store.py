"""`Cache`: finds, loads and saves blocks across its tiers, within their budgets.

The model threads of the engine and operators call it. Any number of models and threads may share one cache.
A lookup reads memory, and the index if another process has written to it. A load may read a file. A save is
stored in RAM at once and written to the slower tiers later. A storage fault raises no exception: it is a
miss or an unsaved block, counted and logged. `Cache` wires the pipeline, and each call goes to one link.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Never

import numpy as np
from numpy.typing import NDArray

from erllama._runtime.log import logger
from erllama._runtime.reentry import reentered
from erllama.cache.blocks.block import Block
from erllama.cache.blocks.keys import TOKEN_BYTES, token_bytes
from erllama.cache.blocks.match import Loaded, Match, Row, TierStatus
from erllama.cache.blocks.pins import Pin, PinRecord, check_pin_name
from erllama.cache.catalog.block_log import BlockChange, BlockChanges, BlockLog, LoggedBlocks
from erllama.cache.catalog.catalog import BlockCatalog, places_of
from erllama.cache.catalog.counters import Counters
from erllama.cache.options import (
    OPTIONS,
    Directories,
    as_read_only,
    check_separate,
    checked_block_size,
    checked_key_file,
    custom_tiers,
    directories,
    file_tiers,
    remote_root,
)
from erllama.cache.pipeline.attached_tiers import AttachedTiers
from erllama.cache.pipeline.change_feed import ChangeFeed
from erllama.cache.pipeline.evictor import Evictor
from erllama.cache.pipeline.fetcher import Fetch, Fetcher
from erllama.cache.pipeline.garbage_collector import GarbageCollector
from erllama.cache.pipeline.integrity import IntegrityChecker
from erllama.cache.pipeline.loader import Loader
from erllama.cache.pipeline.memory_directory import MemoryDirectory
from erllama.cache.pipeline.pinner import Pinner
from erllama.cache.pipeline.report import CacheReport
from erllama.cache.pipeline.saver import Saver
from erllama.cache.pipeline.text_memory import TextMemory
from erllama.cache.pipeline.tier_set import TierSet
from erllama.cache.pipeline.tier_writer import TierWriter
from erllama.cache.pipeline.write_queue import PendingSave, WriteQueue
from erllama.cache.pressure.pressure import Pressure, PressureWatch
from erllama.cache.remote.options import DEFAULT_QUOTA, create_remote_tier, remote_options
from erllama.cache.remote.tier import busy_tiers
from erllama.cache.sharing.members import CacheMember, MemberReport, Members
from erllama.cache.sharing.spec import CacheSpec, root_specs
from erllama.cache.sizes import parse_bytes
from erllama.cache.tiers.directory import new_cache_id
from erllama.cache.tiers.file_tier import FileTier
from erllama.cache.tiers.ram_tier import RamTier
from erllama.cache.tiers.tier import Problem, Tier
from erllama.cache.uninterrupted import run_behind, uninterrupted
from erllama.checks import boolean, encodable, reject_unknown
from erllama.errors import CacheError, IntegrityError, OptionError

log = logger("erllama.cache")

# A reader of the whole content holds the lock for about a millisecond: for this many blocks.
_LOG_PART = 1024
_LOG_PAUSE = 0.001  # seconds between two parts

_open_caches: weakref.WeakSet[Cache] = weakref.WeakSet()
# Includes those of caches that were garbage-collected: waiting work keeps the pipeline alive.
_open_tier_sets: weakref.WeakSet[TierSet] = weakref.WeakSet()


class Cache:
    """A store of KV blocks, in memory and, if it has directories, in files.

    Models and threads may share it, and signal handlers may call it. An exception that a handler raises, such
    as KeyboardInterrupt, ends a call at once; the call completes in the background, so no change is left half
    done. Close the cache, use it in a `with`, or leave it to the interpreter's exit: each writes the waiting saves.

    Args:
        ram: budget of the RAM tier, as "2GiB" or in bytes; 0 or None turns it off.
        ram_file: directory on a tmpfs, for blocks that outlive this process but not the machine's uptime;
            True for this user's directory in /dev/shm; None for no such tier. Several: as for `disk`.
        ram_file_quota: budget of each such directory.
        disk: directory of the disk tier, created if missing, private to its owner;
            True for the user's cache directory; None for no disk. Several directories are one tier: pass a sequence
            of them, or a mapping to their quotas.
        disk_quota: budget of each such directory.
        key_file: file of secret keys that encrypts the directories, `ram_file` included, remembered texts, and the
            remote tier; made by `erllama cache new-key`. None for no encryption. Needs the extra `encryption`.
        remote: a bucket or a mounted directory that several machines share, as "s3://bucket/prefix", "gs://…", "az://…",
            "file:///directory" or a path. Buckets need the extra `remote`. It is the slowest tier.
        remote_key_file: file of the keys that sign blocks there; see `erllama cache new-key`. None for `key_file`;
            `remote` needs one of them.
        remote_quota: budget of all blocks there, those of other machines included.
        remote_lifetime: remove blocks there that were not used for so long, as "30d" or in seconds; None to
            keep them.
        read_only: read the directories and the remote tier, and never write to them. A directory that holds a
            cache and cannot be written, such as one on a read-only mount, is always opened read-only.
        tiers: tiers of your own, slower than all these, from fast to slow.
        block_size: tokens per block; a power of two from 16 to 4096.
        pin_quota: maximum bytes that pins may protect, in each tier that has pins. None for half of its budget.
        write_queue: maximum bytes that may wait for the slower tiers. Saves beyond it are dropped and counted.
        pressure: evict when memory runs short: a `Pressure`, a mapping of its options, or the name of a source.
        watch: notice files that others put into the directories or remove from them.

    Raises:
        OptionError: an option is unknown, ill-typed or out of range.
        CacheKeyError: the key file is missing, is not private, or has no key.
        MissingPackage: there is a key file, and the package `cryptography` is not installed.

    A directory that cannot be used, for example one that is encrypted with another key, does not raise. The cache
    continues without it, logs the reason, keeps it in `disk_error`, and tries again from time to time.
    """

    def __init__(
        self,
        *,
        ram: str | int | None = "2GiB",
        ram_file: Directories = None,
        ram_file_quota: str | int = "4GiB",
        disk: Directories = None,
        disk_quota: str | int = "50GiB",
        key_file: str | Path | None = None,
        remote: str | Path | None = None,
        remote_key_file: str | Path | None = None,
        remote_quota: str | int = DEFAULT_QUOTA,
        remote_lifetime: str | float | None = None,
        read_only: bool = False,
        tiers: Sequence[Tier] = (),
        block_size: int = 256,
        pin_quota: str | int | None = None,
        write_queue: str | int = "512MiB",
        pressure: Pressure | Mapping[str, object] | str | None = None,
        watch: bool = True,
        **unknown: Never,
    ) -> None:
        reject_unknown(unknown, OPTIONS, "Cache")
        self.ram_budget = parse_bytes("ram", 0 if ram is None else ram)
        self.block_size = checked_block_size(block_size)
        self._pin_quota = None if pin_quota is None else parse_bytes("pin_quota", pin_quota)
        queue_bytes = parse_bytes("write_queue", write_queue)
        roots = directories("ram_file", ram_file, ram_file_quota) + directories("disk", disk, disk_quota)
        self._watch = boolean("watch", watch)
        self._key_file = checked_key_file(key_file)
        self._remote = remote_options(
            remote, remote_key_file, remote_quota, remote_lifetime, boolean("read_only", read_only), self._key_file
        )
        if read_only:
            roots = as_read_only(roots, self._remote is not None)
        all_tiers: list[Tier] = [RamTier(self.ram_budget)] if self.ram_budget else []
        all_tiers += file_tiers(roots, self._watch, self._key_file)
        check_separate([*roots, *remote_root(self._remote)])
        if self._remote is not None:
            all_tiers.append(create_remote_tier(self._remote))
        self._custom_tiers = custom_tiers(tiers)
        # Created before any directory is opened, because it raises if its source is not available.
        self._pressure = self._pressure_watch(Pressure.of(pressure))
        self._start(all_tiers + self._custom_tiers, queue_bytes)

    @classmethod
    def of_spec(cls, spec: CacheSpec) -> Cache:
        """Open in another process the cache that made `spec` with `share_with_process`. The engine calls it.

        Saves are written to `ram_file` at once, before those to the disk: the process may be killed at any moment.
        """
        cache = cls.__new__(cls)
        cache.ram_budget, cache.block_size, cache._watch = spec.ram, spec.block_size, spec.watch
        cache._custom_tiers, cache._pressure, cache._pin_quota = [], None, spec.pin_quota
        cache._remote = spec.remote
        cache._key_file = None if spec.key_file is None else Path(spec.key_file)
        tiers: list[Tier] = [RamTier(spec.ram)] if spec.ram else []
        tiers += file_tiers(spec.as_roots(), spec.watch, cache._key_file)
        if spec.remote is not None:
            tiers.append(create_remote_tier(spec.remote))
        cache._start(tiers, spec.write_queue, frozenset(["ram_file"]))
        return cache

    def _start(self, tiers: list[Tier], queue_bytes: int, immediate: frozenset[str] = frozenset()) -> None:
        """Open the cache. Saves to `immediate` tiers are written without delays, before those to other tiers."""
        self._immediate = immediate
        self._id = new_cache_id()
        self._lock = threading.RLock()
        self._counters = Counters()
        self._members = Members(self._counters)
        self._block_logs: tuple[BlockLog, ...] = ()
        self._closing = False
        self._opening = threading.Lock()
        self._sharing = threading.Lock()
        try:
            self._open(tiers, queue_bytes)
        except BaseException:
            # The caller was interrupted and never receives this cache, which must release its directories.
            with suppress(RuntimeError):
                run_behind(self._close_interrupted)
            raise

    @uninterrupted
    def _open(self, tiers: list[Tier], queue_bytes: int) -> None:
        with self._opening:
            if self._closing:
                return
            self._assemble(tiers, queue_bytes)
            if self._pressure is not None:
                self._pressure.start()
            _open_caches.add(self)

    def _close_interrupted(self) -> None:
        with self._opening:
            self._closing = True
            if hasattr(self, "_tier_set"):
                self.close()

    def _assemble(self, tiers: list[Tier], queue_bytes: int) -> None:
        """Wire the pipeline: each link gets the links that it calls. Then open the tiers."""

        def write(save: PendingSave) -> None:  # the queue is the first link and calls the last one
            writer.write(save)

        lock, counters = self._lock, self._counters
        for tier in tiers:
            if isinstance(tier, FileTier):
                tier.use_for(self._id)
        catalog = BlockCatalog(self.block_size, counters, tiers, self._pin_quota)
        queue = WriteQueue(write, queue_bytes, self._immediate)
        tier_set = TierSet(lock, catalog, counters, queue, tiers)
        evictor = Evictor(lock, catalog, queue, tier_set)
        feed = ChangeFeed(lock, catalog, queue, tier_set, evictor)
        writer = TierWriter(lock, catalog, counters, queue, tier_set, evictor, feed)
        self._saver = Saver(lock, catalog, counters, queue, tier_set, feed, writer, self.block_size)
        self._loader = Loader(lock, catalog, counters, queue, evictor, writer)
        self._fetcher = Fetcher(lock, catalog, self._loader)
        self._pinner = Pinner(lock, catalog, counters, queue, tier_set, feed, writer, self._loader)
        self._texts = TextMemory(queue, tier_set)
        self._attached = AttachedTiers(lock, catalog, tier_set)
        self._garbage_collector = GarbageCollector(lock, catalog, queue, tier_set, evictor, feed)
        self._integrity = IntegrityChecker(lock, catalog, tier_set, evictor)
        self._report = CacheReport(catalog, counters, queue, tier_set)
        for log in self._block_logs:
            catalog.add_log(log)
        self._catalog, self._queue, self._tier_set = catalog, queue, tier_set
        self._evictor, self._feed = evictor, feed
        self._memory_directory = MemoryDirectory(tier_set, feed, self._watch, self._id, self._key_file)
        feed.open_all()
        if tiers:
            _open_tier_sets.add(tier_set)

    def _pressure_watch(self, options: Pressure | None) -> PressureWatch | None:
        if options is None:
            return None
        weak_self = weakref.ref(self)

        def open_cache() -> Cache:
            cache = weak_self()
            if cache is None or cache.closed:
                raise ReferenceError("the cache is closed or was garbage-collected")
            return cache

        return PressureWatch(
            options,
            lambda n_bytes, tiers: open_cache()._relieve_pressure(n_bytes, tiers),
            lambda _: open_cache().count_fault(),
        )

    def _relieve_pressure(self, n_bytes: int, tiers: tuple[str, ...]) -> int:
        self._counters.add("pressure_evictions")
        self._queue.skip_delays()  # waiting saves hold memory, too
        return self.evict_bytes(n_bytes, tiers)

    # --- called by the engine ----------------------------------------------------------

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
            whole: match only blocks whose last token agrees, too; for memory that cannot be cut.
            loadable: match only blocks that `load` can return; skip those that are only in a context's cells.
            parent_key: the key of a context that `tokens` continue. If its save is in flight,
                the lookup waits for it.
            wait_ms: the longest such wait, in milliseconds.
            count: count a hit or a miss; False for a caller that counts the outcome with `count_request`.

        Returns:
            a Match whose blocks are pinned until its `release()`; use it in a `with`.
        """
        raw = token_bytes(tokens)
        if parent_key is not None and wait_ms > 0:
            self._saver.wait_for(parent_key, wait_ms / 1000)
        with self._counters.timing("lookup"), self._lock:
            self._feed.poll()
            blocks, n_tokens = self._catalog.find_prefix(namespace, raw, whole, loadable)
            unpin = self._catalog.pin(blocks)
            self._tier_set.record_uses(blocks, time.time_ns())
            resumed = parent_key is not None and any(block.key == parent_key for block in blocks)
        if count:
            kind = "cold" if not n_tokens else "exact" if n_tokens * TOKEN_BYTES == len(raw) else "partial"
            self.count_request(kind, n_tokens, resumed=resumed)
        return Match(tuple(blocks), n_tokens, unpin)

    @uninterrupted
    def fetch(
        self, blocks: Sequence[Block], seconds_per_token: float | None = None, n_tokens: int | None = None
    ) -> Fetch:
        """Begin to read the blocks that only a remote tier has, in the background. The engine calls it.

        Does not wait. The result is done once the blocks were read, or waiting is not worth it any more: a read
        must not take longer than computing. `load` and `load_batches` then return them while the result exists.

        Args:
            blocks: of a match, from the first that is needed to the last.
            seconds_per_token: how long the model computes; None if that is unknown.
            n_tokens: how many tokens the model need not compute with the blocks; None for those of the blocks, from
                the first that is fetched.
        """
        return self._fetcher.fetch(blocks, seconds_per_token, n_tokens)

    def load(self, block: Block, *, local: bool = False) -> Loaded | None:
        """Load the payload of a block from the fastest tier that has it.

        Args:
            local: do not wait for a remote tier: only what `fetch` has brought counts.

        Returns:
            the payload, and the block as it was saved with it. None if each tier has lost or damaged it;
            the cache then drops the block.
        """
        return self._loader.load(block, local)

    def load_batches(self, blocks: Sequence[Block], *, local: bool = False) -> Generator[list[Loaded], None, None]:
        """Load several blocks in order, and yield them in batches. While the caller uses one, the next is read.

        Ends at the first block that `load` would not return. The caller keeps the blocks pinned, and closes the
        iterator if it stops early.
        """
        return self._loader.load_batches(blocks, local)

    @uninterrupted
    def save(
        self,
        block: Block,
        payload: NDArray[np.uint8] | bytes,
        *,
        replace: bool = False,
        trimmable: bool = True,
        kept_tail: bytes | None = None,
    ) -> bool:
        """Store a block: in RAM at once, in slower tiers later. Does not wait for storage.

        Args:
            block: its parent is stored already, or is the namespace.
            payload: bytes, contiguous, at least one. The caller must not change it afterwards.
            replace: store it even if a block of this key is stored.
            trimmable: whether its payload can be cut after restoring. If so, the block supersedes
                shorter tails; otherwise only a full block does.
            kept_tail: the key of a tail that the block does not supersede.

        Returns:
            False if the block is stored already, or no tier has room.

        Raises:
            OptionError: the payload is not bytes, or empty, or the block is longer than `block_size`.
        """
        return not self._closing and self._saver.save(block, payload, replace, trimmable, kept_tail)

    @uninterrupted
    def wants(self, key: bytes) -> bool:
        """Return whether saving the block of this key would store it in a tier that lacks it."""
        with self._lock:
            return not self._closing and self._saver.wants(key)

    def contains(self, key: bytes) -> bool:
        """Return whether a block is stored in any tier."""
        return self.stored(key) is not None

    @uninterrupted
    def stored(self, key: bytes) -> Block | None:
        """Return the stored block of this key, if any. A block that is only in a context's cells is not stored."""
        with self._lock:
            block = self._catalog.stored_block(key)
            if block is None:  # another process may have saved it since the last poll
                self._feed.poll(at_once=True)
                block = self._catalog.stored_block(key)
            return block

    @uninterrupted
    def context(self, key: bytes) -> NDArray[np.uint32] | None:
        """Return the tokens of the stored context that ends with this block, shape (n,); None if not stored."""
        with self._lock:
            blocks = self._catalog.path(key)
            if not blocks:  # another process may have saved it since the last poll
                self._feed.poll(at_once=True)
                blocks = self._catalog.path(key)
        return np.frombuffer(b"".join(block.tokens for block in blocks), "<u4") if blocks else None

    @contextmanager
    def packing(self) -> Iterator[None]:
        """Count the time of the `with` block as time spent packing."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._add_seconds("pack", time.perf_counter() - began)

    @uninterrupted
    def _add_seconds(self, name: str, seconds: float) -> None:
        self._counters.add_seconds(name, seconds)

    @uninterrupted
    def count_request(self, kind: str, tokens_reused: int, *, resumed: bool = False) -> None:
        """Count how a request was served: "exact", "partial" or "cold". `resumed`: its parent's key matched."""
        name = "misses" if kind == "cold" else "hits_resume" if resumed else _HIT_COUNTS[kind]
        self._counters.add(name)
        self._counters.add("tokens_reused", tokens_reused)

    @uninterrupted
    def count_fault(self) -> None:
        """Count that the cache could not serve a request for an unexpected reason."""
        self._counters.add("faults")

    @uninterrupted
    def reject(self, block: Block, error: Exception) -> None:
        """Drop a block whose payload the backend refused."""
        self._loader.reject(block, error)

    def expecting(self, key: bytes) -> AbstractContextManager[None]:
        """Announce the save of a block for a `with` block. Lookups that continue from the block wait for it."""
        return self._saver.expecting(key)

    @uninterrupted
    def awaits(self, key: bytes) -> bool:
        """Return whether a block is not stored yet and its save is in flight."""
        return self._saver.awaits(key)

    # --- pins -------------------------------------------------------------------------------

    @uninterrupted
    def pin_prefix(
        self,
        namespace: bytes,
        tokens: Sequence[int] | NDArray[np.integer],
        *,
        name: str,
        model: str,
        model_key: bytes,
        expires: float | None = None,
        whole: bool = False,
        share: float = 1.0,
    ) -> Pin:
        """Keep the blocks of a stored prefix. `Model.pin` computes the prefix first, and calls it.

        Writes the blocks to the disk tier; without one, to `ram_file`; without either, they stay in the RAM tier.
        Eviction, quotas and `gc` skip them there until the pin expires or is removed. A pin of the same name is
        replaced.

        Args:
            namespace: the root key, from `namespace_key`.
            tokens: ids of the prefix, shape (n,).
            name: of 1 to 200 printable characters.
            model: the model's id, for reports.
            model_key: the model's root key without a salt, 32 bytes; for `warm_pins`.
            expires: when the pin ends, in seconds since 1970; None for never.
            whole: as of `lookup`.
            share: fraction of the bytes that pins may protect which all pins may then take.

        Raises:
            PinQuotaExceeded: pins would protect more bytes than they may.
            PinError: the cache does not have the whole prefix, or cannot store it.
            OptionError: `name` or the tokens are not valid.
            CacheError: the cache is closed.
        """
        self._check_open()
        raw, now = token_bytes(tokens), time.time()
        pin = PinRecord(check_pin_name(name), model, model_key, len(raw) // TOKEN_BYTES, (), now, expires)
        return self._pinner.pin(namespace, raw, pin, whole, share, self.flush)

    @uninterrupted
    def pins(self) -> list[Pin]:
        """Return the pins that have not expired, the oldest first."""
        return self._pinner.pins()

    @uninterrupted
    def unpin(self, name: str) -> bool:
        """Remove a pin, so that its blocks may be evicted. Return False if no pin has this name.

        Raises:
            CacheError, OSError, sqlite3.Error: the directory cannot be written.
        """
        return self._pinner.unpin(check_pin_name(name))

    @uninterrupted
    def warm_pins(self, model_key: bytes) -> None:
        """Read the blocks of a model's pins into the fastest tier in memory, in the background.

        Reads at most as many bytes as the tier may hold. The engine calls it when a model is loaded.

        Args:
            model_key: as of `pin_prefix`.
        """
        if not self._closing:
            self._pinner.warm(model_key)

    # --- live tiers -------------------------------------------------------------------------

    @uninterrupted
    def attach(self, tier: Tier) -> None:
        """Add a tier that its owner writes, as the fastest: KV that is still in a context's cells.

        Its owner reports with `report_stored` and `report_removed` which blocks it has. Lookups find those
        blocks; `load` does not read from the tier; `evict_bytes` calls its `remove`.

        Raises:
            OptionError: the tier does not have `write_mode="external"`.
        """
        self._attached.attach(tier)

    @uninterrupted
    def detach(self, tier: Tier) -> None:
        """Remove an attached tier and its blocks from the cache."""
        self._attached.detach(tier)

    @uninterrupted
    def report_stored(self, tier: Tier, block: Block, n_bytes: int) -> bool:
        """Record that an attached tier has a block; False if its budget has no room after evicting others."""
        return self._attached.report_stored(tier, block, n_bytes)

    @uninterrupted
    def report_removed(self, tier: Tier, keys: Sequence[bytes]) -> None:
        """Record that an attached tier no longer has these blocks."""
        self._attached.report_removed(tier, keys)

    # --- changes of blocks --------------------------------------------------------------------

    @uninterrupted
    def open_block_log(
        self,
        namespace: bytes,
        *,
        limit: int,
        wake: Callable[[], None],
        reports: Callable[[str], bool] = lambda tier: True,
    ) -> BlockLog:
        """Record the changes of full blocks in the tiers, for one reader. A publisher of KV events calls it.

        Saves and evictions never wait for the reader: a log that is full forgets its changes, and the next read
        returns the whole content.

        Args:
            namespace: root key of the blocks to record, from `namespace_key`.
            limit: maximum number of changes that wait for the reader.
            wake: called, in any thread and under the cache's lock, when there are changes to read. Must not wait.
            reports: whether to record the changes of the tier with a name.
        """
        log = BlockLog(LoggedBlocks(namespace, self.block_size, reports), limit, wake)
        with self._lock:
            self._block_logs = (*self._block_logs, log)
            self._catalog.add_log(log)
        return log

    @uninterrupted
    def read_block_log(self, log: BlockLog) -> BlockChanges:
        """Return the changes since the last call; the whole content at the first one, and after an overflow.

        Includes what other processes wrote to the directories. Does not wait for storage. A closed cache is empty.
        The whole content is read in parts, between which requests go on. It may lack changes made meanwhile, or
        have some of them: the next call returns them all, in order.
        """
        with self._lock:
            self._feed.poll()
            if not log.is_restarted:
                return BlockChanges(log.take(), complete=False)
            overflowed, logged, entries = log.overflowed, log.logged, self._catalog.entries()
            log.take()  # further changes are recorded
        changes: list[BlockChange] = []
        for at in range(0, len(entries), _LOG_PART):
            if at:
                time.sleep(_LOG_PAUSE)  # a thread that waits for the lock gets it
            with self._lock:
                changes += places_of(entries[at : at + _LOG_PART], logged)
        return BlockChanges(changes, complete=True, overflowed=overflowed)

    @uninterrupted
    def turn_block_log(self, log: BlockLog, namespace: bytes) -> None:
        """Record the blocks of another namespace. The next read returns the whole content."""
        with self._lock:
            log.use_namespace(namespace)

    @uninterrupted
    def close_block_log(self, log: BlockLog) -> None:
        """Record no further changes. Idempotent."""
        with self._lock:
            self._block_logs = tuple(other for other in self._block_logs if other is not log)
            self._catalog.remove_log(log)

    @uninterrupted
    def count_events(self, *, batches: int = 0, overflows: int = 0, replays: int = 0) -> None:
        """Count what a publisher of KV events did: batches sent, losses of changes, and replays."""
        for name, n in (("event_batches", batches), ("event_overflows", overflows), ("event_replays", replays)):
            if n:
                self._counters.add(name, n)

    # --- other processes --------------------------------------------------------------------

    @uninterrupted
    def share_with_process(self, *, ram_file: str | Path | None = None) -> CacheSpec:
        """Return what a process that runs a model needs to open this cache there. The engine calls it.

        What that process saves must outlive it, so it has no RAM tier. If this cache has one and no `ram_file`
        directory, it gains one, with the budget of the RAM tier but at most half of the tmpfs. Models in this
        process then save to it, too. Without a usable tmpfs, the spec keeps the RAM tier, and the reason is logged.

        Args:
            ram_file: the directory to add; None for this user's in /dev/shm.

        Raises:
            OptionError: the cache has tiers of your own, or `ram_file` is not a directory.
            CacheError: the cache is closed.
        """
        with self._sharing:
            memory_directory = self._memory_directory  # taken before the check: `close` replaces it
            self._check_open()
            if self._custom_tiers:
                raise OptionError(
                    f"tiers has {self._custom_tiers[0].name!r}, an object that another process cannot use; leave "
                    "it out, or load the model in this process"
                )
            saves_to_file = bool(self.ram_budget) and memory_directory.ensure(ram_file, self.ram_budget)
            tiers = [tier for tier in self._tier_set if isinstance(tier, FileTier)]
            ram = 0 if saves_to_file else self.ram_budget
            spec = CacheSpec(
                ram,
                root_specs(tiers),
                self.block_size,
                self._queue.limit_bytes,
                self._watch,
                self._pin_quota,
                self._remote,
                None if self._key_file is None else encodable("key_file", str(self._key_file)),
            )
            self._check_open()
            return spec

    def _check_open(self) -> None:
        if self._closing:
            raise CacheError("the cache is closed; pass an open one")

    @uninterrupted
    def add_member(self, member: CacheMember) -> None:
        """Include another process that uses this cache in reports, flushes and evictions. The engine calls it.

        `close` removes all members.
        """
        with self._lock:
            if not self._closing:
                self._members.add(member)

    @uninterrupted
    def remove_member(self, member: CacheMember) -> None:
        """Remove a process that `add_member` added. Its counts, as last reported, stay. The engine calls it."""
        self._members.remove(member)

    @uninterrupted
    def member_report(self) -> MemberReport:
        """Return what a member reports of this cache, in the process that runs the model. The engine calls it."""
        with self._lock:
            return self._report.as_member()

    # --- state and fingerprints ------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it was closed, or belongs to the process that forked this one. It then stores no blocks."""
        return self._closing

    @property
    def key_file(self) -> Path | None:
        """The file of the keys that encrypt the directories; None without encryption."""
        return self._key_file

    @property
    def persistent(self) -> bool:
        """Whether saved blocks outlive this process."""
        return any(
            tier.persistent and not tier.read_only and self._tier_set.readable(tier) for tier in self._tier_set
        )

    @property
    def disk_error(self) -> CacheError | None:
        """Why a directory, or a tier of your own, cannot be used; None if all can."""
        return self._tier_set.first_error()

    @uninterrupted
    def fingerprint(self, identity: str) -> str | None:
        """Return the digest that was remembered for a file's identity."""
        for tier in self._tier_set.file_tiers():
            with self._tier_set.guard("reading a fingerprint", tier):
                digest = tier.fingerprint(identity)
                if digest is not None:
                    return digest
        return None

    @uninterrupted
    def remember_fingerprint(self, identity: str, sha256: str) -> None:
        """Remember a file's digest in the directories."""
        for tier in self._tier_set.file_tiers(writable=True):
            with self._tier_set.guard("writing a fingerprint", tier):
                tier.remember_fingerprint(identity, sha256)

    # --- texts -------------------------------------------------------------------------------

    @uninterrupted
    def remember_text(self, namespace: bytes, text: bytes, tokens: NDArray[np.int32]) -> None:
        """Remember the tokens, shape (n,), that a text was computed as, in memory and in the directories.

        Stores digests of the text, not the text itself.
        """
        if not self._closing:
            self._texts.remember(namespace, text, tokens)

    @uninterrupted
    def longest_text(self, namespace: bytes, text: bytes) -> tuple[int, NDArray[np.int32]] | None:
        """Find the longest remembered text that `text` begins with.

        Returns:
            its length in bytes, and the tokens that it was computed as, read-only; None if no text matches.
        """
        record = self._texts.longest(namespace, text)
        return None if record is None else (record.n_bytes, record.tokens)

    # --- called by operators --------------------------------------------------------------

    @property
    def tier_names(self) -> tuple[str, ...]:
        """The names of the tiers, from fast to slow."""
        return self._report.names(self._members.last_reports())

    def tiers(self) -> list[TierStatus]:
        """Return the state of every root of every tier, from fast to slow. Safe in signal handlers."""
        if reentered():
            return self._report.statuses(self._members.reports(wait=False))
        return self._current_statuses()

    @uninterrupted
    def _current_statuses(self) -> list[TierStatus]:
        members = self._members.reports(wait=True)
        with self._lock:
            return self._report.statuses(members)

    def counters(self) -> Mapping[str, int | float]:
        """Return counts since this cache was created, seconds spent, and bytes and blocks stored now, by name.

        Includes the counts of models in processes of their own. Safe in signal handlers. A handler that interrupts
        a call of this library gets the present counts, without the changes of other processes since the last poll.
        """
        if reentered():
            return self._report.counts(self._members.reports(wait=False))
        return self._current_counts()

    @uninterrupted
    def _current_counts(self) -> dict[str, int | float]:
        members = self._members.reports(wait=True)
        with self._lock:
            self._feed.poll(at_once=True)
            return self._report.counts(members)

    @uninterrupted
    def rows(self) -> list[Row]:
        """List every stored block: key, tier, position, tokens, bytes and pins."""
        members = self._members.reports(wait=True)
        with self._lock:
            self._feed.poll(at_once=True)
            return self._report.rows(members)

    @uninterrupted
    def evict_bytes(self, n_bytes: int | str, tiers: Sequence[str] | None = None) -> int:
        """Free at least `n_bytes`, least recently used first, of these tiers; by default of those in memory.

        Returns:
            the bytes freed: fewer if the rest is pinned.
        """
        wanted = parse_bytes("n_bytes", n_bytes)
        if tiers is None:
            tiers = tuple(name for name in self.tier_names if name in ("ram", "ram_file"))
        self._check_tiers(tiers, "tiers")
        freed = 0
        for name in tiers:
            freed += self._evictor.evict_bytes(wanted - freed, (name,))
            if freed < wanted and name in ("live", "ram"):  # other processes have tiers of these names, too
                freed += self._members.evict_bytes(wanted - freed, (name,))
        return freed

    def _check_tiers(self, tiers: object, option: str) -> None:
        known = {"ram", "ram_file", "disk", "live", *self.tier_names}
        if not isinstance(tiers, tuple | list) or not known.issuperset(tiers):
            raise OptionError(f"{option}={tiers!r}; pass a tuple of {', '.join(map(repr, sorted(known)))}")

    @uninterrupted
    def gc(self) -> int:
        """Collect garbage: write the waiting saves, repair the directories and enforce the budgets.

        Adopts files that were added and drops rows of files that were removed. Removes files that ended
        processes left, and blocks whose parent is missing.

        Returns:
            the bytes freed, without those of evictions.
        """
        self.flush()
        return self._garbage_collector.collect()

    @uninterrupted
    def verify(self) -> list[Problem]:
        """Read every stored file and list each defect. Does not change the files."""
        return self._integrity.verify()

    @uninterrupted
    def check_integrity(self) -> None:
        """Check that memory, the index of each directory and its files agree: every byte on disk is counted.

        Reads no payloads. `verify` finds files that others removed or damaged.

        Raises:
            IntegrityError: they disagree; the message says where.
        """
        wrong = list(self._integrity.contradictions())
        if wrong:
            raise IntegrityError(f"{len(wrong)} contradictions: {'; '.join(wrong[:5])}")

    def flush(self, timeout: float | None = None) -> bool:
        """Write all blocks that wait at the time of the call; False if `timeout` seconds were not enough.

        Does not wait for blocks that are saved meanwhile. Includes the blocks of models in processes of their own.
        """
        began = time.monotonic()
        queue = self._queue
        flush = queue.begin_flush()
        complete = not len(self._members) or self._flush_members(timeout)
        complete = queue.wait(flush, _left(began, timeout)) and complete
        return self._tier_set.flush(_left(began, timeout)) and complete

    @uninterrupted
    def _flush_members(self, timeout: float | None) -> bool:
        return self._members.flush(timeout)

    @uninterrupted
    def close(self) -> None:
        """Write the waiting saves and close the directories. Idempotent. Later lookups miss."""
        with self._lock:
            self._closing = True
        self._members.clear()
        if self._pressure is not None:
            self._pressure.stop()
        # If this is interrupted, close() can be called again. Lookups meanwhile miss.
        self._tier_set.close()
        with self._lock:
            self._reset()
        _open_caches.discard(self)

    @uninterrupted
    def abandon(self) -> None:
        """End as if the process had been killed, without writing or cleaning up. For tests."""
        with self._lock:
            queue, tier_set = self._queue, self._tier_set
            self._reset()
        queue.abandon()
        for tier in tier_set:
            tier.abandon()
        _open_caches.discard(self)

    def _reset(self) -> None:
        """Become an empty cache that stores no blocks."""
        self._closing = True
        self._assemble([], 0)

    def _forked(self) -> None:
        """Become an empty cache in a forked child. It stores no blocks and leaves the parent's tiers unchanged."""
        self._lock = threading.RLock()
        self._counters = Counters()
        self._pressure = None
        self._members = Members(self._counters)
        self._block_logs = ()  # the threads that read them belong to the parent
        self._sharing = threading.Lock()
        # Closing the parent's connections here could damage its databases. The tiers are therefore never collected.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._tier_set))
        for tier in self._tier_set:
            if isinstance(tier, FileTier):
                tier.forked()
        self._reset()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _left(began: float, timeout: float | None) -> float | None:
    """Return what is left of a timeout that began at a time of time.monotonic(); None if there is none."""
    return None if timeout is None else timeout - (time.monotonic() - began)


_HIT_COUNTS = {"exact": "hits_exact", "partial": "hits_longest_prefix"}


def close_all() -> None:
    """Close every cache, at exit. Logs one that fails and closes the rest."""
    closing = [*(cache.close for cache in _open_caches), *(tiers.close for tiers in _open_tier_sets)]
    for close in [*closing, *(tier.close for tier in tuple(busy_tiers))]:
        try:
            close()
        except BaseException:  # of one cache: close the others
            log.exception("a cache could not be closed at exit")


def _after_fork_in_child() -> None:
    # The connections, the threads and the locks belong to the parent.
    for cache in list(_open_caches):
        cache._forked()
    _open_caches.clear()
    _open_tier_sets.clear()
    busy_tiers.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
