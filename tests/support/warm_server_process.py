"""The process of a `WarmServer`: prints its URL, and answers each line on stdin once all saves are written."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
from pathlib import Path


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
