"""Streams of a reply's events, for threads and for asyncio.

`Model` creates them; `ChatStream` and `AsyncChatStream` add the result of a chat.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import ClassVar
from weakref import WeakKeyDictionary, ref

import numpy as np
from numpy.typing import NDArray

from erllama.engine import Completion, Done, Event, Ticket


class Stream:
    """A streamed reply. Iterating over it yields its events; `Done` is the last.

    Leaving a `with` block, or dropping the stream, cancels the request. Unread events are joined, so a stream that
    is not read takes no more memory than its reply.
    """

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._events: Iterator[Event] = ticket.events()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        try:
            return next(self._events)
        except KeyboardInterrupt:
            self.cancel()
            raise

    def cancel(self) -> None:
        """End the reply at the next token. `Done` follows with finish_reason "cancelled".

        Idempotent. Safe to call from any thread.
        """
        self._ticket.cancel()

    def result(self) -> Completion:
        """Wait for the end and return the whole reply; raise the error of a request that failed."""
        return wait(self._ticket)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        _cancel_dropped(self)


class AsyncStream:
    """A reply streamed to asyncio. `async for` yields its events; `Done` is the last.

    Uses no extra thread and does not poll: the model thread wakes the event loop. Leaving an `async with` block,
    dropping the stream, or cancelling the task that reads it cancels the request. One task at a time may read a
    stream, in the event loop that created it.
    """

    def __init__(self, ticket: Ticket) -> None:
        self._ended = False
        self._attach(ticket)

    def _attach(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._waiter = TicketWaiter(ticket)

    @property
    def prompt(self) -> NDArray[np.int32]:
        """The token ids of the prompt, int32, shape (n,). Those of a chat are known once it has started."""
        return self._ticket.request.prompt

    @property
    def has_ended(self) -> bool:
        """Whether the reply is complete, so that the events that are left can be read without waiting."""
        return self._ticket.done

    def join_unread(self) -> None:
        """Join the events that nobody has read, so that the next one has all that has come of its kind."""
        self._ticket.join_unread()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        try:
            while (event := self._ticket.poll()) is None:
                await self._waiter.wait()
        except BaseException:
            self._ended = True
            self.cancel()
            raise
        self._ended = isinstance(event, Done)
        return event

    def cancel(self) -> None:
        """End the reply at the next token. `Done` follows with finish_reason "cancelled". Idempotent."""
        self._ticket.cancel()

    async def result(self) -> Completion:
        """Wait for the end and return the whole reply; raise the error of a request that failed."""
        return await wait_async(self._ticket, self._waiter)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        _cancel_dropped(self)


class LoopWaker:
    """Wakes the tasks of one event loop that wait for tickets, all of them by one call.

    The model thread announces the tasks whose tickets have events, and wakes the loop once after a tick.
    """

    _of_loops: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, LoopWaker]] = WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._announced: deque[TicketWaiter] = deque()

    @classmethod
    def of_running_loop(cls) -> LoopWaker:
        """Return the waker of the loop that runs in this thread."""
        loop = asyncio.get_running_loop()
        waker = cls._of_loops.get(loop)
        if waker is None:
            # The tasks that a closed loop never woke refer to it, and would keep it.
            for known in cls._of_loops.keyrefs():
                if (old := known()) is not None and old.is_closed():
                    cls._of_loops.pop(old, None)
            waker = cls._of_loops[loop] = cls(loop)
        return waker

    def announce(self, waiter: TicketWaiter) -> None:
        """Make `wake` wake a task."""
        self._announced.append(waiter)

    def wake(self) -> None:
        """Wake the announced tasks."""
        loop = self._loop()
        # RuntimeError: the event loop is closed, and no task waits.
        with suppress(RuntimeError):
            if loop is not None:
                loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        while self._announced:
            self._announced.popleft().wake()


class TicketWaiter:
    """Waits, in an asyncio task, until a ticket has an event or a result."""

    def __init__(self, ticket: Ticket) -> None:
        self._waker = LoopWaker.of_running_loop()
        self._ready = asyncio.Event()
        self._is_announced = False
        ticket.listen(self)

    def announce(self) -> LoopWaker | None:
        """Record, in the model thread, that the ticket has an event."""
        if self._is_announced:
            return None
        self._is_announced = True
        self._waker.announce(self)
        return self._waker

    def wake(self) -> None:
        """Wake the task. Runs in the event loop."""
        self._is_announced = False  # before the task reads the ticket
        self._ready.set()

    async def wait(self) -> None:
        """Wait for an event. Returns at once if one arrived since the previous wait."""
        await self._ready.wait()
        self._ready.clear()


def wait(ticket: Ticket) -> Completion:
    """Return the completion of a request. An interrupt, such as Ctrl-C, cancels the request."""
    try:
        return ticket.result()
    except BaseException:
        ticket.cancel()
        raise


async def wait_async(ticket: Ticket, waiter: TicketWaiter) -> Completion:
    """Await the completion of a request. Cancelling the task cancels the request."""
    try:
        while not ticket.done:
            await waiter.wait()
    except BaseException:
        ticket.cancel()
        raise
    return ticket.outcome()


def _cancel_dropped(stream: Stream | AsyncStream) -> None:
    ticket: Ticket | None = getattr(stream, "_ticket", None)
    if ticket is not None and not ticket.done:
        ticket.cancel()
