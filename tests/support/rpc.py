"""RPC servers on this machine, for tests. A server offers its CPU as a device, with memory of its own."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from erllama import llama_ffi
from erllama.engine.backends.llama_options import LlamaOptions

PROGRAM = llama_ffi.rpc_server_program() or "rpc-server"
needs_rpc = pytest.mark.skipif(
    PROGRAM == "rpc-server", reason="this libllama was built without RPC; see `make test-rpc`"
)


class RpcServer:
    """A server in a child process, with one thread. It keeps its port when it is started again.

    Attributes:
        address: host and port, for `rpc_servers`.
    """

    def __init__(self, port: int | None = None) -> None:
        if port is None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [PROGRAM, "--port", str(self._port), "--threads", "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "GOMP_SPINCOUNT": "0"},
        )
        for _ in range(3000):
            assert self._process.poll() is None, "rpc-server ended"
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
            except OSError:
                time.sleep(0.01)
            else:
                return
        raise AssertionError("rpc-server does not listen")

    def kill(self) -> None:
        """End the server as a crash would. Its memory is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        self.kill()
        self.start()


@contextmanager
def rpc_server() -> Iterator[RpcServer]:
    server = RpcServer()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def all_models_on(server: RpcServer) -> Iterator[None]:
    """Put the layers of all models on a server, unless a test chooses devices or servers itself."""
    check = LlamaOptions.__post_init__

    @functools.wraps(check)
    def add_server(options: LlamaOptions) -> None:
        if options.devices is None and options.rpc_servers is None:
            object.__setattr__(options, "rpc_servers", (server.address,))
        check(options)

    patch = pytest.MonkeyPatch()
    patch.setattr(LlamaOptions, "__post_init__", add_server)
    try:
        yield
    finally:
        patch.undo()
