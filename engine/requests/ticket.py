"""The caller's end of a request in flight: its events, its result, and its cancellation.

The model thread fills a `Ticket`, and callers read it, from any thread. Events arrive in order and end with `Done`
or an error. The model thread never waits for a reader.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from erllama.engine.requests.request import (
    Completion,
    Delta,
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
_MOST_UNREAD = 256
_SLEEP_SECONDS = 1.0


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
        kind: what ended.
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
        self._lock = threading.Lock()
        self._waiters: list[threading.Lock] = []  # one for each waiting reader: acquired, and released to wake it
        self._notify_due = False
        self._unread: deque[Piece] = deque()
        self._backlog = _Backlog()  # unread, after those
        self._completion: Completion | None = None
        self._error: BaseException | None = None
        self._end_read = False
        self.cancelled = False
        self.model: object = None
        self._listener: Callable[[], None] | None = None

    # --- the model thread's side

    def emit(self, piece: Piece) -> None:
        """Add a piece, if the caller reads events. `notify` wakes the readers."""
        if self.streaming:
            with self._lock:
                self._notify_due = self._notify_due or not self._unread
                if len(self._unread) < _MOST_UNREAD and not self._backlog:
                    self._unread.append(piece)
                else:
                    self._backlog.add(piece)

    def notify(self) -> None:
        """Wake the readers, if there is a new piece or the end."""
        if self._notify_due:
            with self._lock:
                self._notify_due = False
                waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                waiter.release()
            if self._listener is not None:
                self._listener()

    def finish(self, completion: Completion) -> None:
        """End the request with a result."""
        with self._lock:
            self._completion = completion
            self._notify_due = True
        self.notify()

    def fail(self, error: BaseException) -> None:
        """End the request with an error."""
        with self._lock:
            self._error = error
            self._notify_due = True
        self.notify()

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
        with self._lock:
            return self._next()

    def events(self) -> Iterator[Event]:
        """Yield events as they arrive. Raises the request's error if it failed."""
        while not self._end_read:
            self._check_process()
            with self._lock:
                event = self._next()
                waiter = self._add_waiter() if event is None else None
            if event is not None:
                yield event
            elif waiter is not None:
                wait_for_release(waiter)

    def result(self) -> Completion:
        """Wait for the end and return the result. Raises the request's error if it failed."""
        self._check_process()
        while not self.done:
            with self._lock:
                waiter = self._add_waiter() if not self.done else None
            if waiter is not None:
                wait_for_release(waiter)
        return self.outcome()

    def outcome(self) -> Completion:
        """Return the result, or raise the request's error. Requires `done`."""
        if self._error is not None:
            raise self._error
        assert self._completion is not None
        return self._completion

    def _next(self) -> Event | None:
        if self._unread:
            piece = self._unread.popleft()
            if not self._unread:
                self._unread.extend(self._backlog.take())
            return _event(piece)
        if self._error is not None:
            self._end_read = True
            raise self._error
        if self._completion is not None and not self._end_read:
            self._end_read = True
            return Done(self._completion)
        return None

    def _add_waiter(self) -> threading.Lock | None:
        """Return a lock that is released when there is something to read; None if the end was read."""
        if self._end_read:
            return None
        waiter = threading.Lock()
        waiter.acquire()
        self._waiters.append(waiter)
        return waiter

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise ModelUnloaded("the request was made before this process was forked; its model runs in the parent")


def wait_for_release(lock: threading.Lock) -> None:
    """Wait until another thread releases a lock, and acquire it.

    The wait is cut into seconds: a Ctrl-C in the moment before the thread sleeps is noticed when it wakes.
    """
    while not lock.acquire(timeout=_SLEEP_SECONDS):
        pass


def _event(piece: Piece) -> Event:
    if isinstance(piece, DeltaPiece):
        return _delta(*piece)
    return ThinkingEnd(piece.raw) if piece.kind == "thinking" else ToolCallEnd(piece.raw)


def _delta(kind: str, text: str, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> Delta:
    return _DELTAS[kind](text, tokens, logprobs)


class _Backlog:
    """Pieces that a slow reader has not read; consecutive deltas of one kind are joined."""

    def __init__(self) -> None:
        self._runs: list[list[DeltaPiece] | EndPiece] = []

    def __bool__(self) -> bool:
        return bool(self._runs)

    def add(self, piece: Piece) -> None:
        """Add a piece."""
        if isinstance(piece, EndPiece):
            self._runs.append(piece)
            return
        last = self._runs[-1] if self._runs else None
        if isinstance(last, list) and last[0].kind == piece.kind:
            last.append(piece)
        else:
            self._runs.append([piece])

    def take(self) -> list[Piece]:
        """Remove and return all pieces, joined."""
        runs, self._runs = self._runs, []
        return [run if isinstance(run, EndPiece) else _joined(run) for run in runs]


def _joined(pieces: list[DeltaPiece]) -> DeltaPiece:
    if len(pieces) == 1:
        return pieces[0]
    return DeltaPiece(
        pieces[0].kind,
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        tuple(logprobs for piece in pieces for logprobs in piece.logprobs),
    )
