"""The access log: one line of JSON for each request, once its response has ended. It has no text of prompts.

The lines go to the logger `erllama.server.access`.
"""

from __future__ import annotations

import logging
import time

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("erllama.server.access")


class AccessLog:
    """Logs each request. An ASGI application around another."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began = 0, time.monotonic()

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        finally:
            _write(scope, status, time.monotonic() - began)


def _write(scope: Scope, status: int, seconds: float) -> None:
    record = scope.get("state", {}).get("record")
    key = scope.get("state", {}).get("key")
    line: dict[str, object] = {
        "time": time.time(),
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "seconds": round(seconds, 6),
        "key": key.name if key is not None else None,
    }
    if record is not None:
        line |= {
            "id": record.id,
            "model": record.model,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "computed_tokens": record.prompt_tokens - record.cached_tokens,
            "completion_tokens": record.completion_tokens,
            "tier": record.tier,
            "first_token": record.first_token,
            "finish_reason": record.finish_reason,
            "error": record.error,
            "notes": record.notes,
        }
    log.info(
        msgspec.json.encode({name: value for name, value in line.items() if value not in (None, "", [])}).decode()
    )
