"""The access log: one line of JSON for each request, once its response has ended.

The lines go to the logger `erllama.server.access`. They have no text of prompts, unless `log_prompts` is set.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("erllama.server.access")

# A request whose model is loaded waits less than this for it.
_LOAD_SECONDS = 0.001


class AccessLog:
    """Logs each request, and ends its hold on its model. An ASGI application around another.

    Args:
        on_end: called at the end of each request with its record (None without an endpoint), its key (None without
            one), its status and its seconds. For metrics.
    """

    def __init__(self, app: ASGIApp, on_end: Callable[[Any, Any, int, float], None] | None = None) -> None:
        self._app, self._on_end = app, on_end

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
            seconds = time.monotonic() - began
            state = scope.get("state", {})
            record, key = state.get("record"), state.get("key")
            try:
                # The token counts of a reply that the client abandoned arrive with its last tick.
                if record is not None and record.ending is not None:
                    await record.ending
            finally:
                if record is not None and record.release is not None:
                    record.release()
                if self._on_end is not None:
                    self._on_end(record, key, status, seconds)
                if log.isEnabledFor(logging.INFO):
                    _write(scope, status, seconds, record, key)


def _write(scope: Scope, status: int, seconds: float, record: Any, key: Any) -> None:  # noqa: ANN401
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
            "load_seconds": round(record.load_seconds, 6) if record.load_seconds > _LOAD_SECONDS else None,
            "first_token": record.first_token,
            "finish_reason": record.finish_reason,
            "error": record.error,
            "notes": record.notes,
            "prompt": record.prompt,
        }
    shown = {name: value for name, value in line.items() if value not in (None, "", [])}
    log.info("%s", msgspec.json.encode(shown).decode())
