"""The supervisor of one model's process: starts it, watches it, and replaces it when it ends.

One thread starts all processes, because the kernel ends a child when the thread that started it ends. It also
receives the messages. As in Erlang, a process is replaced a number of times within a window; then the supervisor
gives up.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import msgspec

from erllama._process.child_process import ChildProcess
from erllama._process.options import ProcessOptions
from erllama._process.protocol import messages as m
from erllama._process.protocol.frames import ProtocolError
from erllama._process.protocol.token_message import TokenEntry
from erllama._runtime.log import logger
from erllama.cache.uninterrupted import uninterrupted
from erllama.errors import Error, ModelFailed, ModelLoadError

log = logger("erllama.process")

_WATCH_SECONDS = 0.25  # between two looks at the process
_STOP_SECONDS = 10.0  # for a child to exit after it has unloaded its model


class ProcessUser(Protocol):
    """What a supervisor tells about its process; all calls in the supervisor's thread."""

    def process_started(self, child: ChildProcess, started: m.Started) -> None:
        """A process has loaded the model."""
        ...

    def receive(self, message: m.FromChild) -> None:
        """The process has sent a message."""
        ...

    def receive_tokens(self, entries: list[TokenEntry]) -> None:
        """The process has sent new tokens, in the short form."""
        ...

    def messages_received(self) -> None:
        """All messages that had arrived were passed to `receive`."""
        ...

    def process_ended(self, reason: str) -> None:
        """The process has ended; another one is being started, unless `gave_up` or the end follows."""
        ...

    def gave_up(self, error: Error) -> None:
        """No other process is started."""
        ...

    def supervision_ended(self) -> None:
        """The last process has ended. The last call."""
        ...


