"""Server-sent events: responses that stream a reply, with late errors and with comments that keep it open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response

from erllama.server.conduct.errors import ApiError, as_api_error
from erllama.server.endpoints import Call

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"


def encode_event(value: object, name: str | None = None) -> bytes:
    """Return a JSON value as an event.

    Args:
        name: type of the event; None for an event without one.
    """
    start = b"" if name is None else b"event: " + name.encode() + b"\n"
    return b"%bdata: %b\n\n" % (start, _encode(value))


def event_stream(
    call: Call,
    events: AsyncIterator[bytes],
    encode_error: Callable[[ApiError], bytes],
    make_ping: Callable[[], bytes] | None = None,
) -> Response:
    """Return a response that streams events.

    Args:
        events: encoded events. The iterator is closed when the client leaves.
        encode_error: makes an event of an error that occurs in `events`.
        make_ping: makes what keeps a quiet connection open; None for a comment.
    """

    async def with_errors() -> AsyncIterator[bytes]:
        try:
            async with aclosing(events):  # type: ignore[type-var]
                async for event in events:
                    yield event
        except (GeneratorExit, asyncio.CancelledError):
            call.record.error = "disconnected"
            raise
        except Exception as error:
            answer = as_api_error(error)
            call.record.error = answer.code or answer.kind
            yield encode_error(answer)

    return EventSourceResponse(
        with_errors(),
        ping=call.server.options.keep_alive_seconds,
        ping_message_factory=_Ping(make_ping),  # type: ignore[arg-type] # it may return bytes
        sep="\n",
        headers={"x-request-id": call.record.id, "cache-control": "no-cache"},
    )


class _Ping:
    def __init__(self, make: Callable[[], bytes] | None) -> None:
        self._make = make

    def __call__(self) -> ServerSentEvent | bytes:
        return b": keep-alive\n\n" if self._make is None else self._make()
