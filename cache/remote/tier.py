"""The remote tier: a bucket or a mounted directory in which several machines store blocks.

`Cache(remote=…)` creates it. A write hands the block to `Uploads` and returns. A list of the blocks, which
manifests keep in line with those of other machines, answers lookups. Reads run in threads of the tier: requests
wait for them only as long as computing would take (see `pipeline/fetcher.py`), and never while the service fails.
All blocks and manifests are signed, because whoever can write to the bucket could otherwise plant KV. With a key
file, they are encrypted, too.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from functools import partial
from typing import TypeVar

from erllama._runtime.log import logger
from erllama.cache.blocks.block import Block
from erllama.cache.blocks.encryption import Encryption
from erllama.cache.blocks.key_file import SecretKeys
from erllama.cache.remote.block_list import BlockList
from erllama.cache.remote.daemon_threads import DaemonThreads
from erllama.cache.remote.health import CircuitBreaker, ReadCost
from erllama.cache.remote.manifest import Entry, version_of
from erllama.cache.remote.manifest_log import ManifestLog
from erllama.cache.remote.object_codec import ObjectCodec
from erllama.cache.remote.stores import ObjectStore, do_nothing
from erllama.cache.remote.uploads import Uploads
from erllama.cache.tiers.tier import Changes, Problem, Tier, TierRow
from erllama.errors import (
    CacheError,
    CacheFormatError,
    CacheKeyError,
    CacheVersionError,
    RemoteError,
    RemoteUnreachable,
    SignatureRefused,
)

T = TypeVar("T")

log = logger("erllama.cache")

_random = random.SystemRandom()  # apart from the generator that a program may have seeded: machines must differ

REQUEST_SECONDS = 30.0  # of one request to the service: a block has some megabytes
_READ_SECONDS = 10.0  # that a caller of `read` waits
_START_SECONDS = 5.0  # that opening waits for the manifests; the rest is read in the background
_RETRY_SECONDS = 0.1  # between two attempts to write a manifest while the caller waits
_CLOSE_SECONDS = 60.0  # that closing waits for uploads
_POLL_SECONDS = 60.0  # between two listings of the manifests: each costs a request, on each machine
_PUBLISH_SECONDS = 5.0  # that a stored block may be unknown to other machines
_READERS = 4
READS_PER_POLL = 32  # segments: more are read once another machine has merged them
_WRITERS_PER_DELAY = 20  # machines beyond which each publishes less often, so that segments stay few
_USE_STEP_NS = 3600 * 10**9  # uses are told to other machines this rarely
_ORPHAN_SECONDS = 24 * 3600.0  # an object that no manifest lists by then belongs to a machine that ended before
_UPLOAD_BYTES = 256 << 20

# Tiers with blocks that are not uploaded, or not in a manifest yet. A cache that was dropped does not lose them.
busy_tiers: set[RemoteTier] = set()


class RemoteTier(Tier):
    """Blocks in a bucket or a mounted directory, shared by any number of machines.

    Args:
        store: where the objects lie.
        location: the address of the store, for messages.
        keys: sign and verify all objects.
        encryption: encrypts all objects and their names; None for no encryption.
        budget: maximum bytes of all blocks in the store, those of other machines included.
        lifetime: seconds after which an unused block is removed; None for never.
        read_only: never write to the store.
        upload_bytes: maximum bytes of blocks that may wait to be uploaded. Blocks beyond are dropped and counted.
        poll_seconds: between two listings of the manifests.
        publish_seconds: how long a stored block may be unknown to other machines.

    Raises (from `open`):
        RemoteAccessError: the service refuses this machine.
        CacheKeyError: there are manifests, and all of them are encrypted with other keys, or are not encrypted
            although there is `encryption`.
        RemoteUnreachable: the service does not answer. The tier keeps trying, and can be opened once it does.
    """

    def __init__(
        self,
        store: ObjectStore,
        location: str,
        keys: SecretKeys,
        budget: int,
        *,
        encryption: Encryption | None = None,
        lifetime: float | None = None,
        read_only: bool = False,
        upload_bytes: int = _UPLOAD_BYTES,
        poll_seconds: float = _POLL_SECONDS,
        publish_seconds: float = _PUBLISH_SECONDS,
    ) -> None:
        super().__init__("remote", budget)
        self.read_only = read_only
        self._store, self._location, self._lifetime = store, location, lifetime
        self._poll_seconds, self._publish_seconds = poll_seconds, publish_seconds
        self._codec = ObjectCodec(keys, encryption)
        self._cost = ReadCost()
        self._breaker = CircuitBreaker(location, partial(self._count, "remote_outages", 1))
        self._readers = DaemonThreads(_READERS, "erllama-remote-reader")
        self._upload_bytes = upload_bytes
        self._counts: Counter[str] = Counter()
        self._counts_lock = threading.Lock()
        self._own: set[str] = set()  # names of the objects that this machine stored
        # Objects that were refused, and whether others may be able to use them.
        self._refused: dict[str, bool] = {}
        self._gone: set[str] = set()  # objects that are missing though a manifest lists them
        self._on_change: Callable[[], None] = do_nothing
        self._is_open = False
        self._turn_lock = threading.Lock()  # one thread at a time reads and writes manifests
        self._poller: _Poller | None = None
        self._forget()

    def _forget(self) -> None:
        """Start from an empty list. What a thread still does with the old one has no effect."""
        self._blocks = BlockList()
        self._log = ManifestLog(
            self._store, self._codec, self._blocks, self._readers, self._count, self._on_replaced
        )
        self._uploads = Uploads(
            self._store,
            self._codec,
            self._breaker,
            self._upload_bytes,
            self._on_stored,
            self._on_lost,
            self._wake,
        )

    # --- state ---------------------------------------------------------------------------------------

    @property
    def location(self) -> str:
        return self._location

    def location_of(self, block: Block) -> str:
        entry = self._blocks.get(block.key)
        return f"{self._location}/{entry.object_name}" if entry is not None else super().location_of(block)

    @property
    def usable(self) -> bool:
        return self._is_open

    @property
    def problem(self) -> CacheError | None:
        return self._breaker.problem

    @property
    def serves(self) -> bool:
        """Whether requests may wait for reads now: the last call of the service succeeded."""
        return self._is_open and self._breaker.closed

    @property
    def unlisted(self) -> str | None:
        if (problem := self.unread_problem) is not None:
            return problem
        return "other machines have blocks that this one cannot use" if self._blocks.has_hidden else None

    @property
    def unread_problem(self) -> str | None:
        """Why manifests were not read, which may list any object; None if all were."""
        return self._log.unread_problem

    def counts(self) -> Mapping[str, int]:
        with self._counts_lock:
            return dict(self._counts)

    def _count(self, name: str, n: int = 1) -> None:
        with self._counts_lock:
            self._counts[name] += n

    # --- opening and closing -----------------------------------------------------------------------------

    def open(self) -> None:
        if self._is_open:
            return
        first = self._poller is None
        if self._poller is None:
            self._poller = _Poller(self)
        self._poller.polled.wait(_START_SECONDS if first else 0.0)
        error = self._poller.error
        if error is not None:
            raise error
        if not self._poller.polled.is_set():
            raise RemoteUnreachable(f"{self._location} did not answer within {_START_SECONDS:g} seconds")
        self._is_open = True

    def close(self) -> None:
        if self._poller is None:
            return
        complete = self.flush(_CLOSE_SECONDS) if self._is_open else True
        if not complete:
            log.warning("%d bytes could not be uploaded to %s and are lost", self._uploads.n_bytes, self._location)
        self.abandon()

    def abandon(self) -> None:
        """Stop without uploading what waits, as if the process had been killed."""
        poller, self._poller, self._is_open = self._poller, None, False
        if poller is not None:
            poller.stop()
        self._uploads.abandon()
        self._forget()
        busy_tiers.discard(self)

    def flush(self, timeout: float | None = None) -> bool:
        deadline = time.monotonic() + (_CLOSE_SECONDS if timeout is None else timeout)
        if not self._is_open or self.read_only:
            return True
        if not self._uploads.wait(max(deadline - time.monotonic(), 0.0)):
            return False
        if not self._turn_lock.acquire(timeout=max(deadline - time.monotonic(), 0.001)):
            return False
        try:
            # Again after a lost request: blocks in no manifest would be lost to other machines.
            while not self._try_to_publish():
                if self._breaker.open or time.monotonic() >= deadline:
                    return False
                time.sleep(_RETRY_SECONDS)
        finally:
            self._turn_lock.release()
        return True

    def _try_to_publish(self) -> bool:
        try:
            self._log.publish()
        except RemoteError as error:
            self._breaker.record_failure(error)
            return False
        return True

    # --- reading and writing -----------------------------------------------------------------------------

    def rows(self) -> Iterable[TierRow]:
        if not self._is_open and self._poller is None:
            raise RemoteUnreachable(f"{self._location} is not open")
        return self._blocks.rows()

    def size(self, block: Block, payload_bytes: int) -> int:
        return self._codec.block_bytes(block.n_tokens, payload_bytes)

    def write(self, block: Block, payload: memoryview) -> None:
        if self.read_only:
            raise CacheError(f"{self._location} is read-only")
        if not self._uploads.has_room(payload.nbytes):
            raise RemoteUnreachable(
                f"{self._uploads.n_bytes} bytes wait to be uploaded to {self._location} already"
            )
        version, key_id = version_of(block, payload), self._codec.key_id
        name = self._codec.name(block, version, key_id)
        entry = self._blocks.new_entry(block, self.size(block, payload.nbytes), version, name, key_id)
        self._own.add(name)
        self._gone.discard(name)
        # Before the block is listed: a read finds it here, or as an object.
        self._uploads.add(entry, payload, replace=self._refused.pop(name, None) is not None)
        replaced = self._blocks.store(entry)
        newest = self._blocks.get(block.key)
        if replaced is not None and (newest is None or replaced.object_name != newest.object_name):
            self._delete(replaced)
        busy_tiers.add(self)

    def read(self, block: Block) -> tuple[Block, memoryview]:
        entry = self._entry(block)
        if (waiting := self._waiting(entry)) is not None:
            return waiting
        try:
            return self.run(partial(self.read_now, block)).result(_READ_SECONDS)
        except FutureTimeout:
            raise RemoteUnreachable(f"{self.location_of(block)} was not read within {_READ_SECONDS:g} s") from None

    def run(self, call: Callable[[], T]) -> Future[T]:
        """Run a call in one of the tier's threads for reading."""
        return self._readers.submit(call)

    def _entry(self, block: Block) -> Entry:
        entry = self._blocks.get(block.key)
        if entry is None:
            raise FileNotFoundError(f"{self._location} has no block {block.key.hex()}")
        return entry

    def _waiting(self, entry: Entry) -> tuple[Block, memoryview] | None:
        """Return a block that waits to be uploaded."""
        payload = self._uploads.get(entry.object_name)
        return (entry.block, payload) if payload is not None and entry.block is not None else None

    def read_now(self, block: Block, on_response: Callable[[], None] = do_nothing) -> tuple[Block, memoryview]:
        """Read a block in this thread, however long it takes. Raises as `read` does.

        Args:
            on_response: called when the service has begun to answer.
        """
        entry = self._entry(block)
        if (waiting := self._waiting(entry)) is not None:
            return waiting
        if not self._breaker.closed:
            raise RemoteUnreachable(f"{self._location} does not answer; waiting until it does")
        self._count("remote_reads")
        began = time.monotonic()
        try:
            content = self._store.get(entry.object_name, entry.n_bytes, on_response)
        except RemoteError as error:
            self._breaker.record_failure(error)
            self._wake()
            raise
        except FileNotFoundError:
            self._breaker.record_success()
            if self._blocks.get(block.key) is not entry:
                return self.read_now(block, on_response)  # another version has replaced it meanwhile
            self._gone.add(entry.object_name)  # another machine has removed it
            raise
        self._breaker.record_success()
        self._cost.record(content.nbytes, time.monotonic() - began)
        self._count("remote_bytes_read", content.nbytes)
        return self._verified(entry, block, content)

    def _verified(self, entry: Entry, block: Block, content: memoryview) -> tuple[Block, memoryview]:
        try:
            found, payload = self._codec.decode_block(content, entry.key_id)
        except SignatureRefused as error:
            self._refused[entry.object_name] = error.unknown_key
            self._count("remote_signatures_refused")
            raise
        except CacheVersionError:
            self._refused[entry.object_name] = True
            raise
        fields = ("key", "parent", "namespace", "start", "tokens")
        if any(getattr(found, name) != getattr(block, name) for name in fields):
            raise CacheFormatError("the object contains another block than the manifest says")
        return found, payload

    def verify(self) -> Iterator[Problem]:
        for row in self.rows():
            try:
                self.read(row.block)
            except (CacheError, OSError) as error:
                yield Problem(self.name, self.location_of(row.block), str(error))

    def remove(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            entry = self._blocks.get(key)
            found = self._blocks.remove(key, gone=entry is not None and entry.object_name in self._gone)
            if found is not None and not self.read_only:
                self._log.append(found[0])
                self._delete(found[1])

    def _delete(self, entry: Entry) -> None:
        """Delete the object of a block that no longer counts."""
        name = entry.object_name
        self._uploads.delete([name])
        self._own.discard(name)
        self._gone.discard(name)
        self._refused.pop(name, None)

    def quarantine(self, block: Block) -> None:
        entry = self._blocks.get(block.key)
        if entry is not None and self._refused.get(entry.object_name):
            self._blocks.hide(block.key)  # its key is unknown, or a newer release wrote it: left where it is
        else:
            self.remove([block.key])

    def touch(self, used: Iterable[tuple[bytes, int]]) -> None:
        for key, at in used:
            entry = self._blocks.use(key, at, _USE_STEP_NS)
            if entry is not None and not self.read_only:
                self._log.append(entry)

    # --- the cost of reads, for the fetcher ----------------------------------------------------------------

    def expected_seconds(self, n_bytes: int, n_blocks: int) -> float:
        """Return how long it should take to read some blocks of so many bytes together, by recent reads."""
        return self._cost.expected(*self._per_reader(n_bytes, n_blocks))

    def _per_reader(self, n_bytes: int, n_blocks: int) -> tuple[int, int]:
        """Return the bytes and the number of blocks that one thread reads, if several read some blocks together."""
        n_rounds = -(-n_blocks // _READERS)
        return n_bytes * n_rounds // max(n_blocks, 1), n_rounds

    @property
    def round_trip_seconds(self) -> float:
        """How long the service should take until it begins to answer, by recent reads."""
        return self._cost.expected(0)

    def record_late(self, n_bytes: int, n_blocks: int, seconds: float, *, silent: bool) -> None:
        """Record that reads of some blocks of so many bytes together exceeded their deadline.

        Args:
            silent: the service has not begun to answer. Suspends reads until a probe succeeds.
        """
        self._count("remote_reads_late")
        if silent:
            self._cost.record_late(0, seconds)
            self._breaker.record_late()
            self._wake()
        else:
            of_one, n_rounds = self._per_reader(n_bytes, n_blocks)
            self._cost.record_late(of_one, seconds, n_rounds)

    def record_skipped(self) -> None:
        """Record that a request did not wait for the tier, because computing is faster."""
        self._count("remote_reads_skipped")

    # --- other machines ------------------------------------------------------------------------------------

    def watch(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change

    def changes(self) -> Changes | None:
        return self._blocks.take_changes()

    def uses(self) -> Iterable[tuple[bytes, int]]:
        return self._blocks.take_uses()

    @property
    def n_manifests(self) -> int:
        """The number of segments that were read."""
        return self._log.n_segments

    def read_all(self) -> None:
        """Read the manifests to the end, however long that takes."""
        with self._turn_lock:
            self._log.read_all()

    def repair(self) -> None:
        if not self.read_only and self._is_open:
            self.collect_garbage()

    def collect_garbage(self) -> int:
        """Read all manifests, merge them, and remove objects older than a day that none of them lists.

        If manifests were not read, no object is removed, because they may list it. `unread_problem` says why.

        Returns:
            the number of removed objects.
        """
        self.flush()
        self.read_all()
        with self._turn_lock:
            self._log.merge(always=True)
            problem = self.unread_problem
        if problem is not None:
            log.warning("%s: %s; no object is removed", self._location, problem)
            return 0
        before, known = time.time() - _ORPHAN_SECONDS, self._blocks.names()
        names = [
            each.name
            for kind in (*self._codec.prefixes, "checks")
            for each in self._store.list(kind)
            if each.written < before
        ]
        orphans = [name for name in names if name not in known]
        self._store.delete(orphans)
        return len(orphans)

    # --- in the poller's thread, and in those of the uploads -------------------------------------------------

    def _wake(self) -> None:
        poller = self._poller
        if poller is not None:
            poller.wake.set()

    def _on_stored(self, entry: Entry) -> None:
        self._log.append(entry)
        self._wake()

    def _on_lost(self, entry: Entry, error: Exception) -> None:
        log.info("a block could not be uploaded to %s: %s", self._location, error)
        self._count("remote_uploads_lost")
        self._own.discard(entry.object_name)
        if self._blocks.lose(entry):
            self._on_change()

    def _on_replaced(self, entries: Sequence[Entry]) -> None:
        """Delete the objects that this machine stored and another one has replaced."""
        names = [entry.object_name for entry in entries if entry.object_name in self._own]
        self._own.difference_update(names)
        self._uploads.delete(names)

    def turn(self, poller: _Poller) -> float:
        """Do what is due, and return in how many seconds to call again."""
        probe = self._breaker.seconds_to_probe()
        if probe is not None and probe > 0:
            return probe
        now, called = time.monotonic(), False
        try:
            with self._turn_lock:
                if poller is not self._poller:
                    return 0.0  # the tier was closed
                publish = self._log.seconds_to_publish(self._publish_delay)
                if publish == 0.0 and not self.read_only and probe is None:
                    self._log.publish()
                    called = True
                if not poller.polled.is_set() and not self.read_only:
                    self._store.create()
                if not poller.polled.is_set() or probe is not None:
                    self._check_access()
                if now >= poller.next_poll or probe is not None:
                    self._poll(poller, now)
                    called = True
        except Exception as error:
            if not isinstance(error, RemoteError | CacheKeyError):
                log.exception("reading the manifests of %s failed unexpectedly", self._location)
                error = RemoteUnreachable(f"{self._location}: {error!r}")
            poller.report(error)
            self._breaker.record_failure(error)
            return self._breaker.seconds_to_probe() or 0.0
        if called:
            self._breaker.record_success()
        self._uploads.resume()
        if self._blocks.has_changes:
            self._on_change()
        busy_tiers.discard(self)
        if not self._uploads.idle or self._log.has_waiting:
            busy_tiers.add(self)
        dues = [poller.next_poll - time.monotonic()]
        if (publish := self._log.seconds_to_publish(self._publish_delay)) is not None and not self.read_only:
            dues.append(publish)
        return max(min(dues), 0.0)

    @property
    def _publish_delay(self) -> float:
        delay = self._publish_seconds * max(self._log.n_writers / _WRITERS_PER_DELAY, 1.0)
        return min(delay, max(self._poll_seconds, self._publish_seconds))

    def _check_access(self) -> None:
        """Write, read and remove a small object. Raises RemoteError if one of that fails.

        A listing alone may succeed where reads and writes are refused.
        """
        if self.read_only:
            return
        name, content = f"checks/{secrets.token_hex(8)}", b"erllama writes, reads and removes this object"
        self._store.put(name, [content])
        began = time.monotonic()
        with suppress(FileNotFoundError):  # a rule of the bucket removed it at once
            self._store.get(name, len(content))
            self._cost.record(len(content), time.monotonic() - began)
        self._store.delete([name])

    def _poll(self, poller: _Poller, now: float) -> None:
        first, caught_up = not poller.polled.is_set(), poller.caught_up
        complete = self._log.read_new(now + _START_SECONDS, READS_PER_POLL if caught_up else None)
        if self._log.key_problem is not None and not self._is_open:
            raise CacheKeyError(f"{self._location}: {self._log.key_problem}")
        poller.caught_up = caught_up or complete
        # Machines that start together must not list together.
        poller.next_poll = now + self._poll_seconds * _random.uniform(0.75, 1.25) if complete else now
        poller.report(None)
        if not first and complete and not self.read_only:
            self._expire()
            if self._log.should_merge:
                self._log.merge()

    def _expire(self) -> None:
        """Remove blocks that were not used for their lifetime. Machines do so at different times."""
        self._log.forget_removals()
        if self._lifetime is None:
            return
        before = time.time() - self._lifetime * _random.uniform(1.0, 1.1)
        for key in self._blocks.unused_since(int(before * 10**9)):
            entry = self._blocks.get(key)
            found = self._blocks.remove(key) if entry is not None else None
            if found is not None:
                self._count("remote_expired")
                self._log.append(found[0])
                self._delete(found[1])
                self._blocks.mark_changed(key)


class _Poller:
    """The thread that exchanges manifests with other machines. Keeps the tier no longer than its turn.

    Attributes:
        polled: set once the manifests were read, or that failed.
        error: why the last attempt failed; None if it succeeded.
        wake: set to begin the next turn now.
        next_poll: when to read the manifests next, by time.monotonic().
        caught_up: whether all manifests that there were at the start have been read.
    """

    def __init__(self, tier: RemoteTier) -> None:
        self.polled = threading.Event()
        self.error: CacheError | None = None
        self.wake = threading.Event()
        self.next_poll = 0.0
        self.caught_up = False
        self._stopped = False
        reference = weakref.ref(tier)
        thread = threading.Thread(target=self._run, args=(reference,), name="erllama-remote-poller", daemon=True)
        thread.start()

    def report(self, error: CacheError | None) -> None:
        self.error = error
        self.polled.set()

    def stop(self) -> None:
        self._stopped = True
        self.wake.set()

    def _run(self, reference: weakref.ref[RemoteTier]) -> None:
        while not self._stopped:
            self.wake.clear()
            tier = reference()
            if tier is None:
                return
            delay = tier.turn(self)
            del tier
            if delay > 0:
                self.wake.wait(min(delay, 1.0))
