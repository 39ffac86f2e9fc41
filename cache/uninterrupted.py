"""Completes a call even if a signal handler raises an exception meanwhile.

Python runs signal handlers in the main thread, and raises their exceptions there, between any two steps of the
running code: KeyboardInterrupt, SystemExit, or a program's own. A change that ends halfway leaves locks held,
transactions open, and memory inconsistent with files. So a call from the main thread runs in another thread, and
the main thread only waits for it. An exception of a handler then ends the wait, and the call still completes. A
handler may call the cache, too, because the main thread holds none of its locks. `Cache`, the pipeline and the
engine decorate their calls with it.
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

# Running calls. The callers of some may no longer wait. Tests wait until the set is empty.
running: set[object] = set()


def uninterrupted(call: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that an exception of a signal handler does not end it halfway.

    In the main thread the exception is raised at once, and the call completes in the background. In other threads
    the function runs directly. It also does where no thread can be started, as at the interpreter's exit.
    """

    @functools.wraps(call)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if threading.get_ident() != threading.main_thread().ident or sys.is_finalizing() or _cannot_wait():
            return call(*args, **kwargs)
        return Job(functools.partial(call, *args, **kwargs), running).run()

    return run


def _cannot_wait() -> bool:
    """Return whether this is such a call already, or the main thread is importing a module.

    Another thread that imports the same module, as a user's tier may, would wait for the main thread's import lock.
    """
    return is_importing() or runs_here()


def run_behind(call: Callable[[], object]) -> None:
    """Start a call in another thread, and return at once."""
    Job(call, running).start()
