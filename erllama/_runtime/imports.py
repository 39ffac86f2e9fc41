"""Lazy imports that a signal handler cannot break.

An exception from a signal handler, such as KeyboardInterrupt, can leave a module half imported, and some modules
(numpy, for example) cannot be imported again in the same process. A handler may also use a name of a module that
the main thread is still importing. Therefore a helper thread imports, and the main thread only waits. An exception
then ends the wait, and the import completes. A handler that needs the same module waits for it in the same way.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
from functools import partial
from types import FrameType, ModuleType

from erllama._runtime.jobs import Job

_running: set[object] = set()


def import_safely(name: str) -> ModuleType:
    """Import a module, in a helper thread if the caller is the main thread and is not already importing."""
    if threading.get_ident() != threading.main_thread().ident or sys.is_finalizing() or is_importing():
        return importlib.import_module(name)
    return Job(partial(importlib.import_module, name), _running).run()


def wait_for_imports() -> None:
    """Wait for imports in helper threads whose callers no longer wait."""
    # If this thread is importing, a helper may need that module: waiting would deadlock.
    while _running and not is_importing():
        time.sleep(0.001)


def is_importing() -> bool:
    """Return whether the calling thread is inside an import and may hold a module's lock."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # `_handle_fromlist` runs `from erllama import name` and holds no lock.
        if code.co_filename == "<frozen importlib._bootstrap>" and code.co_name != "_handle_fromlist":
            return True
        frame = frame.f_back
    return False


# The child has no helper threads, so a module that one was importing would stay locked there forever.
os.register_at_fork(before=wait_for_imports, after_in_child=_running.clear)
