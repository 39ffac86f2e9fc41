"""The cache: finds, loads and saves blocks across its tiers, within their budgets.

Callers are the engine's model threads; any number of models and threads may
share one cache. Lookups touch memory only. Loads may read a file. Saves land
in RAM and are written behind to the disk. Nothing here raises at a request
because storage failed: it is a miss or an unsaved block, counted and logged.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import sqlite3
import threading
import time
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Never

import numpy as np
import platformdirs
from erllama.cache import kvc
from erllama.cache.blocks import Block
from erllama.cache.counters import Counters
from erllama.cache.disk import DiskTier
from erllama.cache.keys import TOKEN_BYTES, child_key, token_bytes
from erllama.cache.lru import LeafLRU
from erllama.cache.match import Loaded, Match, Row
from erllama.cache.sizes import parse_bytes
from erllama.cache.tree import BlockTree
from erllama.cache.writer import TAIL_DELAY_SECONDS, Pending, WriteBehind
from numpy.typing import NDArray

from erllama.errors import CacheError, CacheFormatError, OptionError, integer, reject_unknown

log = logging.getLogger("erllama.cache")

RAM, DISK, PENDING = "ram", "disk", "pending"
TIERS = (RAM, DISK)

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
        self._tree = BlockTree()
        self._ram: dict[bytes, NDArray[np.uint8]] = {}
        self._lru = {RAM: LeafLRU(), DISK: LeafLRU()}
        self._pins: Counter[bytes] = Counter()
        self._touched: dict[bytes, int] = {}
        self._counters = Counters()
        self._fingerprints: dict[str, str] = {}
        self._closed = False
        self.disk_error: CacheError | None = None
        self._disk: DiskTier | None = None
        if root is not None:
            self._open_disk(root)
        self._writer = WriteBehind(self._persist, queue_bytes)
        _open_caches.add(self)

    def _open_disk(self, root: Path) -> None:
        try:
            self._disk = DiskTier(root)
            self._adopt_rows()
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
            raw = token_bytes(tokens)
            self._see_others()
            blocks, n_tokens = self._walk(namespace, raw, whole)
            now = time.time_ns()
            for block in blocks:
                self._pins[block.key] += 1
                self._touch(block.key, now)
        return Match(tuple(blocks), n_tokens, self._unpin)

    def _walk(self, namespace: bytes, raw: bytes, whole: bool) -> tuple[list[Block], int]:
        blocks: list[Block] = []
        parent, at, step = namespace, 0, self.block_size * TOKEN_BYTES
        while at < len(raw):
            rest = raw[at : at + kvc.MAX_TOKENS * TOKEN_BYTES]
            entry = self._tree.get(child_key(parent, rest[:step])) if len(rest) >= step else None
            shared = self.block_size
            if entry is None and whole:
                entry = self._tree.longest_whole(parent, rest)
                shared = entry.block.n_tokens if entry else 0
            elif entry is None:
                best = self._tree.longest_shared(parent, rest)
                entry, shared = best or (None, 0)
            if entry is None or entry.block.namespace != namespace or entry.block.start != at // TOKEN_BYTES:
                break
            blocks.append(entry.block)
            at += shared * TOKEN_BYTES
            if shared < entry.block.n_tokens:
                break
            parent = entry.block.key
        return blocks, at // TOKEN_BYTES

    def load(self, block: Block) -> Loaded | None:
        """The payload of a block, from the fastest place that has it.

        Returns:
            None when no place can give it, undamaged; the block is then forgotten.
        """
        with self._counters.timing("load"):
            with self._lock:
                payload = self._ram.get(block.key)
            if payload is None:
                payload = self._writer.get(block.key)
            return self._load_from_disk(block) if payload is None else Loaded(RAM, payload.data)

    def _load_from_disk(self, block: Block) -> Loaded | None:
        if self._disk is None:
            return None
        try:
            payload = self._disk.read(block)
        except CacheFormatError as error:
            log.warning("%s: %s; not used", self._disk.path_of(block.key), error)
            self._counters.add("corrupt_files")
            with self._guarding_disk("setting a damaged file aside"):
                self._disk.set_aside(block.key)
            self._forget(DISK, block.key)
            return None
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("%s cannot be read: %s", self._disk.path_of(block.key), error)
                self._counters.add("disk_errors")
            self._forget(DISK, block.key)
            return None
        with self._lock:
            if block.key in self._lru[DISK]:  # promote
                self._put_in_ram(block, np.frombuffer(payload, np.uint8))
        return Loaded(DISK, payload)

    def save(
        self, block: Block, payload: NDArray[np.uint8], *, replace: bool = False, trimmable: bool = True
    ) -> bool:
        """Store a block: in RAM at once, on disk behind the caller's back.

        Args:
            block: its parent is stored already, or is the namespace.
            payload: uint8 array, shape (bytes,); not changed by the caller afterwards.
            replace: store it even where a block of this key is stored.
            trimmable: whether its payload can be cut after restoring. Then it takes
                the place of shorter tails; otherwise only a full block does.

        Returns:
            False when it is stored already, or nowhere has room.
        """
        block_payload = np.ascontiguousarray(payload, np.uint8)
        with self._lock:
            if self._closed:
                return False
            if self._tree.get(block.key) is not None and not replace:
                self._counters.add("duplicates_dropped")
                return False
            if replace:
                self._drop(RAM, block.key)
                entry = self._tree.get(block.key)
                if entry is not None:
                    entry.block = block
            whole = trimmable or block.n_tokens >= self.block_size
            overtaken = self._tree.overtaken_by(block) if whole else []
            in_ram = self._put_in_ram(block, block_payload)
            queued = self._offer_to_disk(block, block_payload, tuple(tail.key for tail in overtaken))
            if not in_ram and not queued:
                self._counters.add("saves_dropped")
                return False
            self._counters.add(f"saves_{block.reason.name.lower()}")
            for tail in overtaken:
                if not self._pins[tail.key]:
                    self._overtake(tail.key)
        return True

    def _offer_to_disk(self, block: Block, payload: NDArray[np.uint8], overtaken: tuple[bytes, ...]) -> bool:
        if self._disk is None:
            return False
        reachable = (
            block.parent == block.namespace or block.parent in self._lru[DISK] or block.parent in self._writer
        )
        delay = 0.0 if block.n_tokens >= self.block_size else TAIL_DELAY_SECONDS
        if reachable and self._writer.offer(block, payload, overtaken, delay):
            self._tree.add(block, PENDING)
            return True
        if self.ram_budget:  # else the caller counts it
            self._counters.add("saves_dropped")
        return False

    def _overtake(self, key: bytes) -> None:
        """Drop a tail whose successor is stored; from the disk only once that is there, too."""
        self._drop(RAM, key)
        if self._writer.cancel(key):
            self._tree.discard(key, PENDING)
        if self._tree.get(key) is None:
            self._counters.add("tails_overtaken")

    def contains(self, key: bytes) -> bool:
        """Whether a block is stored anywhere."""
        with self._lock:
            return self._tree.get(key) is not None

    def stored(self, key: bytes) -> Block | None:
        """The stored block of this key, if any."""
        with self._lock:
            entry = self._tree.get(key)
            return entry.block if entry else None

    def count_request(self, kind: str, tokens_reused: int) -> None:
        """Count how a request was served: "exact", "partial" or "cold"."""
        with self._lock:
            self._counters.add("misses" if kind == "cold" else f"hits_{kind}")
            self._counters.add("tokens_reused", tokens_reused)

    def reject(self, block: Block, error: Exception) -> None:
        """Forget a block whose payload the backend refused."""
        log.warning("a stored block of %d tokens could not be restored: %s; dropped", block.n_tokens, error)
        with self._lock:
            self._counters.add("restore_errors")
            self._drop(RAM, block.key)
            if self._writer.cancel(block.key):
                self._tree.discard(block.key, PENDING)
            on_disk = block.key in self._lru[DISK]
        if on_disk:
            self._remove_from_disk([block.key])

    # --- fingerprints ---------------------------------------------------------------------

    @property
    def persistent(self) -> bool:
        """Whether blocks survive this process."""
        return self._disk is not None

    def fingerprint(self, identity: str) -> str | None:
        """The digest remembered for a file's identity."""
        with self._lock:
            if identity in self._fingerprints:
                return self._fingerprints[identity]
        if self._disk is not None:
            with self._guarding_disk("reading a fingerprint"):
                return self._disk.index.fingerprint(identity)
        return None

    def remember_fingerprint(self, identity: str, sha256: str) -> None:
        """Remember a file's digest, on disk where there is one."""
        with self._lock:
            self._fingerprints[identity] = sha256
        if self._disk is not None:
            with self._guarding_disk("noting a fingerprint"):
                self._disk.index.remember_fingerprint(identity, sha256)

    # --- what an operator calls --------------------------------------------------------------

    def counters(self) -> Mapping[str, int | float]:
        """Counts since this cache was made, seconds spent, and bytes held now, by name."""
        with self._lock:
            found = self._counters.snapshot()
            found |= {f"bytes_{tier}": self._lru[tier].n_bytes for tier in TIERS}
            found |= {f"blocks_{tier}": len(self._lru[tier]) for tier in TIERS}
            found["bytes_pending"] = self._writer.n_bytes
        return found

    def rows(self) -> list[Row]:
        """Every block that is stored: key, tier, position, tokens, bytes and pins."""
        with self._lock:
            return [
                Row(key, tier, entry.block.start, entry.block.n_tokens, lru.size_of(key), self._pins[key])
                for tier, lru in self._lru.items()
                for key in lru
                if (entry := self._tree.get(key)) is not None
            ]

    def evict_bytes(self, n_bytes: int, tiers: tuple[str, ...] = (RAM,)) -> int:
        """Free at least `n_bytes`, least recently used first; returns the bytes freed."""
        n_bytes = parse_bytes("n_bytes", n_bytes)
        for tier in tiers:
            if tier not in TIERS:
                raise OptionError(f"tiers={tiers!r}; it takes {', '.join(TIERS)}")
        freed = 0
        for tier in tiers:
            with self._lock:
                victims = self._choose_victims(tier, self._lru[tier].n_bytes - (n_bytes - freed))
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
            if self._closed:
                return
            self._closed = True
        self.flush()
        with self._lock:
            disk, self._disk = self._disk, None
            self._tree = BlockTree()
            self._ram.clear()
            self._lru = {RAM: LeafLRU(), DISK: LeafLRU()}
        if disk is not None:
            disk.close()
        _open_caches.discard(self)

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside ------------------------------------------------------------------------------

    def _put_in_ram(self, block: Block, payload: NDArray[np.uint8]) -> bool:
        lru = self._lru[RAM]
        if block.key in lru or payload.nbytes > self.ram_budget:
            return block.key in lru
        self._choose_victims(RAM, self.ram_budget - payload.nbytes, keep=block.parent)
        if lru.n_bytes + payload.nbytes > self.ram_budget:
            return False
        self._ram[block.key] = payload
        lru.add(block.key, block.parent, payload.nbytes, time.time_ns())
        self._tree.add(block, RAM)
        return True

    def _choose_victims(self, tier: str, target: int, keep: bytes = b"") -> list[tuple[bytes, int]]:
        """Take the least recently used blocks out of a tier until `target` bytes are left."""
        lru = self._lru[tier]
        pinned = {key for key, n in self._pins.items() if n} | {keep}
        victims = []
        while lru.n_bytes > max(target, 0) and (key := lru.oldest_leaf(pinned)) is not None:
            victims.append((key, lru.size_of(key)))
            self._drop(tier, key)
            self._counters.add(f"evictions_{tier}")
        return victims

    def _drop(self, tier: str, key: bytes) -> None:
        self._lru[tier].remove(key)
        if tier == RAM:
            self._ram.pop(key, None)
        self._tree.discard(key, tier)

    def _forget(self, tier: str, key: bytes) -> None:
        with self._lock:
            self._drop(tier, key)

    def _persist(self, pending: Pending) -> None:
        """Write one save; the writer's thread calls it."""
        block, payload = pending.block, pending.payload
        disk = self._disk
        if disk is None:
            return
        with self._counters.timing("write"), self._guarding_disk(f"writing a block of {block.n_tokens} tokens"):
            if self._make_room(block, kvc.header_bytes(block.n_tokens) + payload.nbytes):
                n_bytes = disk.write(block, payload.data, now := time.time_ns())
                with self._lock:
                    self._lru[DISK].remove(block.key)
                    self._lru[DISK].add(block.key, block.parent, n_bytes, now)
                    self._tree.add(block, DISK)
                    self._counters.add("bytes_written", n_bytes)
                    overtaken = [key for key in pending.overtaken if key in self._lru[DISK] and not self._pins[key]]
                    for key in overtaken:
                        self._drop(DISK, key)
                        self._overtake(key)
                disk.remove(overtaken)
        with self._lock:
            self._tree.discard(block.key, PENDING)
        if len(self._touched) >= _TOUCH_FLUSH:
            self._tell_uses()

    def _make_room(self, block: Block, n_bytes: int) -> bool:
        """Bring the disk tier down so that `n_bytes` fit; False, counted, when they cannot."""
        with self._lock:
            lru = self._lru[DISK]
            held = lru.size_of(block.key) if block.key in lru else 0
            victims: list[tuple[bytes, int]] = []
            reachable = block.parent == block.namespace or block.parent in lru
            if reachable and n_bytes <= self.disk_quota:
                victims = self._choose_victims(DISK, self.disk_quota - n_bytes + held, keep=block.parent)
            fits = reachable and lru.n_bytes - held + n_bytes <= self.disk_quota
            if not fits:
                self._counters.add("saves_dropped")
        if self._disk is not None:
            self._disk.remove([key for key, _ in victims])
        return fits

    def _remove_from_disk(self, keys: list[bytes]) -> None:
        with self._lock:
            for key in keys:
                self._drop(DISK, key)
        if self._disk is not None and keys:
            with self._guarding_disk("removing blocks"):
                self._disk.remove(keys)

    def _adopt_rows(self) -> None:
        """Bring the picture in memory in line with the index."""
        assert self._disk is not None
        rows = {row.block.key: row for row in self._disk.rows()}
        lru = self._lru[DISK]
        for key in [key for key in lru if key not in rows]:
            self._drop(DISK, key)
        for key, row in rows.items():
            if key not in lru:
                lru.add(key, row.block.parent, row.file_bytes, row.last_used)
                self._tree.add(row.block, DISK)

    def _see_others(self) -> None:
        """Take in what other processes did to the directory since the last lookup."""
        if self._disk is not None:
            with self._guarding_disk("reading the index"):
                if self._disk.index.changed_by_others():
                    self._adopt_rows()

    def _touch(self, key: bytes, now: int) -> None:
        for lru in self._lru.values():
            lru.touch(key, now)
        if key in self._lru[DISK]:
            self._touched[key] = now

    def _tell_uses(self) -> None:
        with self._lock:
            touched, self._touched = self._touched, {}
        if touched and self._disk is not None:
            with self._guarding_disk("noting uses"):
                self._disk.index.touch(touched.items())

    def _unpin(self, blocks: tuple[Block, ...]) -> None:
        with self._lock:
            for block in blocks:
                self._pins[block.key] -= 1
                if not self._pins[block.key]:
                    del self._pins[block.key]

    def _guarding_disk(self, action: str) -> contextlib.AbstractContextManager[None]:
        return _Guard(self, action)


class _Guard(contextlib.AbstractContextManager[None]):
    """Counts and logs a storage fault instead of letting it reach a request."""

    def __init__(self, cache: Cache, action: str) -> None:
        self._cache, self._action = cache, action

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> bool:
        if not isinstance(error, OSError | sqlite3.Error | CacheError):
            return False
        self._cache._counters.add("disk_errors")
        log.warning("%s failed: %s", self._action, error)
        return True


def _disk_root(disk: object) -> Path | None:
    if disk is None or disk is False:
        return None
    if disk is True:
        return Path(platformdirs.user_cache_dir("erllama")) / "kv"
    if not isinstance(disk, str | Path) or not str(disk):
        raise OptionError(f"disk={disk!r}; give a directory, True for the user's cache directory, or None")
    return Path(disk).expanduser().absolute()


@atexit.register
def _close_all() -> None:
    for cache in list(_open_caches):
        cache.close()
