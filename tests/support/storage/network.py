"""A proxy between clients and a server that delays, loses, refuses or answers, and a bucket server in a process."""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BUCKET = "bucket"
DEADLINE = 60.0
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET

Place = tuple[str, int] | str  # of a TCP port, or the path of a Unix socket


class Proxy:
    """Forwards connections to a server, and fails as it is told to.

    Attributes:
        delay: seconds before each request is passed on.
        loss: the part of requests whose connection is reset.
        gone: whether connections are reset at once, and `black_hole`: whether they are accepted and never answered.
        answer: an HTTP response to send in place of the server's.
        n_requests: pieces that clients sent.
    """

    def __init__(self, target: Place, listen: Place = ("127.0.0.1", 0)) -> None:
        self.delay, self.loss, self.gone, self.black_hole = 0.0, 0.0, False, False
        self.answer: bytes | None = None
        self.n_requests = 0
        self._target = target
        self._dice = random.Random(1)
        self._sockets: set[socket.socket] = set()
        family = socket.AF_UNIX if isinstance(listen, str) else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        self._listener.bind(listen)
        self._listener.listen(64)
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.add(client)
            if self.gone:
                self._close(client)
                continue
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server: socket.socket | None = None
        with suppress(OSError):
            while sent := client.recv(1 << 16):
                self.n_requests += 1
                if self.delay:
                    time.sleep(self.delay)
                while self.black_hole and not self.gone:
                    time.sleep(0.01)
                if self.gone or self._dice.random() < self.loss:
                    break
                if self.answer is not None:
                    client.sendall(self.answer)
                    break
                if server is None:
                    server = connect(self._target)
                    self._sockets.add(server)
                    threading.Thread(target=self._pass_back, args=(server, client), daemon=True).start()
                server.sendall(sent)
        self._close(client)
        if server is not None:
            self._close(server)

    def _pass_back(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while received := server.recv(1 << 16):
                if self.gone:
                    break
                client.sendall(received)
        self._close(client)

    def _close(self, end: socket.socket) -> None:
        self._sockets.discard(end)
        with suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()

    def close(self) -> None:
        self.gone = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in list(self._sockets):
            self._close(end)
        self._accepting.join(DEADLINE)


def connect(place: Place) -> socket.socket:
    family = socket.AF_UNIX if isinstance(place, str) else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.connect(place)
    return connection


def s3_error(status: str, code: str) -> bytes:
    """Return the response of S3 that refuses a request."""
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'.encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


@contextmanager
def proxied(target: Place) -> Iterator[Proxy]:
    proxy = Proxy(target)
    try:
        yield proxy
    finally:
        proxy.close()


@contextmanager
def bucket_server() -> Iterator[int]:
    """Run moto's S3 server with an empty bucket. Yields its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
        ends = time.monotonic() + DEADLINE
        while True:
            try:
                urllib.request.urlopen(request, timeout=DEADLINE).close()
                break
            except OSError:
                if time.monotonic() > ends or server.poll() is not None:
                    raise
                time.sleep(0.05)
        yield port
    finally:
        server.kill()
        server.wait()


def environment(port: int) -> dict[str, str]:
    """Return the environment of a client of the bucket server."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }


def enter_network_namespace(path: Path) -> int:
    """Move this process into a network namespace of its own, whose only way out is the Unix socket `path`.

    Returns:
        the port there that leads to the socket.

    Raises:
        PermissionError: the kernel refuses a new namespace.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NETWORK):
        raise PermissionError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:  # the loopback device is down at first
        up = struct.pack("16sH22x", b"lo", 1)
        fcntl.ioctl(control, 0x8914, up)  # SIOCSIFFLAGS, IFF_UP
    return Proxy(str(path)).port


def may_enter_network_namespace() -> bool:
    """Return whether the kernel allows a new network namespace."""
    child = os.fork()
    if child == 0:
        os._exit(1 if ctypes.CDLL(None).unshare(_NEW_NETWORK) else 0)
    return os.waitpid(child, 0)[1] == 0
