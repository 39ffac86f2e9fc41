"""Detection of calls from signal handlers that interrupt this library in the same thread.

Python runs a handler between any two steps of the main thread, which may be inside a call of this library and hold
one of its locks. If the handler's call waited for another thread, both could wait forever, because that thread may
wait for the lock.
"""

from __future__ import annotations

import sys
from types import FrameType

# These call the library from above and hold none of its locks.
_CALLERS = ("erllama.cli", "erllama.testing", "erllama.__main__")


def reentered() -> bool:
    """Return whether the calling public method interrupts another call of this library in the same thread.

    A public method must call this function itself: the topmost frames of the library are then its own call.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _is_library_frame(frame):
        frame = frame.f_back
    while frame is not None and not _is_library_frame(frame):
        frame = frame.f_back
    return frame is not None


def _is_library_frame(frame: FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return (
        isinstance(name, str)
        and (name == "erllama" or name.startswith("erllama."))
        and not name.startswith(_CALLERS)
    )
