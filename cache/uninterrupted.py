"""Runs a call to its end, whatever a signal handler raises meanwhile.

Python runs signal handlers in the main thread, and raises there what they
raise: KeyboardInterrupt, SystemExit or an operator's own exception, between any
two steps of the code that runs. A change that is ended in this way leaves locks
held, transactions open, and memory and files apart. So a call from the main
thread runs in a thread of its own, and the main thread only waits for it. An
exception of a handler then ends the waiting, and the call completes by itself.
A handler may call the cache, too: the main thread holds none of its locks.
"""

from __future__ import annotations

import _thread
import functools
import sys
import threading
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# Calls that run now, some of them behind callers that no longer wait. Tests wait until none is left.
running: set[object] = set()


def uninterrupted(call: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that no signal handler's exception ends it halfway.

    In the main thread the handler's exception is raised at once, and the call
    completes behind the caller. In other threads the function runs as it is.
    So it does where no thread can be started, as at the interpreter's end.
    """

    @functools.wraps(call)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if threading.get_ident() != threading.main_thread().ident or sys.is_finalizing() or _cannot_wait():
            return call(*args, **kwargs)
        return _Job(functools.partial(call, *args, **kwargs)).run()

    return run


def _cannot_wait() -> bool:
    """Whether the main thread makes such a call itself already, or imports a module.

    A thread that imports the same module, as a tier of the user's may, would wait for the main thread's lock on it.
    """
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _Job.run_here.__code__ or frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def run_behind(call: Callable[[], object]) -> None:
    """Start a call in a thread of its own, and wait for nothing."""
    _Job(call).start()


class _Job(Generic[T]):
    """One call, and the thread that makes it."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._calls = [call]  # taken by whoever makes the call: pop() is one step
        self._values: list[T] = []
        self._errors: list[BaseException] = []
        self._done = threading.Lock()
        self._done.acquire()

    def run(self) -> T:
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
        """Make the call in the main thread: no other can be had. Calls within it are made there, too."""
        return call()

    def start(self) -> None:
        # Not `threading.Thread`, whose `start` is Python code with locks of its own: a handler's exception in the
        # middle of it leaves those in disorder.
        _thread.start_new_thread(self._work, ())

    def _work(self) -> None:
        try:
            call = self._calls.pop()
        except IndexError:
            return  # taken back
        running.add(self)
        try:
            self._values.append(call())
        except BaseException as error:
            self._errors.append(error)
        finally:
            running.discard(self)
            self._done.release()
