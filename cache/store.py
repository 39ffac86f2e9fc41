"""The cache: finds, loads and saves blocks across its tiers, within their budgets.

Callers are the engine's model threads; any number of models and threads may
share one cache. Lookups touch memory, and the index where another process has
written to it. Loads may read a file. Saves land in RAM and are written behind
to the disk. Nothing here raises at a request
because storage failed: it is a miss or an unsaved block, counted and logged.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Never

import numpy as np
import platformdirs
from numpy.typing import NDArray

from erllama.cache import kvc
from erllama.cache.blocks import Block
from erllama.cache.counters import Counters
from erllama.cache.disk import DiskTier
from erllama.cache.keys import token_bytes
from erllama.cache.match import Loaded, Match, Row
from erllama.cache.residents import DISK, PENDING, RAM, TIERS, Residents
from erllama.cache.sizes import parse_bytes
from erllama.cache.writer import TAIL_DELAY_SECONDS, Pending, WriteBehind
from erllama.errors import CacheError, CacheFormatError, OptionError, integer, reject_unknown

log = logging.getLogger("erllama.cache")

_LOOK_SECONDS = 0.25  # between two looks at what other processes saved: a look may read the whole index
_TOUCH_FLUSH = 512  # uses noted in memory before the index is told of them

_open_caches: weakref.WeakSet[Cache] = weakref.WeakSet()


class Cache:
    """A store of KV blocks, in memory and, where a directory is given, on disk.

    Safe to share between models and threads. Close it, use it in a `with`, or
    leave it to the interpreter's exit: what waits to be written is written.

    Args:
        ram: budget of the RAM tier, as "2GiB" or in bytes; 0 or None turns it off.
        disk: directory of the disk tier, made if missing, private to its owner;
            True for the user's cache directory; None for no disk.
        disk_quota: budget of the disk tier.
        block_size: tokens of one block; a power of two from 16 to 4096.
        write_queue: most bytes that may wait for the disk; saves beyond are dropped and counted.

    Raises:
        OptionError: an option is unknown, ill-typed or out of range.

    A directory that cannot be used does not raise: the cache goes on without
    it, logs the reason and keeps it in `disk_error`.
    """

    def __init__(
        self,
        *,
        ram: str | int | None = "2GiB",
        disk: str | Path | bool | None = None,
        disk_quota: str | int = "50GiB",
        block_size: int = 256,
        write_queue: str | int = "512MiB",
        **unknown: Never,
    ) -> None:
        reject_unknown(unknown, ("ram", "disk", "disk_quota", "block_size", "write_queue"), "Cache")
        self.ram_budget = parse_bytes("ram", 0 if ram is None else ram)
        self.disk_quota = parse_bytes("disk_quota", disk_quota)
        self.block_size = integer("block_size", block_size, 16, 4096)
        if self.block_size & (self.block_size - 1):
            raise OptionError(f"block_size={block_size}; it must be a power of two from 16 to 4096")
        queue_bytes = parse_bytes("write_queue", write_queue)
        root = _disk_root(disk)
        if root is not None and self.disk_quota == 0:
            raise OptionError("disk_quota=0 leaves a disk tier no room; give a size, or leave `disk` out")

        self._lock = threading.RLock()
        self._counters = Counters()
        self._residents = Residents(self.block_size, self._counters)
        self._touched: dict[bytes, int] = {}
        self._closing = False
        self._out_of_step = False  # a fault left memory and index apart
        self._look_again = 0.0  # when to look what other processes did, by time.monotonic()
        self.disk_error: CacheError | None = None
        self._disk: DiskTier | None = None
        if root is not None:
            self._open_disk(root)
        self._writer = WriteBehind(self._persist, queue_bytes)
        _open_caches.add(self)

    def _open_disk(self, root: Path) -> None:
        try:
            self._disk = DiskTier(root)
            self._adopt_rows(self._disk)
            # The quota may be smaller than the last time.
            self._disk.remove([key for key, _ in self._residents.evict(DISK, self.disk_quota)])
        except (OSError, sqlite3.Error, CacheError) as error:
            self._disk = None
            self.disk_error = (
                error
                if isinstance(error, CacheError)
                else CacheError(f"the cache directory {root} cannot be used: {error}; give a writable one")
            )
            self._counters.add("disk_errors")
            log.warning("%s. Going on without a disk tier", self.disk_error)

    # --- what the engine calls ----------------------------------------------------------

    def lookup(self, namespace: bytes, tokens: NDArray[np.integer], *, whole: bool = False) -> Match:
        """Find the longest stored prefix of `tokens`.

        Args:
            namespace: the root key, from `namespace_key`.
            tokens: ids, shape (n,).
            whole: only blocks that match to their last token; for memory that
                cannot be cut.

        Returns:
            a Match whose blocks are pinned until its `release()`; use it in a `with`.
        """
        with self._counters.timing("lookup"), self._lock:
            self._see_others()
            blocks, n_tokens = self._residents.walk(namespace, token_bytes(tokens), whole)
            self._residents.pin(blocks)
            now = time.time_ns()
            for block in blocks:
                self._residents.touch(block.key, now)
                if self._residents.holds(DISK, block.key):
                    self._touched[block.key] = now
        return Match(tuple(blocks), n_tokens, self._unpin)

    def load(self, block: Block) -> Loaded | None:
        """The payload of a block, from the fastest place that has it.

        Returns:
            what was found, with the block as it was saved with that payload;
            None when no place can give it undamaged: it is then forgotten.
        """
        with self._counters.timing("load"):
            with self._lock:
                entry = self._residents.tree.get(block.key)
                payload = self._residents.payloads.get(block.key)
                if entry is not None and payload is not None:
                    return Loaded(RAM, payload.data, entry.block)
                pending = self._writer.get(block.key)
                if pending is not None:
                    return Loaded(RAM, pending.payload.data, pending.block)
                disk = self._disk
            return self._load_from_disk(disk, block) if disk is not None else None

    def _load_from_disk(self, disk: DiskTier, block: Block) -> Loaded | None:
        try:
            found, payload = disk.read(block)
        except CacheFormatError as error:
            log.warning("%s: %s; not used", disk.path_of(block.key), error)
            self._counters.add("corrupt_files")
            with self._guarding("setting a damaged file aside"):
                disk.set_aside(block.key)
        except FileNotFoundError:
            log.warning("%s is gone", disk.path_of(block.key))
            with self._guarding("forgetting a missing file"):
                disk.index.remove([block.key])
        except (OSError, MemoryError) as error:
            log.warning("%s cannot be read: %s", disk.path_of(block.key), error)
            self._counters.add("disk_errors")
        else:
            with self._lock:
                if self._residents.holds(DISK, block.key):
                    self._residents.learn(found)
                    self._residents.put_in_ram(found, payload, self.ram_budget, time.time_ns())
            return Loaded(DISK, payload.data, found)
        with self._lock:
            self._residents.drop(DISK, block.key)
        return None

    def save(
        self, block: Block, payload: NDArray[np.uint8], *, replace: bool = False, trimmable: bool = True
    ) -> bool:
        """Store a block: in RAM at once, on disk behind the caller's back.

        Args:
            block: its parent is stored already, or is the namespace.
            payload: uint8 array, shape (bytes,), contiguous; not changed by the caller afterwards.
            replace: store it even where a block of this key is stored.
            trimmable: whether its payload can be cut after restoring. Then it takes
                the place of shorter tails; otherwise only a full block does.

        Returns:
            False when it is stored already, or nowhere has room.
        """
        residents = self._residents
        with self._lock:
            if self._closing:
                return False
            if residents.tree.get(block.key) is not None and not replace:
                self._counters.add("duplicates_dropped")
                return False
            if block.parent != block.namespace and residents.tree.get(block.parent) is None:
                self._counters.add("saves_dropped")  # what it follows was evicted: nobody could find it
                return False
            residents.drop(RAM, block.key)
            whole = trimmable or block.n_tokens >= self.block_size
            overtaken = tuple(tail.key for tail in residents.tree.overtaken_by(block)) if whole else ()
            in_ram = residents.put_in_ram(block, payload, self.ram_budget, time.time_ns())
            queued = self._offer_to_disk(block, payload, overtaken)
            if (self._disk is not None and not queued) or (not in_ram and not queued):
                self._counters.add("saves_dropped")
            if not in_ram and not queued:
                return False
            self._counters.add(f"saves_{block.reason.name.lower()}")
            for key in overtaken:
                if not residents.pinned(key):
                    self._overtake(key)
        return True

    def _offer_to_disk(self, block: Block, payload: NDArray[np.uint8], overtaken: tuple[bytes, ...]) -> bool:
        if self._disk is None:
            return False
        parent = block.parent
        reachable = parent == block.namespace or self._residents.holds(DISK, parent) or parent in self._writer
        delay = 0.0 if block.n_tokens >= self.block_size else TAIL_DELAY_SECONDS
        if not reachable or not self._writer.offer(block, payload, overtaken, delay):
            return False
        self._residents.tree.add(block, PENDING).block = block
        return True

    def _overtake(self, key: bytes) -> None:
        """Drop a tail whose successor is stored; from the disk only once that is there, too."""
        self._residents.drop(RAM, key)
        if self._writer.cancel(key):
            self._residents.drop(PENDING, key)
        if self._residents.tree.get(key) is None:
            self._counters.add("tails_overtaken")

    def contains(self, key: bytes) -> bool:
        """Whether a block is stored anywhere."""
        return self.stored(key) is not None

    def stored(self, key: bytes) -> Block | None:
        """The stored block of this key, if any."""
        with self._lock:
            entry = self._residents.tree.get(key)
            return entry.block if entry else None

    def count_request(self, kind: str, tokens_reused: int) -> None:
        """Count how a request was served: "exact", "partial" or "cold"."""
        self._counters.add("misses" if kind == "cold" else f"hits_{kind}")
        self._counters.add("tokens_reused", tokens_reused)

    def count_fault(self) -> None:
        """Count that the cache could not serve a request for a reason that nobody foresaw."""
        self._counters.add("faults")

    def reject(self, block: Block, error: Exception) -> None:
        """Forget a block whose payload the backend refused."""
        log.warning("a stored block of %d tokens could not be restored: %s; dropped", block.n_tokens, error)
        self._counters.add("restore_errors")
        with self._lock:
            self._residents.drop(RAM, block.key)
            if self._writer.cancel(block.key):
                self._residents.drop(PENDING, block.key)
            on_disk = self._residents.holds(DISK, block.key)
        if on_disk:
            self._remove_from_disk([block.key])

    # --- fingerprints ---------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it was closed, or belongs to the process that forked this one; it then stores nothing."""
        return self._closing

    @property
    def persistent(self) -> bool:
        """Whether blocks survive this process."""
        return self._disk is not None

    def fingerprint(self, identity: str) -> str | None:
        """The digest remembered for a file's identity."""
        disk, digest = self._disk, None
        if disk is not None:
            with self._guarding("reading a fingerprint"):
                digest = disk.index.fingerprint(identity)
        return digest

    def remember_fingerprint(self, identity: str, sha256: str) -> None:
        """Remember a file's digest where blocks survive the process."""
        disk = self._disk
        if disk is not None:
            with self._guarding("noting a fingerprint"):
                disk.index.remember_fingerprint(identity, sha256)

    # --- what an operator calls --------------------------------------------------------------

    def counters(self) -> Mapping[str, int | float]:
        """Counts since this cache was made, seconds spent, and bytes held now, by name."""
        with self._lock:
            found = self._counters.snapshot()
            found |= {f"bytes_{tier}": self._residents.n_bytes(tier) for tier in TIERS}
            found |= {f"blocks_{tier}": self._residents.n_blocks(tier) for tier in TIERS}
            found["bytes_pending"] = self._writer.n_bytes
        return found

    def rows(self) -> list[Row]:
        """Every block that is stored: key, tier, position, tokens, bytes and pins."""
        with self._lock:
            return self._residents.rows()

    def evict_bytes(self, n_bytes: int, tiers: tuple[str, ...] = (RAM,)) -> int:
        """Free at least `n_bytes`, least recently used first; returns the bytes freed."""
        n_bytes = parse_bytes("n_bytes", n_bytes)
        if not isinstance(tiers, tuple | list) or not set(tiers) <= set(TIERS):
            raise OptionError(f"tiers={tiers!r}; give a tuple of {', '.join(map(repr, TIERS))}")
        freed = 0
        for tier in tiers:
            with self._lock:
                victims = self._residents.evict(tier, self._residents.n_bytes(tier) - (n_bytes - freed))
            freed += sum(size for _, size in victims)
            if tier == DISK:
                self._remove_from_disk([key for key, _ in victims])
        return freed

    def flush(self, timeout: float | None = None) -> bool:
        """Write everything that waits; False when `timeout` seconds were not enough."""
        done = self._writer.flush(timeout)
        self._tell_uses()
        return done

    def close(self) -> None:
        """Write what waits and let go of the directory. Idempotent; lookups then miss."""
        with self._lock:
            self._closing = True
        # Interrupted here, close() can be called again.
        self.flush()
        with self._lock:
            disk, self._disk = self._disk, None
            self._residents = Residents(self.block_size, self._counters)
        if disk is not None:
            disk.close()
        _open_caches.discard(self)

    def _forked(self) -> None:
        """In a forked child: an empty cache that saves nothing, without touching what the parent holds."""
        self._lock = threading.RLock()
        self._counters = Counters()
        self._residents = Residents(self.block_size, self._counters)
        self._writer = WriteBehind(self._persist, 0)
        self._touched = {}
        if self._disk is not None:
            # Closing the parent's connection here could damage its database: never let it be collected.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._disk))
        self._disk = None
        self._closing = True

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the disk's side ------------------------------------------------------------------------

    def _persist(self, pending: Pending) -> None:
        """Write one save; the writer's thread calls it."""
        block, payload = pending.block, pending.payload
        disk, written = self._disk, False
        with self._counters.timing("write"), self._guarding(f"writing a block of {block.n_tokens} tokens"):
            if disk is not None and self._make_room(disk, block, kvc.header_bytes(block.n_tokens) + payload.nbytes):
                n_bytes = disk.write(block, payload.data, now := time.time_ns())
                written = True
                self._counters.add("bytes_written", n_bytes)
                with self._lock:
                    self._residents.put(DISK, block, n_bytes, now)
                    superfluous = [
                        key
                        for key in pending.overtaken
                        if self._residents.holds(DISK, key) and not self._residents.pinned(key)
                    ]
                    for key in superfluous:
                        self._residents.drop(DISK, key)
                        self._overtake(key)
                disk.remove(superfluous)
        with self._lock:
            self._residents.drop(PENDING, block.key)
            # An older version of the block may be there still; what it is, only the index knows.
            self._out_of_step |= not written
        if len(self._touched) >= _TOUCH_FLUSH:
            self._tell_uses()

    def _make_room(self, disk: DiskTier, block: Block, n_bytes: int) -> bool:
        """Bring the disk tier down so that `n_bytes` fit; False, counted, when they cannot."""
        residents, quota = self._residents, self.disk_quota
        others = disk.index.changed_by_others()
        with self._lock:
            if others or self._out_of_step:
                self._adopt_rows(disk)
            victims: list[tuple[bytes, int]] = []
            reachable = block.parent == block.namespace or residents.holds(DISK, block.parent)
            if reachable and n_bytes <= quota:
                excess = residents.room_with(DISK, block, n_bytes) - quota
                victims = residents.evict(DISK, residents.n_bytes(DISK) - max(excess, 0), keep=block.parent)
            fits = reachable and residents.room_with(DISK, block, n_bytes) <= quota
        disk.remove([key for key, _ in victims])
        if not fits:
            self._counters.add("saves_dropped")
        return fits

    def _remove_from_disk(self, keys: list[bytes]) -> None:
        with self._lock:
            disk = self._disk
            for key in keys:
                self._residents.drop(DISK, key)
        if disk is not None:
            with self._guarding("removing blocks"):
                disk.remove(keys)

    def _adopt_rows(self, disk: DiskTier) -> None:
        """Bring the picture in memory in line with the index."""
        rows = {row.block.key: row for row in disk.index.rows()}
        self._out_of_step = False
        for key in self._residents.keys(DISK):
            if key not in rows:
                self._residents.drop(DISK, key)
        for key, row in rows.items():
            if not self._residents.holds(DISK, key):
                self._residents.put(DISK, row.block, row.file_bytes, row.last_used)
            self._residents.learn(row.block)

    def _see_others(self) -> None:
        """Take in what other processes did to the directory since the last lookup."""
        disk, now = self._disk, time.monotonic()
        if disk is None or now < self._look_again:
            return
        self._look_again = now + _LOOK_SECONDS
        with self._guarding("reading the index"):
            if disk.index.changed_by_others() or self._out_of_step:
                self._adopt_rows(disk)

    def _tell_uses(self) -> None:
        with self._lock:
            touched, self._touched = self._touched, {}
            disk = self._disk
        if touched and disk is not None:
            with self._guarding("noting uses"):
                disk.index.touch(touched.items())

    def _unpin(self, blocks: tuple[Block, ...]) -> None:
        with self._lock:
            self._residents.unpin(blocks)

    @contextmanager
    def _guarding(self, action: str) -> Iterator[None]:
        """Count and log a storage fault instead of letting it reach a request."""
        try:
            yield
        except (OSError, sqlite3.Error, CacheError, MemoryError) as error:
            self._out_of_step = True
            self._counters.add("disk_errors")
            log.warning("%s failed: %s", action, error)


def _disk_root(disk: object) -> Path | None:
    if disk is None or disk is False:
        return None
    if disk is True:
        return Path(platformdirs.user_cache_dir("erllama")) / "kv"
    if not isinstance(disk, str | Path) or not str(disk) or "\0" in str(disk):
        raise OptionError(f"disk={disk!r}; give a directory, True for the user's cache directory, or None")
    try:
        return Path(disk).expanduser().absolute()
    except RuntimeError as error:
        raise OptionError(f"disk={disk!r}: {error}") from None


@atexit.register
def _close_all() -> None:
    for cache in list(_open_caches):
        cache.close()


def _after_fork_in_child() -> None:
    # The connection, the writer's thread and the locks stayed with the parent.
    for cache in list(_open_caches):
        cache._forked()
    _open_caches.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
