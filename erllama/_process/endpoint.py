"""The child's side of the protocol: runs requests and calls on the child's model, and sends what they yield.

One thread reads messages and submits requests. Calls that may take long run in threads of a pool. The model thread
sends the new tokens of all requests as one message after each tick, and a thread of its own sends signs of life.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from erllama._process.model_calls import ModelCalls
from erllama._process.protocol import messages as m
from erllama._process.protocol import wire_types as w
from erllama._process.protocol.frames import FrameReader, Outbox, receive
from erllama._process.protocol.token_message import TokenEntry, encode_tokens
from erllama._process.protocol.wire_values import (
    pack_error,
    pack_metrics,
    unpack_ids,
    unpack_options,
    unpack_progress,
)
from erllama._process.running_request import RunningRequest
from erllama._runtime.log import logger
from erllama.cache import Cache
from erllama.engine import Backend, ModelFacts, ModelThread, Request, Ticket
from erllama.engine.requests.ticket import Waker
from erllama.errors import Error

log = logger("erllama.process")

_POOL_THREADS = 16


class Endpoint:
    """Serves the parent of one model's process. Implements `Waker` for the tickets of its requests.

    Args:
        connection: the socket to the parent.
        reader: has read the first message.
        outbox: sends messages through the socket; it may have sent some.
        backend, cache, runner: the model.
        heartbeat_seconds: the time between two signs of life.
    """

    def __init__(
        self,
        connection: socket.socket,
        reader: FrameReader,
        outbox: Outbox,
        backend: Backend,
        cache: Cache,
        runner: ModelThread,
        heartbeat_seconds: float,
    ) -> None:
        self._connection, self._reader, self._outbox = connection, reader, outbox
        self._backend, self._cache, self._runner = backend, cache, runner
        self._heartbeat_seconds = heartbeat_seconds
        self._backlog = threading.Semaphore(0)
        outbox.on_backlog = self._backlog.release
        self._requests: dict[int, RunningRequest] = {}
        self._submitting: set[int] = set()  # requests that the pool submits
        self._cancelled: set[int] = set()  # of these, those that the parent has cancelled
        self._announced: list[RunningRequest] = []
        self._sent_activity = ("", 0, 0)  # phase, pending and running, as the parent knows them
        self._model_calls = ModelCalls(backend, cache, runner)
        self._pool = ThreadPoolExecutor(_POOL_THREADS, thread_name_prefix="erllama-call")
        self._ended = threading.Event()
        self._state_lock = threading.Lock()
        self._stopping = False

    # --- sending ---------------------------------------------------------------------------------

    def send(self, message: m.FromChild) -> None:
        """Send a message."""
        self._outbox.send(m.encode(message))

    def _send_with_state(self, make: Callable[[w.ModelState], m.FromChild]) -> None:
        """Send a message with the state of the model. The parent keeps the last one that arrives.

        So no state may overtake another: it is read and sent in one step.
        """
        with self._state_lock:
            state = self.state()
            self._sent_activity = (state.phase, state.pending, state.running)
            self.send(make(state))

    def state(self) -> w.ModelState:
        """Return the state of the model."""
        runner = self._runner
        facts = getattr(self._backend, "facts", None) or ModelFacts()
        clock = runner.tick_clock
        began = clock.began
        return w.ModelState(
            phase=runner.phase,
            pending=runner.pending,
            running=runner.running,
            metrics=pack_metrics(runner.metrics),
            cache_problem=runner.cache_problem,
            n_threads=facts.n_threads,
            n_threads_batch=facts.n_threads_batch,
            threads_reason=facts.threads_reason,
            tick_seconds=time.monotonic() - began if began else 0.0,
            expected_seconds=clock.expected_seconds or 0.0,
        )

    def announced(self, request: RunningRequest) -> Waker:
        """List a request for the next message; in the model thread."""
        self._announced.append(request)
        return self

    def wake(self) -> None:
        """Send what a tick added to the announced requests; in the model thread."""
        if self._outbox.full and not any(request.ticket.done for request in self._announced):
            return  # they stay announced, and `_send_backlog` sends them once the parent reads again
        announced, self._announced = self._announced, []
        updates, entries = [], []
        for request in announced:
            request.announced = False
            new = request.take()
            if isinstance(new, TokenEntry):
                entries.append(new)
            else:
                updates.append(new)
        if entries:
            self._outbox.send(encode_tokens(entries))
        runner = self._runner
        activity = (runner.phase, runner.pending, runner.running)
        if updates or (entries and activity != self._sent_activity):
            self._send_updates(updates, activity)

    def _send_updates(self, updates: list[w.Update], activity: tuple[str, int, int]) -> None:
        ended = [update.id for update in updates if update.completion is not None or update.error is not None]
        for id in ended:
            self._requests.pop(id, None)
        now = partial(m.Updates, tuple(updates), *activity)
        if ended:
            self._send_with_state(now)
        else:
            with self._state_lock:
                self._sent_activity = activity
                self.send(now())

    def _send_backlog(self) -> None:
        """Send what the socket did not take at once; in a thread of its own."""
        while not self._ended.is_set():
            while not self._outbox.flush() and not self._ended.is_set():
                _wait_writable(self._connection)
            if self._announced:
                self._runner.call_soon(self.wake)
            self._backlog.acquire()

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(self._heartbeat_seconds):
            if self._runner.stopped and not self._stopping:
                log.critical("the model cannot continue; its process ends, so that it is replaced")
                os._exit(1)
            if self._outbox.full:
                continue  # what waits is a sign of life, too; a parent that is stopped reads none
            try:
                self._send_heartbeat()
            except Exception:
                log.exception("a sign of life could not be sent")

    def _send_heartbeat(self) -> None:
        counters = dict(self._cache.counters())
        self._send_with_state(lambda state: m.Heartbeat(state, counters))

    # --- receiving -------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve the parent until it asks for the end, or is gone."""
        for target in (self._send_backlog, self._send_heartbeats):
            threading.Thread(target=target, name=f"erllama-{target.__name__.strip('_')}", daemon=True).start()
        try:
            received: bytes | None = b""  # the reader may have messages that came with the first one
            while received is not None:
                for body in self._reader.feed(received):
                    message = m.decode_from_parent(body)
                    if isinstance(message, m.Stop):
                        self._stop()
                        return
                    self._handle(message)
                received = receive(self._connection) or None  # no bytes: the parent has ended
        finally:
            self._ended.set()
            self._backlog.release()

    def _stop(self) -> None:
        self._stopping = True
        self._model_calls.close()
        self._runner.stop()
        self._cache.close()
        self._send_heartbeat()  # the last counts
        self.send(m.Stopped())
        deadline = time.monotonic() + 5
        while not self._outbox.flush() and time.monotonic() < deadline:
            _wait_writable(self._connection)

    def _handle(self, message: m.Submit | m.Cancel | m.AnyCall) -> None:
        if isinstance(message, m.Submit):
            if message.options.grammar is not None or message.options.phases is not None:  # slow to compile
                self._submitting.add(message.id)
                self._pool.submit(self._submit, message)
            else:
                self._submit(message)
        elif isinstance(message, m.Cancel):
            if message.id in self._submitting:
                self._cancelled.add(message.id)  # before the request is looked up: `_submit` checks it after
            request = self._requests.get(message.id)
            if request is not None:
                request.ticket.cancel()
        elif isinstance(message, m.AbortEmbedder):
            self._return(message, self._model_calls.abort_embedder)
        else:
            self._pool.submit(self._return, message, partial(self._model_calls.answer, message))

    def _submit(self, message: m.Submit) -> None:
        try:
            options = unpack_options(message.options)
            progress = None if message.progress is None else unpack_progress(message.progress)
            request = Request(unpack_ids(message.prompt), options, message.n_scored, progress)
            # Always streaming: the parent keeps the tokens of every reply, to continue it in another process.
            ticket = Ticket(request, streaming=not message.n_scored)
            adapters = self._model_calls.adapter_set(message.adapters)
            n_known = 0 if progress is None else len(progress.tokens)
            self._requests[message.id] = RunningRequest(
                message.id, ticket, self, n_known, is_read=message.streaming
            )
            if message.id in self._cancelled:
                ticket.cancel()
            self._runner.submit(ticket, adapters)
        except BaseException as error:
            self._requests.pop(message.id, None)
            self.send(m.Refused(message.id, pack_error(error)))
        else:
            self._send_with_state(partial(m.Accepted, message.id))
        finally:
            self._submitting.discard(message.id)
            self._cancelled.discard(message.id)

    # --- calls -----------------------------------------------------------------------------------

    def _return(self, message: m.AnyCall, call: Callable[[], m.Returned]) -> None:
        try:
            returned = call()
        except BaseException as error:
            if not isinstance(error, Error):
                log.exception("a call of the parent failed unexpectedly")
            returned = m.Returned(message.call, pack_error(error))
        self.send(returned)


def _wait_writable(connection: socket.socket) -> None:
    poller = select.poll()  # select() takes no file handles above 1023
    poller.register(connection, select.POLLOUT)
    poller.poll(1000)
