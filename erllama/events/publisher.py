"""The publisher of one model's KV events: a thread that reads the cache's block log and owns two ZeroMQ sockets.

One socket sends `[topic, sequence number, batch]` to all subscribers. It is an XPUB socket: a PUB socket that
learns of new subscribers. A ROUTER socket answers a sequence number with the batches from it on. Numbers start at 0
and have no gaps, because vllm-router refuses replays with gaps, and takes a lower number for a restart.

The first batch clears all blocks, and the content of all tiers follows. Both are sent again to subscribers that
connect soon after the start: they may know the blocks of the process before this one. Later subscribers get an
empty batch, so that they see the gap and ask for a replay. An empty batch is also sent now and then, for
subscribers that lost the last one.

Requests and saves never wait for the publisher, and it never waits for a subscriber. A publisher that fails logs
the failure and stops; the model is not affected.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from erllama._runtime.log import logger
from erllama.cache import BlockLog, Cache
from erllama.checks import import_optional
from erllama.errors import EventsError
from erllama.events.options import KvEvents
from erllama.events.published import PublishedBlocks
from erllama.events.replays import Batch, Replay, ReplayBuffer, payloads, snapshot
from erllama.events.wire import AllBlocksCleared, BlockStored, Event, EventBatch, encode, sequence_bytes

if TYPE_CHECKING:
    import zmq

log = logger("erllama.events")

_GATHER_SECONDS = 0.01  # to wait for further changes after the first one, so that they share a batch
_READ_SECONDS = 1.0  # between two reads of the log without a change: other processes write to shared directories
_IDLE_SECONDS = 15.0  # without a batch, after which an empty one is sent
_START_SECONDS = 60.0  # after the start, in which subscribers of the process before this one may connect again
# After a subscriber has connected, before it gets a batch: others of the same router connect at the same time.
_CONNECT_SECONDS = 0.05
# Between two announcements to all subscribers because one of them asks for more than is kept.
_ANNOUNCE_SECONDS = 10.0
_BIND_SECONDS = 1.0  # for an address in use: the process before this one may still be ending
_RETRY_SECONDS = 0.1
_CLOSE_SECONDS = 2.0
_LINGER_MS = 200  # to send what waits when the sockets are closed
# Messages that wait for one subscriber, of at most _BATCH_TOKENS each: about 40 MB. Beyond it, they are dropped for
# this subscriber, which sees a gap and asks for a replay.
_HIGH_WATER_MARK = 1000
_BATCH_TOKENS = 8192
# An announcement longer than this waits after each further _PACE_BATCHES, so that a subscriber that keeps up loses
# nothing: 500 batches a second, or 16,000 blocks.
_PACE_AFTER = 500
_PACE_BATCHES = 50
_PACE_SECONDS = 0.1
_MAX_REPLAYS = 64  # at once; further requests wait in the socket
_REPLAY_SECONDS = 30.0  # without progress, after which a replay is dropped
_MESSAGES_A_TURN = 256  # of replays, between two looks at the log


def check_installed() -> ModuleType:
    """Return the module `zmq`.

    Raises:
        MissingPackage: pyzmq is not installed.
    """
    return import_optional("zmq", needed_by="kv_events", package="pyzmq", install="'erllama[events]'")


class PublisherStats(NamedTuple):
    """Counts of one publisher."""

    batches: int
    replays: int
    blocks: int


class Publisher:
    """Publishes the events of one model's blocks. Binds its sockets before it returns.

    Args:
        options: where and how.
        cache: the cache that the model uses, in the process that runs the model.
        name: the model's name, for the log.
        namespace: the root key of the blocks to publish: those of requests without a salt.
        wait_for_address: if an address cannot be used, log it, and try again in the thread. For a process that
            replaces one that has ended: its requests must not fail.

    Raises:
        MissingPackage: pyzmq is not installed.
        OptionError: the events' block size does not divide that of the cache.
        EventsError: an address cannot be used.

    Attributes:
        address, replay_address: of the sockets, with the ports that were chosen.
    """

    def __init__(
        self,
        options: KvEvents,
        cache: Cache,
        name: str,
        namespace: bytes,
        *,
        wait_for_address: bool = False,
    ) -> None:
        self._zmq = check_installed()
        options.check_block_size(cache.block_size)
        self._options, self._cache, self._name = options, cache, name
        self._topic = options.topic.encode()
        self._blocks = PublishedBlocks(options.block_size)
        self._buffer = ReplayBuffer(options.replay_batches, int(options.replay_bytes))
        self._replays: deque[Replay] = deque()
        self._number = 0  # of the next batch
        self._last_sent = 0.0  # this and the times below by time.monotonic()
        self._began = time.monotonic()
        self._greet_at = math.inf  # when new subscribers get a batch
        self._announced = -math.inf  # the last announcement of all blocks
        self._announce_at = math.inf  # the next one, if a subscriber needs it
        self._stopping = False
        self._n_batches = self._n_replays = 0
        self._process = os.getpid()
        self._wake_reader, self._wake_writer = socket.socketpair()
        for end in (self._wake_reader, self._wake_writer):
            end.setblocking(False)
        self._context: zmq.Context[zmq.Socket[bytes]] = self._zmq.Context()
        self._events: zmq.Socket[bytes] | None = None
        self._requests: zmq.Socket[bytes] | None = None
        self.address, self.replay_address = options.addresses
        try:
            self._bind_all()
        except EventsError as error:
            if not wait_for_address:
                self._close_sockets()
                raise
            log.warning("model %r: %s. Trying again until then", name, error)
        except BaseException:
            self._close_sockets()
            raise
        self._log: BlockLog = cache.open_block_log(
            namespace, limit=options.max_pending, wake=self._wake, reports=options.reports
        )
        self._thread = threading.Thread(target=self._run, name=f"erllama-events-{name}", daemon=True)
        self._thread.start()

    # --- called by other threads ---------------------------------------------------------------------

    def close(self) -> None:
        """Send what waits, tell subscribers that all blocks are gone, and release the sockets. Idempotent."""
        if self._process != os.getpid():
            return
        self._stopping = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_SECONDS)

    def use_namespace(self, namespace: bytes) -> None:
        """Publish the blocks of another root key from now on, and clear those of the one before."""
        try:
            self._cache.turn_block_log(self._log, namespace)
        except Exception:
            log.exception("model %r: its KV events keep the adapters that were in effect", self._name)

    @property
    def stats(self) -> PublisherStats:
        """Counts since the publisher started."""
        return PublisherStats(self._n_batches, self._n_replays, len(self._blocks))

    def _wake(self) -> None:
        with suppress(OSError):
            self._wake_writer.send(b"\0")

    # --- sockets -------------------------------------------------------------------------------------

    def _bind_all(self) -> None:
        if self._events is None:
            self._events = self._bind(self._zmq.XPUB, self._options.addresses[0], "address")
            self.address = _bound(self._events)
        if self._requests is None:
            self._requests = self._bind(self._zmq.ROUTER, self._options.addresses[1], "replay_address")
            self.replay_address = _bound(self._requests)

    def _bind(self, kind: int, address: str, option: str) -> zmq.Socket[bytes]:
        made: zmq.Socket[bytes] = self._context.socket(kind)
        made.setsockopt(self._zmq.LINGER, _LINGER_MS)
        made.setsockopt(self._zmq.SNDHWM, _HIGH_WATER_MARK)
        # Notice a subscriber whose machine is gone, so that messages do not wait for it forever.
        made.setsockopt(self._zmq.HEARTBEAT_IVL, 10_000)
        made.setsockopt(self._zmq.HEARTBEAT_TIMEOUT, 30_000)
        if ":[" in address or "//[" in address:
            made.setsockopt(self._zmq.IPV6, 1)
        if kind == self._zmq.ROUTER:
            made.setsockopt(self._zmq.ROUTER_MANDATORY, 1)
        else:
            made.setsockopt(self._zmq.XPUB_VERBOSE, 1)
        deadline = time.monotonic() + _BIND_SECONDS
        while True:
            try:
                made.bind(address)
                return made
            except self._zmq.ZMQError as error:
                if error.errno == self._zmq.EADDRINUSE and time.monotonic() < deadline:
                    time.sleep(_RETRY_SECONDS)
                    continue
                made.close(0)
                remedy = (
                    "stop the program that uses it, or pass another port"
                    if error.errno == self._zmq.EADDRINUSE
                    else "pass an address of this machine, or a directory that you may write to"
                )
                raise EventsError(
                    f"kv_events: {option}={address!r} cannot be bound: {error.strerror}; {remedy}"
                ) from None

    def _close_sockets(self) -> None:
        for made in (self._events, self._requests):
            if made is not None:
                made.close(_LINGER_MS)
        self._context.term()
        for end in (self._wake_reader, self._wake_writer):
            end.close()

    # --- the thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            events, requests = self._wait_for_sockets()
            if events is not None and requests is not None:
                self._publish(events, requests)
        except Exception:
            log.exception("model %r: publishing its KV events failed; it publishes no further ones", self._name)
        finally:
            self._cache.close_block_log(self._log)
            self._close_sockets()

    def _wait_for_sockets(self) -> tuple[zmq.Socket[bytes] | None, zmq.Socket[bytes] | None]:
        """Try to bind the sockets until that succeeds or the publisher is closed."""
        while not self._stopping and (self._events is None or self._requests is None):
            with suppress(EventsError):
                self._bind_all()
                break
            time.sleep(_RETRY_SECONDS)
        return self._events, self._requests

    def _publish(self, pub: zmq.Socket[bytes], router: zmq.Socket[bytes]) -> None:
        poller = self._zmq.Poller()
        for source in (pub, router, self._wake_reader):
            poller.register(source, self._zmq.POLLIN)
        self._read_log(pub)
        progress = False  # whether a replay can be continued at once
        while not self._stopping:
            ready = dict(poller.poll(0 if progress else self._wait_ms()))
            if self._wake_reader.fileno() in ready:
                with suppress(BlockingIOError):
                    self._wake_reader.recv(4096)
                if not self._stopping:
                    time.sleep(_GATHER_SECONDS)
            self._read_log(pub)
            if pub in ready:
                self._accept_subscribers(pub)
            if router in ready:
                self._accept_replays(router)
            progress = self._send_replays(router)
            self._send_due(pub)
        self._read_log(pub)
        self._send(pub, [AllBlocksCleared()])

    def _wait_ms(self) -> int:
        seconds = _RETRY_SECONDS if self._replays else _READ_SECONDS
        due = min(self._greet_at, self._announce_at) - time.monotonic()
        return max(math.ceil(min(seconds, due) * 1000), 0)

    def _accept_subscribers(self, pub: zmq.Socket[bytes]) -> None:
        """Note that subscribers have connected."""
        with suppress(self._zmq.Again):
            while True:
                if pub.recv(self._zmq.NOBLOCK)[:1] == b"\x01":
                    self._greet_at = min(self._greet_at, time.monotonic() + _CONNECT_SECONDS)

    def _send_due(self, pub: zmq.Socket[bytes]) -> None:
        """Send what is due without a change of the cache: an announcement, or an empty batch."""
        now = time.monotonic()
        greets = now >= self._greet_at
        if greets and now - self._began < _START_SECONDS:
            # A subscriber ignores a batch with the number of the last one that it got from the process before. If
            # that is the empty batch, the announcement follows it; if it is the announcement, the empty batch has a
            # lower number, which shows the restart.
            self._send(pub, [])
            self._announce(pub)
        elif now >= self._announce_at:
            self._announce(pub)
        elif greets or now - self._last_sent > _IDLE_SECONDS:
            self._send(pub, [])
        if greets:
            self._greet_at = math.inf

    def _announce(self, pub: zmq.Socket[bytes]) -> None:
        """Send all blocks to all subscribers, which forget what they knew."""
        for n_sent, payload in enumerate(payloads(self._blocks, self._blocks.located())):
            if n_sent >= _PACE_AFTER and n_sent % _PACE_BATCHES == 0:
                self._pause()
            if self._stopping:
                break
            self._send_payload(pub, payload)
        self._announced, self._announce_at = time.monotonic(), math.inf

    def _pause(self) -> None:
        time.sleep(_PACE_SECONDS)

    def _read_log(self, pub: zmq.Socket[bytes]) -> None:
        """Send the changes since the last call; all blocks if the log has lost some."""
        changes, complete, overflowed = self._cache.read_block_log(self._log)
        if not complete:
            for events in _split(self._blocks.apply(changes)):
                self._send(pub, events)
            return
        if overflowed:
            self._cache.count_events(overflows=1)
            log.warning("model %r: too many changes waited for its KV events; announcing all blocks", self._name)
        self._blocks.replace(changes)
        self._announce(pub)

    def _send(self, pub: zmq.Socket[bytes], events: list[Event]) -> None:
        self._send_payload(pub, encode(EventBatch(time.time(), events)))

    def _send_payload(self, pub: zmq.Socket[bytes], payload: bytes) -> None:
        """Send a batch to all subscribers, and keep it for replays. Drops it for those with too many waiting."""
        batch = Batch(self._number, payload)
        self._number += 1
        self._buffer.add(batch)
        self._n_batches += 1
        self._cache.count_events(batches=1)
        pub.send_multipart((self._topic, sequence_bytes(batch.number), payload), self._zmq.NOBLOCK)
        self._last_sent = time.monotonic()

    # --- replays -------------------------------------------------------------------------------------

    def _accept_replays(self, router: zmq.Socket[bytes]) -> None:
        """Begin the replays that subscribers ask for."""
        while len(self._replays) < _MAX_REPLAYS:
            try:
                frames = router.recv_multipart(self._zmq.NOBLOCK)
            except self._zmq.Again:
                return
            # A REQ or DEALER socket sends an empty frame before the number.
            if len(frames) != 3 or frames[1] or len(frames[2]) != 8:
                log.warning("model %r: a request for KV events has no sequence number of 8 bytes", self._name)
                continue
            client, number = frames[0], int.from_bytes(frames[2], "big")
            self._replays.append(Replay(client, self._topic, self._batches_since(number)))
            self._n_replays += 1
            self._cache.count_events(replays=1)

    def _batches_since(self, number: int) -> Iterator[Batch]:
        """Return the batches from a number on; a snapshot if some of them are not kept any more.

        vllm-router refuses the snapshot, because its numbers do not begin with the requested one. So all blocks are
        also announced to all subscribers.
        """
        last = self._number - 1
        if number > last:
            return iter(())
        kept = self._buffer.since(number)
        if kept is not None:
            return iter(kept)
        self._announce_at = min(self._announce_at, self._announced + _ANNOUNCE_SECONDS)
        return snapshot(self._blocks, self._blocks.located(), number, last)

    def _send_replays(self, router: zmq.Socket[bytes]) -> bool:
        """Send parts of the replays that wait. Return whether some of them can be continued at once."""
        progress = False
        for _ in range(len(self._replays)):
            replay = self._replays.popleft()
            if self._send_part(router, replay):
                progress = True
            if not replay.ended and time.monotonic() - replay.last_sent < _REPLAY_SECONDS:
                self._replays.append(replay)
        return progress and bool(self._replays)

    def _send_part(self, router: zmq.Socket[bytes], replay: Replay) -> bool:
        """Send a part of a replay. Return whether a message was sent."""
        for index in range(_MESSAGES_A_TURN):
            try:
                router.send_multipart(replay.frames(), self._zmq.NOBLOCK)
            except self._zmq.ZMQError as error:
                if error.errno != self._zmq.EAGAIN:  # the subscriber has gone
                    replay.ended = True
                return index > 0
            if replay.sent():
                return True
        return True


def _split(events: list[Event]) -> Iterator[list[Event]]:
    """Yield events in batches of a bounded number of tokens."""
    batch: list[Event] = []
    n_tokens = 0
    for event in events:
        batch.append(event)
        n_tokens += len(event.token_ids) if isinstance(event, BlockStored) else 1
        if n_tokens >= _BATCH_TOKENS:
            yield batch
            batch, n_tokens = [], 0
    if batch:
        yield batch


def _bound(made: zmq.Socket[bytes]) -> str:
    """Return the address that a socket is bound to."""
    endpoint = made.LAST_ENDPOINT
    return endpoint.decode() if isinstance(endpoint, bytes) else str(endpoint)
