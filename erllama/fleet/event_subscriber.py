"""Subscribes to the KV events of replicas: one thread per process, with two ZeroMQ sockets per replica.

Replicas report the addresses of their events with their load. A new replica's blocks are asked for as a replay from
the beginning, and so are messages that were lost. A message that cannot be read is logged and skipped: routing is
less exact then, and requests are not affected.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from erllama._runtime.log import logger
from erllama.checks import import_optional
from erllama.fleet.kv_events import AllBlocksCleared, KvEvent, KvEventError, decode_batch

if TYPE_CHECKING:
    import zmq

log = logger("erllama.fleet")

_END = (-1).to_bytes(8, "big", signed=True)
_POLL_MS = 1000
_REPLAY_SECONDS = 30.0  # without a message, after which a replay is asked for again
_MESSAGES_A_TURN = 1000  # of one replica, between two looks at the others


class Addresses(NamedTuple):
    """Where a replica publishes: its events, and what it sends again."""

    events: str
    replay: str


class _Source:
    """One replica: its sockets, and the number of its next message."""

    def __init__(self, addresses: Addresses, events: zmq.Socket[bytes], replay: zmq.Socket[bytes]) -> None:
        self.addresses, self.events, self.replay = addresses, events, replay
        self.next: int | None = None  # None before the first message
        self.replaying = False
        self.heard = 0.0  # when the replay was asked for, or its last message came

    def close(self) -> None:
        self.events.close(0)
        self.replay.close(0)


class EventSubscriber:
    """Reads the KV events of replicas, and passes them on in order.

    Args:
        apply: called with a replica and its events, in the subscriber's thread.

    Attributes:
        n_gaps: how often messages were lost and asked for again.
        n_unreadable: messages that were no events, or that `apply` failed with.

    Raises:
        MissingPackage: pyzmq is not installed.
    """

    def __init__(self, apply: Callable[[str, tuple[KvEvent, ...]], object]) -> None:
        self._zmq = import_optional("zmq", needed_by="erllama.fleet", package="pyzmq", install="'erllama[ray]'")
        self._apply = apply
        self._lock = threading.Lock()
        self._wanted: dict[str, Addresses] = {}
        self._left: set[str] = set()  # left since the last `_connect`, and may have returned
        self._sources: dict[str, _Source] = {}
        self._stopping = False
        self._process = os.getpid()
        self.n_gaps = self.n_unreadable = 0
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        self._context: zmq.Context[zmq.Socket[bytes]] = self._zmq.Context()
        self._thread = threading.Thread(target=self._run, name="erllama-fleet-events", daemon=True)
        self._thread.start()

    def set_replicas(self, addresses: Mapping[str, Addresses]) -> None:
        """Subscribe to these replicas and to no others. Never waits.

        A replica that was left out once is subscribed to anew, so that all its blocks are replayed.
        """
        with self._lock:
            if self._wanted == addresses:
                return
            self._left |= self._wanted.keys() - addresses.keys()
            self._wanted = dict(addresses)
        self._wake()

    def close(self) -> None:
        """End the subscriptions. Idempotent."""
        if self._process != os.getpid():
            return
        self._stopping = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _wake(self) -> None:
        with suppress(OSError):
            self._writer.send(b"\0")

    # --- the thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._connect()
                self._read()
        except Exception:
            log.exception("reading KV events failed; requests are routed without them from now on")
            for name in self._sources:  # what they hold changes unnoticed from now on
                self._pass_on(name, (AllBlocksCleared(),))
        finally:
            for source in self._sources.values():
                source.close()
            self._context.destroy(0)
            self._reader.close()
            self._writer.close()

    def _connect(self) -> None:
        """Open the sockets of new replicas, and close those of replicas that are gone."""
        with self._lock:
            wanted, left = dict(self._wanted), self._left
            self._left = set()
        for name, source in list(self._sources.items()):
            if name in left or wanted.get(name) != source.addresses:
                del self._sources[name]
                source.close()
        for name, addresses in wanted.items():
            if name not in self._sources:
                try:
                    self._sources[name] = source = self._open(addresses)
                except self._zmq.ZMQError as error:
                    log.warning("the KV events of replica %s cannot be read: %s", name, error.strerror)
                    with self._lock:
                        if self._wanted.get(name) == addresses:
                            del self._wanted[name]
                    continue
                self._ask(source, 0)

    def _open(self, addresses: Addresses) -> _Source:
        module = self._zmq
        opened: list[zmq.Socket[bytes]] = []
        try:
            for kind, address in ((module.SUB, addresses.events), (module.DEALER, addresses.replay)):
                made = self._context.socket(kind)
                opened.append(made)
                made.setsockopt(module.LINGER, 0)
                made.setsockopt(module.HEARTBEAT_IVL, 10_000)
                made.setsockopt(module.HEARTBEAT_TIMEOUT, 30_000)
                if "[" in address:
                    made.setsockopt(module.IPV6, 1)
                if kind == module.SUB:
                    made.setsockopt(module.SUBSCRIBE, b"")
                made.connect(address)
        except BaseException:
            for made in opened:
                made.close(0)
            raise
        return _Source(addresses, *opened)

    def _ask(self, source: _Source, number: int) -> None:
        """Ask for the messages from a number on."""
        if not source.replaying:
            with suppress(self._zmq.Again):
                source.replay.send_multipart((b"", number.to_bytes(8, "big")), self._zmq.NOBLOCK)
                source.replaying, source.heard = True, time.monotonic()

    def _ask_again(self, source: _Source) -> None:
        """Ask again for a replay that has stopped: the replica drops those that are read too slowly."""
        if source.replaying and time.monotonic() - source.heard > _REPLAY_SECONDS:
            source.replaying = False
            self._ask(source, source.next or 0)

    def _read(self) -> None:
        poller = self._zmq.Poller()
        poller.register(self._reader, self._zmq.POLLIN)
        for source in self._sources.values():
            self._ask_again(source)
            # Newer messages wait until the replay has ended, so that all come in order.
            poller.register(source.replay if source.replaying else source.events, self._zmq.POLLIN)
        ready = dict(poller.poll(_POLL_MS))
        if self._reader.fileno() in ready:
            with suppress(BlockingIOError):
                self._reader.recv(4096)
        for name, source in self._sources.items():
            if source.replaying and source.replay in ready:
                self._read_replay(name, source)
            elif source.events in ready:
                self._read_events(name, source)

    def _read_events(self, name: str, source: _Source) -> None:
        for _ in range(_MESSAGES_A_TURN):
            try:
                frames = source.events.recv_multipart(self._zmq.NOBLOCK)
            except self._zmq.Again:
                return
            number = self._number(name, frames, 3)
            if number is None or (source.next is not None and number < source.next):
                continue  # the replay had it
            if source.next is not None and number > source.next:
                self.n_gaps += 1
                self._ask(source, source.next)
                return  # the replay has this message, too
            self._decode(name, source, number, frames[2])

    def _read_replay(self, name: str, source: _Source) -> None:
        for _ in range(_MESSAGES_A_TURN):
            try:
                frames = source.replay.recv_multipart(self._zmq.NOBLOCK)
            except self._zmq.Again:
                return
            source.heard = time.monotonic()
            if len(frames) == 4 and frames[2] == _END:
                source.replaying = False
                return
            number = self._number(name, frames[1:], 3)
            if number is not None and (source.next is None or number >= source.next):
                self._decode(name, source, number, frames[3])

    def _number(self, name: str, frames: list[bytes], n_frames: int) -> int | None:
        if len(frames) != n_frames or len(frames[1]) != 8:
            self.n_unreadable += 1
            log.warning("replica %s sent a message that has no KV events", name)
            return None
        return int.from_bytes(frames[1], "big")

    def _decode(self, name: str, source: _Source, number: int, payload: bytes) -> None:
        source.next = number + 1
        try:
            events = decode_batch(payload)
        except KvEventError as error:
            self.n_unreadable += 1
            log.warning("replica %s: %s", name, error)
            return
        if events:
            self._pass_on(name, events)

    def _pass_on(self, name: str, events: tuple[KvEvent, ...]) -> None:
        try:
            self._apply(name, events)
        except Exception:  # one replica's message must not end the events of all
            self.n_unreadable += 1
            log.exception("a message of KV events of replica %s had no effect, or a part of it", name)