class Supervisor:
    """Keeps one process running.

    Args:
        start: the first message to each process.
        options: when it is replaced, and how often.
        user: receives the messages and learns of starts and ends.

    Attributes:
        restarts: how many processes replaced another.
    """

    def __init__(self, start: m.Start, options: ProcessOptions, user: ProcessUser) -> None:
        self._start_message, self._options, self._name, self._user = start, options, start.id, user
        self._child: ChildProcess | None = None
        self._ends: deque[float] = deque()
        self._stopping = False
        self._stop_timeout = 0.0
        self._watch_at = 0.0
        self._poller = select.poll()  # of the present process
        self._work: deque[Callable[[], object]] = deque()
        self._wake_reader, self._wake_writer = socket.socketpair()
        for end in (self._wake_reader, self._wake_writer):
            end.setblocking(False)
        self.restarts = 0
        self._thread = threading.Thread(target=self._run, name=f"erllama-process-{start.id}", daemon=True)
        uninterrupted(self._thread.start)()

    # --- called by any thread ----------------------------------------------------------------------

    def wake(self) -> None:
        """Make the thread look for work. Never waits; safe in signal handlers and `__del__`."""
        with suppress(OSError):
            self._wake_writer.send(b"\0")

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call a function in the supervisor's thread. Never waits; safe in signal handlers and `__del__`."""
        self._work.append(function)
        self.wake()

    def begin_to_stop(self, timeout: float) -> None:
        """End the process: unload its model, or kill it after a time. Returns at once. Idempotent."""
        if not self._stopping:
            self._stop_timeout = timeout
            self._stopping = True
        self.wake()

    def join(self) -> None:
        """Wait until the process and the thread have ended."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def is_current_thread(self) -> bool:
        """Whether the caller runs in the supervisor's thread."""
        return threading.current_thread() is self._thread

    def forked(self) -> None:
        """Release the sockets in a forked process, so that the child sees when its parent ends."""
        child, self._child = self._child, None
        if child is not None:
            child.close_handles()
        for end in (self._wake_reader, self._wake_writer):
            end.close()

    # --- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                if self._child is None:
                    self._begin()
                self._serve()
        except Error as error:
            self._give_up(error)
        except BaseException as error:
            log.exception("model %r: the supervision of its process failed", self._name)
            self._give_up(ModelFailed(f"model {self._name!r}: the supervision of its process failed: {error}"))
        finally:
            try:
                self._end()
            finally:
                self._user.supervision_ended()

    def _begin(self) -> None:
        """Start a process."""
        try:
            start = msgspec.structs.replace(self._start_message, is_replacement=self.restarts > 0)
            child = self._child = ChildProcess(start, self.wake)
        except (OSError, ValueError, Error) as error:
            kind = ModelFailed if self.restarts else ModelLoadError
            self._give_up(kind(f"the process of model {self._name!r} cannot be started: {error}"))
            return
        self._poller = select.poll()
        for source in (child.connection, self._wake_reader, child.log_pipe):
            self._poller.register(source, select.POLLIN)

    def _serve(self) -> None:
        """Serve the process until something happens, for at most a quarter of a second."""
        child = self._child
        if child is None:
            return
        self._poll(child)
        while self._work:
            self._work.popleft()()
        try:
            for message in child.messages():
                self._receive(child, message)
        except ProtocolError as error:
            child.kill(str(error))
        self._user.messages_received()
        if child.kill_reason or child.ended:
            self._replace(child)
            return
        now = time.monotonic()
        if now < self._watch_at:
            return
        self._watch_at = now + _WATCH_SECONDS
        fault = child.fault(self._options.hang_timeout, _bytes(self._options.memory_limit))
        if fault is not None:
            log.warning("model %r: its process %d is killed: %s", self._name, child.pid, fault)
            child.kill(fault)

    def _poll(self, child: ChildProcess) -> None:
        """Wait for messages, output and work, and send what waits for the child to read."""
        if child.outbox.waiting:
            self._poller.modify(child.connection, select.POLLIN | select.POLLOUT)
        for descriptor, event in self._poller.poll(_WATCH_SECONDS * 1000):
            if descriptor == self._wake_reader.fileno():
                with suppress(BlockingIOError):
                    self._wake_reader.recv(4096)
            elif descriptor == child.log_descriptor:
                child.read_log()
                if not child.log_open:
                    self._poller.unregister(descriptor)
            elif event & select.POLLOUT and child.outbox.flush():
                self._poller.modify(descriptor, select.POLLIN)

    def _receive(self, child: ChildProcess, message: m.FromChild | list[TokenEntry]) -> None:
        if isinstance(message, list):
            self._user.receive_tokens(message)
        elif isinstance(message, m.Started):
            child.started = True
            self._user.process_started(child, message)
        elif isinstance(message, m.StartFailed):
            child.kill_reason = message.error.message
            self._user.receive(message)
        else:
            self._user.receive(message)

    def _replace(self, child: ChildProcess) -> None:
        """Note that a process has ended. Give up if it is one too many."""
        self._child = None
        was_loaded = child.started
        reason = child.close()
        if self._stopping:
            return
        log.warning("model %r: its process %d has ended: %s", self._name, child.pid, reason)
        now = time.monotonic()
        self._ends.append(now)
        while self._ends and now - self._ends[0] > self._options.restart_window:
            self._ends.popleft()
        self._user.process_ended(reason)
        details = f". Its last output:\n{child.last_lines}" if child.last_lines else ""
        if not was_loaded and not self.restarts:
            self._give_up(
                ModelLoadError(
                    f"the process of model {self._name!r} ended while it loaded the model: {reason}{details}"
                )
            )
        elif len(self._ends) > self._options.max_restarts:
            self._give_up(
                ModelFailed(
                    f"model {self._name!r}: its process ended {len(self._ends)} times within "
                    f"{self._options.restart_window:g} s, at last because {reason}, and "
                    f"max_restarts={self._options.max_restarts}; unload it, and load it again{details}"
                )
            )
        else:
            self.restarts += 1

    def _give_up(self, error: Error) -> None:
        self._stopping = True
        self._user.gave_up(error)

    def _end(self) -> None:
        """End the process, if there is one: ask it to, and kill it if it does not."""
        child, self._child = self._child, None
        if child is not None:
            if not child.started:
                child.kill("the model is unloaded")
            else:
                child.outbox.send(m.encode(m.Stop()))
            deadline = time.monotonic() + self._stop_timeout + _STOP_SECONDS
            try:
                while not child.ended and time.monotonic() < deadline:
                    self._poll(child)
                    for message in child.messages():
                        self._receive(child, message)
                    self._user.messages_received()
            except Exception:
                log.exception("model %r: its process could not be ended in order", self._name)
            if not child.ended:
                child.kill("it did not end in time")
            child.close()
        for end in (self._wake_reader, self._wake_writer):
            with suppress(OSError):
                end.close()


def _bytes(limit: str | int | None) -> int | None:
    assert not isinstance(limit, str)  # ProcessOptions has parsed it
    return limit
