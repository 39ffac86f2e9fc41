"""A server of some models on a free loopback port, run by uvicorn in a thread of the test."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

import erllama.server
from erllama import Model
from erllama.server import ServedModel

_STOP_SECONDS = 60.0  # for a busy machine; a server that takes longer hangs


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that accepts requests.

    Attributes:
        url: such as "http://127.0.0.1:41375".
    """

    url: str


@contextmanager
def running_server(
    models: Model | ServedModel | Iterable[Model | ServedModel], **options: object
) -> Iterator[RunningServer]:
    """Serve models within a `with` block.

    Args:
        options: of `erllama.server.ServerOptions`.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)  # connections wait here until the thread accepts
    config = uvicorn.Config(
        erllama.server.app(models, **options), log_level="warning", lifespan="on", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="http-server", daemon=True)
    thread.start()
    try:
        yield RunningServer(f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        server.should_exit = True
        thread.join(_STOP_SECONDS)
        listener.close()
        assert not thread.is_alive(), "the server does not stop"
