"""Servers for tests: in a thread of this process, or as the command `erllama serve`. Clients on plain sockets."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn

import erllama
from erllama.server import ServedModel, ServerOptions
from erllama.server.application import make_server
from erllama.server.models import ModelPool
from erllama.server.run import uvicorn_config
from erllama.server.settings.listening import ListenOptions, url_of
from erllama.server.state import Server
from support.threads import wait_until

CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}


def chat_body(text: str = "hello", **options: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], **options}


@dataclass
class RunningServer:
    """A server that listens."""

    url: str
    state: Server
    uvicorn: uvicorn.Server

    def tasks(self) -> int:
        """Return the number of tasks of the server's event loop."""
        return len(asyncio.all_tasks(self.uvicorn.servers[0].get_loop()))

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").rsplit(":", 1)
        return host, int(port)

    def post(self, body: object, path: str = CHAT, **options: object) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {**JSON, **options.pop("headers", {})}  # type: ignore[dict-item]
        return httpx.post(self.url + path, content=content, headers=headers, timeout=120, **options)  # type: ignore[arg-type]

    def connect(self) -> socket.socket:
        client = socket.create_connection(self.address)
        client.settimeout(120)
        return client

    def send(self, body: object, path: str = CHAT, headers: Mapping[str, str] | None = None) -> socket.socket:
        """Send a request and return its connection."""
        client = self.connect()
        client.sendall(request_bytes(body, path, headers))
        return client


def request_bytes(body: object, path: str = CHAT, headers: Mapping[str, str] | None = None) -> bytes:
    """Return a POST request."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"host": "localhost", **JSON, "content-length": str(len(content)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + content


def read_until(client: socket.socket, text: bytes) -> bytes:
    """Return what a connection sends up to and including a text."""
    received = b""
    while text not in received:
        part = client.recv(65536)
        assert part, received
        received += part
    return received


@contextmanager
def running(
    models: erllama.Model | ServedModel | Sequence[erllama.Model] | ModelPool,
    listen: Mapping[str, object] | None = None,
    **options: object,
) -> Iterator[RunningServer]:
    """Run a server of some models in a thread."""
    listening = ListenOptions(**{"port": 0, **(listen or {})})  # type: ignore[arg-type]
    state = make_server(models, ServerOptions.of(options))
    bound = listening.bind()
    server = uvicorn.Server(uvicorn_config(state, listening))
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield RunningServer(url_of(bound), state, server)
    finally:
        server.should_exit = True
        thread.join(120)
        bound.close()
        assert not thread.is_alive()


@contextmanager
def running_server(
    models: erllama.Model | ServedModel | Sequence[erllama.Model] | ModelPool, **options: object
) -> Iterator[RunningServer]:
    """Run a server of some models in a thread, with options of the server alone."""
    with running(models, **options) as server:  # type: ignore[arg-type]
        yield server


@dataclass
class ServeCommand:
    """A process of `erllama serve`."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def stop(self) -> None:
        """Let the server finish, its access log included, and end."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(120) == 0

    def access_lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


@contextmanager
def serve_command(
    directory: Path, *arguments: object, environment: Mapping[str, str] | None = None
) -> Iterator[ServeCommand]:
    """Run `erllama serve` on a free port, with directories of the test. stderr goes to the file `log`."""
    log = directory / "stderr.txt"
    around = {
        **{name: value for name, value in os.environ.items() if name != "ERLLAMA_API_KEY"},
        "ERLLAMA_CACHE_DIR": str(directory / "kv"),
        "XDG_CACHE_HOME": str(directory / "cache"),
        **(environment or {}),
    }
    with open(log, "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "erllama", "serve", "--port", "0", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=around,
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " on http://" in line, (line, log.read_text())
        yield ServeCommand(process, line.split(" on ")[1].split(". ")[0], log)
    finally:
        process.kill()
        process.wait(60)
        process.stdout.close()  # type: ignore[union-attr]
