"""A server in a process of its own, with its cache in a directory, that a test can kill and start again.

Run as a script, it is that process: it prints its URL, and answers each line on stdin once all saves are written.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType

START_SECONDS = 120.0  # for a busy machine; a server that takes longer hangs


class WarmServer:
    """A server of one model. Leaving the `with` block kills it.

    Args:
        model: a GGUF file.
        cache: the directory of its cache, which outlives the server.
        process: whether the model runs in a process of its own.
        n_ctx: tokens of the context.

    Attributes:
        url: such as "http://127.0.0.1:41375"; another one after each start.
    """

    def __init__(self, model: Path, cache: Path, *, process: bool = True, n_ctx: int = 8192) -> None:
        options = [f"--n-ctx={n_ctx}", *(["--process"] if process else [])]
        self._command = [sys.executable, __file__, str(model), str(cache), *options]
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def __enter__(self) -> WarmServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def start(self) -> None:
        """Start the server, and wait until it accepts requests."""
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.url = self._read_line()

    def wait_until_written(self) -> None:
        """Wait until the cache has written what it was given, as it has long before a person's next message."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write("flush\n")
        self._process.stdin.flush()
        assert self._read_line() == "True"

    def kill(self) -> None:
        """End the server at once, by SIGKILL."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.communicate()
            self._process = None

    def _read_line(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_SECONDS)
        line = self._process.stdout.readline() if ready else ""
        assert line, f"the server printed nothing and has exit code {self._process.poll()}"
        return line.strip()


def _run(model: Path, cache_directory: Path, *, process: bool, n_ctx: int) -> None:
    import uvicorn

    import erllama
    import erllama.server

    # Without a RAM tier, the model's process shares no directory of the user's with other tests.
    cache = erllama.Cache(ram=None, disk=cache_directory)
    loaded = erllama.load_model(model, id="warm", cache=cache, n_ctx=n_ctx, n_threads=1, process=process)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(erllama.server.app(loaded), log_level="warning", lifespan="on"))

    def flush_when_asked() -> None:
        for _ in sys.stdin:
            print(cache.flush(), flush=True)  # noqa: T201
        os._exit(0)  # the test is gone

    threading.Thread(target=flush_when_asked, daemon=True).start()
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)  # noqa: T201
    server.run(sockets=[listener])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--n-ctx", type=int, default=8192)
    parser.add_argument("--process", action="store_true")
    arguments = parser.parse_args()
    _run(arguments.model, arguments.cache, process=arguments.process, n_ctx=arguments.n_ctx)
