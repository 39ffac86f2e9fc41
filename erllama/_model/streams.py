"""Replies as they come: for threads, and for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

from erllama.engine import Completion, Done, Event, Ticket


class Stream:
    """A reply as it comes: iterate it for events, the last of which is `Done`.

    Leaving a `with`, or dropping the stream, cancels what is still running. One
    that is not read costs no more than its reply: the pieces are joined.
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
        """End the reply at the next token; `Done` still comes, with finish_reason "cancelled". Idempotent.

        From any thread.
        """
        self._ticket.cancel()

    def result(self) -> Completion:
        """Wait for the end and return the whole reply; raises the error of a failed one."""
        return wait(self._ticket)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        _cancel_dropped(self)


class AsyncStream:
    """A reply as it comes, in asyncio: `async for` gives its events, the last of which is `Done`.

    Takes no thread and does not poll: the model's thread wakes the event loop.
    Leaving an `async with`, dropping the stream, or cancelling the task that
    reads it cancels what is still running. Read by one task at a time, in the
    loop that it was made in.
    """

    def __init__(self, ticket: Ticket) -> None:
        self._ended = False
        self._attach(ticket)

    def _attach(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._news = News(ticket)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        try:
            while (event := self._ticket.poll()) is None:
                await self._news.wait()
        except BaseException:
            self._ended = True
            self.cancel()
            raise
        self._ended = isinstance(event, Done)
        return event

    def cancel(self) -> None:
        """End the reply at the next token; `Done` still comes, with finish_reason "cancelled". Idempotent."""
        self._ticket.cancel()

    async def result(self) -> Completion:
        """Wait for the end and return the whole reply; raises the error of a failed one."""
        return await wait_async(self._ticket, self._news)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        _cancel_dropped(self)


class News:
    """Wakes a task when a ticket has something new."""

    def __init__(self, ticket: Ticket) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived = asyncio.Event()
        ticket.listen(self._tell)

    def _tell(self) -> None:
        # In the model's thread. A loop that was closed has nobody to tell.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def wait(self) -> None:
        """Until there may be something. What came since the last wait counts."""
        await self._arrived.wait()
        self._arrived.clear()


def wait(ticket: Ticket) -> Completion:
    """The end of a request; whoever stops waiting, by Ctrl-C, cancels it."""
    try:
        return ticket.result()
    except BaseException:
        ticket.cancel()
        raise


async def wait_async(ticket: Ticket, news: News) -> Completion:
    """As `wait`, for a task; cancelling the task cancels the request."""
    try:
        while not ticket.done:
            await news.wait()
    except BaseException:
        ticket.cancel()
        raise
    return ticket.outcome()


def _cancel_dropped(stream: Stream | AsyncStream) -> None:
    ticket: Ticket | None = getattr(stream, "_ticket", None)
    if ticket is not None and not ticket.done:
        ticket.cancel()
