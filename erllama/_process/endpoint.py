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
from pathlib import Path

from erllama._process.protocol import messages as m
from erllama._process.protocol import wire_types as w
from erllama._process.protocol.frames import FrameReader, Outbox, receive
from erllama._process.protocol.token_message import TokenEntry, encode_tokens
from erllama._process.protocol.wire_values import (
    pack_completion,
    pack_error,
    pack_generator,
    pack_ids,
    pack_metrics,
    pack_piece,
    pack_progress,
    unpack_grammar,
    unpack_ids,
    unpack_options,
    unpack_progress,
)
from erllama._runtime.log import logger
from erllama.cache import Cache
from erllama.engine import Backend, Embedder, EmbeddingBackend, ModelFacts, ModelThread, Request, Ticket
from erllama.engine.adapters import ActiveAdapter, AdapterBackend, AdapterSet, LoadedAdapter
from erllama.engine.backends.fingerprint import content_digest
from erllama.engine.requests.progress import ReplyProgress
from erllama.engine.requests.ticket import Piece, Waker
from erllama.errors import AdapterUnloaded, BackendError, Error, ModelLoadError, Unsupported

log = logger("erllama.process")

_POOL_THREADS = 16


class RunningRequest:
    """One request of the parent: a `Listener` of its ticket.

    Args:
        n_known: tokens of the reply that the parent has.
        is_read: whether somebody reads the pieces of the reply.

    Attributes:
        id, ticket: the request.
        announced: whether it is listed for the next message.
    """

    def __init__(self, id: int, ticket: Ticket, endpoint: Endpoint, n_known: int, *, is_read: bool) -> None:
        self.id, self.ticket, self.announced = id, ticket, False
        self._endpoint, self._is_read = endpoint, is_read
        self._n_sent = n_known
        self._sent: ReplyProgress | None = None  # in the present process
        ticket.listen(self)

    def announce(self) -> Waker | None:
        """List it for the next message, in the model thread."""
        if self.announced:
            return None
        self.announced = True
        return self._endpoint.announced(self)

    def take(self) -> w.Update | TokenEntry:
        """Return what is new; in the model thread."""
        ticket = self.ticket
        done = ticket.done
        pieces = ticket.take_pieces()
        found, before = None, self._sent
        source = ticket.source
        if source is not None:
            found = self._sent = source.progress(self._n_sent)
            self._n_sent += len(found.tokens)
        are_tokens = found is not None and (not self._is_read or tuple(pieces) == found.tokens)
        if are_tokens and before is not None and not done:
            assert found is not None
            entry = _token_entry(self.id, found, before)
            if entry is not None:
                return entry
        return self._make_update(found, before, None if are_tokens else pieces, done=done)

    def _make_update(
        self, found: ReplyProgress | None, before: ReplyProgress | None, pieces: list[Piece] | None, *, done: bool
    ) -> w.Update:
        progress, shown, ticket = None, None, self.ticket
        if found is not None:
            is_new = before is None or found.sampling_state != before.sampling_state
            progress = pack_progress(found, with_state=is_new)
        if self._is_read and pieces is not None:
            shown = tuple(map(pack_piece, pieces))
        if not done:
            return w.Update(self.id, progress, shown)
        try:
            return w.Update(self.id, progress, shown, completion=pack_completion(ticket.outcome()))
        except BaseException as error:
            return w.Update(self.id, progress, shown, error=pack_error(error))


