"""The requests that run in a model's process, as the parent keeps them to continue them in another one.

A `RemoteRequest` has what a new process needs: the prompt, the options, the tokens so far and the state of the
sampler. `RequestTable` knows which requests are out, and in which order a new process gets them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import cast

import msgspec

from erllama._process.protocol import messages as m
from erllama._process.protocol import wire_types as w
from erllama._process.protocol.token_message import TokenEntry
from erllama._process.protocol.wire_values import (
    pack_ids,
    pack_options,
    unpack_completion,
    unpack_error,
    unpack_piece,
)
from erllama.engine import Ticket
from erllama.engine.adapters import AdapterSet
from erllama.engine.requests.ticket import TicketGroup, Waker
from erllama.errors import DeadlineExceeded

# A request that was running at this many deaths in a row, without a new token between them, is not sent again.
_MAX_DEATHS = 2


class RemoteGroup(TicketGroup):
    """The group of one request's ticket. A cancellation becomes a call.

    Args:
        wakers: the event loops to wake, of all requests.
        on_cancel: called, in any thread, when the ticket was cancelled. Must not wait.
    """

    def __init__(self, wakers: set[Waker], on_cancel: Callable[[], None]) -> None:
        self._on_cancel = on_cancel
        super().__init__()
        self.wakers = wakers

    @property
    def cancelled(self) -> bool:
        """Always False; setting it to True cancels."""
        return False

    @cancelled.setter
    def cancelled(self, cancelled: bool) -> None:
        if cancelled:
            self._on_cancel()


class RemoteRequest:
    """One request in the process of its model.

    Args:
        id: identifies it in messages.
        ticket: the caller's end.
        adapters: the set in effect at submission.

    Attributes:
        id, ticket, adapters: the arguments.
        deaths: how many processes in a row ended while it was running, without a new token between them.
        restarts: how many processes ended since it was submitted.

    Raises:
        OptionError: an option cannot cross to another process.
    """

    def __init__(self, id: int, ticket: Ticket, adapters: AdapterSet) -> None:
        self.id, self.ticket, self.adapters = id, ticket, adapters
        self.deaths = self.restarts = 0
        self._options = pack_options(ticket.request.options, None)
        self._prompt = pack_ids(ticket.request.prompt)
        self._tokens: list[int] = []
        self._logprobs: list[w.WireLogprobs] = []
        self._state: w.WireSamplingState | None = None
        self._generator: bytes | None = None  # of the state, if a draw has changed it since
        self._queued: tuple[int, ...] = ()
        self._hit: w.WireHit | None = None
        self._thinking_ended = False
        self._stored = (0, 0)

    @property
    def has_tokens(self) -> bool:
        """Whether its reply has begun."""
        return bool(self._tokens)

    @property
    def hit(self) -> w.WireHit | None:
        """The cache hit of its prompt, once it is known."""
        return self._hit

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return self.ticket.deadline is not None and time.perf_counter() >= self.ticket.deadline

    def late_error(self) -> DeadlineExceeded:
        """Return the error of a request whose time is over."""
        return DeadlineExceeded(
            f"the reply was not complete within timeout={self.ticket.request.options.timeout:g} s"
        )

    def submission(self) -> m.Submit:
        """Return the message that runs it, or continues it.

        Raises:
            DeadlineExceeded: its time is over.
        """
        options = self._options
        if self.ticket.deadline is not None:
            left = self.ticket.deadline - time.perf_counter()
            if left <= 0:
                raise self.late_error()
            options = msgspec.structs.replace(options, timeout=left)
        return m.Submit(
            id=self.id,
            prompt=self._prompt,
            options=options,
            n_scored=self.ticket.request.n_scored,
            streaming=self.ticket.streaming,
            adapters=tuple((cast(int, adapter.native), scale) for adapter, scale in self.adapters),
            progress=self.progress(),
        )

    def progress(self) -> w.WireProgress | None:
        """Return how far its reply has come; None before its first token."""
        state = self._state
        if not self._tokens or state is None:
            return None
        if self._generator is not None:
            state = msgspec.structs.replace(state, state=self._generator)
        return w.WireProgress(
            tuple(self._tokens),
            tuple(self._logprobs),
            state,
            self._queued,
            self._hit,
            self._thinking_ended,
            self._stored,
        )

    def add_token(self, entry: TokenEntry) -> None:
        """Record one new token, and send it to the reader."""
        self._tokens.append(entry.token)
        if entry.drawn:
            self._generator = entry.state
        self.deaths = 0
        self.ticket.send_token(entry.token)

    def apply(self, update: w.Update) -> None:
        """Record what a tick added, and send it to the reader."""
        ticket, progress = self.ticket, update.progress
        if progress is not None:
            self._tokens += progress.tokens
            self._logprobs += progress.logprobs
            if progress.state is not None:
                self._state, self._generator = progress.state, None
            self._queued = progress.queued
            self._hit = progress.hit or self._hit
            self._thinking_ended = progress.thinking_ended
            self._stored = progress.stored
            if progress.tokens:
                self.deaths = 0
            if update.pieces is None:
                for token in progress.tokens:
                    ticket.send_token(token)
        if update.pieces:
            for piece in update.pieces:
                ticket.emit(unpack_piece(piece))
            ticket.notify()
        if update.completion is not None:
            ticket.finish(unpack_completion(update.completion, ticket.request.prompt, self.restarts))
        elif update.error is not None:
            error = unpack_error(update.error)
            # The process names the time that was left when it got the request.
            ticket.fail(self.late_error() if isinstance(error, DeadlineExceeded) else error)


class RequestTable:
    """The requests that are out. Not thread-safe; the runner's lock guards it.

    After a process has ended, the requests that were running are sent to the next one by one: each when the one
    before it has a new token or has ended. So if one of them ends the process again, it is known which.
    """

    def __init__(self) -> None:
        self._requests: dict[int, RemoteRequest] = {}
        self._waiting: deque[RemoteRequest] = deque()  # not sent yet
        self._on_trial: RemoteRequest | None = None  # sent alone after a death, without a new token since
        self._suspects: set[int] = set()  # those that were running at the last death
        self._sent: set[int] = set()

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request: RemoteRequest) -> bool:
        return request.id in self._requests

    @property
    def has_waiting(self) -> bool:
        """Whether a request waits for a process, or for another request to pass its trial."""
        return bool(self._waiting)

    def late(self) -> list[RemoteRequest]:
        """Return the requests that wait for a process, and whose time is over."""
        return [request for request in self._waiting if request.late]

    def all(self) -> list[RemoteRequest]:
        """Return all requests, in the order of submission."""
        return list(self._requests.values())

    def get(self, id: int) -> RemoteRequest | None:
        """Return a request that is out."""
        return self._requests.get(id)

    def is_sent(self, request: RemoteRequest) -> bool:
        """Whether the present process has it."""
        return request.id in self._sent

    def add(self, request: RemoteRequest) -> None:
        """Add a request. `next_to_send` returns it when it may be sent."""
        self._requests[request.id] = request
        self._waiting.append(request)

    def remove(self, request: RemoteRequest) -> None:
        """Remove a request that has ended."""
        self._requests.pop(request.id, None)
        self._sent.discard(request.id)
        self._suspects.discard(request.id)
        if request in self._waiting:
            self._waiting.remove(request)
        if self._on_trial is request:
            self._on_trial = None

    def next_to_send(self) -> RemoteRequest | None:
        """Return the next request to send, and count it as sent; None if no request may be sent now."""
        if self._on_trial is not None or not self._waiting:
            return None
        request = self._waiting.popleft()
        self._sent.add(request.id)
        if request.id in self._suspects:
            self._on_trial = request
        return request

    def is_suspect(self, request: RemoteRequest) -> bool:
        """Whether a request was running at the last death, and has no new token since."""
        return request.id in self._suspects or self._on_trial is request

    def progressed(self, request: RemoteRequest) -> None:
        """Note that a request has a new token."""
        self._suspects.discard(request.id)
        if self._on_trial is request:
            self._on_trial = None

    def process_ended(self, n_running: int) -> list[RemoteRequest]:
        """Note the end of the process. All requests wait for the next one.

        Args:
            n_running: the number of requests that may run at once: the first of those that were sent.

        Returns:
            the requests that were running at too many ends.
        """
        sent = [request for request in self._requests.values() if request.id in self._sent]
        # While one is on trial, those that passed before it run, too.
        running = sent[:n_running]
        for request in sent:
            request.restarts += 1
        for request in running:
            request.deaths += 1
        crashed = [request for request in running if request.deaths >= _MAX_DEATHS]
        for request in crashed:
            self.remove(request)
        self._suspects |= {request.id for request in running if request not in crashed}
        self._on_trial = None
        self._sent.clear()
        # Suspects first: only they are running when one of them ends the process again.
        self._waiting = deque(
            sorted(self._requests.values(), key=lambda request: (request.id not in self._suspects, request.id))
        )
        return crashed
