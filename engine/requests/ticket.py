"""The caller's end of a request in flight: its events, its result, and its cancellation.

The model thread fills a `Ticket`, and callers read it, from any thread. Events arrive in order and end with `Done`
or an error. The model thread never waits for a reader. Both sides meet in `queue.SimpleQueue`, which is written in
C: `put` and `get` are one step each, so an exception of a signal handler cannot leave them halfway.
`python -m benchmarks.waiting` compares it with other ways of waiting.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Literal, NamedTuple, Protocol

from erllama.engine.output.text import TokenDecoder
from erllama.engine.requests.progress import ProgressSource
from erllama.engine.requests.request import (
    Completion,
    Done,
    Event,
    Request,
    TextDelta,
    ThinkingDelta,
    ThinkingEnd,
    ToolCallDelta,
    ToolCallEnd,
)
from erllama.engine.sampling.sampler import TokenLogprobs
from erllama.errors import ModelUnloaded

# Beyond this many unread pieces, further ones of one kind are joined: a stalled reader costs no more memory than
# the reply.
_MAX_UNREAD = 256
# Longest wait at a time. A Ctrl-C in the moment before a thread sleeps is noticed when it wakes.
SLEEP_SECONDS = 1.0


class DeltaPiece(NamedTuple):
    """A part of a reply, from which the reader's thread makes an event.

    Attributes:
        kind: its phase.
        text: its text.
        tokens: the ids since the last piece.
        logprobs: one for each of them, if requested; else empty.
    """

    kind: Literal["text", "thinking", "call"]
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]


class EndPiece(NamedTuple):
    """The end of a thought or of a call.

    Attributes:
        kind: the phase that ended.
        raw: the signature of the thinking, or the bytes of the call.
    """

    kind: Literal["thinking", "call"]
    raw: bytes


class TextTokens(NamedTuple):
    """Tokens of a reply that is all text. The reader's thread decodes them.

    Attributes:
        tokens: their ids.
        is_last: whether the reply ends with them: a character that has begun will not end.
    """

    tokens: tuple[int, ...]
    is_last: bool = False


# A token alone is one of a reply that is all text. It is the most frequent piece, so it has no object of its own.
Piece = DeltaPiece | EndPiece | TextTokens | int

_DELTAS: dict[str, type[TextDelta] | type[ThinkingDelta] | type[ToolCallDelta]] = {
    "text": TextDelta,
    "thinking": ThinkingDelta,
    "call": ToolCallDelta,
}


class Waker(Protocol):
    """Wakes the tasks of one event loop."""

    def wake(self) -> None:
        """Wake all tasks that were announced. Must be quick and must not raise."""


class Listener(Protocol):
    """A task that waits for the events of one ticket."""

    def announce(self) -> Waker | None:
        """Record, in the model thread, that `poll` has an event.

        Returns:
            what wakes the task; None if it will be woken anyway.
        """


class TicketGroup:
    """The tickets of one model thread: the tasks to wake after a tick, and whether a ticket was cancelled.

    To wake an event loop takes a system call, during which other threads run. So the model thread wakes each loop
    once, when it has finished a tick.

    Attributes:
        cancelled: set by any thread when it has cancelled a ticket; cleared by the model thread.
        wakers: wake the tasks that have events.
    """

    def __init__(self) -> None:
        self.cancelled = False
        self.wakers: set[Waker] = set()

    def add(self, waker: Waker) -> None:
        """Wake the tasks of a waker at the next `wake`."""
        self.wakers.add(waker)

    def wake(self) -> None:
        """Wake all tasks that have events."""
        while self.wakers:
            self.wakers.pop().wake()


class Ticket:
    """One request in flight. Safe from any thread. One thread at a time reads the events.

    Args:
        request: the request.
        streaming: whether the caller reads events; otherwise only the result.

    Attributes:
        cancelled: whether an early end was requested.
        deadline: when the request fails, on the clock of time.perf_counter; None for never.
        model: what runs the request; the ticket keeps it alive.
        source: the reply while it is in progress, for the model thread alone; None before the request is submitted,
            and after its end.
    """

    def __init__(self, request: Request, streaming: bool) -> None:
        self.request = request
        self.streaming = streaming
        self.submitted = time.perf_counter()
        timeout = request.options.timeout
        self.deadline = None if timeout is None else self.submitted + timeout
        self._process = os.getpid()
        self._emitted: list[Piece] = []  # not sent to the readers yet; used by the model thread alone
        self._backlog = _Backlog()  # pieces before those, if the reader is slow; used by the model thread alone
        self._unread: SimpleQueue[Piece | None] = SimpleQueue()  # None, the last item, wakes the readers at the end
        self._joined: deque[Piece] = deque()  # pieces before those, which `join_unread` joined; used by the reader
        self._decoder: TokenDecoder | None = None  # of a reply that is all text; used by the readers
        self._ended: SimpleQueue[None] = SimpleQueue()  # has an item once the request has ended
        self._completion: Completion | None = None
        self._error: BaseException | None = None
        self._end_lock = threading.Lock()
        self._end_read = False
        self.cancelled = False
        self.model: object = None
        self.source: ProgressSource | None = None
        self._listener: Listener | None = None
        self._group: TicketGroup | None = None

    # --- the model thread's side

    def join(self, group: TicketGroup) -> None:
        """Become a ticket of a model thread, which wakes the tasks that listen. Called before its first event."""
        self._group = group
        if self.cancelled:
            group.cancelled = True

    def decode_with(self, decoder: TokenDecoder) -> None:
        """Set the decoder of a reply that is all text. Called before its first event."""
        self._decoder = decoder

    def send_token(self, token: int) -> None:
        """Send a token of a reply that is all text to the readers, if there are any, and wake them."""
        if not self.streaming:
            return
        if self._backlog.runs or self._unread.qsize() >= _MAX_UNREAD:
            self._emitted.append(token)
            self.notify()
            return
        self._unread.put(token)
        if self._listener is not None:
            self._announce(self._listener)

    def emit(self, piece: Piece) -> None:
        """Add a piece, if the caller reads events. `notify` sends it to the readers."""
        if self.streaming:
            self._emitted.append(piece)

    def notify(self) -> None:
        """Send the new pieces, and wake the readers. If too many are unread, wait with the new ones."""
        if self._emitted:
            if self._unread.qsize() < _MAX_UNREAD:
                self._send()
            else:
                self._backlog.add(self._emitted)
                self._emitted = []

    def flush(self) -> None:
        """Send all pieces, however many are unread. For a request that pauses or ends."""
        if self._backlog.runs:
            self._backlog.add(self._emitted)
            self._emitted = []
        self._send()

    def take_pieces(self) -> list[Piece]:
        """Remove and return all pieces that are not read, for a reader that sends them to another process.

        Called by the model thread, between two ticks, as `source.progress` is: the pieces are those of the tokens
        up to that progress. Another ticket's `emit` and `send_token` accept them. The end of the request remains
        for the other readers. `result` and `outcome` return it.
        """
        pieces = self._take_unread()
        if self._backlog.runs:
            pieces += self._backlog.take()
        pieces += self._emitted
        self._emitted = []
        return pieces

    def _take_unread(self) -> list[Piece]:
        pieces: list[Piece] = []
        while not self._unread.empty():
            piece = self._unread.get_nowait()
            if piece is None:  # the last item
                self._unread.put(None)
                break
            pieces.append(piece)
        return pieces

    def drop_emitted(self) -> None:
        """Drop the pieces that were emitted and not sent: the readers have them from another process."""
        self._emitted = []

    def _send(self) -> None:
        pieces, self._emitted = self._emitted, []
        if self._backlog.runs:
            pieces = self._backlog.take() + pieces
        for piece in pieces:
            self._unread.put(piece)
        if pieces and self._listener is not None:
            self._announce(self._listener)

    def _announce(self, listener: Listener) -> None:
        waker = listener.announce()
        if waker is None:
            return
        if self._group is not None:
            self._group.add(waker)
        else:
            waker.wake()

    def finish(self, completion: Completion) -> None:
        """End the request with a result."""
        self.flush()
        self._completion = completion
        self._announce_end()

    def fail(self, error: BaseException) -> None:
        """End the request with an error."""
        self.flush()
        self._error = error
        self._announce_end()

    def _announce_end(self) -> None:
        self._unread.put(None)
        self._ended.put(None)
        if self._listener is not None:
            self._announce(self._listener)

    # --- the caller's side

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._completion is not None or self._error is not None

    def cancel(self) -> None:
        """Request an early end; the request still ends with a Completion. Idempotent."""
        self.cancelled = True
        if self._group is not None:  # otherwise the model thread has not received it, and will check it
            self._group.cancelled = True

    @property
    def has_listener(self) -> bool:
        """Whether a task of an event loop waits for the events."""
        return self._listener is not None

    def listen(self, listener: Listener) -> None:
        """Announce to a listener when `poll` has an event. Called before the request is submitted."""
        self._listener = listener

    def poll(self) -> Event | None:
        """Return the next event, or None if there is none yet. Raises the request's error if it failed."""
        self._check_process()
        if not self.done and not self._joined and self._unread.empty():
            return None
        return self._next(wait=False)

    def join_unread(self) -> None:
        """Join the unread pieces, so that the next events have all that has come. Called by the reader."""
        unread = _Backlog()
        unread.add([*self._joined, *self._take_unread()])
        self._joined = deque(unread.take())

    def events(self) -> Iterator[Event]:
        """Yield events as they arrive. Raises the request's error if it failed."""
        while not self._end_read:
            self._check_process()
            event = self._next(wait=True)
            if event is not None:
                yield event

    def result(self) -> Completion:
        """Wait for the end and return the result. Raises the request's error if it failed."""
        self._check_process()
        while not self.done:
            with suppress(Empty):
                self._ended.get(timeout=SLEEP_SECONDS)
                self._ended.put(None)  # for the next thread that waits
        return self.outcome()

    def outcome(self) -> Completion:
        """Return the result, or raise the request's error. Requires `done`."""
        if self._error is not None:
            raise self._error
        assert self._completion is not None
        return self._completion

    def _next(self, *, wait: bool) -> Event | None:
        """Return the next event; None if none arrives in time, or after the end."""
        if self._joined:
            return self._make_event(self._joined.popleft())
        done = self.done  # read first: all pieces are sent before the request is done
        try:
            piece = self._unread.get(wait and not done, SLEEP_SECONDS)
        except Empty:
            piece = None
        else:
            if piece is not None:
                return self._make_event(piece)
            self._unread.put(None)  # for the other readers
            done = True
        return self._end() if done else None

    def _make_event(self, piece: Piece) -> Event:
        """Return the event of a piece."""
        if isinstance(piece, int):
            assert self._decoder is not None
            return TextDelta(self._decoder.feed(piece), (piece,))
        if isinstance(piece, TextTokens):
            assert self._decoder is not None
            text = "".join(map(self._decoder.feed, piece.tokens))
            return TextDelta(text + self._decoder.finish() if piece.is_last else text, piece.tokens)
        if isinstance(piece, DeltaPiece):
            return _DELTAS[piece.kind](piece.text, piece.tokens, piece.logprobs)
        return ThinkingEnd(piece.raw) if piece.kind == "thinking" else ToolCallEnd(piece.raw)

    def _end(self) -> Event | None:
        """Return the last event, or raise the request's error; once."""
        with self._end_lock:
            if self._end_read:
                return None
            self._end_read = True
        return Done(self.outcome())

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise ModelUnloaded("the request was made before this process was forked; its model runs in the parent")


