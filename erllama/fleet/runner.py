"""`FleetRunner`: the `ModelRunner` of a model whose replicas run on other machines.

The ingress keeps every running request with the tokens that its client has. If a replica ends, its requests
continue on other replicas, and the clients notice a pause. A thread with an event loop sends requests and receives
replies.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Never, TypeVar

import numpy as np
from numpy.typing import NDArray

from erllama._process.protocol import messages as m
from erllama._process.protocol import wire_types as w
from erllama._process.protocol.token_message import MARK, decode_tokens
from erllama._process.protocol.wire_values import pack_ids, unpack_error, unpack_hit
from erllama._process.remote_backend import RemoteBackend
from erllama._process.remote_requests import RemoteGroup, RemoteRequest
from erllama._runtime.log import logger
from erllama.checks import check_loaded
from erllama.engine import CacheHit, EngineMetrics, Grammar, Phase, Ticket
from erllama.engine.adapters import Adapters, LoadedAdapter
from erllama.engine.kv.prefix_cache import prompt_namespace
from erllama.engine.requests.text_reply import TextReply, decode_pieces
from erllama.engine.requests.ticket import Waker
from erllama.errors import (
    CalledFromModelThread,
    Error,
    ModelFailed,
    ModelMismatch,
    ModelUnloaded,
    QueueFull,
    RequestCrashed,
    SessionBusy,
    Unsupported,
)
from erllama.fleet.cancelled_reply import end_cancelled
from erllama.fleet.drains import DrainTable
from erllama.fleet.prefix_router import PrefixRouter
from erllama.fleet.transport import Received, ReplicaCalls, ReplicaLost, WirePrefix

log = logger("erllama.fleet")

_T = TypeVar("_T")

# A request that this many replicas in a row did not survive, without a new token between them, is not sent again.
_MAX_DEATHS = 2
# A request that was sent this often in a row, without a new token between, fails: replicas refused it, since they
# stop or have another model, or it reached none.
_MAX_TRIES = 10
# Before a request is sent again: the router may not know yet that a replica has ended. The time doubles each time.
_RETRY_SECONDS = 0.05
_MAX_RETRY_SECONDS = 5.0
_MAX_SESSIONS = 1 << 16  # whose replicas are known; then those used longest ago are forgotten


class _Moved(Exception):  # noqa: N818
    """A request leaves its replica, which stops."""


class _Refused(Exception):  # noqa: N818
    """A replica refused a request that another one may accept."""

    def __init__(self, error: Error) -> None:
        self.error = error


class _Running:
    """A request, and where it runs."""

    def __init__(self, request: RemoteRequest) -> None:
        self.request = request
        self.name = ""  # to the router and the replica; a new one each time that it is sent
        self.replica: str | None = None
        self.consumer: asyncio.Task[None] | None = None
        self.has_ended = False
        self.tries = 0  # that failed in a row, without a new token
        self.cancelled = asyncio.Event()


class FleetRunner:
    """Sends the requests of one model to replicas.

    Args:
        name: of the model.
        calls: reaches the replicas.
        router: chooses among them.
        max_pending: requests that may be sent at once. Further ones raise QueueFull.
        drain_seconds: how long requests may run on a replica that stops before they move to another one.
        n_hot: prefixes that new replicas load.

    Attributes:
        adapters: none; a fleet has no adapters.
    """

    adapters: Adapters

    def __init__(
        self,
        name: str,
        calls: ReplicaCalls,
        router: PrefixRouter,
        *,
        max_pending: int = 1024,
        drain_seconds: float = 30.0,
        n_hot: int = 16,
    ) -> None:
        self._name, self._calls, self._router = name, calls, router
        self._max_pending, self._n_hot = max_pending, n_hot
        self._process = os.getpid()
        self._stopping = False
        self._backend: RemoteBackend | None = None
        self._identity = ""
        self._numbers = count(1)
        self._prefix = uuid.uuid4().hex[:12]
        self._running: dict[int, _Running] = {}
        self._sessions: dict[tuple[str | None, str], int] = {}  # those of running requests
        self._session_replicas: OrderedDict[tuple[str | None, str], str] = OrderedDict()
        self._drains = DrainTable(drain_seconds)
        self._wakers: set[Waker] = set()
        self._metrics = EngineMetrics()
        self._last_hit: CacheHit | None = None
        self._moves = 0
        self._lock = threading.RLock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name=f"erllama-fleet-{name}", daemon=True)
        self._thread.start()

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()

    # --- start -------------------------------------------------------------------------------------

    def connect(self, make: Callable[[FleetRunner, str, m.Started], RemoteBackend]) -> RemoteBackend:
        """Wait for a replica, and return what describes the model.

        Args:
            make: makes the description from this runner, the replica's identity and what it says.

        Raises:
            ModelMismatch: the replica has another model than the ingress.
        """
        identity, body = self._wait(self._calls.describe())
        started = m.decode_from_child(body)
        assert isinstance(started, m.Started)
        self._identity = identity
        self._backend = make(self, identity, started)
        self.adapters = Adapters(self._backend)
        self._router.use_identity(identity)
        self._router.on_change = lambda serving: self._loop.call_soon_threadsafe(self._replicas_changed, serving)
        self._loop.call_soon_threadsafe(self._replicas_changed, self._router.serving)
        return self._backend

    @property
    def state(self) -> w.ModelState | None:
        """None: replicas have states of their own."""
        return None

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine in the event loop, and wait for it in the caller's thread."""
        if threading.current_thread() is self._thread:
            work.close()
            raise CalledFromModelThread(f"model {self._name!r} was called by the thread that receives its replies")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # --- state: reading never waits ----------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """What the fleet does now."""
        return "generating" if self._running else "idle"

    @property
    def pending(self) -> int:
        """Number of requests that wait, beyond the slots of all replicas."""
        return max(len(self._running) - self.slots, 0)

    @property
    def running(self) -> int:
        """Number of requests that run, at most as many as all replicas have slots."""
        return min(len(self._running), self.slots)

    @property
    def slots(self) -> int:
        """Number of requests that all replicas together run at once, as far as they have reported it."""
        return sum(report.slots for report in self._router.reports().values())

    @property
    def last_hit(self) -> CacheHit | None:
        """Cache hit of the latest request; None before the first."""
        return self._last_hit

    @property
    def metrics(self) -> EngineMetrics:
        """Counts of the requests that this process has sent. Ticks and rows are counted by the replicas."""
        return self._metrics

    @property
    def cache_problem(self) -> str:
        """Empty: replicas report their caches in their own logs."""
        return ""

    @property
    def pid(self) -> int:
        """Number of this process, while there is a replica; else 0."""
        return self._process if self._router.serving else 0

    @property
    def restarts(self) -> int:
        """How many times a request continued on another replica."""
        return self._moves

    @property
    def is_ours(self) -> bool:
        """Whether the runner belongs to this process; False in a fork."""
        return self._process == os.getpid()

    @property
    def stopped(self) -> bool:
        """Whether the runner has stopped, or is stopping."""
        return self._stopping

    def namespace(self, cache_salt: str | None) -> bytes:
        """Return the root key of the cache entries that a request with this salt may use."""
        assert self._backend is not None
        return prompt_namespace(self._backend.namespace, cache_salt, ())

    def cached_prefix(self, namespace: bytes, tokens: NDArray[np.int32]) -> int:
        """Return how many tokens of a prompt the best replica has, as far as the router knows; of no salt only."""
        return self._router.longest(tokens, None) if namespace == self.namespace(None) else 0

    def stored_context(self, key: bytes, namespace: bytes) -> None:
        """Return None: it is not known which replica has a context."""
        return

    # --- checks ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise ModelUnloaded if the model is unloaded."""
        check_loaded(self._name, self._process, stopped=self._stopping)

    def check_computes(self) -> None:
        """Check as `check` does."""
        self.check()

    def check_caller(self) -> None:
        """Raise the errors of `check`, and CalledFromModelThread in the thread that receives the replies."""
        self.check()
        if threading.current_thread() is self._thread:
            raise CalledFromModelThread(
                f"model {self._name!r} was called by the thread that receives its replies, and would wait; "
                "hand the work to another thread"
            )

    # --- requests ----------------------------------------------------------------------------------

    def submit(self, ticket: Ticket) -> None:
        """Send a request. Errors of the replica reach the ticket.

        Raises:
            QueueFull: `max_pending` requests are sent already.
            SessionBusy: a request of the same session is running.
            OptionError: an option cannot be sent to another machine.
        """
        self.check_caller()
        request = RemoteRequest(next(self._numbers), ticket, ())
        assert self._backend is not None
        if ticket.streaming and TextReply.suits(ticket.request.options):
            decode_pieces(ticket, self._backend.vocabulary)
        running = _Running(request)
        with self._lock:
            self.check()
            if len(self._running) >= self._max_pending:
                self._metrics.refused += 1
                raise QueueFull(
                    f"{len(self._running)} requests run or wait for model {self._name!r}, and max_pending="
                    f"{self._max_pending}; ask again later, or raise max_pending"
                )
            self._claim_session(ticket, request.id)
            self._running[request.id] = running
        ticket.join(RemoteGroup(self._wakers, partial(self._cancel_soon, request.id)))
        self._loop.call_soon_threadsafe(self._start, running)

    def _claim_session(self, ticket: Ticket, id: int) -> None:
        session = _session(ticket)
        if session is None:
            return
        if session in self._sessions:
            raise SessionBusy(f"a request of session {session[1]!r} is running; wait for its end")
        self._sessions[session] = id

    def _start(self, running: _Running) -> None:
        task = self._loop.create_task(self._serve(running))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, running: _Running) -> None:
        """Run a request until it has ended, on one replica after another."""
        try:
            while not running.has_ended:
                if running.request.ticket.cancelled:
                    self._end_cancelled(running)
                    return
                try:
                    await self._send(running)
                except _Moved:
                    self._count_move(running, "stops")
                except ReplicaLost as error:
                    self._check_loss(running, error)
                    await self._pause(running)
                except _Refused as refused:
                    running.tries += 1
                    if running.tries >= _MAX_TRIES or not self._is_retriable(refused.error):
                        raise refused.error from None
                    await self._pause(running)
        except asyncio.CancelledError:
            self._fail(running, ModelUnloaded(f"model {self._name!r} was unloaded while the request ran or waited"))
        except Exception as error:
            if not isinstance(error, Error):
                log.exception("a request of model %r failed unexpectedly", self._name)
            self._fail(running, error)

    def _check_loss(self, running: _Running, error: ReplicaLost) -> None:
        """Count the end of a request's replica, or that it reached none. Raise an error if that was too often."""
        if running.request.ticket.cancelled:
            return
        running.tries += 1
        if running.replica is not None:
            running.request.deaths += 1
            if running.request.deaths >= _MAX_DEATHS:
                raise self._crashed(error) from error
            self._count_move(running, f"was lost ({error})")
        elif running.tries >= _MAX_TRIES:
            raise ModelFailed(
                f"a request reached no replica of model {self._name!r} in {running.tries} tries ({error}); see the "
                "logs of the replicas"
            ) from error
        else:
            log.warning("a request reached no replica (%s) and is sent again", error)

    async def _pause(self, running: _Running) -> None:
        """Wait before a request is sent again, at most until its deadline. A cancellation ends the wait."""
        delay = min(_RETRY_SECONDS * 2 ** (max(running.tries, 1) - 1), _MAX_RETRY_SECONDS)
        left = self._seconds_left(running.request)
        with suppress(TimeoutError):
            await asyncio.wait_for(running.cancelled.wait(), delay if left is None else min(delay, left))

    def _end_cancelled(self, running: _Running) -> None:
        """End a request that was cancelled while no replica ran it."""
        assert self._backend is not None
        self._forget(running)
        end_cancelled(running.request, self._backend.vocabulary, self._backend.limits.n_ctx)
        self._metrics.count_finished(running.request.ticket.outcome().finish_reason)
        self._wake()

    def _count_move(self, running: _Running, reason: str) -> None:
        running.request.restarts += 1
        self._moves += 1
        running.request.ticket.flush()  # no piece of its reply may come for a while
        log.warning("replica %s %s; its request continues on another one", running.replica, reason)

    def _crashed(self, error: Error) -> RequestCrashed:
        return RequestCrashed(
            f"{_MAX_DEATHS} replicas of model {self._name!r} ended in a row while they ran the request ({error}), "
            "so it is the likely cause and is not sent again"
        )

    def _is_retriable(self, error: Error) -> bool:
        return isinstance(error, ModelUnloaded) or (
            isinstance(error, ModelMismatch) and bool(self._router.accepted())
        )

    async def _send(self, running: _Running) -> None:
        """Run a request on one replica until it has ended.

        Raises:
            _Moved: it has to continue elsewhere.
            _Refused: the replica did not accept it.
            ReplicaLost: the replica has ended.
            Error: the request failed before it was sent.
        """
        request, ticket = running.request, running.request.ticket
        running.name, running.replica = f"{self._prefix}-{next(self._numbers)}", None
        body = m.encode(request.submission())
        self._router.expect(running.name, ticket.request.prompt, ticket.request.options.cache_salt)
        consumer = running.consumer = self._loop.create_task(self._consume(running, body))
        try:
            await asyncio.wait({consumer}, timeout=self._seconds_left(request))
            if not consumer.done():
                raise request.late_error()
            if not consumer.cancelled():
                consumer.result()
            if not running.has_ended and not (consumer.cancelled() and running.replica is None):
                raise _Moved if consumer.cancelled() else ReplicaLost("the stream of its reply ended early")
        finally:
            if not consumer.done():
                consumer.cancel()
                await asyncio.wait({consumer})
            running.consumer = None
            self._router.ended(running.name, running.replica, _context(ticket) if running.has_ended else None)
            self._drains.end(running.name)

    async def _consume(self, running: _Running, body: bytes) -> None:
        """Read what the replica sends. Cancelled if the request has to move."""
        replies = self._calls.run(running.name, body, self._identity)
        try:
            async for received in replies:
                self._receive(running, received)
                if running.has_ended:
                    return
        finally:
            await _close(replies)

    def _seconds_left(self, request: RemoteRequest) -> float | None:
        """Return how many seconds a request may take, with some time for the replica's own error to come."""
        deadline = request.ticket.deadline
        return None if deadline is None else max(deadline - time.perf_counter(), 0.0) + 1.0

    def _receive(self, running: _Running, received: Received) -> None:
        """Handle messages about a request."""
        if running.replica is None:
            running.replica = received.replica
            self._drains.begin(running.name, received.replica, time.monotonic())
            self._arrange_moves()
            session = _session(running.request.ticket)
            if session is not None:
                self._remember(session, received.replica)
            if running.request.ticket.cancelled:
                self._cancel_soon(running.request.id)
        for body in received.bodies:
            if body[0] == MARK:
                for entry in decode_tokens(body):
                    running.request.add_token(entry)
                running.tries = 0
                self._router.begun(running.name)
                continue
            message = m.decode_from_child(body)
            if isinstance(message, m.Refused):
                raise self._refusal(running, unpack_error(message.error))
            if isinstance(message, m.Updates):
                for update in message.updates:
                    self._apply(running, update)
        self._wake()

    def _remember(self, session: tuple[str | None, str], replica: str) -> None:
        """Note the replica of a session's latest request."""
        with self._lock:
            self._session_replicas[session] = replica
            self._session_replicas.move_to_end(session)
            while len(self._session_replicas) > _MAX_SESSIONS:
                self._session_replicas.popitem(last=False)

    def _refusal(self, running: _Running, error: Error) -> _Refused:
        if isinstance(error, ModelMismatch) and running.replica is not None:
            self._router.refuse(running.replica)
        return _Refused(error)

    def _apply(self, running: _Running, update: w.Update) -> None:
        request = running.request
        if update.progress is not None and update.progress.hit is not None and request.hit is None:
            self._last_hit = unpack_hit(update.progress.hit)
        if update.progress is not None and update.progress.tokens:
            running.tries = 0
        self._router.begun(running.name)
        if update.error is not None:
            error = unpack_error(update.error)
            if isinstance(error, ModelUnloaded) and not self._stopping:
                raise _Refused(error)  # the replica stopped before the request had ended
        if update.completion is not None or update.error is not None:
            self._forget(running)  # before the caller sees the end
        request.apply(update)
        if update.completion is not None:
            self._metrics.count_finished(update.completion.finish_reason)
            self._metrics.prompt_tokens += len(request.ticket.request.prompt)
            self._metrics.cached_tokens += update.completion.cache.tokens
        elif update.error is not None:
            self._metrics.count_failed(unpack_error(update.error))

    def _forget(self, running: _Running) -> None:
        with self._lock:
            running.has_ended = True
            self._running.pop(running.request.id, None)
            session = _session(running.request.ticket)
            if session is not None and self._sessions.get(session) == running.request.id:
                del self._sessions[session]

    def _fail(self, running: _Running, error: BaseException) -> None:
        if running.has_ended:
            return
        self._forget(running)
        self._metrics.count_failed(error)
        running.request.ticket.fail(error)
        self._wake()

    def _wake(self) -> None:
        """Wake the event loops whose tasks have events."""
        while self._wakers:
            self._wakers.pop().wake()

    def _cancel_soon(self, id: int) -> None:
        """Cancel a request. Never waits: a ticket is also cancelled by `__del__` and in signal handlers."""
        with suppress(RuntimeError):  # the event loop has ended, and all requests with it
            self._loop.call_soon_threadsafe(self._cancel, id)

    def _cancel(self, id: int) -> None:
        running = self._running.get(id)
        if running is None:
            return
        running.cancelled.set()
        if running.replica is None:
            if running.consumer is not None:
                running.consumer.cancel()  # then `_serve` ends the request
        else:
            self._spawn(self._cancel_on(running, running.replica, running.name))

    async def _cancel_on(self, running: _Running, replica: str, name: str) -> None:
        try:
            await self._calls.cancel(replica, name)
        except ReplicaLost:
            pass  # the request continues elsewhere, and is cancelled there

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- replicas that come and go -------------------------------------------------------------------

    def _replicas_changed(self, serving: tuple[str, ...]) -> None:
        new, left = self._drains.update(serving, time.monotonic())
        if left:
            with self._lock:
                for session in [each for each, replica in self._session_replicas.items() if replica in left]:
                    del self._session_replicas[session]
        if new and self._n_hot:
            prefixes = [WirePrefix(each.salt, pack_ids(each.tokens)) for each in self._router.hottest(self._n_hot)]
            for replica in new if prefixes else ():
                self._spawn(self._warm(replica, prefixes))
        self._arrange_moves()

    async def _warm(self, replica: str, prefixes: list[WirePrefix]) -> None:
        try:
            found = await self._calls.warm(replica, prefixes)
        except Error as error:
            log.warning("replica %s could not load the hottest prefixes: %s", replica, error)
        else:
            log.info("replica %s loaded %d tokens of the hottest prefixes", replica, found)

    def _arrange_moves(self) -> None:
        """Move requests from replicas that stop once their time is over."""
        deadline = self._drains.next_deadline()
        if deadline is not None:
            self._loop.call_later(max(deadline - time.monotonic(), 0.0) + 0.01, self._move_due)

    def _move_due(self) -> None:
        due = set(self._drains.due(time.monotonic()))
        for running in self._running.values():
            if running.name in due and running.consumer is not None:
                running.consumer.cancel()

    # --- calls -------------------------------------------------------------------------------------

    def call(self, make: Callable[[int], m.AnyCall]) -> m.Returned:
        """Call any replica, and wait for its answer. If it ends meanwhile, another one is called, once.

        Args:
            make: makes the message from the call's number.
        """
        self.check_caller()
        body = m.encode(make(next(self._numbers)))
        return self._wait(self._call(body, None))

    def send_soon(self, message: m.AnyCall) -> None:
        """Do nothing: replicas end their embedders themselves."""

    def free_native(self, native: int) -> None:
        """Do nothing: there are no adapters."""

    async def _call(self, body: bytes, replica: str | None) -> m.Returned:
        for attempt in range(2):
            try:
                answer = m.decode_from_child(await self._calls.call(body, replica))
            except ReplicaLost:
                if attempt or replica is not None:
                    raise
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            assert isinstance(answer, m.Returned)
            if answer.error is not None:
                raise unpack_error(answer.error)
            return answer
        raise AssertionError("unreachable")

    def compile(self, grammar: Grammar) -> None:
        """Do nothing: the replica that gets a request compiles its grammar."""
        self.check()

    def end_session(self, session_id: str, cache_salt: str | None) -> bool:
        """Release the cells of a session on the replica that ran its last request."""
        self.check_caller()
        session = (cache_salt, session_id)
        if session in self._sessions:
            raise SessionBusy(f"a request of session {session_id!r} is running; wait for its end")
        with self._lock:
            replica = self._session_replicas.pop(session, None)
        if replica is None or replica not in self._router.serving:
            return False
        body = m.encode(m.EndSession(next(self._numbers), session_id, cache_salt))
        try:
            return self._wait(self._call(body, replica)).flag
        except ReplicaLost:
            return False

    def load_adapter(self, path: Path, digest: str, scale: float, is_complete: Callable[[], bool]) -> Never:
        """Raise Unsupported."""
        raise Unsupported("a fleet has no adapters; load the adapter into a model of one machine")

    def unload_adapter(self, adapter: LoadedAdapter) -> None:
        """Do nothing: there are no adapters."""

    def warm_up(self) -> None:
        """Do nothing: replicas warm up when they start."""

    def evict(self) -> None:
        """Raise Unsupported: each replica has its own context."""
        raise Unsupported("evict() of a fleet; each replica saves its context when it stops")

    # --- the end -----------------------------------------------------------------------------------

    def begin_to_stop(self) -> None:
        """Refuse new requests, and end those that run. Returns at once. Idempotent."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
        self._router.on_change = None
        self._loop.call_soon_threadsafe(self._stop_soon)

    def _stop_soon(self) -> None:
        self._spawn(self._end_loop())

    async def _end_loop(self) -> None:
        own = asyncio.current_task()
        tasks = [task for task in self._tasks if task is not own]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for running in list(self._running.values()):
            self._fail(running, ModelUnloaded(f"model {self._name!r} was unloaded while the request ran or waited"))
        self._loop.stop()

    def stop(self) -> None:
        """Fail all requests with ModelUnloaded. Replicas are not affected. Idempotent."""
        if not self.is_ours:
            return
        self.begin_to_stop()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if self._backend is not None:
            self._backend.close()


def _session(ticket: Ticket) -> tuple[str | None, str] | None:
    options = ticket.request.options
    return None if options.session_id is None else (options.cache_salt, options.session_id)


def _context(ticket: Ticket) -> NDArray[np.int32] | None:
    """Return the tokens of an ended request's prompt and reply; None if it failed."""
    try:
        return np.array(ticket.outcome().context_tokens, np.int32)
    except Error:
        return None


async def _close(replies: AsyncIterator[Received]) -> None:
    close = getattr(replies, "aclose", None)
    if close is not None:
        try:
            await close()
        except Exception as error:
            log.debug("the stream of a replica could not be closed: %s", error)
