"""Calls that run in a separate thread, so that a signal handler's exception cannot interrupt them.

Python raises a handler's exception in the main thread, which here only waits for the call. Imports the standard
library alone.
"""

from __future__ import annotations

import _thread
import sys
from collections.abc import Callable
from types import FrameType
from typing import Generic, TypeVar

T = TypeVar("T")


# A signal that arrives just before a wait begins does not end the wait. The handler runs when the wait ends.
_SIGNAL_CHECK_SECONDS = 0.25


class Job(Generic[T]):
    """One call and the thread that makes it.

    Args:
        call: the function to call.
        running: the set of running jobs. It contains this job while its call runs.
    """

    def __init__(self, call: Callable[[], T], running: set[object]) -> None:
        self._calls = [call]  # the thread that makes the call removes it: pop() is one step of the interpreter
        self._running = running
        self._values: list[T] = []
        self._errors: list[BaseException] = []
        self._done = _thread.allocate_lock()
        self._done.acquire()

    def run(self) -> T:
        """Make the call, wait for it and return its result; in the caller's thread if no thread can be started."""
        try:
            self.start()
        except BaseException as error:
            try:
                call = self._calls.pop()
            except IndexError:
                raise error from None  # a handler raised the error; the thread has started and makes the call
            if isinstance(error, RuntimeError) and "new thread" in str(error):
                return self.run_here(call)
            raise
        while not self._done.acquire(timeout=_SIGNAL_CHECK_SECONDS):
            pass
        if not self._errors:
            return self._values.pop()
        try:
            raise self._errors[0]
        finally:
            self._errors.clear()  # its traceback refers to this object

    def run_here(self, call: Callable[[], T]) -> T:
        """Make the call in the caller's thread. Calls inside it then run there, too: see `runs_here`."""
        return call()

    def start(self) -> None:
        """Start the call and return at once."""
        # Not `threading.Thread`: its `start` is Python code with locks of its own, which a handler's exception in
        # the middle of it would leave locked.
        _thread.start_new_thread(self._work, ())

    def _work(self) -> None:
        try:
            call = self._calls.pop()
        except IndexError:
            return  # `run` has taken the call back
        self._running.add(self)
        try:
            self._values.append(call())
        except BaseException as error:
            self._errors.append(error)
        finally:
            self._running.discard(self)
            self._done.release()


def runs_here() -> bool:
    """Return whether the calling thread is inside a call for which no thread could be started."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is Job.run_here.__code__:
            return True
        frame = frame.f_back
    return False