class _Backlog:
    """Pieces that a slow reader has not read; consecutive ones of one kind are joined.

    Attributes:
        runs: the consecutive pieces of one kind.
    """

    def __init__(self) -> None:
        self.runs: list[list[Piece]] = []

    def add(self, pieces: list[Piece]) -> None:
        """Add pieces."""
        for piece in pieces:
            last = self.runs[-1] if self.runs else None
            if last is not None and not isinstance(piece, EndPiece) and _kind(piece) == _kind(last[0]):
                last.append(piece)
            else:
                self.runs.append([piece])

    def take(self) -> list[Piece]:
        """Remove and return all pieces, joined."""
        runs, self.runs = self.runs, []
        return [_join(run) if len(run) > 1 else run[0] for run in runs]


def _kind(piece: Piece) -> str:
    if isinstance(piece, DeltaPiece):
        return piece.kind
    return "end" if isinstance(piece, EndPiece) else "tokens"


def _join(pieces: list[Piece]) -> Piece:
    """Join pieces of one kind."""
    deltas = [piece for piece in pieces if isinstance(piece, DeltaPiece)]
    if not deltas:
        tokens: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                tokens.append(piece)
            elif isinstance(piece, TextTokens):
                tokens += piece.tokens
        last = pieces[-1]
        return TextTokens(tuple(tokens), is_last=isinstance(last, TextTokens) and last.is_last)
    return DeltaPiece(
        deltas[0].kind,
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.tokens),
        tuple(logprobs for delta in deltas for logprobs in delta.logprobs),
    )
