"""The model thread: takes requests from a queue and runs them on one backend.

One request at a time, first come first served. Only this thread touches the
backend (its vocabulary and `abort` apart). A request that fails, fails alone.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from typing import Literal

from erllama.cache import Cache, Policy, SaveReason
from erllama.engine.backend import Backend
from erllama.engine.request import CacheHit, Request, Ticket
from erllama.engine.sequence import Sequence
from erllama.engine.warmth import shared_warmth
from erllama.errors import BackendError, Error, ModelUnloaded

log = logging.getLogger("erllama.engine")

# evict() and stop() wait that long for the disk: a hung one must not hang them.
_SYNCHRONOUS_SAVE_SECONDS = 30.0

Phase = Literal["idle", "prefilling", "generating"]


class Runner:
    """Runs requests on a backend in a thread of its own.

    Args:
        backend: closed when the runner is.
        cache: shared with other runners; not closed.
        policy: what is saved, and when.
        name: for the thread and the log.
    """

    def __init__(self, backend: Backend, cache: Cache, policy: Policy, name: str) -> None:
        self._backend = backend
        self._cache = cache
        self._shared = shared_warmth(cache, backend, policy)
        self._name = name
        self._condition = threading.Condition()
        self._queue: deque[tuple[Ticket, float]] = deque()
        self._stopping = False
        self._evicting: list[threading.Event] = []  # callers of evict() that wait
        self._saved_at_stop = False
        self._process = os.getpid()
        # Read without a lock, by anyone, at any time.
        self.phase: Phase = "idle"
        self.last_hit: CacheHit | None = None
        self._thread = threading.Thread(target=self._run, name=f"erllama-model-{name}", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def stopped(self) -> bool:
        return self._stopping

    def check(self) -> None:
        """Raise ModelUnloaded if no request can run here any more."""
        if self._process != os.getpid():
            raise ModelUnloaded(
                f"model {self._name!r} was loaded before this process was forked and does not run in it; "
                "load models after forking, or start workers with multiprocessing's 'spawn' method"
            )
        if self._stopping:
            raise ModelUnloaded(f"model {self._name!r} is unloaded; load it again to use it")

    def submit(self, request: Request) -> Ticket:
        """Queue a request.

        Raises:
            ModelUnloaded: the runner was stopped.
        """
        self.check()  # before the lock, which a fork may have left taken
        ticket = Ticket(request)
        with self._condition:
            self.check()
            self._queue.append((ticket, time.perf_counter()))
            self._condition.notify_all()
        return ticket

    def stop(self) -> None:
        """End the present request and those that wait with ModelUnloaded, and close the backend. Idempotent."""
        with self._condition:
            first = not self._stopping
            self._stopping = True
            self._condition.notify_all()
        if self._process != os.getpid():
            return  # the thread stayed with the parent
        if first:
            self._backend.abort(True)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if first and self._saved_at_stop:
            self._cache.flush(_SYNCHRONOUS_SAVE_SECONDS)

    def evict(self) -> None:
        """Save what the context holds, at the next token, and wait until that is stored; then let go of idle KV."""
        self.check()
        done = threading.Event()
        with self._condition:
            self.check()
            self._evicting.append(done)
            self._condition.notify_all()
        done.wait()
        self._cache.flush(_SYNCHRONOUS_SAVE_SECONDS)

    def _run(self) -> None:
        try:
            while (admitted := self._next()) is not None:
                ticket, queued_at = admitted
                self._serve(ticket, time.perf_counter() - queued_at)
        finally:
            with self._condition:
                self._stopping = True
                waiting, self._queue = self._queue, deque()
                self._evicted()
            for ticket, _ in waiting:
                ticket.fail(self._unloaded())
            self._backend.close()

    def _next(self) -> tuple[Ticket, float] | None:
        with self._condition:
            self.phase = "idle"
            while not self._stopping:
                if self._evicting:
                    self._backend.clear()  # all of it was saved when its request ended
                    self._evicted()
                if self._queue:
                    return self._queue.popleft()
                self._condition.wait()
            return None

    def _evicted(self) -> None:
        """Tell who waits; under the lock."""
        for done in self._evicting:
            done.set()
        self._evicting.clear()

    def _serve(self, ticket: Ticket, queued: float) -> None:
        try:
            # Cleared, so that cells are taken in the same order every time.
            self._backend.clear()
            self.phase = "prefilling"
            sequence = Sequence(ticket, 0, self._shared, queued)
            sequence.restore()
            self.last_hit = sequence.hit
            try:
                self._run_to_end(ticket, sequence)
            except BaseException:
                if self._stopping:
                    self._save_at_stop(sequence)
                raise
            sequence.save(SaveReason.FINISH)
            ticket.finish(sequence.completion())
        except Error as error:
            ticket.fail(self._unloaded() if self._stopping else error)
        except BaseException as error:
            # SystemExit, too: no interrupt is meant for this thread, and whoever waits must not wait for ever.
            log.exception("a request on model %r failed unexpectedly", self._name)
            failure = BackendError(f"the request failed unexpectedly: {type(error).__name__}: {error}")
            failure.__cause__ = error
            ticket.fail(failure)

    def _run_to_end(self, ticket: Ticket, sequence: Sequence) -> None:
        while sequence.finish_reason is None:
            if self._stopping:
                raise self._unloaded()
            if ticket.cancelled:
                sequence.finish_reason = "cancelled"
                break
            if self._evicting:
                sequence.save(SaveReason.EVICT)
                with self._condition:
                    self._evicted()
            batch = sequence.next_batch()
            logits = self._backend.decode(batch)
            sequence.decoded(batch, logits)
            self.phase = "prefilling" if sequence.prefilling else "generating"

    def _save_at_stop(self, sequence: Sequence) -> None:
        """Keep what an interrupted request had computed."""
        try:
            if sequence.recover():
                sequence.save(SaveReason.SHUTDOWN)
                self._saved_at_stop = True
        except Exception:
            log.warning("model %r: the interrupted request could not be saved", self._name, exc_info=True)

    def _unloaded(self) -> ModelUnloaded:
        return ModelUnloaded(f"model {self._name!r} was unloaded while the request ran or waited")
