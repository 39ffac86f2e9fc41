"""Checks the headers Host and Origin, so that web pages cannot use the server of the machine that shows them.

A page can reach a server on this machine in two ways: under a name of its own that resolves to 127.0.0.1 (DNS
rebinding), or by a request to 127.0.0.1 whose answer it cannot read. Either would make the model compute.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from erllama.server.conduct.errors import ApiError

_LOCAL_NAMES = ("localhost",)


class HostCheck:
    """Answers 421 to requests whose Host header names another machine, and 403 to those of other sites' pages.

    An ASGI application around another. IP addresses are accepted as hosts: a page cannot have one as its name
    unless it was loaded from there.

    Args:
        allowed: names that are accepted besides those of this machine, without ports. "*" for any.
        origins: origins of pages that are accepted besides those of the server itself. "*" for any.
        refuse: returns the response for an error of a request, in the form of the API that was called.
    """

    def __init__(
        self,
        app: ASGIApp,
        allowed: Collection[str],
        origins: Collection[str],
        refuse: Callable[[Scope, ApiError], ASGIApp],
    ) -> None:
        self._app, self._refuse = app, refuse
        self._allowed = frozenset(name.lower() for name in (*_LOCAL_NAMES, *allowed))
        self._origins = frozenset(origin.lower().rstrip("/") for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] in ("http", "websocket"):
            error = self._find_error(Headers(scope=scope))
            if error is not None:
                await self._refuse(scope, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _find_error(self, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if not self._is_allowed(host):
            text = "the Host header names a machine that this server does not serve; see `--allowed-host`"
            return ApiError("permission", text, "host_not_allowed", status=HTTPStatus.MISDIRECTED_REQUEST)
        if not self._is_origin_allowed(headers.get("origin"), host):
            text = "pages of this origin may not use this server; see `--cors-origin`"
            return ApiError("permission", text, "origin_not_allowed")
        return None

    def _is_origin_allowed(self, origin: str | None, host: str) -> bool:
        if origin is None or "*" in self._origins or origin.lower() in self._origins:
            return True
        return urlsplit(origin).netloc.lower() == host.lower() != ""

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
