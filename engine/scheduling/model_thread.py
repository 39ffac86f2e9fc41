"""The model thread: takes requests from callers, and runs the scheduler's ticks.

Only this thread touches the backend (its vocabulary and `abort` apart).
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

from erllama._runtime.log import logger
from erllama.cache import Cache, Policy
from erllama.cache.uninterrupted import running as running_calls
from erllama.cache.uninterrupted import uninterrupted
from erllama.engine.adapters import AdapterBackend, LoadedAdapter
from erllama.engine.backend import Backend
from erllama.engine.grammar.grammar import Grammar
from erllama.engine.kv.sequence_kv import LIVE
from erllama.engine.metrics import EngineMetrics
from erllama.engine.requests.request import CacheHit
from erllama.engine.requests.ticket import Ticket, awaken
from erllama.engine.scheduling.live_tier import LiveTier
from erllama.engine.scheduling.model_context import ModelContext
from erllama.engine.scheduling.scheduler import Phase, Scheduler, typed
from erllama.engine.scheduling.sequence import Sequence
from erllama.errors import (
    AdapterLoadError,
    BackendError,
    CalledFromModelThread,
    Error,
    ModelUnloaded,
    QueueFull,
    SessionBusy,
)

log = logger("erllama.engine")

_LOOK_AGAIN_SECONDS = 0.01
_START_SECONDS = 5.0


class ModelThread:
    """Runs requests on a backend in a thread of its own.

    Args:
        backend: closed when the runner is.
        cache: shared with other runners; not closed.
        policy: what is saved, and when.
        name: for the thread and the log.
        n_seq_max: most requests that run at once.
        prefill_chunk_size: most tokens of prompts in one tick beside replies that are being written.
        parked_cells: cells that finished sequences may keep while others compute.
        max_pending: most requests that may wait.

    Attributes:
        adapters: of the model.
    """

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
    ) -> None:
        self._backend = backend
        self._cache = cache
        self._policy = policy
        self._stopping = False
        self._shared = ModelContext.of(cache, backend, policy)
        self.adapters = self._shared.adapters
        limits = backend.limits
        self._name = name
        self._n_seq_max, self._max_pending = n_seq_max, max_pending
        # Ctrl-C cannot come between the acquisition of such a lock and the `with`. Reentrant, for signal handlers.
        self._lock = threading.RLock()
        # Not a Condition, which is written in Python: a signal handler's exception within `notify()` can leave
        # it so that the model thread is never woken again. `put` is one step, and safe in signal handlers.
        self._wakeups: SimpleQueue[None] = SimpleQueue()
        self._arrived: deque[Sequence] = deque()
        self._sessions: dict[tuple[bytes, str], Sequence] = {}  # whose they are; a tenant's are its own
        self._calls: deque[_Call] = deque()
        self._failure: BackendError | None = None  # why the model cannot go on
        self._saved_at_stop = False
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name=f"erllama-model-{name}", daemon=True)
        self._tier: LiveTier | None = None
        try:
            if limits.cell_bytes and not cache.closed:
                place = f"the context of model {name!r}"
                self._tier = LiveTier(cache, LIVE, place, limits.cell_bytes, limits.n_ctx)
            self._scheduler = Scheduler(
                self._shared,
                n_seq_max=n_seq_max,
                prefill_chunk_size=prefill_chunk_size,
                parked_cells=parked_cells,
                tier=self._tier,
                on_end=self._on_end,
                stopping=lambda: self._stopping,
            )
            uninterrupted(self._thread.start)()
        except BaseException:
            self._undo_start()
            raise

    def _undo_start(self) -> None:
        """Leave nothing behind where `__init__` was interrupted: the thread may run all the same."""
        self._stopping = True
        self._notify()
        deadline = time.monotonic() + _START_SECONDS
        while self._thread.ident is None and running_calls and time.monotonic() < deadline:
            time.sleep(0.001)
        if self._thread.ident is not None:
            self._thread.join()  # it detaches the tier, and closes the backend
        elif self._tier is not None:
            self._tier.detach()

    # --- read without a lock, by anyone, at any time

    @property
    def phase(self) -> Phase:
        return self._scheduler.phase

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return len(self._arrived) + len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        """Requests that are admitted."""
        return len(self._scheduler.running)

    @property
    def last_hit(self) -> CacheHit | None:
        return self._scheduler.last_hit

    @property
    def metrics(self) -> EngineMetrics:
        return self._scheduler.metrics

    @property
    def cache_problem(self) -> str:
        """Why KV is neither saved nor taken from the cache; empty where it is."""
        return self._shared.weights.problem

    @property
    def is_ours(self) -> bool:
        """Whether it runs in this process: not in one that was forked from it."""
        return self._process == os.getpid()

    @property
    def stopped(self) -> bool:
        return self._stopping

    def namespace(self, cache_salt: str | None) -> bytes:
        """The root key of what a request of this salt may share that is submitted now."""
        return self._shared.namespace(cache_salt, self.adapters.current)

    # --- asking

    def compile(self, grammar: Grammar) -> None:
        """Compile a grammar, in the caller's thread, so that requests find it ready."""
        self.check_caller()
        self._shared.grammars.matcher(grammar)

    def check(self) -> None:
        """Raise ModelUnloaded if no request can run here any more."""
        if self._process != os.getpid():
            raise ModelUnloaded(
                f"model {self._name!r} was loaded before this process was forked and does not run in it; "
                "load models after forking, or start workers with multiprocessing's 'spawn' method"
            )
        if self._stopping:
            raise self._unloaded("is unloaded; load it again to use it")

    def check_computes(self) -> None:
        """As `check`; a model without weights has another runner, which raises VocabularyOnly here."""
        self.check()

    def submit(self, ticket: Ticket) -> None:
        """Queue a request.

        Raises:
            ModelUnloaded: the runner was stopped.
            QueueFull: as many wait as may.
            SessionBusy: a request of its session runs or waits.
            CalledFromModelThread: by this runner's own thread.
        """
        self.check_caller()
        sequence = None
        try:
            sequence = Sequence(ticket, self._shared, self.adapters.enter(ticket))
            self._queue(sequence)
        except BaseException:
            # Ctrl-C may come before and after it is queued. Once it is, its end is the model thread's.
            with self._lock:
                queued = sequence is not None and (sequence in self._arrived or sequence.arrived)
                self._notify()
            if not queued:
                self.adapters.leave(ticket)
                if sequence is not None:
                    self._leave_session(sequence)
                self._wake()
            raise

    def _queue(self, sequence: Sequence) -> None:
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
            self._arrived.append(sequence)
            self._notify()

    def _leave_session(self, sequence: Sequence) -> None:
        session = _session_of(sequence)
        if session is not None:
            with self._lock:
                if self._sessions.get(session) is sequence:
                    del self._sessions[session]

    def end_session(self, session_id: str, cache_salt: str | None) -> bool:
        """Stop keeping the context of a session; False where none is kept.

        Raises:
            SessionBusy: a request of it runs or waits.
        """
        tenant = self._shared.namespace(cache_salt, ())
        self.check_caller()
        with self._lock:
            self._check_session((tenant, session_id))
        found: list[bool] = []
        self._call(lambda: found.append(self._scheduler.live.end_session(tenant, session_id)))
        return any(found)

    def load_adapter(self, path: Path, digest: str, scale: float, is_complete: Callable[[], bool]) -> LoadedAdapter:
        """Have the backend load a file that it has found good, and put it into effect.

        Args:
            is_complete: called once the file is loaded; the adapter is freed where it returns False.

        Raises:
            AdapterLoadError: it cannot be loaded, or is not complete.
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
            # Ctrl-C ends the waiting and not the loading: what comes of it is undone behind it.
            def undo() -> None:
                for adapter in loaded:
                    self.adapters.detach(adapter)

            with self._lock:
                self._calls.append(_Call(undo))
                self._notify()
            raise

    def unload_adapter(self, adapter: LoadedAdapter) -> None:
        """Let requests to come do without an adapter; it is freed behind those that use it. Idempotent."""
        if self._process == os.getpid():  # in a fork, neither is there
            self.adapters.detach(adapter)
            self._wake()

    def _wake(self) -> None:
        """There may be adapters to be freed."""
        if self.adapters.unused:
            with self._lock:
                self._notify()

    def warm_up(self) -> None:
        """Decode once for nothing; before any request."""
        self._call(self._scheduler.warm_up)

    def evict(self) -> None:
        """Save what the context holds and wait until that is stored; let go of what no request uses."""
        self._call(self._scheduler.evict)
        self._flush()

    def stop(self) -> None:
        """End all requests with ModelUnloaded, save what they had computed, and close the backend. Idempotent."""
        if self._process != os.getpid():
            return  # the thread stayed with the parent, and so, perhaps, did the lock
        self.begin_to_stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if self._saved_at_stop:
            self._saved_at_stop = False
            self._flush()

    def begin_to_stop(self) -> None:
        """Refuse new requests, and have the model thread end; waits for nothing. Idempotent."""
        with self._lock:
            first = not self._stopping
            self._stopping = True
            self._notify()
        if first:
            self._last(lambda: self._backend.abort(True))

    def _flush(self) -> None:
        timeout_ms = self._policy.evict_save_timeout_ms
        if not self._cache.flush(timeout_ms / 1000):
            log.warning(
                "model %r: its saves were not written within evict_save_timeout_ms=%d", self._name, timeout_ms
            )

    def check_caller(self) -> None:
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
        """Have the model thread call something between two ticks, and wait for that; raises what it raised."""
        self.check_caller()
        call = _Call(function)
        with self._lock:
            self.check()
            self._calls.append(call)
            self._notify()
        call.wait()

    # --- the model thread

    def _run(self) -> None:
        scheduler = self._scheduler
        progress = True
        try:
            while not self._stopping:
                self._wait_for_work(progress)
                while self._calls:
                    self._calls.popleft().run()
                if self.adapters.unused:
                    self.adapters.free_unused()
                while self._arrived:
                    self._arrived[0].arrived = True  # before it is taken out: `submit` looks for it in this order
                    scheduler.waiting.append(self._arrived.popleft())
                progress = self._tick() if not self._stopping and scheduler.busy else True
        finally:
            with self._lock:
                self._stopping = True
                for sequence in self._arrived:
                    sequence.arrived = True
                scheduler.waiting.extend(self._arrived)
                self._arrived.clear()
                calls, self._calls = self._calls, deque()
            self._last(lambda: self._end_requests(scheduler))
            for call in calls:
                call.end(self._unloaded("was unloaded meanwhile"))
            self._last(self.adapters.close)
            if self._tier is not None:
                self._last(self._tier.detach)
            self._last(self._backend.close)

    def _end_requests(self, scheduler: Scheduler) -> None:
        self._saved_at_stop = scheduler.shut_down(self._unloaded("was unloaded while the request ran or waited"))

    def _last(self, step: Callable[[], object]) -> None:
        """Do one step of the model's end; whatever it raises, the others follow."""
        try:
            step()
        except BaseException:
            log.exception("model %r did not end well", self._name)

    def _unloaded(self, how: str) -> ModelUnloaded:
        if self._failure is None:
            return ModelUnloaded(f"model {self._name!r} {how}")
        error = ModelUnloaded(f"model {self._name!r} cannot go on, and is unloaded: {self._failure}")
        error.__cause__ = self._failure
        return error

    def _wait_for_work(self, progress: bool) -> None:
        if self._scheduler.busy and progress:
            return
        # Where all admitted requests wait for saves of others, look at those again soon.
        timeout = _LOOK_AGAIN_SECONDS if self._scheduler.busy else None
        with suppress(Empty):
            while not self._has_work():
                self._wakeups.get(timeout=timeout)

    def _notify(self) -> None:
        """Wake the model thread; after whatever it is to see."""
        if self._wakeups.empty():  # else the thread looks again anyway, when it takes what is there
            self._wakeups.put(None)

    def _has_work(self) -> bool:
        return self._stopping or bool(self._arrived or self._calls) or self.adapters.unused

    def _tick(self) -> bool:
        """Whatever goes wrong, those who wait are told, and the thread goes on."""
        try:
            return self._scheduler.tick()
        except BaseException as error:
            # SystemExit, too: no interrupt is meant for this thread.
            log.exception("model %r failed unexpectedly; its requests end", self._name)
            failure = BackendError(f"the model failed unexpectedly: {type(error).__name__}: {error}")
            failure.__cause__ = error
            try:
                self._scheduler.fail_all(failure)
            except BaseException:
                log.exception("model %r cannot go on; it is unloaded", self._name)
                self._failure = failure
                self._stopping = True
            return True

    def _on_end(self, sequence: Sequence) -> None:
        self.adapters.leave(sequence.ticket)
        self._leave_session(sequence)


def _session_of(sequence: Sequence) -> tuple[bytes, str] | None:
    session_id = sequence.options.session_id
    return None if session_id is None else (sequence.tenant, session_id)


class _Call:
    """Something that the model thread does for another, which waits for it."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._done = threading.Lock()  # a lock and no Event, whose own lock Ctrl-C could leave taken
        self._done.acquire()
        self._error: Error | None = None

    def run(self) -> None:
        """Call it; in the model thread."""
        try:
            self._function()
        except BaseException as error:
            self.end(typed(error))
        else:
            self.end(None)

    def end(self, error: Error | None) -> None:
        """Let go whom waits for it; once."""
        self._error = error
        self._done.release()

    def wait(self) -> None:
        """Wait for its end; raises the error it ended with."""
        awaken(self._done)
        if self._error is not None:
            raise self._error
