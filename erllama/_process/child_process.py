"""One child process as its parent sees it: started, read, watched and killed.

`Supervisor` creates a `ChildProcess` for each start of a model's process, and uses it in its own thread.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import psutil

from erllama._process.protocol import messages as m
from erllama._process.protocol import wire_types as w
from erllama._process.protocol.frames import FrameReader, Outbox
from erllama._process.protocol.token_message import MARK, TokenEntry, decode_tokens
from erllama._runtime.log import logger
from erllama._runtime.processes import python_command
from erllama.errors import Unsupported

log = logger("erllama.process")

_KEPT_LINES = 300  # of the child's log: a crash may print the stacks of many threads
_SHOWN_LINES = 20  # of these, in the error when the model has failed
_CRASH = re.compile(r"^Fatal Python error|GGML_ASSERT|^terminate called|ssertion .*failed")
_MAX_LINE = 4000
_RECEIVED = 1 << 16  # bytes received at once, into memory that stays
_LOG_LINE = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL):([\w.]+):(.*)", re.DOTALL)
_MEASURE_SECONDS = 0.25  # between two measurements of memory
_START_SECONDS = 60.0  # for a process to send its first message
_LONGEST_STEP = 1.0  # seconds between two looks at a child that count
# Decodes take this many times their measured time before the process counts as hung.
_SLACK = 10.0


class _ThisProcess:
    """What this process is."""

    runs_model = False


_this_process = _ThisProcess()


def mark_as_child() -> None:
    """Note that this process runs a model: it must not start another process for one."""
    _this_process.runs_model = True


def library_version() -> str:
    """Return the version of the installed library: parent and child compare theirs."""
    try:
        return version("erllama")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return ""


def check_platform() -> None:
    """Raise Unsupported if this process cannot start the process of a model."""
    if os.name != "posix" or not hasattr(socket, "socketpair"):
        raise Unsupported(f"process=True needs a POSIX system, and this is {sys.platform}; leave it out")
    if _this_process.runs_model:
        raise Unsupported("process=True within the process of a model; leave it out there")


class ChildProcess:
    """A process that runs one model.

    Args:
        start: the first message.
        on_backlog: called, in any thread, when bytes wait for the child to read.

    Attributes:
        connection: the socket to it.
        outbox: sends messages to it.
        log_pipe, log_descriptor: its standard output and standard error.
        log_open: whether more of it may come.
        started: whether it has loaded its model.
        last_state: the state that it sent last; None before the first.
    """

    def __init__(self, start: m.Start, on_backlog: Callable[[], None]) -> None:
        first = m.encode(start)
        self.connection, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                python_command("erllama._process.child", str(theirs.fileno()), str(os.getpid())),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in the terminal is for the parent
            )
        except BaseException:
            self.connection.close()
            raise
        finally:
            theirs.close()
        assert self._process.stdout is not None
        self.log_pipe = self._process.stdout
        self.log_descriptor = self.log_pipe.fileno()
        self.log_open = True
        os.set_blocking(self.log_descriptor, False)
        self.outbox = Outbox(self.connection, on_backlog)
        self.started = False
        self.last_state: w.ModelState | None = None
        self._reader = FrameReader()
        self._received = memoryview(bytearray(_RECEIVED))
        self._partial_line = b""
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._silent_seconds = 0.0
        self._has_sent = False
        self._tick_seconds = 0.0  # of the present tick, as the child reported it, and since
        self._watched_at = self._measure_at = time.monotonic()
        self._ended = False
        self.kill_reason = ""
        self.outbox.send(first)

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    # --- what it sends -----------------------------------------------------------------------------

    def messages(self) -> Iterator[m.FromChild | list[TokenEntry]]:
        """Yield some of the messages that have arrived. Sets `ended` at the end of the connection.

        Raises:
            ProtocolError: it sent something else.
        """
        if self._ended:
            return
        try:
            n_bytes = self.connection.recv_into(self._received, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            n_bytes = 0
        self._ended = not n_bytes
        self._silent_seconds = 0.0
        self._has_sent = True
        for body in self._reader.feed(self._received[:n_bytes]):
            if body[0] == MARK:
                yield decode_tokens(body)
                continue
            message = m.decode_from_child(body)
            self._record(message)
            yield message

    @property
    def ended(self) -> bool:
        """Whether it has closed the connection: it has ended, or is about to."""
        return self._ended

    def _record(self, message: m.FromChild) -> None:
        """Note what the process does."""
        state = getattr(message, "state", None)
        if state is not None:
            self.last_state = state
        if isinstance(message, m.Heartbeat):
            self._tick_seconds = message.state.tick_seconds

    def read_log(self) -> bool:
        """Pass some of what it printed to `logging`. Return whether there was any."""
        try:
            printed = os.read(self.log_descriptor, 1 << 16)
        except BlockingIOError:
            return False  # the pipe is also open in a process that the child started
        except OSError:
            printed = b""
        self.log_open = bool(printed)
        *lines, self._partial_line = (self._partial_line + printed).split(b"\n")
        if len(self._partial_line) > _MAX_LINE or not printed:
            lines, self._partial_line = [*lines, self._partial_line], b""
        for line in lines:
            self._log_line(line[:_MAX_LINE].decode("utf-8", "replace").rstrip())
        return bool(printed)

    def _log_line(self, line: str) -> None:
        if not line:
            return
        self._lines.append(line)
        found = _LOG_LINE.fullmatch(line)
        if found:
            logger(found[2]).log(getattr(logging, found[1]), "[process %d] %s", self.pid, found[3])
        else:
            log.log(logging.INFO, "[process %d] %s", self.pid, line)

    @property
    def last_lines(self) -> str:
        """What it printed last: from the message of a crash on, if there is one."""
        lines = list(self._lines)
        at = next((at for at, line in enumerate(lines) if _CRASH.search(line)), -_SHOWN_LINES)
        return "\n".join(lines[at:][:_SHOWN_LINES])

    # --- supervision ---------------------------------------------------------------------------------

    def fault(self, hang_timeout: float, memory_limit: int | None) -> str | None:
        """Return why the process must be replaced; None if it is well. Called at least twice a second.

        Counts only the time between two calls, and little of it: a parent that was stopped for a while does not
        take its child for hung.
        """
        now = time.monotonic()
        passed = min(now - self._watched_at, _LONGEST_STEP, hang_timeout / 4)
        self._watched_at = now
        self._silent_seconds += passed
        # A process that has not sent anything yet imports its modules, which takes long on a busy machine.
        if self._silent_seconds > (hang_timeout if self._has_sent else max(hang_timeout, _START_SECONDS)):
            return f"no sign of life for {self._silent_seconds:.1f} s (hang_timeout={hang_timeout:g})"
        if self.started:
            state = self.last_state
            self._tick_seconds = self._tick_seconds + passed if self._tick_seconds else 0.0
            if state is not None and self._tick_seconds:
                limit = max(hang_timeout, _SLACK * state.expected_seconds)
                if self._tick_seconds > limit:
                    return f"a decode takes longer than {limit:.1f} s"
        if memory_limit is not None and now >= self._measure_at:
            self._measure_at = now + _MEASURE_SECONDS
            used = self._used_memory()
            if used > memory_limit:
                return f"it uses {used} bytes of memory, and memory_limit={memory_limit}"
        return None

    def _used_memory(self) -> int:
        """Return the bytes that it has allocated; mapped files do not count."""
        with suppress(psutil.Error):
            memory = psutil.Process(self.pid).memory_info()
            return max(int(memory.rss) - int(getattr(memory, "shared", 0)), 0)
        return 0

    def kill(self, reason: str = "") -> None:
        """Kill it at once."""
        self.kill_reason = self.kill_reason or reason
        with suppress(OSError):
            self._process.kill()

    def wait(self, timeout: float) -> bool:
        """Wait until it has ended; return whether it has."""
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> str:
        """Kill it if it still runs, release everything, and return how it ended."""
        status = self._process.poll()
        if status is None:
            # It has closed the connection and is about to exit, unless it must be killed.
            if self.kill_reason or not self.wait(1.0):
                self._process.kill()
            status = self._process.wait()
        while self.read_log():
            pass
        self.release()
        return self.kill_reason or _describe_exit(status)

    def release(self) -> None:
        """Drop what is not sent, and close the socket and the pipe."""
        self.outbox.close()
        self.close_handles()

    def close_handles(self) -> None:
        """Close the socket and the pipe. Takes no lock: a thread of the parent may have held one at a fork."""
        self.connection.close()
        with suppress(OSError):
            self.log_pipe.close()


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"it exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"it was ended by {name}"
