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
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Literal, NamedTuple

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


Piece = DeltaPiece | EndPiece

_DELTAS: dict[str, type[TextDelta] | type[ThinkingDelta] | type[ToolCallDelta]] = {
    "text": TextDelta,
    "thinking": ThinkingDelta,
    "call": ToolCallDelta,
}


class Ticket:
    """One request in flight. Safe from any thread.

    Args:
        request: the request.
        streaming: whether the caller reads events; otherwise only the result.

    Attributes:
        cancelled: whether an early end was requested.
        deadline: when the request fails, on the clock of time.perf_counter; None for never.
        model: what runs the request; the ticket keeps it alive.
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
        self._ended: SimpleQueue[None] = SimpleQueue()  # has an item once the request has ended
        self._completion: Completion | None = None
        self._error: BaseException | None = None
        self._end_lock = threading.Lock()
        self._end_read = False
        self.cancelled = False
        self.model: object = None
        self._listener: Callable[[], None] | None = None

    # --- the model thread's side

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
        if self._backlog:
            self._backlog.add(self._emitted)
            self._emitted = []
        self._send()

    def _send(self) -> None:
        pieces, self._emitted = self._emitted, []
        if self._backlog:
            pieces = self._backlog.take() + pieces
        for piece in pieces:
            self._unread.put(piece)
        # If older pieces are unread, the listener was called for them, and its reader finds these after them.
        if pieces and self._listener is not None and self._unread.qsize() <= len(pieces):
            self._listener()

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
            self._listener()

    # --- the caller's side

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._completion is not None or self._error is not None

    def cancel(self) -> None:
        """Request an early end; the request still ends with a Completion. Idempotent."""
        self.cancelled = True

    def listen(self, listener: Callable[[], None]) -> None:
        """Call a function, in the model thread, when `poll` has an event after it had none.

        It must be quick and must not raise.
        """
        self._listener = listener

    def poll(self) -> Event | None:
        """Return the next event, or None if there is none yet. Raises the request's error if it failed."""
        self._check_process()
        return self._next(wait=False)

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
        done = self.done  # read first: all pieces are sent before the request is done
        try:
            piece = self._unread.get(wait and not done, SLEEP_SECONDS)
        except Empty:
            piece = None
        else:
            if piece is not None:
                return make_event(piece)
            self._unread.put(None)  # for the other readers
            done = True
        return self._end() if done else None

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


def make_event(piece: Piece) -> Event:
    """Return the event of a piece."""
    if isinstance(piece, DeltaPiece):
        return _DELTAS[piece.kind](piece.text, piece.tokens, piece.logprobs)
    return ThinkingEnd(piece.raw) if piece.kind == "thinking" else ToolCallEnd(piece.raw)


class _Backlog:
    """Pieces that a slow reader has not read; consecutive deltas of one kind are joined."""

    def __init__(self) -> None:
        self._runs: list[list[DeltaPiece] | EndPiece] = []

    def __bool__(self) -> bool:
        return bool(self._runs)

    def add(self, pieces: list[Piece]) -> None:
        """Add pieces."""
        for piece in pieces:
            last = self._runs[-1] if self._runs else None
            if isinstance(piece, EndPiece):
                self._runs.append(piece)
            elif isinstance(last, list) and last[0].kind == piece.kind:
                last.append(piece)
            else:
                self._runs.append([piece])

    def take(self) -> list[Piece]:
        """Remove and return all pieces, joined."""
        runs, self._runs = self._runs, []
        return [run if isinstance(run, EndPiece) else _join(run) for run in runs]


def _join(pieces: list[DeltaPiece]) -> DeltaPiece:
    if len(pieces) == 1:
        return pieces[0]
    return DeltaPiece(
        pieces[0].kind,
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        tuple(logprobs for piece in pieces for logprobs in piece.logprobs),
    )
