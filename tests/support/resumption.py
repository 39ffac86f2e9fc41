"""Replies that are interrupted between two ticks, and resumed on another model thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

import erllama
from erllama.cache import Cache, Policy
from erllama.engine import (
    Backend,
    Completion,
    Event,
    Request,
    RequestOptions,
    Ticket,
    Vocabulary,
)
from erllama.engine.backends.stub import EOG, StubBackend
from erllama.engine.requests.progress import ReplyProgress
from erllama.engine.requests.text_reply import TextReply, decode_pieces
from erllama.engine.requests.ticket import Piece, TicketGroup
from support.engine_models import start_thread
from support.scripted_backend import PieceVocabulary

Outcome = Completion | erllama.Error

# Markers as one token and in parts, characters in parts, and special tokens without text.
VOCABULARY = PieceVocabulary(
    ["<t>", "</t>", "<c>", "</c>", "ab", "a b", 'é"', "<", "</", "é}"], ["<|t|>", "<|stop|>"], end="<|end|>"
)
THINK, STOP = VOCABULARY.special["<|t|>"], VOCABULARY.special["<|stop|>"]
LIKELY = [*range(257, VOCABULARY.n_tokens), *sorted(set('ab tc</>{}":é☃\n'.encode()))]


class LikelyStub(StubBackend):
    """A stub with `VOCABULARY` that prefers the tokens of markers and a few letters."""

    def __init__(self, *, likely: Sequence[int] = LIKELY, end_bias: float = 6.0, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        limits = self.limits
        sizes = {name: getattr(limits, name) for name in limits.__slots__}
        self.limits = limits.__class__(**{**sizes, "n_vocab": VOCABULARY.n_tokens})
        self.vocabulary = VOCABULARY  # type: ignore[assignment]
        self._biases = np.zeros(VOCABULARY.n_tokens, np.float32)
        self._biases[list(likely)] = 8
        self._biases[EOG] = end_bias

    def _logits(self, sequence: int) -> NDArray[np.float32]:
        return super()._logits(sequence) + self._biases


class Record:
    """What another process has received of a reply.

    Attributes:
        pieces: for the reader.
        progress: the latest progress, with all tokens; None before the first.
    """

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.progress: ReplyProgress | None = None

    def add(self, ticket: Ticket) -> None:
        """Receive what is new. Called by the model thread."""
        self.pieces += ticket.take_pieces()
        assert ticket.source is not None
        known = self.progress
        new = ticket.source.progress(0 if known is None else len(known.tokens))
        if known is not None:
            new = new._replace(tokens=known.tokens + new.tokens, logprobs=known.logprobs + new.logprobs)
        self.progress = new


class _Nobody:
    """Makes the model thread call `TicketGroup.wake` after each tick."""

    def wake(self) -> None:
        pass


_NOBODY = _Nobody()


class Observer(TicketGroup):
    """Records a reply between ticks, and kills the backend at one of these moments.

    Attributes:
        n_borders: borders of ticks so far, from the first tick of the request on.
        killed: whether the backend was killed.
    """

    def __init__(
        self, ticket: Ticket, backend: Backend, record: Record | None, kill_after: int | None, every: int
    ) -> None:
        super().__init__()
        self.wakers.add(_NOBODY)
        self._ticket, self._backend, self._record = ticket, backend, record
        self._kill_after, self._every = kill_after, every
        self.n_borders = 0
        self.killed = False

    def wake(self) -> None:
        super().wake()
        self.wakers.add(_NOBODY)
        if self.killed or self._ticket.source is None or self._ticket._group is not self:
            return
        self.n_borders += 1
        is_last = self.n_borders == self._kill_after
        if self._record is not None and (self.n_borders == 1 or self.n_borders % self._every == 0):
            self._record.add(self._ticket)
        if is_last:
            self.killed = True
            kill(self._backend)


def kill(backend: Backend) -> None:
    """Make the calls of a backend fail that compute or save: what happens later is lost, as with its process."""

    def fail(*_: object) -> None:
        raise erllama.BackendError("killed")

    backend.decode = backend.pack = fail  # type: ignore[method-assign, assignment]


class Life:
    """The run of one request on one model thread, until its end or until the backend is killed.

    Args:
        record: receives the pieces and the progress after every `every` ticks; None to read events instead.
        kill_after: the number of ticks after which the backend is killed; None for never.
        n_beside: other requests that run meanwhile.

    Attributes:
        outcome: the completion or the error; None if the backend was killed.
        events: without a record, the events except `Done`.
    """

    def __init__(
        self,
        request: Request,
        backend: Backend,
        cache: Cache,
        record: Record | None = None,
        *,
        kill_after: int | None = None,
        every: int = 1,
        n_beside: int = 0,
        policy: Policy | None = None,
    ) -> None:

        thread = start_thread(backend, cache, policy)
        ticket = Ticket(request, streaming=True)
        observer = Observer(ticket, backend, record, kill_after, every)
        self.outcome: Outcome | None = None
        self.events: list[Event] = []
        try:
            thread._scheduler.tickets = observer
            for i in range(n_beside):
                beside = Request(np.array([i, 0], np.int32), RequestOptions(max_tokens=100))
                thread.submit(Ticket(beside, streaming=False))
            try:
                thread.submit(ticket)
                if record is None:
                    for event in ticket.events():
                        self.events.append(event)
                    assert self.events.pop() == erllama.Done(ticket.result())
                self.outcome = ticket.result()
            except erllama.Error as error:
                self.outcome = error
        finally:
            thread.stop()
        assert ticket.source is None, "a reply that has ended is not kept"
        if observer.killed:
            self.outcome = None
        elif record is not None:
            record.pieces += ticket.take_pieces()


def events_of(
    request: Request, pieces: Sequence[Piece], outcome: Outcome | None, vocabulary: Vocabulary
) -> list[Event]:
    """Return the events, without `Done`, that a ticket of another process makes from pieces."""
    ticket = Ticket(request, streaming=True)
    if TextReply.suits(request.options):
        decode_pieces(ticket, vocabulary)
    for piece in pieces:
        if isinstance(piece, int):
            ticket.send_token(piece)
        else:
            ticket.emit(piece)
            ticket.notify()
    events: list[Event] = []
    if outcome is None:
        while (event := ticket.poll()) is not None:
            events.append(event)
    elif isinstance(outcome, Completion):
        ticket.finish(outcome)
        events = list(ticket.events())
        assert events.pop() == erllama.Done(outcome)
    else:
        ticket.fail(outcome)
        try:
            for event in ticket.events():
                events.append(event)
        except erllama.Error as error:
            assert error is outcome  # noqa: PT017
    return events


def comparable(outcome: Outcome | None, *without: str) -> object:
    """Return the parts of an outcome that an interruption must not change."""
    if not isinstance(outcome, Completion):
        return type(outcome), str(outcome)
    dropped = {"timings", "drafts", *without}
    return {field.name: getattr(outcome, field.name) for field in fields(outcome) if field.name not in dropped}
