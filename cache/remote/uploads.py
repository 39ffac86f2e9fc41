"""Uploads and deletions of a remote tier, in threads of its own.

The thread of the write queue hands blocks over and does not wait for the network, which may be much slower than the
disks that it writes to. Until a block is uploaded, it is read from here. Each object has one operation at a time,
so that a deletion cannot overtake an upload. While the service does not answer, operations wait for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from erllama._runtime.log import logger
from erllama.cache.remote.daemon_threads import DaemonThreads
from erllama.cache.remote.health import CircuitBreaker
from erllama.cache.remote.manifest import Entry
from erllama.cache.remote.object_codec import ObjectCodec
from erllama.cache.remote.stores import ObjectStore
from erllama.errors import CacheError, RemoteError, RemoteUnreachable

log = logger("erllama.cache")

_THREADS = 2
# Between two tries of an operation that fails although the service answers others. The first retry is at once.
_FIRST_RETRY_SECONDS = 0.25
_LONGEST_RETRY_SECONDS = 30.0
_MOST_WAITING = 100_000  # operations, while the service does not answer; a deletion beyond them is left to `gc`


@dataclass(eq=False, slots=True)
class _Operation:
    """What to do with one object: upload a payload, or delete it if there is none."""

    entry: Entry | None
    payload: memoryview | None
    replace: bool = False


@dataclass(eq=False, slots=True)
class _Job:
    """The operation on one object, whether a thread works on the object, and when to try again."""

    wanted: _Operation
    running: bool = False
    n_failures: int = 0
    retry_at: float = 0.0  # by time.monotonic()


class Uploads:
    """The operations of one tier.

    Args:
        limit_bytes: maximum bytes of payloads that may wait.
        on_stored: called with the entry of each block that was uploaded.
        on_lost: called with the entry of each block that could not be uploaded.
        on_failure: called when the service failed. `resume` must be called once it answers.
    """

    def __init__(
        self,
        store: ObjectStore,
        codec: ObjectCodec,
        breaker: CircuitBreaker,
        limit_bytes: int,
        on_stored: Callable[[Entry], None],
        on_lost: Callable[[Entry, Exception], None],
        on_failure: Callable[[], None],
    ) -> None:
        self._store, self._codec, self._breaker = store, codec, breaker
        self._limit_bytes = limit_bytes
        self._on_stored, self._on_lost, self._on_failure = on_stored, on_lost, on_failure
        self._threads = DaemonThreads(_THREADS, "erllama-remote-writer")
        self._condition = threading.Condition()
        self._jobs: dict[str, _Job] = {}  # by the name of the object
        self._n_bytes = 0
        self.abandoned = False

    @property
    def n_bytes(self) -> int:
        """Bytes of payloads that wait."""
        return self._n_bytes

    @property
    def idle(self) -> bool:
        """Whether no operation waits or runs."""
        return not self._jobs

    def has_room(self, n_bytes: int) -> bool:
        """Return whether a payload may be added."""
        return self._n_bytes + n_bytes <= self._limit_bytes and len(self._jobs) < _MOST_WAITING

    def add(self, entry: Entry, payload: memoryview, *, replace: bool = False) -> None:
        """Upload a block.

        Args:
            replace: replace an object of this name, which others forged or damaged.
        """
        self._want(entry.object_name, _Operation(entry, payload, replace))

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects. Uploads of these names are cancelled."""
        for name in names:
            if name in self._jobs or len(self._jobs) < _MOST_WAITING:
                self._want(name, _Operation(None, None))

    def get(self, name: str) -> memoryview | None:
        """Return the payload of a block that waits to be uploaded."""
        job = self._jobs.get(name)
        return job.wanted.payload if job is not None else None

    def _want(self, name: str, operation: _Operation) -> None:
        with self._condition:
            job = self._jobs.get(name)
            if job is None:
                job = self._jobs[name] = _Job(operation)
            else:
                self._n_bytes -= _n_bytes(job.wanted)
                job.wanted = operation
            self._n_bytes += _n_bytes(operation)
            self._start(name, job)

    def _start(self, name: str, job: _Job) -> None:
        """Let a thread work on an object, unless one does or the service does not answer. Called with the lock."""
        if job.running or self._breaker.open or self.abandoned or time.monotonic() < job.retry_at:
            return
        job.running = True
        begun = self._threads.submit(partial(self._work, name))
        if begun.done() and begun.exception() is not None:
            job.running = False  # no thread could start; `resume` tries again

    def resume(self) -> None:
        """Start the operations that wait, because they have failed or no thread could start."""
        with self._condition:
            for name, job in self._jobs.items():
                self._start(name, job)

    def wait(self, timeout: float) -> bool:
        """Wait until no operation is left. Returns False if that takes longer, or the service does not answer."""
        deadline = time.monotonic() + timeout
        with self._condition:
            while self._jobs and not self.abandoned:
                left = deadline - time.monotonic()
                if left <= 0 or self._breaker.open:
                    return False
                self._condition.wait(min(left, 0.5))  # the breaker does not notify
            return not self._jobs

    def abandon(self) -> None:
        """Drop all operations that have not begun."""
        with self._condition:
            self.abandoned = True
            self._jobs.clear()
            self._n_bytes = 0
            self._condition.notify_all()

    # --- in the threads --------------------------------------------------------------------------------

    def _work(self, name: str) -> None:
        """Bring one object into the state that is wanted, which may change meanwhile."""
        while True:
            with self._condition:
                job = self._jobs.get(name)
                if job is None:
                    return
                operation = job.wanted
            error = self._try(name, operation)
            with self._condition:
                if self._jobs.get(name) is not job:
                    return  # abandoned
                if job.wanted is not operation:
                    continue
                if isinstance(error, RemoteUnreachable):
                    job.running = False  # `resume` starts it again
                    job.n_failures += 1
                    delay = min(_FIRST_RETRY_SECONDS * 2 ** min(job.n_failures, 10), _LONGEST_RETRY_SECONDS)
                    job.retry_at = time.monotonic() + (delay if job.n_failures > 1 else 0.0)
                    break
                del self._jobs[name]
                self._n_bytes -= _n_bytes(operation)
                # Before the lock is released: a block is either here or in the manifests to be.
                if operation.entry is not None and error is None:
                    self._on_stored(operation.entry)
                elif operation.entry is not None and error is not None:
                    self._on_lost(operation.entry, error)
                self._condition.notify_all()
            return
        self._on_failure()

    def _try(self, name: str, operation: _Operation) -> Exception | None:
        """Do one operation. Returns the error if it fails."""
        try:
            if operation.entry is None or operation.payload is None:
                self._store.delete([name])
            else:
                self._upload(name, operation.entry, operation.payload, operation.replace)
        except RemoteError as error:
            self._breaker.record_failure(error)
            return error
        except Exception as error:
            log.exception("an operation on %s failed unexpectedly", name)
            return CacheError(f"{name}: {error!r}")
        self._breaker.record_success()
        return None

    def _upload(self, name: str, entry: Entry, payload: memoryview, replace: bool) -> None:
        assert entry.block is not None
        # If the object exists, another machine has stored the same version: its content is as good as this one.
        self._store.put(name, self._codec.encode_block(entry.block, payload, entry.key_id), replace=replace)


def _n_bytes(operation: _Operation) -> int:
    return operation.payload.nbytes if operation.payload is not None else 0
