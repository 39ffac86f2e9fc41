"""Runs a server with uvicorn until a signal, and stops it: `run`.

SIGTERM or SIGINT ends it in this order: no new connections, running requests finish within `shutdown_seconds`, the
models are unloaded, which saves their contexts and ends what still runs with an error, and `run` returns. A second
signal skips the wait. SIGHUP reloads the configuration.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import uvicorn

from erllama.server.application import make_app
from erllama.server.conduct.connections import ConnectionLimits, protocol_class
from erllama.server.service_manager import report_ready, report_stopping
from erllama.server.settings.listening import ListenOptions
from erllama.server.state import Server

log = logging.getLogger("erllama.server")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Threads that render templates, tokenize, and wait for vectors and scores. Most of them wait.
_THREADS = 64
# For the errors of requests that the end of their model cut off to reach their clients.
_GOODBYE_SECONDS = 10.0


def run(
    server: Server,
    listen: ListenOptions,
    bound: socket.socket,
    on_started: Callable[[], None],
    on_hangup: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT. Call it in the main thread.

    Args:
        bound: of `listen.bind()`.
        on_started: called once the server accepts connections.
        on_hangup: called in the event loop at a SIGHUP, which reloads the configuration.
    """
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns of every malformed request
    _UvicornServer(uvicorn_config(server, listen), server, on_started, on_hangup).run([bound])


def uvicorn_config(server: Server, listen: ListenOptions) -> uvicorn.Config:
    """Return how uvicorn runs a server."""
    limits = ConnectionLimits(listen.header_timeout, listen.send_timeout, listen.max_connections)
    return uvicorn.Config(
        make_app(server),
        http=protocol_class(limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=listen.idle_timeout,  # type: ignore[arg-type]
        timeout_graceful_shutdown=server.options.shutdown_seconds + _GOODBYE_SECONDS,  # type: ignore[arg-type]
    )


class _UvicornServer(uvicorn.Server):
    """uvicorn's server, whose exit status is its caller's and whose requests end with their models."""

    def __init__(
        self,
        config: uvicorn.Config,
        server: Server,
        on_started: Callable[[], None],
        on_hangup: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._server, self._on_started, self._on_hangup = server, on_started, on_hangup
        self._in_terminal = sys.stderr.isatty()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at a signal. uvicorn's own method raises the signal again at the end, which kills the process."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        try:
            yield
        finally:
            for number in (*_SIGNALS, signal.SIGHUP):
                loop.remove_signal_handler(number)
            if not self._in_terminal:
                signal.signal(signal.SIGHUP, signal.SIG_IGN)  # contexts are being saved

    def _hang_up(self) -> None:
        """Reload at a SIGHUP. If the terminal of the server is closed, which also sends one, stop."""
        if self._in_terminal and not sys.stderr.isatty():
            self._stop()
        else:
            self._on_hangup()

    def _stop(self) -> None:
        report_stopping()
        self._server.is_stopping = True
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # Python's default is 6 threads on 2 cores. As many embeddings would block the templates of all chats.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "erllama-server"))
        await super().startup(sockets)
        self._server.models.start()
        self._on_started()
        report_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_requests())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            self._server.models.cancel_loads()

    async def _end_requests(self) -> None:
        """Unload the models once the running requests have had their time."""
        await asyncio.sleep(self._server.options.shutdown_seconds)
        self._server.models.cancel_loads()
        log.warning(
            "requests still run after %g s; their models are unloaded", self._server.options.shutdown_seconds
        )
        # With those that a reload has removed.
        models = [each.served.model for each in self._server.models.lifecycle.known if each.served is not None]
        await asyncio.gather(*(asyncio.to_thread(model.unload) for model in models))
