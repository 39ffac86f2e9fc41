"""Functions that the model thread runs for other threads, which may wait for them.

`ModelThread` queues a `ThreadCall` or an `UnawaitedCall`, and runs it between two ticks.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue

from erllama._runtime.log import logger
from erllama.engine.requests.ticket import SLEEP_SECONDS
from erllama.engine.scheduling.failures import wrap_error
from erllama.errors import Error

log = logger("erllama.engine")


class ThreadCall:
    """One call of a function in the model thread.

    Args:
        function: what to call; its result is dropped.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function
        # Not an Event, which is written in Python: Ctrl-C could leave its lock taken.
        self._ended: SimpleQueue[Error | None] = SimpleQueue()

    def run(self) -> None:
        """Call the function; in the model thread."""
        try:
            self._function()
        except BaseException as error:
            self.end(wrap_error(error))
        else:
            self.end(None)

    def end(self, error: Error | None) -> None:
        """Wake the waiting thread; once."""
        self._ended.put(error)

    def wait(self) -> None:
        """Wait until the call has ended. Raises the error that it ended with."""
        while True:
            try:
                error = self._ended.get(timeout=SLEEP_SECONDS)
            except Empty:
                continue
            if error is not None:
                raise error
            return


class UnawaitedCall:
    """One call of a function in the model thread that no thread waits for.

    Args:
        function: what to call; its result is dropped. It uses no sequences: a decode run may be in progress.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function

    def run(self) -> None:
        """Call the function; in the model thread. Logs its error."""
        try:
            self._function()
        except BaseException:
            log.exception("a call in the model thread failed")

    def end(self, error: Error | None) -> None:
        """Drop the call."""
