"""Streams of JSON lines (NDJSON): responses with errors after the first byte, and lines that keep them open.

NDJSON has no comments, and clients decode every line. So a quiet stream is kept open by a line of the API that adds
no text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from erllama.server.conduct.errors import ApiError, as_api_error
from erllama.server.endpoints import Call

_encode = msgspec.json.Encoder().encode

MEDIA_TYPE = "application/x-ndjson"


def encode_line(value: object) -> bytes:
    """Return a JSON value as a line."""
    return _encode(value) + b"\n"


def line_stream(
    call: Call,
    lines: AsyncGenerator[bytes],
    encode_error: Callable[[ApiError], bytes],
    make_ping: Callable[[], bytes],
) -> Response:
    """Return a response that streams lines.

    Args:
        lines: encoded lines. The generator is closed when the client leaves.
        encode_error: makes a line of an error that occurs in `lines`.
        make_ping: makes the line that keeps a quiet connection open.
    """
    return _LineStream(call, lines, encode_error, make_ping)


class _LineStream(Response):
    media_type = MEDIA_TYPE

    def __init__(
        self,
        call: Call,
        lines: AsyncGenerator[bytes],
        encode_error: Callable[[ApiError], bytes],
        make_ping: Callable[[], bytes],
    ) -> None:
        self._call, self._lines, self._encode_error, self._make_ping = call, lines, encode_error, make_ping
        self._sent = time.monotonic()  # when the previous line was sent
        self._writing = asyncio.Lock()  # lines are sent whole
        self.status_code, self.background = 200, None
        self.init_headers({"x-request-id": call.record.id, "cache-control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the lines until they end or the client leaves."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        sending = asyncio.create_task(self._send_lines(send))
        others = [asyncio.create_task(_wait_for_disconnect(receive)), asyncio.create_task(self._ping(send))]
        try:
            await asyncio.wait((sending, *others), return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                self._call.record.error = "disconnected"
        finally:
            for task in (sending, *others):
                task.cancel()
            await asyncio.gather(sending, *others, return_exceptions=True)

    async def _send_lines(self, send: Send) -> None:
        try:
            async with aclosing(self._lines) as lines:
                async for line in lines:
                    await self._send(send, line)
        except Exception as error:
            answer = as_api_error(error)
            self._call.record.error = answer.code or answer.kind
            await self._send(send, self._encode_error(answer))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _ping(self, send: Send) -> None:
        interval = self._call.server.options.keep_alive_seconds
        while True:
            quiet = time.monotonic() - self._sent
            await asyncio.sleep(max(interval - quiet, 0))
            if time.monotonic() - self._sent >= interval:
                await self._send(send, self._make_ping())

    async def _send(self, send: Send, line: bytes) -> None:
        async with self._writing:
            await send({"type": "http.response.body", "body": line, "more_body": True})
            self._sent = time.monotonic()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
