"""The model thread: receives requests from callers' threads, and runs the scheduler's ticks.

Owns the queue, the sessions and the lifecycle of one model. Only this thread touches the backend, except its
vocabulary and `abort`. Models make one `ModelThread` each. On any failure, waiting requests end with an
error.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np
from numpy.typing import NDArray

from erllama._runtime.log import logger
from erllama.cache import Cache, Policy
from erllama.cache.uninterrupted import running as running_calls
from erllama.cache.uninterrupted import uninterrupted
from erllama.checks import check_not_forked
from erllama.engine.adapters import AdapterBackend, AdapterSet, LoadedAdapter
from erllama.engine.backend import Backend
from erllama.engine.grammar.grammar import Grammar
from erllama.engine.kv.sequence_kv import LIVE
from erllama.engine.metrics import EngineMetrics
from erllama.engine.requests.request import CacheHit
from erllama.engine.requests.ticket import Ticket
from erllama.engine.scheduling.live_tier import LiveTier
from erllama.engine.scheduling.model_context import ModelContext
from erllama.engine.scheduling.scheduler import Phase, Scheduler
from erllama.engine.scheduling.sequence import Sequence
from erllama.engine.scheduling.thread_call import ThreadCall, UnawaitedCall
from erllama.engine.scheduling.tick_clock import TickClock
from erllama.errors import (
    AdapterLoadError,
    BackendError,
    CalledFromModelThread,
    ModelUnloaded,
    QueueFull,
    SessionBusy,
)

log = logger("erllama.engine")

_RETRY_SECONDS = 0.01  # between ticks while all running requests wait for saves of others
_START_SECONDS = 5.0


class ModelThread:
    """Runs requests on a backend in a thread of its own.

    Args:
        backend: the model; closed when the thread ends.
        cache: shared with other models; not closed.
        policy: what is saved, and when.
        name: names the model in the thread's name and the log.
        n_seq_max: maximum number of requests that run at once.
        prefill_chunk_size: maximum number of tokens of prompts in one tick while replies are generated.
        parked_cells: cells that finished sequences may keep while others compute.
        max_pending: maximum number of requests that may wait.
        on_stopped: called in the model thread as the last step of its end.

    Attributes:
        adapters: the model's adapters.
        restarts: always 0: it runs in this process.
    """

    restarts = 0

    def __init__(
        self,
        backend: Backend,
        cache: Cache,
        policy: Policy,
        name: str,
        *,
        n_seq_max: int,
        prefill_chunk_size: int,
        parked_cells: int,
        max_pending: int,
        on_stopped: Callable[[], object] | None = None,
    ) -> None:
        self._backend = backend
        self._on_stopped = on_stopped
        self._cache = cache
        self._policy = policy
        self._stopping = False
        self._context = ModelContext.of(cache, backend, policy)
        self.adapters = self._context.adapters
        limits = backend.limits
        self._name = name
        self._n_seq_max, self._max_pending = n_seq_max, max_pending
        # Ctrl-C cannot interrupt between the acquisition of such a lock and the `with`. Reentrant, for signal
        # handlers.
        self._lock = threading.RLock()
        # Not a Condition, which is written in Python: after a signal handler's exception within `notify()` the
        # model thread may never wake again. `put` is one step, and safe in signal handlers.
        self._wakeups: SimpleQueue[None] = SimpleQueue()
        self._queue: deque[Sequence] = deque()
        self._sessions: dict[tuple[bytes, str], Sequence] = {}  # by tenant and session_id
        self._calls: deque[ThreadCall | UnawaitedCall] = deque()
        self._failure: BackendError | None = None  # why the model cannot continue
        self._saved_at_stop = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name=f"erllama-model-{name}", daemon=True)
        self._tier: LiveTier | None = None
        try:
            if limits.cell_bytes and not cache.closed:
                location = f"the context of model {name!r}"
                self._tier = LiveTier(cache, LIVE, location, limits.cell_bytes, limits.n_ctx)
            self._scheduler = Scheduler(
                self._context,
                n_seq_max=n_seq_max,
                prefill_chunk_size=prefill_chunk_size,
                parked_cells=parked_cells,
                tier=self._tier,
                on_end=self._on_end,
                stopping=lambda: self._stopping,
            )
            uninterrupted(self._thread.start)()
            self._context.prefix_cache.warm_pins()
        except BaseException:
            self._undo_start()
            raise

    def _undo_start(self) -> None:
        """Clean up after `__init__` was interrupted. The thread may have started."""
        self._stopping = True
        self._notify()
        deadline = time.monotonic() + _START_SECONDS
        while self._thread.ident is None and running_calls and time.monotonic() < deadline:
            time.sleep(0.001)
        if self._thread.ident is not None:
            self._thread.join()  # the thread detaches the tier, and closes the backend
        elif self._tier is not None:
            self._tier.detach()

    # --- state; read by any thread, without a lock

    @property
    def phase(self) -> Phase:
        """What the running requests do."""
        return self._scheduler.phase

    @property
    def pending(self) -> int:
        """The number of requests that wait."""
        return len(self._queue) + len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        """The number of requests that are admitted."""
        return len(self._scheduler.running)

    @property
    def last_hit(self) -> CacheHit | None:
        """How much of the last prompt was reused."""
        return self._scheduler.last_hit

    @property
    def metrics(self) -> EngineMetrics:
        """Counts since the model was loaded."""
        return self._scheduler.metrics

    @property
    def cache_problem(self) -> str:
        """Why the model's KV is neither saved nor reused; empty if it is saved and reused."""
        return self._context.prefix_cache.weights.problem

    @property
    def tick_clock(self) -> TickClock:
        """Measures the ticks: how long the current one has taken, and how long its decode should take."""
        return self._scheduler.clock

    @property
    def is_ours(self) -> bool:
        """Whether the thread runs in this process. It does not in a process forked from it."""
        return self._process == os.getpid()

    @property
    def pid(self) -> int:
        """Number of this process, which computes."""
        return self._process

    @property
    def stopped(self) -> bool:
        """Whether the model is unloaded, or being unloaded."""
        return self._stopping

    def namespace(self, cache_salt: str | None) -> bytes:
        """Return the root key of the KV that a request with this salt may share, if it is submitted now."""
        return self._context.prefix_cache.namespace(cache_salt, self.adapters.current)

    def cached_prefix(self, namespace: bytes, tokens: NDArray[np.int32]) -> int:
        """Return how many tokens of a prompt the cache has. Does not wait for the model."""
        return self._context.prefix_cache.cached_prefix(namespace, tokens)

    def stored_context(self, key: bytes, namespace: bytes) -> NDArray[np.int32] | None:
        """Return the tokens of the stored context that ends with a block, int32, shape (n,); None if not stored."""
        return self._context.prefix_cache.stored_context(key, namespace)

    # --- requests

    def compile(self, grammar: Grammar) -> None:
        """Compile a grammar in the caller's thread. Later requests use the compiled form."""
        self.check_caller()
        self._context.grammars.matcher(grammar)

    def check(self) -> None:
        """Raise ModelUnloaded if the model accepts no more requests."""
        check_not_forked(self._name, self._process)
        if self._stopping:
            raise self._unloaded_error("is unloaded; load it again to use it")

    def check_computes(self) -> None:
        """Check as `check` does; a model without weights has another runner, which raises VocabularyOnly here."""
        self.check()

    def submit(self, ticket: Ticket, adapters: AdapterSet | None = None) -> None:
        """Queue a request.

        Args:
            adapters: the set of adapters that the request uses; None for the one in effect.

        Raises:
            OptionError: an option does not fit the model, or the request cannot resume at its `resumed`.
            AdapterUnloaded: an adapter of `adapters` is unloaded, and no request uses it.
            ModelUnloaded: the model was unloaded.
            QueueFull: `max_pending` requests wait.
            SessionBusy: a request of its session runs or waits.
            CalledFromModelThread: this is the model thread.
        """
        self.check_caller()
        sequence = None
        try:
            sequence = Sequence(ticket, self._context, self.adapters.acquire(ticket, adapters))
            self._enqueue(sequence)
        except BaseException:
            # Ctrl-C may interrupt before or after it is queued. Once it is queued, the model thread ends it.
            with self._lock:
                queued = sequence is not None and (sequence in self._queue or sequence.dequeued)
                self._notify()
            if not queued:
                ticket.source = None
                self.adapters.release(ticket)
                if sequence is not None:
                    self._leave_session(sequence)
                self._notify_of_unused_adapters()
            raise

    def _enqueue(self, sequence: Sequence) -> None:
        session = _session_of(sequence)
        with self._lock:
            self.check()
            if self.pending >= self._max_pending + max(self._n_seq_max - self.running, 0):
                self.metrics.refused += 1
                raise QueueFull(
                    f"{self.pending} requests wait for model {self._name!r}, and max_pending={self._max_pending}; "
                    "ask again later, or load the model with a larger max_pending"
                )
            if session is not None:
                self._check_session(session)
                self._sessions[session] = sequence
            self._queue.append(sequence)
            self._notify()

    def _leave_session(self, sequence: Sequence) -> None:
        session = _session_of(sequence)
        if session is not None:
            with self._lock:
                if self._sessions.get(session) is sequence:
                    del self._sessions[session]

    def end_session(self, session_id: str, cache_salt: str | None) -> bool:
        """Stop keeping the context of a session. Returns False if there is none.

        Raises:
            SessionBusy: a request of it runs or waits.
        """
        tenant = self._context.prefix_cache.namespace(cache_salt, ())
        self.check_caller()
        with self._lock:
            self._check_session((tenant, session_id))
        ended: list[bool] = []
        self._call(lambda: ended.append(self._scheduler.slots.end_session(tenant, session_id)))
        return any(ended)

    # --- adapters

    def load_adapter(self, path: Path, digest: str, scale: float, is_complete: Callable[[], bool]) -> LoadedAdapter:
        """Load an adapter file that the backend has checked, and use it for requests submitted from now on.

        Args:
            path, digest: the file, and the SHA-256 of its content in hex.
            scale: of the adapter.
            is_complete: called once the file is loaded; if it returns False, the adapter is freed.

        Raises:
            AdapterLoadError: it cannot be loaded, or was changed meanwhile.
        """
        loaded: list[LoadedAdapter] = []
        backend = self._backend
        assert isinstance(backend, AdapterBackend)

        def load() -> None:
            native = backend.load_adapter(path)
            try:
                if not is_complete():
                    raise AdapterLoadError(
                        f"{path} was changed while it was loaded; load it again when it is complete"
                    )
                loaded.append(self.adapters.attach(native, path, digest, scale))
            except BaseException:
                backend.free_adapter(native)
                raise

        try:
            self._call(load)
            return loaded[0]
        except BaseException:
            # Ctrl-C ends the wait and not the load: undo it when it is complete.
            def undo() -> None:
                for adapter in loaded:
                    self.adapters.detach(adapter)

            with self._lock:
                self._calls.append(ThreadCall(undo))
                self._notify()
            raise

    def unload_adapter(self, adapter: LoadedAdapter) -> None:
        """Stop using an adapter for new requests. It is freed once no request uses it. Idempotent."""
        if self._process == os.getpid():  # a forked process has neither the model nor the adapter
            self.adapters.detach(adapter)
            self._notify_of_unused_adapters()

    def _notify_of_unused_adapters(self) -> None:
        """Wake the model thread if there are adapters to free."""
        if self.adapters.unused:
            with self._lock:
                self._notify()

    # --- maintenance and the end

    def warm_up(self) -> None:
        """Decode one token and drop it; before any request."""
        self._call(self._scheduler.warm_up)

    def evict(self) -> None:
        """Save the KV of the context, evict the parked sequences, and wait until the KV is stored."""
        self._call(self._scheduler.evict)
        self._flush()

    def stop(self) -> None:
        """End all requests with ModelUnloaded, save their KV, and close the backend. Idempotent."""
        if self._process != os.getpid():
            return  # the thread is in the parent process, and the lock may be taken there
        self.begin_to_stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if self._saved_at_stop:
            self._saved_at_stop = False
            self._flush()

    def begin_to_stop(self) -> None:
        """Refuse new requests, and make the model thread end. Does not wait for it. Idempotent."""
        with self._lock:
            first = not self._stopping
            self._stopping = True
            self._notify()
        if first:
            self._run_final_step(lambda: self._backend.abort(True))

    def _flush(self) -> None:
        timeout_ms = self._policy.evict_save_timeout_ms
        if not self._cache.flush(timeout_ms / 1000):
            log.warning(
                "model %r: its saves were not written within evict_save_timeout_ms=%d", self._name, timeout_ms
            )

    def check_caller(self) -> None:
        """Raise ModelUnloaded, or CalledFromModelThread, if this thread may not wait for the model thread."""
        self.check()  # before the lock, which a fork may have left taken
        if threading.current_thread() is self._thread:
            raise CalledFromModelThread(
                f"model {self._name!r} was called by its own thread, from a callback; it would wait for itself. "
                "Hand the work to another thread"
            )

    def _check_session(self, session: tuple[bytes, str]) -> None:
        if session in self._sessions:
            raise SessionBusy(
                f"session {session[1]!r} has a request that runs or waits; "
                "wait for its end, or use another session_id"
            )

    def _call(self, function: Callable[[], object]) -> None:
        """Call a function in the model thread, between two ticks, and wait for it. Raises its error."""
        self.check_caller()
        call = ThreadCall(function)
        with self._lock:
            self.check()
            self._calls.append(call)
            self._notify()
        call.wait()

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call a function in the model thread, between two ticks. Does not wait for it. Errors are logged.

        Safe from any thread, this one included. The function must be quick, like `Waker.wake`. It is not called if
        the model is unloaded before.

        Raises:
            ModelUnloaded: the model was unloaded.
        """
        self.check()
        with self._lock:
            self.check()
            self._calls.append(UnawaitedCall(function))
            self._notify()

    # --- the model thread

    def _run(self) -> None:
        scheduler = self._scheduler
        clock = scheduler.clock
        at_once = False  # whether the next tick can follow at once
        try:
            # Ticks that follow each other call few functions: each takes some us while the caches are cold.
            while not self._stopping:
                if scheduler.tickets.wakers:
                    scheduler.tickets.wake()
                if not at_once or not self._wakeups.empty():
                    self._receive_work(wait=not at_once)
                    if self._stopping or not scheduler.busy:
                        at_once = False
                        continue
                clock.begin()
                try:
                    at_once = scheduler.tick()
                except BaseException as error:
                    self._fail_running(error)
                    at_once = scheduler.busy
                clock.end()
        finally:
            with self._lock:
                self._stopping = True
                for sequence in self._queue:
                    sequence.dequeued = True
                scheduler.waiting.extend(self._queue)
                self._queue.clear()
                calls, self._calls = self._calls, deque()
            self._run_final_step(lambda: self._end_requests(scheduler))
            self._run_final_step(scheduler.tickets.wake)
            for call in calls:
                call.end(self._unloaded_error("was unloaded meanwhile"))
            self._run_final_step(self.adapters.close)
            if self._tier is not None:
                self._run_final_step(self._tier.detach)
            self._run_final_step(self._backend.close)
            if self._on_stopped is not None:
                self._run_final_step(self._on_stopped)

    def _end_requests(self, scheduler: Scheduler) -> None:
        self._saved_at_stop = scheduler.shut_down(
            self._unloaded_error("was unloaded while the request ran or waited")
        )

    def _run_final_step(self, step: Callable[[], object]) -> None:
        """Run one step of the model's end. Logs its exception, if any, so that the other steps follow."""
        try:
            step()
        except BaseException:
            log.exception("model %r: a step of its unloading failed", self._name)

    def _unloaded_error(self, state: str) -> ModelUnloaded:
        if self._failure is None:
            return ModelUnloaded(f"model {self._name!r} {state}")
        error = ModelUnloaded(f"model {self._name!r} cannot continue, and is unloaded: {self._failure}")
        error.__cause__ = self._failure
        return error

    def _receive_work(self, *, wait: bool) -> None:
        """Run the calls of other threads, and pass new requests to the scheduler.

        Args:
            wait: whether to wait for one of them. While all running requests wait for saves of others, the wait is
                short.
        """
        scheduler = self._scheduler
        timeout = _RETRY_SECONDS if scheduler.busy else None
        with suppress(Empty):
            while wait and not self._has_work():
                self._wakeups.get(timeout=timeout)
            while True:  # before the changes are read that these items announce
                self._wakeups.get_nowait()
        for _ in range(len(self._calls)):  # more may arrive meanwhile, from these calls, too
            call = self._calls.popleft()
            if isinstance(call, ThreadCall):
                scheduler.end_run()
            call.run()
        if self.adapters.unused:
            self.adapters.free_unused()
        while self._queue:
            self._queue[0].dequeued = True  # before it is removed: `submit` checks the queue first
            scheduler.add(self._queue.popleft())

    def _notify(self) -> None:
        """Wake the model thread. Called after the change that it must see."""
        if self._wakeups.empty():  # otherwise the thread checks again anyway, after it gets that item
            self._wakeups.put(None)

    def _has_work(self) -> bool:
        return self._stopping or bool(self._queue or self._calls) or self.adapters.unused

    def _fail_running(self, error: BaseException) -> None:
        """Fail the running requests after a tick that failed unexpectedly, and keep the thread running.

        Args:
            error: of the tick. SystemExit, too: no interrupt is meant for this thread.
        """
        log.error("model %r failed unexpectedly; its requests end", self._name, exc_info=error)
        failure = BackendError(f"the model failed unexpectedly: {type(error).__name__}: {error}")
        failure.__cause__ = error
        try:
            self._scheduler.fail_all(failure)
        except BaseException:
            log.exception("model %r cannot continue; it is unloaded", self._name)
            self._failure = failure
            self._stopping = True

    def _on_end(self, sequence: Sequence) -> None:
        sequence.ticket.source = None
        self.adapters.release(sequence.ticket)
        self._leave_session(sequence)
        self._notify_of_unused_adapters()


def _session_of(sequence: Sequence) -> tuple[bytes, str] | None:
    session_id = sequence.options.session_id
    return None if session_id is None else (sequence.tenant, session_id)
