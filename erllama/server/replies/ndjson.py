"""Streams of JSON lines (NDJSON): responses as those of server-sent events, with lines instead of events.

NDJSON has no comments, and clients decode every line. So a quiet stream is kept open by a line of the API that adds
no text.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.responses import Response

from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call
from erllama.server.replies.sse import event_stream

_encode = msgspec.json.Encoder().encode

MEDIA_TYPE = "application/x-ndjson"


def encode_line(value: object) -> bytes:
    """Return a JSON value as a line."""
    return _encode(value) + b"\n"


def line_stream(
    call: Call,
    lines: AsyncIterator[bytes],
    encode_error: Callable[[ApiError], bytes],
    make_ping: Callable[[], bytes],
) -> Response:
    """Return a response that streams lines.

    Args:
        lines: encoded lines. The iterator is closed when the client leaves.
        encode_error: makes a line of an error that occurs in `lines`.
        make_ping: makes the line that keeps a quiet connection open.
    """
    response = event_stream(call, lines, encode_error, make_ping)
    response.headers["content-type"] = MEDIA_TYPE
    return response
