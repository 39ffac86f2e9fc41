"""The caller's end of a request in flight: events, the result, cancelling."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from erllama.engine.request import Completion, Done, Event, Request, TextDelta
from erllama.engine.sampling import TokenLogprobs
from erllama.errors import ModelUnloaded

# Unread pieces beyond this are joined into one: a reader that stops costs no more than the reply itself.
Piece = tuple[str, tuple[int, ...], tuple[TokenLogprobs, ...]]  # what a TextDelta has, before it is one

_MOST_UNREAD = 256


class Ticket:
    """Filled by the model thread, read by the caller. Safe from any thread.

    Events come in order and end with `Done` or an error. The model thread never
    waits for a reader.

    Args:
        request: what is asked.
        streaming: whether pieces are wanted as they come; otherwise the end alone.

    Attributes:
        cancelled: an early end was asked for.
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
        self._on_news: Callable[[], None] | None = None

    # --- the model thread's side

    def emit(self, piece: Piece) -> None:
        """Add a piece, where pieces are wanted; readers learn of it by `tell`, and make an event of it."""
        if self.streaming:
            with self._lock:
                self._news = self._news or not self._unread
                if len(self._unread) < _MOST_UNREAD:
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
                news.acquire()

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
            if not self._unread and (rest := self._beyond.take()) is not None:
                self._unread.append(rest)
            return TextDelta(*piece)
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
                news.acquire()
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


class _Beyond:
    """Pieces that will be read as one."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def add(self, piece: Piece) -> None:
        text, tokens, logprobs = piece
        self._text.append(text)
        self._tokens += tokens
        self._logprobs += logprobs

    def take(self) -> Piece | None:
        """All of them, as one piece; None where there are none."""
        if not self._text:
            return None
        piece = ("".join(self._text), tuple(self._tokens), tuple(self._logprobs))
        self._text, self._tokens, self._logprobs = [], [], []
        return piece
