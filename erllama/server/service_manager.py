"""Reports the state of the server to systemd, with its notification protocol: a datagram to $NOTIFY_SOCKET.

Without that variable, as outside of a unit with `Type=notify`, reports are dropped.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping

log = logging.getLogger("erllama.server")

VARIABLE = "NOTIFY_SOCKET"


def report_ready(environment: Mapping[str, str] = os.environ) -> None:
    """Report that the server accepts requests, or that a reload has ended."""
    _send("READY=1", environment)


def report_reloading(environment: Mapping[str, str] = os.environ) -> None:
    """Report that a reload has begun. `report_ready` ends it."""
    _send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}", environment)


def report_stopping(environment: Mapping[str, str] = os.environ) -> None:
    """Report that the server is stopping."""
    _send("STOPPING=1", environment)


def _send(state: str, environment: Mapping[str, str]) -> None:
    address = environment.get(VARIABLE, "")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket of Linux
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.connect(address)
            sender.sendall(state.encode())
    except OSError as error:
        log.warning("cannot report to the service manager at %s: %s", environment[VARIABLE], error)
