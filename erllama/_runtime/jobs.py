"""Runs a call in a thread of its own, so that no signal handler's exception ends it halfway.

A handler's exception is raised in the main thread, which only waits for the
call here. A leaf module: it imports the standard library alone, and any layer
may use it.
"""

from __future__ import annotations

import _thread
import sys
from collections.abc import Callable
from types import FrameType
from typing import Generic, TypeVar

T = TypeVar("T")


class Job(Generic[T]):
    """One call, and the thread that makes it.

    Args:
        call: what is called.
        running: the jobs whose calls run now; this one is in it from the beginning of its call to the end.
    """

    def __init__(self, call: Callable[[], T], running: set[object]) -> None:
        self._calls = [call]  # taken by whoever makes the call: pop() is one step
        self._running = running
        self._values: list[T] = []
        self._errors: list[BaseException] = []
        self._done = _thread.allocate_lock()
        self._done.acquire()

    def run(self) -> T:
        """Make the call and wait for it. Where no thread can be started, the caller's own thread makes it."""
        try:
            self.start()
        except BaseException as error:
            try:
                call = self._calls.pop()
            except IndexError:
                raise error from None  # a handler raised it, and the thread makes the call
            if isinstance(error, RuntimeError) and "new thread" in str(error):
                return self.run_here(call)
            raise
        self._done.acquire()
        if not self._errors:
            return self._values.pop()
        try:
            raise self._errors[0]
        finally:
            self._errors.clear()  # its traceback refers to this object

    def run_here(self, call: Callable[[], T]) -> T:
        """Make the call in the caller's own thread. Calls within it are made there, too: see `runs_here`."""
        return call()

    def start(self) -> None:
        """Start the call and wait for nothing."""
        # Not `threading.Thread`, whose `start` is Python code with locks of its own: a handler's exception in the
        # middle of it leaves those in disorder.
        _thread.start_new_thread(self._work, ())

    def _work(self) -> None:
        try:
            call = self._calls.pop()
        except IndexError:
            return  # taken back
        self._running.add(self)
        try:
            self._values.append(call())
        except BaseException as error:
            self._errors.append(error)
        finally:
            self._running.discard(self)
            self._done.release()


def runs_here() -> bool:
    """Return whether the calling thread is within a call that no thread could be started for."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is Job.run_here.__code__:
            return True
        frame = frame.f_back
    return False
