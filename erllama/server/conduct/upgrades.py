"""Refuses WebSockets, so that clients that try one first use HTTP at once."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from erllama.server.conduct.errors import ApiError


class RefuseUpgrades:
    """Answers 426 to WebSocket handshakes. An ASGI application around another.

    Codex opens a WebSocket to /v1/responses before its first request. It uses HTTP at once after a 426, and tries
    again several times after any other status. Without a WebSocket library, uvicorn passes the handshake on as a
    GET.

    Args:
        refuse: as for `HostCheck`.
    """

    def __init__(self, app: ASGIApp, refuse: Callable[[Scope, ApiError], ASGIApp]) -> None:
        self._app, self._refuse = app, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] == "websocket" or (
            scope["type"] == "http" and Headers(scope=scope).get("upgrade", "").lower() == "websocket"
        ):
            text = "this server has no WebSockets; send the request as a POST over HTTP"
            error = ApiError("invalid_request", text, "no_websockets", status=HTTPStatus.UPGRADE_REQUIRED)
            await self._refuse(scope, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)
