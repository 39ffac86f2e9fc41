"""A server in a process of its own, with its cache in a directory, that a test can kill and start again."""

from __future__ import annotations

import subprocess
from pathlib import Path

from scripts.agents.server_process import ServerProcess

_PROGRAM = Path(__file__).with_name("warm_server_process.py")


class WarmServer(ServerProcess):
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
        super().__init__()
        self._arguments = [str(_PROGRAM), str(model), str(cache), *options]

    def start(self) -> None:
        """Start the server, and wait until it accepts requests."""
        self.url = self._launch(self._arguments, stdin=subprocess.PIPE).strip()
        assert self.url, "the server printed nothing"

    def wait_until_written(self) -> None:
        """Wait until the cache has written what it was given, as it has long before a person's next message."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write("flush\n")
        self._process.stdin.flush()
        assert self._read_line() == "True\n"
