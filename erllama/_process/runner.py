"""`ProcessRunner`: the `ModelRunner` of a model in a process of its own.

It keeps the running requests, so that a process that ends is replaced without the callers noticing, and sends
requests and calls to the process that runs now. The supervisor's thread calls it with what the process sends.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import RLock
from typing import cast

import numpy as np
from numpy.typing import NDArray

from erllama._process.adapter_files import AdapterFiles
from erllama._process.cache_member import ProcessCache
from erllama._process.calls import CallTable, PendingCall, ProcessEnded
from erllama._process.child_process import ChildProcess
from erllama._process.options import ProcessOptions
from erllama._process.protocol import messages as m
from erllama._process.protocol import wire_types as w
from erllama._process.protocol.token_message import TokenEntry
from erllama._process.protocol.wire_values import (
    pack_grammar,
    pack_ids,
    unpack_error,
    unpack_hit,
    unpack_ids,
)
from erllama._process.remote_backend import ModelFile, RemoteBackend
from erllama._process.remote_requests import RemoteGroup, RemoteRequest, RequestTable
from erllama._process.state_history import StateHistory
from erllama._process.supervisor import Supervisor
from erllama._runtime.log import logger
from erllama.cache import Cache
from erllama.cache.uninterrupted import uninterrupted
from erllama.checks import check_loaded
from erllama.engine import CacheHit, EngineMetrics, Grammar, Phase, Ticket
from erllama.engine.adapters import Adapters, LoadedAdapter
from erllama.engine.kv.prefix_cache import prompt_namespace
from erllama.engine.requests.text_reply import TextReply, decode_pieces
from erllama.engine.requests.ticket import SLEEP_SECONDS, Waker
from erllama.errors import (
    AdapterLoadError,
    CalledFromModelThread,
    Error,
    LoadCancelled,
    ModelFailed,
    ModelUnloaded,
    OptionError,
    QueueFull,
    RequestCrashed,
)

log = logger("erllama.process")

_LOOP_SECONDS = 0.25  # for which the submission of a request may delay an event loop

_runners: weakref.WeakSet[ProcessRunner] = weakref.WeakSet()


class ProcessRunner:
    """Runs the requests of one model in a process of its own.

    Args:
        start: the first message to each process.
        options: of the supervision.
        cache: reports the process's cache, too.
        file: what describes the model, read by this process; None if only the model's process has it.
        max_pending: maximum number of requests that may wait.
        save_timeout: the most seconds that the process may take to save its contexts when it is stopped.

    Attributes:
        adapters: the model's adapters.
    """

    adapters: Adapters

    def __init__(
        self,
        start: m.Start,
        options: ProcessOptions,
        cache: Cache,
        file: ModelFile | None,
        max_pending: int,
        save_timeout: float,
    ) -> None:
        self._name, self._file, self._max_pending = start.id, file, max_pending
        self._cache = cache
        self._member: ProcessCache | None = None  # of the process that runs
        self._save_timeout = save_timeout
        self._process = os.getpid()
        self._lock = RLock()
        self._child: ChildProcess | None = None  # that has loaded the model, and takes requests
        self._table = RequestTable()
        self._submissions: dict[int, PendingCall] = {}  # of requests whose submission is not answered
        self._calls = CallTable()
        self._starting: ChildProcess | None = None  # that loads the adapters
        self._adapter_files = AdapterFiles()
        self._numbers = count(1)
        self._call_numbers = count(-(1 << 32), -(1 << 32))  # of calls that load adapters again: far apart
        self._wakers: set[Waker] = set()
        self._history = StateHistory()
        self._failure: Error | None = None
        self._stopping = False
        self._loading: SimpleQueue[float | Error | None] = SimpleQueue()  # None: loaded
        self._backend: RemoteBackend | None = None
        self._supervisor = Supervisor(start, options, self)
        _runners.add(self)

    # --- loading -----------------------------------------------------------------------------------

    def wait_until_loaded(self, on_progress: Callable[[float], object] | None) -> RemoteBackend:
        """Wait for the first process to load the model. Return what describes the model.

        Raises:
            Error: the model cannot be loaded.
        """
        while True:
            try:
                found = self._loading.get(timeout=SLEEP_SECONDS)
            except Empty:
                continue
            if isinstance(found, Error):
                raise found
            if found is None:
                assert self._backend is not None
                return self._backend
            if on_progress is not None and on_progress(found) is False:
                raise LoadCancelled(f"the load of model {self._name!r} was cancelled by on_progress")

    # --- state: reading never waits ----------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """What the model does now."""
        state = self._history.current
        if not len(self._table):
            return "idle"
        return cast(Phase, state.phase) if state is not None and state.phase != "idle" else "prefilling"

    @property
    def pending(self) -> int:
        """Number of waiting requests."""
        return max(len(self._table) - self.running, 0)

    @property
    def running(self) -> int:
        """Number of admitted requests."""
        state = self._history.current
        return min(len(self._table), state.running) if state is not None and self._child is not None else 0

    @property
    def last_hit(self) -> CacheHit | None:
        """Cache hit of the latest request; None before the first."""
        return self._history.last_hit

    @property
    def metrics(self) -> EngineMetrics:
        """Counts since the model was loaded, of all its processes."""
        return self._history.metrics

    @property
    def cache_problem(self) -> str:
        """Why the cache is not used; empty while it is used."""
        state = self._history.current
        return state.cache_problem if state is not None else ""

    @property
    def pid(self) -> int:
        """Number of the model's process; 0 while it is being replaced."""
        child = self._child
        return child.pid if child is not None else 0

    @property
    def restarts(self) -> int:
        """How many processes replaced another one."""
        return self._supervisor.restarts

    @property
    def is_ours(self) -> bool:
        """Whether the runner belongs to this process; False in a fork."""
        return self._process == os.getpid()

    @property
    def stopped(self) -> bool:
        """Whether the runner has stopped, or is stopping."""
        return self._stopping

    @property
    def state(self) -> w.ModelState | None:
        """What the process sent last about the model."""
        return self._history.current

    def namespace(self, cache_salt: str | None) -> bytes:
        """Return the root key of the cache entries that a request with this salt may use."""
        assert self._backend is not None
        return prompt_namespace(self._backend.namespace, cache_salt, self.adapters.current)

    # --- checks ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ModelUnloaded if the model is unloaded, or ModelFailed if its process is not started again."""
        check_loaded(self._name, self._process, stopped=self._stopping)
        if self._failure is not None:
            raise type(self._failure)(str(self._failure)) from self._failure

    def check_computes(self) -> None:
        """Check as `check` does."""
        self.check()

    def check_caller(self) -> None:
        """Raise the errors of `check`, and CalledFromModelThread in the thread that receives the replies."""
        self.check()
        if self._supervisor.is_current_thread:
            raise CalledFromModelThread(
                f"model {self._name!r} was called by the thread that receives its replies, from a callback such as "
                "a handler of a log; it would wait for itself. Hand the work to another thread"
            )

    # --- requests ----------------------------------------------------------------------------------

    def submit(self, ticket: Ticket) -> None:
        """Queue a request. While the process is being replaced, its errors reach the ticket instead."""
        self.check_caller()
        submission = PendingCall()
        request = self._make_request(ticket)
        try:
            if uninterrupted(self._queue)(request, submission):
                # An event loop must not wait for a process that hangs. The ticket then has the error, if any.
                submission.wait(_LOOP_SECONDS if ticket.has_listener else math.inf)
        except ProcessEnded:
            pass  # the next process gets it
        except Error:
            raise
        except BaseException:
            ticket.cancel()  # Ctrl-C: it may be queued, and nobody will read it
            raise
        finally:
            self._submissions.pop(request.id, None)

    def _make_request(self, ticket: Ticket) -> RemoteRequest:
        try:
            request = RemoteRequest(next(self._numbers), ticket, self.adapters.acquire(ticket))
            assert self._backend is not None
            if ticket.streaming and TextReply.suits(ticket.request.options):
                decode_pieces(ticket, self._backend.vocabulary)
            ticket.join(RemoteGroup(self._wakers, partial(self._cancel, request.id)))
            return request
        except BaseException:
            self._release(ticket)
            raise

    def _queue(self, request: RemoteRequest, submission: PendingCall) -> bool:
        """Queue a request. Return whether it was sent, so that `submission` has an answer soon."""
        try:
            with self._lock:
                self.check()
                self._check_room()
                self._submissions[request.id] = submission
                self._table.add(request)
                self._send_requests()
                sent = self._table.is_sent(request) or request not in self._table
                if not sent:
                    del self._submissions[request.id]
                return sent
        except BaseException:
            self._release(request.ticket)
            raise

    def _check_room(self) -> None:
        """Raise QueueFull if too many requests run or wait: as many as the process accepts."""
        waiting = len(self._table) - self._n_seq_max
        if waiting >= self._max_pending:
            self._history.n_refused += 1
            raise QueueFull(
                f"{waiting} requests wait for model {self._name!r}, and max_pending={self._max_pending}; "
                "ask again later, or load the model with a larger max_pending"
            )

    def _send_requests(self) -> None:
        """Send the requests that may be sent now. The caller holds the lock."""
        child = self._child
        while child is not None and (request := self._table.next_to_send()) is not None:
            try:
                child.outbox.send(_encode(request.submission()))
            except Error as error:
                self._end(request)
                request.ticket.fail(error)
                continue
            if request.ticket.cancelled:
                child.outbox.send(m.encode(m.Cancel(request.id)))

    def _cancel(self, id: int) -> None:
        """Cancel a request. Never waits: a ticket is also cancelled by `__del__` and in signal handlers."""
        self._supervisor.call_soon(partial(self._send_cancel, id))

    def _send_cancel(self, id: int) -> None:
        with self._lock:
            request = self._table.get(id)
            if self._child is not None and request is not None and self._table.is_sent(request):
                self._child.outbox.send(m.encode(m.Cancel(id)))

    def _end(self, request: RemoteRequest) -> None:
        """Forget a request that has ended."""
        with self._lock:
            self._table.remove(request)
            submission = self._submissions.pop(request.id, None)
        if submission is not None:
            submission.end()
        self._release(request.ticket)

    def _release(self, ticket: Ticket) -> None:
        self.adapters.release(ticket)
        if self.adapters.unused and self.is_ours:
            self._supervisor.call_soon(self.adapters.free_unused)

    # --- calls -------------------------------------------------------------------------------------

    def call(self, make: Callable[[int], m.AnyCall]) -> m.Returned:
        """Call the process and wait for its answer. If it ends meanwhile, the next one is called, once.

        Args:
            make: makes the message from the call's number.
        """
        for _ in range(2):
            try:
                return self.call_once(make)
            except ProcessEnded:
                continue
        raise RequestCrashed(
            f"the process of model {self._name!r} ended twice during a call of it; see the log for the reason"
        )

    def call_once(self, make: Callable[[int], m.AnyCall], seconds: float = math.inf) -> m.Returned:
        """Call the process and wait for its answer. While it is being replaced, wait for the next one.

        Args:
            make: makes the message from the call's number.
            seconds: how long to wait at most.

        Raises:
            ProcessEnded: the process ended before it answered, or did not answer in time.
        """
        self.check_caller()
        number, pending = next(self._numbers), PendingCall()
        body = _encode(make(number))
        try:
            uninterrupted(self._send_call)(number, body, pending)
            return pending.wait(seconds)
        finally:
            with self._lock:
                self._calls.remove(number)

    def _send_call(self, number: int, body: bytes, pending: PendingCall) -> None:
        with self._lock:
            self.check()
            child = self._child
            self._calls.add(number, pending, body if child is None else None)
            if child is not None:
                child.outbox.send(body)

    def send_soon(self, message: m.AnyCall) -> None:
        """Send a call whose answer nobody needs. Never waits."""
        with self._lock:
            if self._child is not None:
                self._child.outbox.send(m.encode(message))

    def compile(self, grammar: Grammar) -> None:
        """Compile a grammar in the process and keep it for later requests."""
        packed = pack_grammar(grammar)
        self.call(lambda number: m.CompileGrammar(number, packed))

    def end_session(self, session_id: str, cache_salt: str | None) -> bool:
        """Release the cells of a session; return False if the session has none."""
        return self.call(lambda number: m.EndSession(number, session_id, cache_salt)).flag

    def warm_up(self) -> None:
        """Do nothing: a process decodes one token before it takes requests."""

    def evict(self) -> None:
        """Save the context, wait until it is stored, and release unused cells."""
        self.call(m.Evict)

    def cached_prefix(self, namespace: bytes, ids: NDArray[np.int32]) -> int:
        """Return how many tokens of a prompt the cache has."""
        tokens = pack_ids(ids)
        return self.call(lambda number: m.CachedPrefix(number, namespace, tokens)).number

    def stored_context(self, key: bytes, namespace: bytes) -> NDArray[np.int32] | None:
        """Return the tokens of the stored context that ends with a block, int32, shape (n,); None if not stored."""
        raw = self.call(lambda number: m.StoredContext(number, key, namespace)).raw
        return None if raw is None else unpack_ids(raw)

    # --- adapters ----------------------------------------------------------------------------------

    def load_adapter(self, path: Path, digest: str, scale: float, is_complete: Callable[[], bool]) -> LoadedAdapter:
        """Load a checked adapter file into the process and put it into effect."""
        native = next(self._numbers)
        path = path.absolute()
        self._adapter_files.add(native, path, digest)  # before the call: a new process loads it, too
        try:
            self.call(lambda number: m.LoadAdapter(number, native, str(path), digest))
            if not is_complete():
                raise AdapterLoadError(f"{path} was changed while it was loaded; load it again when it is complete")
            return self.adapters.attach(native, path, digest, scale)
        except BaseException:
            self.free_native(native)
            raise

    def unload_adapter(self, adapter: LoadedAdapter) -> None:
        """Remove an adapter from later requests. Idempotent."""
        if self.is_ours:
            self.adapters.detach(adapter)
            if self.adapters.unused:
                self._supervisor.call_soon(self.adapters.free_unused)

    def free_native(self, native: int) -> None:
        """Free an adapter in the process. Never waits."""
        self._adapter_files.remove(native)
        self.send_soon(m.FreeAdapter(next(self._numbers), native))

    # --- the end -----------------------------------------------------------------------------------

    def begin_to_stop(self) -> None:
        """Refuse new requests and end the process. Returns at once. Idempotent."""
        self._stopping = True
        self._supervisor.begin_to_stop(self._save_timeout)

    def stop(self) -> None:
        """Fail all requests with ModelUnloaded, save their contexts, and end the process. Idempotent."""
        if not self.is_ours:
            return
        self.begin_to_stop()
        self._supervisor.join()
        self._close()

    def forked(self) -> None:
        """Release the sockets in a forked process."""
        self._supervisor.forked()

    # --- called by the supervisor's thread -----------------------------------------------------------

    def process_started(self, child: ChildProcess, started: m.Started) -> None:
        """Send a process that has loaded the model what waits for it."""
        member = self._member = ProcessCache(self.call_once, lambda: self._child is child)
        self._cache.add_member(member)
        if self._backend is None:
            self._backend = RemoteBackend(self, started, self._file)
            self.adapters = Adapters(self._backend)
            self._history.current = started.state
            with self._lock:
                self._child = child
            self._loading.put(None)
            return
        if not self._backend.equals(started):
            raise ModelFailed(
                f"the file of model {self._name!r} was changed since it was loaded; unload the model, and load it "
                "again"
            )
        self._history.current = started.state
        with self._lock:
            for load in self._adapter_files.begin_loading(next(self._call_numbers)):
                child.outbox.send(m.encode(load))
            self._starting = child
        self._finish_start()

    def _finish_start(self) -> None:
        """Send what waits, once the process has the adapters."""
        with self._lock:
            if not self._adapter_files.complete:
                return
            child = self._child = self._starting
            assert child is not None
            for adapter in self._adapter_files.freed_meanwhile():
                child.outbox.send(m.encode(m.FreeAdapter(next(self._numbers), adapter)))
            for body in self._calls.take_unsent():
                child.outbox.send(body)
            self._send_requests()

    def receive(self, message: m.FromChild) -> None:
        """Handle a message of the process."""
        match message:
            case m.Updates():
                self._receive_updates(message)
            case m.Accepted():
                self._history.current = message.state
                submission = self._submissions.pop(message.id, None)
                if submission is not None:
                    submission.answer(m.Returned(0))
            case m.Refused():
                self._refuse(message.id, unpack_error(message.error))
            case m.Returned():
                self._receive_answer(message)
            case m.Heartbeat():
                self._history.current = message.state
                if self._member is not None:
                    self._member.update(message.counters)
            case m.Loading(fraction=fraction) if self._backend is None and fraction is not None:
                self._loading.put(fraction)
            case m.StartFailed():
                if self._backend is None:
                    self._loading.put(unpack_error(message.error))
            case _:
                pass

    def receive_tokens(self, entries: list[TokenEntry]) -> None:
        """Handle new tokens of replies."""
        for entry in entries:
            request = self._table.get(entry.id)
            if request is not None:
                if self._table.is_suspect(request):
                    with self._lock:
                        self._table.progressed(request)
                request.add_token(entry)
        if self._table.has_waiting:
            with self._lock:
                self._send_requests()

    def _receive_updates(self, message: m.Updates) -> None:
        if message.state is not None:
            self._history.current = message.state
        else:
            self._history.move(message.phase, message.pending, message.running)
        for update in message.updates:
            request = self._table.get(update.id)
            if request is None:
                continue
            progress = update.progress
            if progress is not None and progress.hit is not None and request.hit is None:
                self._history.last_hit = unpack_hit(progress.hit)
            if progress is not None and progress.tokens and self._table.is_suspect(request):
                with self._lock:
                    self._table.progressed(request)
            ends = update.completion is not None or update.error is not None
            if ends:
                self._end(request)  # before the caller sees the end
            request.apply(update)
        if self._table.has_waiting:
            with self._lock:
                self._send_requests()

    def _refuse(self, id: int, error: Error) -> None:
        request = self._table.get(id)
        if request is None:
            return
        submission = self._submissions.pop(id, None)
        self._end(request)
        if submission is not None:
            submission.fail(error)
        request.ticket.fail(error)
        with self._lock:
            self._send_requests()

    def _receive_answer(self, message: m.Returned) -> None:
        if self._adapter_files.is_loading(message.call):
            if message.error is not None:
                log.error("model %r: an adapter could not be loaded again: %s", self._name, message.error.message)
            self._adapter_files.finish_loading(message.call)
            self._finish_start()
            return
        with self._lock:
            self._calls.answer(message)

    def messages_received(self) -> None:
        """End the requests that waited too long for a process. Wake the event loops whose tasks have events."""
        if self._table.has_waiting:
            with self._lock:
                late = self._table.late()
            for request in late:
                self._end(request)
                request.ticket.fail(request.late_error())
        while self._wakers:
            self._wakers.pop().wake()

    def process_ended(self, reason: str) -> None:
        """Keep the requests for the next process."""
        with self._lock:
            was_running = self._child is not None
            self._child = None
            self._history.process_ended()
            self._adapter_files.process_ended()
            crashed = self._table.process_ended(self._n_seq_max) if was_running else []
            calls = self._calls.process_ended()
            submissions, self._submissions = list(self._submissions.values()), {}
            requests = self._table.all()
        for request in requests:
            request.ticket.flush()  # no piece of its reply may come for a while
        self._end_member()
        for pending in (*calls, *submissions):
            pending.end()
        for request in crashed:
            self._release(request.ticket)
            request.ticket.fail(
                RequestCrashed(
                    f"the request was running when the process of model {self._name!r} ended, twice in a row "
                    f"({reason}), so it is the likely cause and is not sent again"
                )
            )

    def _end_member(self) -> None:
        member, self._member = self._member, None
        if member is not None:
            member.end()
            self._cache.remove_member(member)

    @property
    def _n_seq_max(self) -> int:
        return self._backend.n_seq_max if self._backend is not None else 1

    def gave_up(self, error: Error) -> None:
        """Fail everything: no process will follow."""
        self._failure = error
        if self._backend is None:
            self._loading.put(error)
        self._fail_all(error)

    def supervision_ended(self) -> None:
        """Release everything: of a model that was dropped, only the supervisor has the runner."""
        self._end_member()
        if self._stopping:
            self._close()

    def _close(self) -> None:
        self._fail_all(ModelUnloaded(f"model {self._name!r} was unloaded while the request ran or waited"))
        self._end_member()
        if self._backend is not None:
            self.adapters.close()
            self._backend.close()

    def _fail_all(self, error: Error) -> None:
        with self._lock:
            self._child = None
            requests = self._table.all()
            calls = self._calls.take_all()
            submissions, self._submissions = list(self._submissions.values()), {}
            for request in requests:
                self._table.remove(request)
        for pending in (*calls, *submissions):
            pending.fail(type(error)(str(error)))
        for request in requests:
            self._release(request.ticket)
            request.ticket.fail(type(error)(str(error)))
        self.messages_received()


def _encode(message: m.Submit | m.AnyCall) -> bytes:
    """Return the body of a message. Raises OptionError if a value of it cannot be sent."""
    try:
        return m.encode(message)
    except (ValueError, OverflowError) as error:
        raise OptionError(f"a value cannot be sent to the model's process: {error}") from None


def _after_fork_in_child() -> None:
    for runner in list(_runners):
        runner.forked()
    _runners.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
