"""`erllama serve` with one model, a cache on a disk alone, and an access log that has the messages."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.agents.server_process import ServerProcess

_CONFIGURATION = """\
[server]
port = {port}
access_log = "access.jsonl"
log_prompts = true

[cache]
ram = 0
disk = "kv"

[[models]]
path = "{model}"
name = "local"
n_ctx = {n_ctx}
"""
# The metrics must be zero for so long: the process of the model reports what it writes a little later.
_IDLE_SECONDS = 3.0
_WAIT = 300.0  # seconds until a busy machine has started the server, or written its cache


class Server(ServerProcess):
    """A server that listens on loopback. Leaving the `with` block kills it.

    Args:
        folder: of its configuration, its cache and its logs.
        model: a GGUF file.
        n_ctx: tokens of the context.

    Attributes:
        url: such as "http://127.0.0.1:41375"; the same after a restart.
    """

    def __init__(self, folder: Path, model: Path, n_ctx: int) -> None:
        super().__init__()
        self._folder, self._model, self._n_ctx = folder, model, n_ctx

    def start(self) -> None:
        """Start the server, on the port of the last time, and wait until it listens."""
        port = self.url.rsplit(":", 1)[1] if self.url else "0"
        path = self._folder / "erllama.toml"
        path.write_text(_CONFIGURATION.format(port=port, model=self._model, n_ctx=self._n_ctx))
        with (self._folder / "server.log").open("a") as log:
            line = self._launch(
                ["-m", "erllama", "serve", "--config", str(path)],
                stderr=log,
                environment={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        found = re.search(r"http://[\d.]+:\d+", line)
        if found is None:
            sys.exit(f"the server did not start; see {self._folder / 'server.log'}")
        self.url = found[0]

    def wait_until_written(self) -> None:
        """Wait until the cache has written all blocks, as it has long before a person's next message."""
        deadline = time.monotonic() + _WAIT
        idle_since: float | None = None
        while idle_since is None or time.monotonic() - idle_since < _IDLE_SECONDS:
            names = ("vllm:num_requests_running", "erllama_cache_pending_bytes")
            is_idle = not any(value for name in names for value in self._metric(name))
            idle_since = (idle_since or time.monotonic()) if is_idle else None
            if time.monotonic() > deadline:
                sys.exit(f"the cache wrote its blocks for more than {_WAIT:.0f} s")
            time.sleep(0.2)

    def _metric(self, name: str) -> list[float]:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=_WAIT) as answer:
            lines = answer.read().decode().splitlines()
        return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name} ", f"{name}{{"))]

    def access_lines(self) -> list[Mapping[str, Any]]:
        """Return the lines of the access log that are about replies."""
        path = self._folder / "access.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line.get("prompt_tokens")]
