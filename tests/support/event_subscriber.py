"""A subscriber of KV events for tests, and the blocks that it should know."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import zmq

import erllama
from erllama.cache import TOKEN_BYTES, Block, Cache, child_key
from erllama.events.wire import AllBlocksCleared, BlockRemoved, BlockStored, Event, decode

Known = set[tuple[int, str]]  # hashes and media
_SECONDS = 60.0
MEDIA = {"live": "GPU", "ram": "CPU", "ram_file": "CPU"}


def free_address() -> str:
    """Return an address whose port, and the next one, are free."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return f"tcp://127.0.0.1:{port}"


def replay_address(address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + 1}"


class Subscriber:
    """Applies events as vllm-router and Dynamo do: in order of their numbers, with a replay for each gap.

    Attributes:
        known: the blocks that it knows.
        tokens: the tokens of each hash.
        parents: the parent of each hash.
        checks_parents: whether each event must follow known blocks.
    """

    def __init__(self, address: str, *, first: int = 0) -> None:
        self._context = zmq.Context()
        self._events = self._context.socket(zmq.SUB)
        self._events.subscribe(b"")
        self._events.connect(address)
        self._replay_address = replay_address(address)
        self.next = first  # the number of the next batch
        self.replays = 0
        self.known: Known = set()
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.parents: dict[int, int | None] = {}
        self.checks_parents = True

    def close(self) -> None:
        self._context.destroy(0)

    def wait_for(self, expected: Known) -> None:
        """Receive events until exactly these blocks are known."""
        deadline = time.monotonic() + _SECONDS
        while self.known != expected:
            assert time.monotonic() < deadline, f"knows {len(self.known)} blocks, not {len(expected)}"
            self.receive()

    def receive(self, wait_ms: int = 100) -> list[Event]:
        """Receive and apply one batch; return its events, or [] if there is none."""
        if not self._events.poll(wait_ms):
            return []
        _, number, payload = self._events.recv_multipart()
        return self._take(int.from_bytes(number, "big"), payload)

    def _take(self, number: int, payload: bytes) -> list[Event]:
        if number < self.next - 1:  # the publisher has restarted
            self.known.clear()
            self.next = 0
        if number > self.next:
            self._replay(number)
        if number < self.next:
            return []
        self.next = number + 1
        return self._apply(payload)

    def _apply(self, payload: bytes) -> list[Event]:
        events = decode(payload).events
        for event in events:
            apply_event(self, event)
        return events

    def _replay(self, wanted: int) -> None:
        """Take what was missed. As vllm-router, refuse numbers with gaps."""
        self.replays += 1
        batches = replay(self._context, self._replay_address, self.next)
        numbers = [number for number, _ in batches]
        if numbers != list(range(self.next, self.next + len(numbers))) or (numbers or [-1])[-1] < wanted:
            self.next = wanted
            return
        for number, payload in batches:
            self._apply(payload)
            self.next = number + 1


def replay(context: zmq.Context[zmq.Socket[bytes]], address: str, first: int) -> list[tuple[int, bytes]]:
    """Ask for the batches from a number on; return their numbers and payloads."""
    with context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVTIMEO, int(_SECONDS * 1000))
        dealer.connect(address)
        dealer.send_multipart([b"", first.to_bytes(8, "big")])
        batches = []
        while True:
            empty, _, number, payload = dealer.recv_multipart()
            assert empty == b""
            if not payload:
                assert number == b"\xff" * 8
                return batches
            batches.append((int.from_bytes(number, "big"), payload))


def apply_event(state: Subscriber | State, event: Event) -> None:
    """Apply an event. Fails if a block follows one that is not known."""
    if isinstance(event, AllBlocksCleared):
        state.known.clear()
    elif isinstance(event, BlockRemoved):
        state.known -= {(each, str(event.medium)) for each in event.block_hashes}
    else:
        assert isinstance(event, BlockStored)
        parent = event.parent_block_hash
        knows = parent is None or any(known == parent for known, _ in state.known)
        assert knows or not state.checks_parents, "an unknown parent"
        assert len(event.token_ids) == len(event.block_hashes) * event.block_size
        for index, each in enumerate(event.block_hashes):
            tokens = tuple(event.token_ids[index * event.block_size : (index + 1) * event.block_size])
            assert state.tokens.setdefault(each, tokens) == tokens
            assert state.parents.setdefault(each, parent) == parent
            state.known.add((each, str(event.medium)))
            parent = each


class State:
    """What a subscriber knows, without sockets."""

    def __init__(self) -> None:
        self.known: Known = set()
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.parents: dict[int, int | None] = {}
        self.checks_parents = True


def hashes_of(block: Block, block_size: int) -> list[int]:
    """Return the hashes of the events' blocks in a block."""
    step = block_size * TOKEN_BYTES
    ends = range(step, len(block.tokens) + 1, step)
    return [int.from_bytes(child_key(block.parent, block.tokens[:end])[:8], "big") for end in ends]


def findable(held: Iterable[tuple[str, Block]], block_size: int, full: int) -> Known:
    """Return what subscribers should know: the full blocks whose predecessors are all held.

    Args:
        held: blocks with the tiers that hold them.
        full: tokens of a full block.
    """
    by_key: dict[bytes, list[tuple[str, Block]]] = {}
    for tier, block in held:
        if block.n_tokens == full:
            by_key.setdefault(block.key, []).append((tier, block))

    def is_reachable(block: Block) -> bool:
        while block.parent != block.namespace:
            if block.parent not in by_key:
                return False
            block = by_key[block.parent][0][1]
        return True

    return {
        (each, MEDIA.get(tier, "DISK"))
        for copies in by_key.values()
        for tier, block in copies
        if is_reachable(block)
        for each in hashes_of(block, block_size)
    }


def stored_in(cache: Cache, namespace: bytes, block_size: int, without: str = "") -> Known:
    """Return what subscribers of a model should know of a cache, or of its tiers without one of them."""
    with cache._lock:
        held = [
            (place, entry.block)
            for entry in cache._catalog._tree
            for place in entry.places
            if place not in ("pending", without) and entry.block.namespace == namespace
        ]
    return findable(held, block_size, cache.block_size)


def namespace_of(model: erllama.Model) -> bytes:
    return model._runner.namespace(None)


@contextmanager
def subscribed(address: str, *, first: int = 0) -> Iterator[Subscriber]:
    subscriber = Subscriber(address, first=first)
    try:
        yield subscriber
    finally:
        subscriber.close()
