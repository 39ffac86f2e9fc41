"""Server-sent events: responses that stream a reply, with later errors, and comments that keep them open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from erllama.server.conduct.disconnects import wait_for_disconnect
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
    return _EventStream(call, events, encode_error, make_ping or _comment)


def _comment() -> bytes:
    return b": keep-alive\n\n"


class _EventStream(Response):
    """A response of events. An event costs one `send`: there is no task and no timer for each."""

    media_type = "text/event-stream"

    def __init__(
        self,
        call: Call,
        events: AsyncIterator[bytes],
        encode_error: Callable[[ApiError], bytes],
        make_ping: Callable[[], bytes],
    ) -> None:
        self.status_code, self.background = 200, None
        self._call, self._events = call, events
        self._encode_error, self._make_ping = encode_error, make_ping
        self._sending = asyncio.Lock()
        self._sent = 0.0  # time of the latest event
        # Proxies such as nginx would collect events otherwise.
        self.init_headers({"x-request-id": call.record.id, "cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until their end, or until the client leaves."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sending = asyncio.ensure_future(self._send_events(send))
        leaving = asyncio.ensure_future(wait_for_disconnect(receive))
        try:
            await self._keep_alive(send, sending, leaving)
        finally:
            leaving.cancel()
            if not sending.done():
                self._call.record.error = "disconnected"
                sending.cancel()
                await asyncio.wait((sending,))
        if not sending.cancelled():
            sending.result()  # raises what it raised

    async def _keep_alive(self, send: Send, sending: asyncio.Task[None], leaving: asyncio.Task[None]) -> None:
        """Send a comment whenever no event was sent for a while, until one of the tasks ends."""
        loop, seconds = asyncio.get_running_loop(), self._call.server.options.keep_alive_seconds
        self._sent = loop.time()
        while not sending.done() and not leaving.done():
            quiet = loop.time() - self._sent
            if quiet < seconds:
                await asyncio.wait((sending, leaving), timeout=seconds - quiet, return_when=asyncio.FIRST_COMPLETED)
                continue
            async with self._sending:
                # An event may have been sent meanwhile. The next one is not encoded before this block ends.
                if not sending.done() and loop.time() - self._sent >= seconds:
                    await _send_part(send, self._make_ping())
                    self._sent = loop.time()

    async def _send_events(self, send: Send) -> None:
        time = asyncio.get_running_loop().time
        async with aclosing(self._events) as events:  # type: ignore[type-var]
            try:
                async for event in events:
                    async with self._sending:
                        await _send_part(send, event)
                        self._sent = time()
            except Exception as error:
                answer = as_api_error(error)
                self._call.record.error = answer.code or answer.kind
                answer.request_id = self._call.record.id
                async with self._sending:
                    await _send_part(send, self._encode_error(answer))
        async with self._sending:
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_part(send: Send, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})
