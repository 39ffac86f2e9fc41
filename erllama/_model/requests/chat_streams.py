"""Streams of chat replies: those of completions, with a `ChatCompletion` as the result."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from erllama._model.requests.streams import AsyncStream, Stream
from erllama.chat.results import ChatCompletion
from erllama.chat.turn import Turn
from erllama.engine import Done, Event, Ticket


class ChatStream(Stream):
    """A streamed chat reply: a `Stream` whose `Done` event and `result()` have a `ChatCompletion`."""

    def __init__(self, ticket: Ticket, turn: Turn) -> None:
        super().__init__(ticket)
        self._turn = turn

    def __next__(self) -> Event:
        return self._turn.convert_event(super().__next__())

    def result(self) -> ChatCompletion:
        """Wait for the end and return the whole reply; raise the error of a request that failed."""
        return self._turn.finish(super().result())

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._turn.abandon()

    def __del__(self) -> None:
        super().__del__()
        _abandon_dropped(self)


class AsyncChatStream(AsyncStream):
    """A chat reply streamed to asyncio: its `Done` event and `result()` have a `ChatCompletion`.

    The request is built in a thread at the first await, because a long conversation or many tools take a while.
    """

    def __init__(self, prepare: Callable[[], tuple[Ticket, Turn]], submit: Callable[[Ticket], None]) -> None:
        self._prepare, self._submit = prepare, submit
        self._start_lock = asyncio.Lock()
        self._turn: Turn | None = None
        self._cancelled = self._ended = False

    async def start(self) -> None:
        """Submit the request, unless an await did; raise its error.

        Errors of the conversation and its options, and a full queue, are raised here, before the first event.
        """
        await self._started()

    async def _started(self) -> Turn:
        async with self._start_lock:
            if self._turn is None:
                ticket, turn = await asyncio.to_thread(self._prepare)
                self._attach(ticket)
                if self._cancelled:
                    ticket.cancel()
                self._turn = turn
                try:
                    self._submit(ticket)
                except Exception as error:
                    ticket.fail(error)  # a later await raises it again
                    raise
        return self._turn

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        try:
            turn = await self._started()
        except BaseException:
            self._ended = True
            raise
        event = await super().__anext__()
        if isinstance(event, Done):
            return await asyncio.to_thread(turn.convert_event, event)
        return turn.convert_event(event)

    def cancel(self) -> None:
        """End the reply at the next token. `Done` follows with finish_reason "cancelled". Idempotent."""
        self._cancelled = True
        if self._turn is not None:
            super().cancel()

    async def result(self) -> ChatCompletion:
        """Wait for the end and return the whole reply; raise the error of a request that failed."""
        turn = await self._started()
        return await asyncio.to_thread(turn.finish, await super().result())

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        if self._turn is not None:
            await asyncio.to_thread(self._turn.abandon)

    def __del__(self) -> None:
        super().__del__()
        _abandon_dropped(self)


def _abandon_dropped(stream: ChatStream | AsyncChatStream) -> None:
    turn: Turn | None = getattr(stream, "_turn", None)
    if turn is not None:
        turn.abandon(later=True)
