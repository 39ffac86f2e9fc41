"""A replica of a fleet: runs the requests that the ingress sends on a loaded model, and reports its load.

Requests and replies have the form that a model's process and its parent exchange, so a reply that a replica did not
finish continues on another one with the tokens that the client has.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress

from erllama._model.model import Model
from erllama._process.model_calls import ModelCalls
from erllama._process.protocol import messages as m
from erllama._process.protocol import wire_types as w
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
from erllama.engine import Backend, ModelFacts, ModelThread, Request, Ticket
from erllama.engine.requests.ticket import Waker
from erllama.errors import Error, ModelMismatch, ModelUnloaded
from erllama.fleet.loads import Load
from erllama.fleet.prefix_router import ReplicaReport
from erllama.fleet.transport import WirePrefix

log = logger("erllama.fleet")

# Seconds for which messages of a reply gather: each one that Ray carries costs milliseconds in three processes. Of
# a reply that nobody reads before its end, only the progress is sent, so that another replica can continue it.
_GATHER_STREAMED = 0.02
_GATHER_WHOLE = 0.5


def identity_of(namespace: Mapping[str, object], recipe: bytes) -> str:
    """Return a name for a model and the layout of its KV. Equal names mean equal tokens and interchangeable KV."""
    return hashlib.sha256(json.dumps(dict(namespace), sort_keys=True).encode() + b"\0" + recipe).hexdigest()[:32]


class ReplicaRequest:
    """One request on a replica. Receives what ticks add, in the model thread, and yields it in the event loop."""

    def __init__(self, message: m.Submit, ticket: Ticket) -> None:
        n_known = 0 if message.progress is None else len(message.progress.tokens)
        self.ticket, self.prompt = ticket, ticket.request.prompt
        self.cached: int | None = None  # tokens of the prompt that the cache has; None until it was looked up
        self.has_begun = False
        self._ended = False
        self._bodies: deque[bytes] = deque()
        self._loop = asyncio.get_running_loop()
        self._ready, self._end = asyncio.Event(), asyncio.Event()
        self._gather = _GATHER_STREAMED if message.streaming else _GATHER_WHOLE
        self._request = RunningRequest(message.id, ticket, self, n_known, is_read=message.streaming)

    def announced(self, request: RunningRequest) -> Waker:
        """Return what takes the news after the tick; in the model thread."""
        return self

    def wake(self) -> None:
        """Take what a tick has added; in the model thread."""
        self._request.announced = False
        self.has_begun = True
        new = self._request.take()
        if isinstance(new, TokenEntry):
            self._put(encode_tokens([new]))
        else:
            ends = new.completion is not None or new.error is not None
            self._put(m.encode(m.Updates((new,), "generating", 0, 1)), ends=ends)

    def refuse(self, error: BaseException) -> None:
        """End the request with an error of its submission."""
        self._put(m.encode(m.Refused(self._request.id, pack_error(error))), ends=True)

    def _put(self, body: bytes, *, ends: bool = False) -> None:
        self._bodies.append(body)
        self._ended = self._ended or ends
        with suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._announce, ends)

    def _announce(self, ends: bool) -> None:
        self._ready.set()
        if ends:
            self._end.set()

    async def bodies(self) -> AsyncIterator[list[bytes]]:
        """Yield messages, those of a short time together, until the request has ended. The first come at once."""
        while True:
            await self._ready.wait()
            self._ready.clear()
            ended = self._ended  # read first: its message was put before
            found = [self._bodies.popleft() for _ in range(len(self._bodies))]
            if found:
                yield found
            if ended and not self._bodies:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._end.wait(), self._gather)


class Replica:
    """Runs requests on a loaded model. Its coroutines run in one event loop.

    Args:
        model: loaded in this process; unloaded by `close`.
        name: names the replica in the log.

    Attributes:
        identity: names the model; see `identity_of`.
        events, replay: addresses of its KV events; None without them.
    """

    def __init__(self, model: Model, name: str) -> None:
        runner = model._runner
        assert isinstance(runner, ModelThread)
        self._model, self._runner, self._name = model, runner, name
        self._backend: Backend = model._backend
        self._calls = ModelCalls(self._backend, model.cache, runner)
        self._requests: dict[str, ReplicaRequest | None] = {}  # None while the options are checked
        self._cancelled: set[str] = set()  # of those, the requests that were cancelled
        self._lock = threading.Lock()
        self._closed = False
        self.identity = identity_of(self._backend.namespace, self._backend.recipe)
        self.events: str | None = None
        self.replay: str | None = None

    # --- requests ----------------------------------------------------------------------------------

    async def run(self, request: str, body: bytes, identity: str) -> AsyncIterator[list[bytes]]:
        """Run a request, and yield messages until it has ended. Closing the iterator cancels it.

        The first item is empty and comes at once: from then on, `cancel` has an effect.

        Args:
            request: names it in `cancel`.
            body: an encoded `Submit`.
            identity: of the model that the ingress has tokenized for. With another one, the request is refused.
        """
        with self._lock:
            self._requests[request] = None
        try:
            yield []
            message = m.decode_from_parent(body)
            assert isinstance(message, m.Submit)
            if refusal := self._refusal(identity):
                yield [m.encode(m.Refused(message.id, pack_error(refusal)))]
                return
            async with aclosing(self._run(request, message)) as replies:
                async for bodies in replies:
                    yield bodies
        finally:
            with self._lock:
                self._requests.pop(request, None)
                self._cancelled.discard(request)

    async def _run(self, request: str, message: m.Submit) -> AsyncGenerator[list[bytes]]:
        try:
            # Grammars are checked here, which takes a while.
            options = await asyncio.to_thread(unpack_options, message.options)
            progress = None if message.progress is None else unpack_progress(message.progress)
            ticket = Ticket(
                Request(unpack_ids(message.prompt), options, message.n_scored, progress),
                streaming=not message.n_scored,
            )
        except Error as error:
            yield [m.encode(m.Refused(message.id, pack_error(error)))]
            return
        running = ReplicaRequest(message, ticket)
        with self._lock:
            self._requests[request] = running
            if request in self._cancelled:
                ticket.cancel()
        try:
            await asyncio.to_thread(self._submit, running)
            async for bodies in running.bodies():
                yield bodies
        finally:
            if not ticket.done:
                ticket.cancel()

    def _submit(self, running: ReplicaRequest) -> None:
        try:
            self._runner.submit(running.ticket)
        except Error as error:
            running.refuse(error)

    def _refusal(self, identity: str) -> Error | None:
        if identity != self.identity:
            return ModelMismatch(
                f"replica {self._name} runs another model than the ingress, under the same name: its identity is "
                f"{self.identity}, not {identity}. Give all machines the same file and the same options"
            )
        if self._closed:
            return ModelUnloaded(f"replica {self._name} is stopping")
        return None

    def cancel(self, request: str) -> None:
        """End a request early; its reply so far follows."""
        with self._lock:
            running = self._requests.get(request)
            if running is not None:
                running.ticket.cancel()
            elif request in self._requests:
                self._cancelled.add(request)

    # --- calls -------------------------------------------------------------------------------------

    async def call(self, body: bytes) -> bytes:
        """Answer an encoded call; its errors are in the encoded answer."""
        message = m.decode_from_parent(body)
        assert isinstance(message, m.Call)
        try:
            if self._closed:
                raise ModelUnloaded(f"replica {self._name} is stopping")
            if isinstance(message, m.AbortEmbedder):
                return m.encode(self._calls.abort_embedder())
            return m.encode(await asyncio.to_thread(self._calls.answer, message))
        except Exception as error:
            if not isinstance(error, Error):
                log.exception("a call of the ingress failed unexpectedly")
            return m.encode(m.Returned(message.call, pack_error(error)))

    def describe(self) -> tuple[str, bytes]:
        """Return the identity of the model, and its description as an encoded `Started`."""
        backend, runner = self._backend, self._runner
        facts = getattr(backend, "facts", None) or ModelFacts()
        state = w.ModelState(
            phase=runner.phase,
            pending=runner.pending,
            running=runner.running,
            metrics=pack_metrics(runner.metrics),
            cache_problem=runner.cache_problem,
            n_threads=facts.n_threads,
            n_threads_batch=facts.n_threads_batch,
            threads_reason=facts.threads_reason,
        )
        started = m.Started(
            pid=os.getpid(),
            limits=backend.limits,
            facts=facts,
            namespace=json.dumps(dict(backend.namespace)).encode(),
            recipe=backend.recipe,
            backend=type(backend).__name__,
            description=str(getattr(backend, "description", "")),
            vocabulary=None,
            n_seq_max=self._model._n_seq_max,
            state=state,
        )
        return self.identity, m.encode(started)

    def report(self) -> ReplicaReport:
        """Return the replica's load. Looks up the prompts that are not computed yet."""
        with self._lock:
            running = [each for each in self._requests.values() if each is not None]
        tokens, slots = 0, self._model._n_seq_max
        for place, each in enumerate(running):
            if each.has_begun:
                continue
            if place >= slots:
                tokens += len(each.prompt)
                continue
            if each.cached is None:
                namespace = self._runner.namespace(each.ticket.request.options.cache_salt)
                each.cached = self._runner.cached_prefix(namespace, each.prompt)
            tokens += len(each.prompt) - each.cached
        return ReplicaReport(self.identity, slots, Load(tokens, len(running)), self.events, self.replay)

    def check_health(self) -> None:
        """Raise ModelUnloaded if the model has ended, so that the replica is replaced."""
        self._runner.check()

    # --- start and end -----------------------------------------------------------------------------

    def warm(self, prefixes: Sequence[WirePrefix], seconds: float) -> int:
        """Load prefixes from the cache's slower tiers into its memory; compute nothing else.

        Args:
            seconds: after which no further prefix is begun.

        Returns:
            how many tokens the cache had.
        """
        deadline, found = time.monotonic() + seconds, 0
        for prefix in prefixes:
            tokens = unpack_ids(prefix.tokens)
            n = self._runner.cached_prefix(self._runner.namespace(prefix.salt), tokens)
            if not n or time.monotonic() >= deadline or self._closed:
                continue
            try:
                self._model.prefill(tokens[:n], cache_salt=prefix.salt, timeout=seconds)
            except Error as error:
                log.warning("replica %s could not load a prefix of %d tokens: %s", self._name, n, error)
                continue
            found += n
        return found

    def close(self) -> None:
        """Refuse new requests, save the contexts, and write what waits. Idempotent."""
        self._closed = True
        self._calls.close()
        self._model.unload()
        self._model.cache.close()
