"""Where a server listens: its address, and the limits of its connections."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from erllama.checks import boolean, integer, real, shown
from erllama.errors import OptionError

_LOOPBACK_NAMES = ("localhost", "ip6-localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenOptions:
    """The address of a server and the limits of its connections.

    Attributes:
        host: IP address, or name of this machine.
        port: 0 for any free one.
        insecure: listen on other addresses than loopback without a key.
        header_timeout: seconds within which the headers of a request must arrive.
        send_timeout: seconds for which a client may leave an answer unread.
        max_connections: how many connections there may be at once. Further ones get a 503.
        idle_timeout: seconds for which a connection stays open between two requests.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    insecure: bool = False
    header_timeout: float = 20.0
    send_timeout: float = 60.0
    idle_timeout: float = 75.0
    max_connections: int = 512

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host:
            raise OptionError(f"host must be an address, not {shown(self.host)}")
        integer("port", self.port, 0, 65535)
        integer("max_connections", self.max_connections, 1)
        boolean("insecure", self.insecure)
        for name in ("header_timeout", "send_timeout", "idle_timeout"):
            real(name, getattr(self, name), 0.001)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host.lower() in _LOOPBACK_NAMES:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check_keys(self, has_keys: bool) -> None:
        """Raise OptionError if other machines could use the server without a key."""
        if not has_keys and not self.is_loopback and not self.insecure:
            raise OptionError(
                f"{self.host} is reachable from other machines, and there is no key; pass --api-key-file, set "
                "ERLLAMA_API_KEY, or pass --insecure to serve everybody"
            )

    def bind(self) -> socket.socket:
        """Return a socket that has the address and does not listen yet.

        Raises:
            OptionError: the address is in use, is not one of this machine, or needs rights.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, address = found[0]
            bound = socket.socket(family, kind, protocol)
            try:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                bound.bind(address)
            except BaseException:
                bound.close()
                raise
        except OSError as error:
            raise OptionError(
                f"cannot listen on {self.host}, port {self.port}: {error.strerror}; pass another --host or --port"
            ) from None
        return bound


def url_of(bound: socket.socket) -> str:
    """Return the address of a socket as a URL."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
