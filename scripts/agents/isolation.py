"""Confines the runner, and so the server and the agents, to a network of its own, with loopback alone.

The runner starts itself again under `unshare`, in which no other machine can be reached.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import sys
from collections.abc import Sequence

_INSIDE = "ERLLAMA_AGENTS_ISOLATED"  # set in the process that unshare starts
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 0x1  # of Linux: SIOCGIFFLAGS, SIOCSIFFLAGS and IFF_UP


def isolate(arguments: Sequence[str]) -> None:
    """Continue in a network with loopback alone. Starts the runner again, unless it is there already.

    Exits with a message if the system does not allow it.

    Args:
        arguments: of the runner.
    """
    if os.environ.get(_INSIDE):
        _raise_loopback()
        return
    unshare = shutil.which("unshare")
    if unshare is None:
        sys.exit("unshare is missing; install util-linux")
    sys.stdout.flush()
    command = [unshare, "--map-root-user", "--net", sys.executable, "-m", "scripts.agents", *arguments]
    os.execve(unshare, command, {**os.environ, _INSIDE: "1"})


def _raise_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        (flags,) = struct.unpack_from("h", fcntl.ioctl(control, _GET_FLAGS, struct.pack("16s16x", b"lo")), 16)
        fcntl.ioctl(control, _SET_FLAGS, struct.pack("16sh14x", b"lo", flags | _UP))
