"""Connections with limits, for uvicorn: clients that are slow to ask, or to take an answer, are cut off.

uvicorn limits neither how long the headers of a request take nor how long a client leaves an answer unread. Each
such connection would hold a file descriptor, and an unread one its answer, for as long as the client likes.
"""

from __future__ import annotations

import asyncio
from importlib import import_module
from typing import Any, NamedTuple

# Bytes that may arrive before the headers of a request are complete. uvicorn limits them on h11 alone.
_MAX_HEADER_BYTES = 1 << 16
_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: 48\r\nconnection: close\r\n\r\nthe server has as many connections as it accepts"
)
# After the server closes a connection, a client has this long to take what is left.
_LINGER_SECONDS = 5.0


class ConnectionLimits(NamedTuple):
    """Limits of a connection.

    Attributes:
        header_timeout: seconds within which the headers of a request must arrive, from its first byte on, or from
            the start of the connection.
        send_timeout: seconds for which a client may leave an answer unread. Bytes that it reads meanwhile do not
            count unless they empty most of the connection's buffer of 64 KiB.
        max_connections: how many there may be. Further ones are answered with 503 and closed.
    """

    header_timeout: float
    send_timeout: float
    max_connections: int


def protocol_class(limits: ConnectionLimits) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with limits: that on httptools if it is installed, otherwise that on h11."""
    try:
        base = import_module("uvicorn.protocols.http.httptools_impl").HttpToolsProtocol
    except ImportError:
        base = import_module("uvicorn.protocols.http.h11_impl").H11Protocol
    return type("LimitedProtocol", (_LimitedConnection, base), {"limits": limits})


class _LimitedConnection:
    """What the limits add to a protocol of uvicorn, whose methods have no types."""

    limits: ConnectionLimits
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    cycle: Any
    connections: set[Any]
    _header_bytes = 0
    _header_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)  # type: ignore[misc]
        if len(self.connections) > self.limits.max_connections:
            transport.write(_TOO_MANY)
            transport.close()
            self._abort_later()
            return
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        self._header_bytes += len(data)
        super().data_received(data)  # type: ignore[misc]
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        _stop(self._header_timer)
        self._header_timer = None
        _stop(self._send_timer)
        self._send_timer = None
        super().connection_lost(exc)  # type: ignore[misc]

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        _stop(self._send_timer)
        self._send_timer = self.loop.call_later(self.limits.send_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        _stop(self._send_timer)
        self._send_timer = None
        super().resume_writing()  # type: ignore[misc]

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()  # type: ignore[misc]
        self._abort_later()

    def _watch_headers(self) -> None:
        """Start the timer of the headers while no request is open, and stop it once one is."""
        if self.cycle is not None and not self.cycle.response_complete:
            _stop(self._header_timer)
            self._header_timer = None
            self._header_bytes = 0
        elif self.transport.is_closing():
            return
        elif self._header_bytes > _MAX_HEADER_BYTES:
            self._close()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self.limits.header_timeout, self._close)

    def _close(self) -> None:
        _stop(self._header_timer)
        self._header_timer = None
        # A request that began behind another one on the connection is open without new data.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
            self._abort_later()

    def _abort_later(self) -> None:
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)


def _stop(timer: asyncio.TimerHandle | None) -> None:
    """Cancel a timer, if there is one."""
    if timer is not None:
        timer.cancel()
