"""The caller's end of a request in flight: events, the result, cancelling."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal

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

# What events are made of, by who reads them: what a delta of the kind has, or the end of a thought or a call.
Said = tuple[Literal["text", "thinking", "call"], str, tuple[int, ...], tuple[TokenLogprobs, ...]]
Piece = Said | tuple[Literal["thinking_end", "call_end"], bytes]

# Unread pieces beyond this are joined where they are of one kind: a reader that stops costs no more than the reply.
_MOST_UNREAD = 256
_SLEEP_SECONDS = 1.0
_DELTAS: dict[str, type[TextDelta] | type[ThinkingDelta] | type[ToolCallDelta]] = {
    "text": TextDelta,
    "thinking": ThinkingDelta,
    "call": ToolCallDelta,
}


class Ticket:
    """Filled by the model thread, read by the caller. Safe from any thread.

    Events come in order and end with `Done` or an error. The model thread never
    waits for a reader.

    Args:
        request: what is asked.
        streaming: whether pieces are wanted as they come; otherwise the end alone.

    Attributes:
        cancelled: an early end was asked for.
        model: what runs it, which lives as long as its requests do.
    """

    def __init__(self, request: Request, streaming: bool) -> None:
        self.request = request
        self.streaming = streaming
        self.submitted = time.perf_counter()
        timeout = request.options.timeout
        self.deadline = None if timeout is None else self.submitted + timeout
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._waiters: list[threading.Lock] = []  # each taken, and released to wake who waits for it
        self._news = False
        self._unread: deque[Piece] = deque()
        self._beyond = _Beyond()  # unread, after those
        self._completion: Completion | None = None
        self._error: BaseException | None = None
        self._ended = False  # the end was read
        self.cancelled = False
        self.model: object = None
        self._on_news: Callable[[], None] | None = None

    # --- the model thread's side

    def emit(self, piece: Piece) -> None:
        """Add a piece, where pieces are wanted; readers learn of it by `tell`, and make an event of it."""
        if self.streaming:
            with self._lock:
                self._news = self._news or not self._unread
                if len(self._unread) < _MOST_UNREAD and not self._beyond:
                    self._unread.append(piece)
                else:
                    self._beyond.add(piece)

    def tell(self) -> None:
        """Wake who waits, if there is something new."""
        if self._news:
            with self._lock:
                self._news = False
                waiters, self._waiters = self._waiters, []
            for waiter in waiters:
                waiter.release()
            if self._on_news is not None:
                self._on_news()

    def finish(self, completion: Completion) -> None:
        with self._lock:
            self._completion = completion
            self._news = True
        self.tell()

    def fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = error
            self._news = True
        self.tell()

    # --- the caller's side

    @property
    def done(self) -> bool:
        return self._completion is not None or self._error is not None

    def cancel(self) -> None:
        """Ask for an early end; the request still ends with a Completion. Idempotent."""
        self.cancelled = True

    def listen(self, on_news: Callable[[], None]) -> None:
        """Have a function called, by the model thread, when there is something to `poll` after there was nothing.

        It must be quick and must not raise.
        """
        self._on_news = on_news

    def poll(self) -> Event | None:
        """The next event, if there is one now; raises the request's error where it failed."""
        self._check_process()
        with self._lock:
            return self._next()

    def events(self) -> Iterator[Event]:
        """Events as they come; raises the request's error where it failed."""
        while not self._ended:
            self._check_process()
            with self._lock:
                event = self._next()
                news = self._wait_for_news() if event is None else None
            if event is not None:
                yield event
            elif news is not None:
                awaken(news)

    def _wait_for_news(self) -> threading.Lock | None:
        """A lock that cannot be taken before there are some; None where none will come."""
        if self._ended:
            return None
        news = threading.Lock()
        news.acquire()
        self._waiters.append(news)
        return news

    def _next(self) -> Event | None:
        if self._unread:
            piece = self._unread.popleft()
            if not self._unread:
                self._unread.extend(self._beyond.take())
            return _event(piece)
        if self._error is not None:
            self._ended = True
            raise self._error
        if self._completion is not None and not self._ended:
            self._ended = True
            return Done(self._completion)
        return None

    def result(self) -> Completion:
        """Wait for the end; raises the request's error where it failed."""
        self._check_process()
        while not self.done:
            with self._lock:
                news = self._wait_for_news() if not self.done else None
            if news is not None:
                awaken(news)
        return self.outcome()

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise ModelUnloaded("the request was made before this process was forked; its model runs in the parent")

    def outcome(self) -> Completion:
        """How it ended; raises the request's error where it failed. Only once `done`."""
        if self._error is not None:
            raise self._error
        assert self._completion is not None
        return self._completion


def awaken(news: threading.Lock) -> None:
    """Wait for news. Ctrl-C that comes in the moment before a thread sleeps would else be noticed when it wakes."""
    while not news.acquire(timeout=_SLEEP_SECONDS):
        pass


def _event(piece: Piece) -> Event:
    if len(piece) == 4:
        return _delta(*piece)
    kind, raw = piece
    return ThinkingEnd(raw) if kind == "thinking_end" else ToolCallEnd(raw)


def _delta(kind: str, text: str, tokens: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...]) -> Delta:
    return _DELTAS[kind](text, tokens, logprobs)


class _Beyond:
    """Pieces that will be read as few."""

    def __init__(self) -> None:
        self._pieces: list[list[Piece]] = []  # those of one kind that follow each other

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def add(self, piece: Piece) -> None:
        if self._pieces and len(piece) == 4 and self._pieces[-1][0][0] == piece[0]:
            self._pieces[-1].append(piece)
        else:
            self._pieces.append([piece])

    def take(self) -> list[Piece]:
        """All of them, those that follow each other joined."""
        taken, self._pieces = self._pieces, []
        return [_joined(pieces) for pieces in taken]


def _joined(pieces: list[Piece]) -> Piece:
    said = [piece for piece in pieces if len(piece) == 4]
    if len(said) < 2:
        return pieces[0]
    return (
        said[0][0],
        "".join(text for _, text, _, _ in said),
        tuple(token for _, _, tokens, _ in said for token in tokens),
        tuple(told for _, _, _, logprobs in said for told in logprobs),
    )
