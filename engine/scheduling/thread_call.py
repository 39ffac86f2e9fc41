"""A function that the model thread runs for another thread, which waits for it.

`ModelThread` queues a `ThreadCall`, and runs it between two ticks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from erllama.engine.requests.ticket import wait_for_release
from erllama.engine.scheduling.scheduler import wrap_error
from erllama.errors import Error


class ThreadCall:
    """One call of a function in the model thread.

    Args:
        function: what to call; its result is dropped.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        self._done = threading.Lock()  # a lock and no Event, whose own lock Ctrl-C could leave taken
        self._done.acquire()
        self._error: Error | None = None

    def run(self) -> None:
        """Call the function; in the model thread."""
        try:
            self._function()
        except BaseException as error:
            self.end(wrap_error(error))
        else:
            self.end(None)

    def end(self, error: Error | None) -> None:
        """Release the waiting thread; once."""
        self._error = error
        self._done.release()

    def wait(self) -> None:
        """Wait until the call has ended. Raises the error that it ended with."""
        wait_for_release(self._done)
        if self._error is not None:
            raise self._error
