"""A mutex that threads acquire in the order in which they asked for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class FairLock:
    """A first-come, first-served mutex. `threading.Lock` may favour the thread that released it last.

    Attributes:
        n_waiting: threads that wait for the lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()  # one lock per waiting thread, released to wake it
        self._locked = False

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Wait for the lock and hold it within a `with` block."""
        turn = threading.Lock()
        with self._lock:
            if self._locked:
                turn.acquire()
                self._waiting.append(turn)
            self._locked = True
        try:
            turn.acquire()  # the previous holder releases it
        except BaseException:  # interrupted
            self._cancel(turn)
            raise
        try:
            yield
        finally:
            self._release()

    def _cancel(self, turn: threading.Lock) -> None:
        with self._lock:
            waiting = turn in self._waiting
            if waiting:
                self._waiting.remove(turn)
        if not waiting:  # the lock was already passed to this thread
            self._release()

    def _release(self) -> None:
        with self._lock:
            self._locked = bool(self._waiting)
            if self._waiting:
                self._waiting.popleft().release()
