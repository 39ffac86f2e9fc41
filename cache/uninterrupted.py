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

import functools
import sys
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from erllama._runtime.imports import is_importing
from erllama._runtime.jobs import Job, runs_here

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
        return Job(functools.partial(call, *args, **kwargs), running).run()

    return run


def _cannot_wait() -> bool:
    """Return whether the main thread makes such a call itself already, or imports a module.

    A thread that imports the same module, as a tier of the user's may, would wait for the main thread's lock on it.
    """
    return is_importing() or runs_here()


def run_behind(call: Callable[[], object]) -> None:
    """Start a call in a thread of its own, and wait for nothing."""
    Job(call, running).start()
