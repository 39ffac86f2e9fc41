"""A server in a process of its own, which a run of agents, or a test, kills and starts again."""

from __future__ import annotations

import select
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO, Self

_START_SECONDS = 300.0  # for a busy machine; a server that takes longer hangs


class ServerProcess(ABC):
    """A server that prints a line once it listens. Entering the `with` block starts it, and leaving kills it.

    Attributes:
        url: such as "http://127.0.0.1:41375"; empty before the first start.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    @abstractmethod
    def start(self) -> None:
        """Start the server, and wait until it listens."""

    def kill(self) -> None:
        """End the server at once, by SIGKILL."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.communicate()
            self._process = None

    def _launch(
        self,
        arguments: Sequence[str],
        *,
        stdin: int | None = None,
        stderr: IO[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Start Python with some arguments, and return the first line that it prints."""
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=environment,
            start_new_session=True,
        )
        return self._read_line()

    def _read_line(self) -> str:
        """Return the next line that the server prints; empty if it ends, or prints none in time."""
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _START_SECONDS)
        return self._process.stdout.readline() if ready else ""
