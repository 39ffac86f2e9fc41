"""Runs a program in a pseudo-terminal, as a user at a keyboard does."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][A-Z0-9]|\x1b[=>78]|\x1b\][^\x07]*\x07")

# Makes the terminal the controlling one, so that Ctrl-C sends a signal.
_TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class PseudoTerminal:
    """Runs a program in its own terminal. `send` types, and `wait_for` reads."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", **environment},
        )
        os.close(theirs)
        self.raw = ""
        self._seen = 0  # the end of the text that the last wait returned

    @property
    def text(self) -> str:
        """The output without cursor movement and colours."""
        return _ESCAPES.sub("", self.raw).replace("\r\n", "\n")

    def send(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, words: str, seconds: float = 60) -> str:
        """Wait until `words` are written after the last match. Returns the text up to and including them."""
        deadline = time.monotonic() + seconds
        while (at := self.text.find(words, self._seen)) < 0:
            assert self._read(deadline), f"{words!r} was not printed; the output is:\n{self.text[self._seen :]}"
        found = self.text[self._seen : at + len(words)]
        self._seen = at + len(words)
        return found

    def wait_for_end(self, seconds: float = 60) -> int:
        """Wait until the program ends. Returns the exit status."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        return self._process.wait(max(deadline - time.monotonic(), 1.0))

    def hang_up(self, seconds: float = 60) -> int:
        """Close the terminal, as its window does, and wait until the program ends. Returns the exit status."""
        os.close(self._ours)
        self._ours = -1
        return self._process.wait(seconds)

    def _read(self, deadline: float) -> bool:
        """Return whether more output was read."""
        ready, _, _ = select.select([self._ours], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            return False
        try:
            piece = os.read(self._ours, 65536)
        except OSError:  # the other end is closed
            return False
        self.raw += piece.decode("utf-8", "replace")
        return bool(piece)

    def __enter__(self) -> PseudoTerminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._ours >= 0:
            os.close(self._ours)
