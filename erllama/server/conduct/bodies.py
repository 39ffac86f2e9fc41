"""Reads the bodies of requests: within limits of size, depth and time, into declared types.

A body's type is a `msgspec.Struct`. Unknown fields are ignored, as clients send fields of newer APIs. A known field
of the wrong type is an error that names its path. Values that reach prompts, such as messages and tools, are
declared as plain JSON (`Json`), because a type that drops or reorders keys would change the prompt.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from erllama.server.conduct.errors import ApiError

# A JSON object as it arrived: its keys in their order. msgspec has no other name for a value of any type.
Json = dict[str, Any]

Body = TypeVar("Body")

# Larger bodies are decoded in a thread: decoding 1 MiB takes about 10 ms.
_SMALL = 1 << 18
# A string, perhaps without its end, or a bracket. Possessive, so that no text is read twice: a body with one open
# string and many quotes would take quadratic time otherwise.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_PATH = re.compile(r" - at `\$\.?(?P<path>.*)`$")
_MISSING = re.compile(r"^Object missing required field `(?P<name>.*)`$")


async def read_body(request: Request, max_bytes: int, timeout: float) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: the body has more than `max_bytes` bytes, or did not arrive within `timeout` seconds.
        starlette.requests.ClientDisconnect: the client is gone.
    """
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise _too_large(int(length), max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(len(body), max_bytes)
    except TimeoutError:
        raise ApiError("timeout", f"the body did not arrive within {timeout:g} seconds; send it faster") from None
    return bytes(body)


async def decode_body(body: bytes, type: type[Body], max_depth: int) -> Body:
    """Return a body as a value of its type.

    Raises:
        ApiError: the body is not JSON, is nested more deeply than `max_depth`, or a field has the wrong type.
    """
    if len(body) > _SMALL:
        return await asyncio.to_thread(_decode, body, type, max_depth)
    return _decode(body, type, max_depth)


def _decode(body: bytes, type: type[Body], max_depth: int) -> Body:
    if not body.strip():
        raise ApiError("invalid_request", "the body is empty; send a JSON object")
    _check_depth(body, max_depth)
    try:
        return msgspec.json.decode(body, type=type)
    except msgspec.ValidationError as error:
        raise field_error(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError("invalid_request", f"the body is not JSON: {error}", "invalid_json") from None


def field_error(error: msgspec.ValidationError, within: str = "") -> ApiError:
    """Return the answer for a value of the wrong type, with its path.

    Args:
        within: path of the value that was checked, such as "messages[2]"; "" for the body.
    """
    message, path = str(error), within
    found = _PATH.search(message)
    if found:
        message = message[: found.start()]
        inner = found["path"]
        path += f".{inner}" if path and inner and not inner.startswith("[") else inner
    missing = _MISSING.search(message)
    if missing:
        path = f"{path}.{missing['name']}" if path else missing["name"]
    return ApiError("invalid_request", f"{path or 'the body'}: {message}", param=path or None)


def _check_depth(body: bytes, max_depth: int) -> None:
    if body.count(b"[") + body.count(b"{") <= max_depth:
        return
    depth = 0
    for token in _TOKEN.finditer(body):
        byte = body[token.start()]
        if byte in b"[{":
            depth += 1
            if depth > max_depth:
                raise ApiError(
                    "invalid_request", f"the body is nested more than {max_depth} deep; flatten it", "invalid_json"
                )
        elif byte in b"]}":
            depth -= 1


def _too_large(size: int, limit: int) -> ApiError:
    return ApiError("too_large", f"the body has {size:,} bytes or more, and the limit is {limit:,}; send less")
