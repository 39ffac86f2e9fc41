"""Replicas for the tests of routers: `erllama serve` with the demo model, each with its own cache directory."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import erllama

BLOCK_SIZE = 64
MODEL = "demo"
_N_CTX = 2048
_START_SECONDS = 300.0

Json = dict[str, Any]


def post(url: str, body: Json, seconds: float = 300.0) -> Any:  # noqa: ANN401
    """Return the JSON of an answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=seconds) as answer:
        return json.load(answer)


def free_ports(n: int) -> int:
    """Return the first of `n` consecutive free ports."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
        try:
            for other in range(port, port + n):
                with socket.socket() as each:
                    each.bind(("127.0.0.1", other))
        except (OSError, OverflowError):
            continue
        return port


class Replica:
    """One server.

    Attributes:
        url: of the server.
        events, replays: addresses of its KV events.
    """

    def __init__(self, folder: Path) -> None:
        port = free_ports(3)
        self.url = f"http://127.0.0.1:{port}"
        self.events, self.replays = (f"tcp://127.0.0.1:{port + each}" for each in (1, 2))
        self.cache = folder / "cache"
        self._log, self._config = folder / "log", folder / "erllama.toml"
        folder.mkdir()
        self._config.write_text(f"""
[server]
port = {port}
access_log = "none"

[cache]
ram = 0
disk = "{self.cache}"

[[models]]
path = "{erllama.demo_model()}"
name = "{MODEL}"
n_ctx = {_N_CTX}
n_threads = 1

[models.kv_events]
address = "{self.events}"
block_size = {BLOCK_SIZE}
""")
        self.start()

    def start(self) -> None:
        """Start the server. `wait` waits for it."""
        command = [sys.executable, "-m", "erllama", "serve", "--config", str(self._config)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            RuntimeError: it has ended, or takes too long.
        """
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except (OSError, urllib.error.URLError):
                time.sleep(0.2)
        raise RuntimeError(f"the replica at {self.url} did not start:\n{self._log.read_text()}")

    def kill(self) -> None:
        """End the server as a crash does."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End the server in order."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()

    def evict(self) -> None:
        """Remove what the replica has cached: other prompts take its cells, and a command empties its directory."""
        for index in range(3):
            ask(self.url, conversation(100 + index))
        command = [sys.executable, "-m", "erllama", "cache", "evict", "--all", "--dir", str(self.cache)]
        subprocess.run(command, check=True, capture_output=True)


def conversation(seed: int) -> list[Json]:
    """Return the messages of a conversation of about 700 tokens, which begins unlike the others."""
    words = " ".join(f"word{(seed * 7919 + index * 31) % 9973}" for index in range(90))
    return [{"role": "user", "content": f"{seed} {words}"}]


def ask(url: str, messages: list[Json]) -> float:
    """Send a conversation; return which fraction of its prompt came from the cache."""
    answer = post(f"{url}/v1/chat/completions", {"model": MODEL, "messages": messages, "max_tokens": 1})
    usage = answer["usage"]
    return float(usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"])


def rendered(url: str, messages: list[Json]) -> list[int]:
    """Return the token ids of a conversation's prompt."""
    answer = post(f"{url}/v1/chat/completions/render", {"model": MODEL, "messages": messages})
    return list(answer["token_ids"])