def _token_entry(id: int, found: ReplyProgress, before: ReplyProgress) -> TokenEntry | None:
    """Return what is new in the short form; None if there is more than one token and its draw."""
    if len(found.tokens) != 1 or found.logprobs or found[3:] != before[3:]:
        return None
    state, last = found.sampling_state, before.sampling_state
    if state is last:
        return TokenEntry(id, found.tokens[0], False, b"")
    if state.position[1:] != last.position[1:] or state.mu is not None:
        return None
    return TokenEntry(id, found.tokens[0], True, pack_generator(state))


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
        self._adapters: dict[int, LoadedAdapter] = {}
        self._embedder: Embedder | None = None
        self._embedder_lock = threading.Lock()
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
        if self._embedder is not None:
            self._embedder.close()
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
            self._return(message, self._abort_embedder)
        else:
            self._pool.submit(self._return, message, partial(self._call, message))

    def _submit(self, message: m.Submit) -> None:
        try:
            options = unpack_options(message.options)
            progress = None if message.progress is None else unpack_progress(message.progress)
            request = Request(unpack_ids(message.prompt), options, message.n_scored, progress)
            # Always streaming: the parent keeps the tokens of every reply, to continue it in another process.
            ticket = Ticket(request, streaming=not message.n_scored)
            adapters = self._adapter_set(message.adapters)
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

    def _adapter_set(self, named: tuple[tuple[int, float], ...]) -> AdapterSet:
        for number, _ in named:
            if number not in self._adapters:
                raise AdapterUnloaded("an adapter of the request could not be loaded again; see the log")
        return tuple(ActiveAdapter(self._adapters[number], scale) for number, scale in named)

    # --- calls -----------------------------------------------------------------------------------

    def _return(self, message: m.AnyCall, call: Callable[[], m.Returned]) -> None:
        try:
            returned = call()
        except BaseException as error:
            if not isinstance(error, Error):
                log.exception("a call of the parent failed unexpectedly")
            returned = m.Returned(message.call, pack_error(error))
        self.send(returned)

    def _call(self, message: m.AnyCall) -> m.Returned:
        runner, call = self._runner, message.call
        match message:
            case m.EndSession(session_id=session_id, cache_salt=cache_salt):
                return m.Returned(call, flag=runner.end_session(session_id, cache_salt))
            case m.Evict():
                runner.evict()
            case m.CompileGrammar(grammar=grammar):
                runner.compile(unpack_grammar(grammar))
            case m.CheckAdapter(path=path):
                self._adapter_backend().check_adapter(Path(path))
            case m.LoadAdapter():
                self._load_adapter(message)
            case m.FreeAdapter(number=number):
                adapter = self._adapters.pop(number, None)
                if adapter is not None:
                    runner.unload_adapter(adapter)
            case m.OpenEmbedder():
                return m.Returned(call, limits=self._open_embedder().limits)
            case m.Embed(texts=texts, pooling=pooling):
                rows = self._open_embedder().embed([unpack_ids(text) for text in texts], pooling)
                packed = tuple((row.astype("<f4", copy=False).tobytes(), row.shape) for row in rows)
                return m.Returned(call, arrays=packed)
            case m.Pair(query=query, document=document):
                ids = self._open_embedder().pair(query, document).astype("<i4", copy=False)
                return m.Returned(call, raw=ids.tobytes())
            case m.CloseEmbedder():
                with self._embedder_lock:
                    embedder, self._embedder = self._embedder, None
                if embedder is not None:
                    embedder.close()
            case m.Tokenize(text=text, add_special=add_special, parse_special=parse_special):
                ids = self._backend.vocabulary.tokenize(text, add_special=add_special, parse_special=parse_special)
                return m.Returned(call, raw=ids.astype("<i4", copy=False).tobytes())
            case m.Detokenize(tokens=tokens, special=special):
                return m.Returned(
                    call, raw=self._backend.vocabulary.detokenize(unpack_ids(tokens), special=special)
                )
            case m.CachedPrefix(namespace=namespace, tokens=tokens):
                return m.Returned(call, number=runner.cached_prefix(namespace, unpack_ids(tokens)))
            case m.StoredContext(key=key, namespace=namespace):
                context = runner.stored_context(key, namespace)
                return m.Returned(call, raw=None if context is None else pack_ids(context))
            case m.ReportCache():
                return m.Returned(call, report=self._cache.member_report().as_plain())
            case m.FlushCache(timeout=timeout):
                flushed = self._cache.flush(timeout)
                return m.Returned(call, flag=flushed, report=self._cache.member_report().as_plain())
            case m.EvictBytes(n_bytes=n_bytes, tiers=tiers):
                return m.Returned(call, number=self._cache.evict_bytes(n_bytes, tiers))
            case _:
                raise BackendError(f"the model's process does not know {type(message).__name__}")
        return m.Returned(call)

    def _adapter_backend(self) -> AdapterBackend:
        if not isinstance(self._backend, AdapterBackend):
            raise Unsupported(
                f"the model takes no adapters: its backend, {type(self._backend).__name__}, has no `load_adapter`; "
                "use load_model, or a backend that has one"
            )
        return self._backend

    def _load_adapter(self, message: m.LoadAdapter) -> None:
        """Load an adapter that requests name by its number. Its own scale is 0: requests bring theirs."""
        if message.number in self._adapters:
            return  # the parent calls again if an earlier process ended during the call
        path = Path(message.path)
        is_complete = partial(self._has_digest, path, message.digest)
        adapter = self._runner.load_adapter(path, message.digest, 0.0, is_complete)
        self._adapters[message.number] = adapter

    def _has_digest(self, path: Path, digest: str) -> bool:
        """Return whether a file is the one that the parent means: it may have been changed since the last start."""
        try:
            return content_digest(path, self._cache) == digest
        except ModelLoadError:
            return False

    def _open_embedder(self) -> Embedder:
        with self._embedder_lock:
            if self._embedder is None:
                if not isinstance(self._backend, EmbeddingBackend):
                    raise Unsupported(
                        f"the model cannot embed: its backend, {type(self._backend).__name__}, has no `embedder`; "
                        "use load_model, or a backend that has one"
                    )
                self._embedder = self._backend.embedder()
            return self._embedder

    def _abort_embedder(self) -> m.Returned:
        if self._embedder is not None:
            self._embedder.abort()
        return m.Returned(-1)


def _wait_writable(connection: socket.socket) -> None:
    poller = select.poll()  # select() takes no file handles above 1023
    poller.register(connection, select.POLLOUT)
    poller.poll(1000)
