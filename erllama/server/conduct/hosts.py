"""Checks the Host header, so that a web page cannot reach the server under a name of its own (DNS rebinding)."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

_LOCAL_NAMES = ("localhost",)


class HostCheck:
    """Answers 421 to requests whose Host header names another machine. An ASGI application around another.

    IP addresses are accepted: a page cannot have one as its name unless it was loaded from there.

    Args:
        allowed: names that are accepted besides those of this machine. "*" for any.
    """

    def __init__(self, app: ASGIApp, allowed: Collection[str]) -> None:
        self._app = app
        self._allowed = frozenset(name.lower() for name in (*_LOCAL_NAMES, *allowed))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] in ("http", "websocket") and not self._is_allowed(Headers(scope=scope).get("host", "")):
            text = "the Host header names a machine that this server does not serve; see `--allowed-host`"
            await PlainTextResponse(text, 421)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, host: str) -> bool:
        if "*" in self._allowed:
            return True
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.strip("[]").lower().rstrip(".")
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return not name or name in self._allowed
        return True
