"""Threads that reach storage for a remote tier: a fixed number, started on demand, which end when they are idle.

They are daemons: a request to a service that hangs must not keep the interpreter from exiting, as the threads of
`concurrent.futures` would. They hold the work and not the tier, so that an unused tier can be collected.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_IDLE_SECONDS = 5.0


class _State:
    """What the threads of one pool share."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.waiting: deque[Callable[[], None]] = deque()
        self.n_threads = 0
        self.n_idle = 0


class DaemonThreads:
    """A pool of daemon threads.

    Args:
        n_threads: the most threads at once.
        name: of the threads.
    """

    def __init__(self, n_threads: int, name: str) -> None:
        self._n_threads, self._name = n_threads, name
        self._state = _State()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run a call in one of the threads. If no thread can start, the future fails with RuntimeError."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = call()
            except BaseException as error:  # of the call: its caller gets it
                future.set_exception(error)
            else:
                future.set_result(result)

        state = self._state
        with state.condition:
            if state.n_idle <= len(state.waiting) and state.n_threads < self._n_threads:
                try:
                    threading.Thread(target=_run, args=(state,), name=self._name, daemon=True).start()
                    state.n_threads += 1
                except RuntimeError as error:  # the system has no more threads, or the interpreter is exiting
                    if not state.n_threads:
                        future.set_exception(error)
                        return future
            state.waiting.append(run)
            state.condition.notify()
        return future


def _run(state: _State) -> None:
    while True:
        with state.condition:
            state.n_idle += 1
            found = state.condition.wait_for(lambda: state.waiting, _IDLE_SECONDS)
            state.n_idle -= 1
            if not found:
                state.n_threads -= 1
                return
            work = state.waiting.popleft()
        work()
        del work  # it may hold the tier
