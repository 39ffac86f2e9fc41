"""Calls from signal handlers: whether a call interrupts this library in its own thread.

Python runs a handler between any two steps of the main thread, which may then
be in the middle of a call of this library and hold one of its locks. A call
from the handler that waited for another thread could wait for ever, since that
thread may wait for the lock. A leaf module: any layer may use it.
"""

from __future__ import annotations

import sys
from types import FrameType

# They run above the library, and hold none of its locks.
_ABOVE = ("erllama.cli", "erllama.testing", "erllama.__main__")


def reentered() -> bool:
    """Return whether the caller was called while the same thread was in the middle of another call of this library.

    To be called by a public method itself: the frames from it on that are the library's are its own call.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_ours(frame):
        frame = frame.f_back
    while frame is not None and not _is_ours(frame):
        frame = frame.f_back
    return frame is not None


def _is_ours(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return (
        isinstance(name, str) and (name == "erllama" or name.startswith("erllama.")) and not name.startswith(_ABOVE)
    )
