"""Calls that threads of the parent make in a model's process, and wait for."""

from __future__ import annotations

import math
import time
from queue import Empty, SimpleQueue

from erllama._process.protocol import messages as m
from erllama._process.protocol.wire_values import unpack_error
from erllama.engine.requests.ticket import SLEEP_SECONDS
from erllama.errors import Error


class ProcessEnded(Exception):  # noqa: N818 - never leaves this package
    """The process ended before it answered."""


class PendingCall:
    """A message that waits for its answer. The supervisor's thread answers, and another thread waits."""

    def __init__(self) -> None:
        # Not an Event, which is written in Python: Ctrl-C could leave its lock taken.
        self._answers: SimpleQueue[m.Returned | Error | None] = SimpleQueue()

    def answer(self, returned: m.Returned) -> None:
        """Pass the answer on; once."""
        self._answers.put(returned if returned.error is None else unpack_error(returned.error))

    def fail(self, error: Error) -> None:
        """Pass an error on; once."""
        self._answers.put(error)

    def end(self) -> None:
        """Tell that the process has ended; once."""
        self._answers.put(None)

    def wait(self, seconds: float = math.inf) -> m.Returned:
        """Wait for the answer, and return it.

        Args:
            seconds: how long to wait at most.

        Raises:
            Error: the call raised it.
            ProcessEnded: the process ended first, or did not answer in time.
        """
        ends_at = time.monotonic() + seconds
        while True:
            left = ends_at - time.monotonic()
            if left <= 0:
                raise ProcessEnded
            try:
                found = self._answers.get(timeout=min(left, SLEEP_SECONDS))
            except Empty:
                continue
            if found is None:
                raise ProcessEnded
            if isinstance(found, Error):
                raise found
            return found


class CallTable:
    """The calls that wait for an answer, and those that wait for a process. Not thread-safe."""

    def __init__(self) -> None:
        self._waiting: dict[int, PendingCall] = {}
        self._unsent: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, number: int, pending: PendingCall, unsent: bytes | None) -> None:
        """Add a call.

        Args:
            unsent: its message, for the next process; None if it was sent.
        """
        self._waiting[number] = pending
        if unsent is not None:
            self._unsent[number] = unsent

    def remove(self, number: int) -> None:
        """Remove a call that nobody waits for any more."""
        self._waiting.pop(number, None)
        self._unsent.pop(number, None)

    def answer(self, returned: m.Returned) -> None:
        """Pass an answer on."""
        pending = self._waiting.get(returned.call)
        if pending is not None:
            pending.answer(returned)

    def take_unsent(self) -> list[bytes]:
        """Remove and return the messages that wait for a process."""
        unsent, self._unsent = list(self._unsent.values()), {}
        return unsent

    def process_ended(self) -> list[PendingCall]:
        """Return the calls that the ended process had."""
        return [pending for number, pending in list(self._waiting.items()) if number not in self._unsent]

    def take_all(self) -> list[PendingCall]:
        """Remove and return all calls."""
        waiting, self._waiting, self._unsent = list(self._waiting.values()), {}, {}
        return waiting
