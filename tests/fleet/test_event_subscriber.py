"""KV events of replicas reach the index: from erllama's publisher, after gaps, and with broken messages between."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

import erllama
from erllama.events import KvEvents
from erllama.fleet.event_subscriber import Addresses, EventSubscriber
from erllama.fleet.kv_events import AllBlocksCleared, BlockStored, KvEvent, encode_batch
from erllama.fleet.prefix_index import PrefixIndex
from erllama.fleet.prefix_router import PrefixRouter

_END = (-1).to_bytes(8, "big", signed=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within two minutes"
        time.sleep(0.02)


class Publisher:
    """A publisher that the test drives by hand: what it sends, and what it keeps for replays."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self.events, self.replay = self._context.socket(zmq.PUB), self._context.socket(zmq.ROUTER)
        ports = [each.bind_to_random_port("tcp://127.0.0.1") for each in (self.events, self.replay)]
        self.addresses = Addresses(*(f"tcp://127.0.0.1:{port}" for port in ports))
        self.kept: dict[int, bytes] = {}
        self.asked: list[int] = []

    def send(self, number: int, *events: KvEvent, lose: bool = False) -> None:
        """Send a message, or lose it."""
        self.kept[number] = encode_batch(0.0, events)
        if not lose:
            self.events.send_multipart((b"", number.to_bytes(8, "big"), self.kept[number]))

    def answer(self) -> None:
        """Answer the next replay."""
        wait_for(lambda: bool(self.replay.poll(0)))
        client, _, number = self.replay.recv_multipart()
        self.asked.append(int.from_bytes(number, "big"))
        for each in sorted(self.kept):
            if each >= self.asked[-1]:
                self.replay.send_multipart((client, b"", b"", each.to_bytes(8, "big"), self.kept[each]))
        self.replay.send_multipart((client, b"", b"", _END, b""))

    def close(self) -> None:
        self._context.destroy(0)


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    made = Publisher()
    yield made
    made.close()


@pytest.fixture
def seen() -> list[KvEvent]:
    return []


@pytest.fixture
def subscriber(seen: list[KvEvent]) -> Iterator[EventSubscriber]:
    made = EventSubscriber(lambda _, events: seen.extend(events))
    yield made
    made.close()


def block(number: int) -> BlockStored:
    return BlockStored((number,), (number,) * 16, 16)


def test_the_blocks_of_a_model_reach_the_index(tmp_path: Path):
    router = PrefixRouter(index=PrefixIndex(16))
    subscriber = EventSubscriber(router.apply)
    router.subscribe = subscriber.set_replicas
    options = KvEvents("tcp://127.0.0.1:*").with_ports()
    with erllama.Cache(ram="32MiB", block_size=16) as cache:
        with erllama.load_model(
            erllama.demo_model(),
            cache=cache,
            n_ctx=1024,
            n_threads=1,
            n_threads_batch=1,
            warmup=False,
            kv_events=options,
        ) as model:
            before = model.tokenize("This was cached before the router came. " * 3)
            model.prefill(before)
            events, replay = options.addresses
            stats = {"identity": "m", "slots": 4, "load": [0, 0], "events": events, "replay": replay}
            router.update("a", {"a": stats})
            wait_for(lambda: router.longest(before, None) == len(before) // 16 * 16)
            after = model.tokenize("And this one while it listened to the events. " * 3)
            model.prefill(after)
            wait_for(lambda: router.longest(after, None) == len(after) // 16 * 16)
            salted = model.tokenize("Nobody else may know about this prompt. " * 3)
            model.prefill(salted, cache_salt="tenant")
            model.prefill(np.concatenate([after, before]))
            wait_for(lambda: router.longest(np.concatenate([after, before]), None) > len(after))
            assert router.longest(salted, None) == 0
    wait_for(lambda: router.longest(before, None) == 0)  # the model was unloaded
    subscriber.close()


def test_what_was_sent_before_the_subscription_is_replayed(
    publisher: Publisher, subscriber: EventSubscriber, seen: list[KvEvent]
):
    publisher.send(5, AllBlocksCleared(), block(1))
    publisher.send(6, block(2))
    subscriber.set_replicas({"a": publisher.addresses})
    publisher.answer()
    wait_for(lambda: len(seen) == 3)
    assert publisher.asked == [0]
    assert seen == [AllBlocksCleared(), block(1), block(2)]


def test_lost_messages_are_asked_for_and_come_in_order(
    publisher: Publisher, subscriber: EventSubscriber, seen: list[KvEvent]
):
    publisher.send(5, block(5))
    subscriber.set_replicas({"a": publisher.addresses})
    publisher.answer()
    wait_for(lambda: seen == [block(5)])
    publisher.send(6, block(6))
    wait_for(lambda: len(seen) == 2)
    publisher.send(7, block(7), lose=True)
    publisher.send(8, block(8))
    publisher.answer()
    wait_for(lambda: len(seen) == 4)
    publisher.send(9, block(9))
    wait_for(lambda: len(seen) == 5)
    assert publisher.asked == [0, 7]
    assert seen == [block(number) for number in range(5, 10)]
    assert subscriber.n_gaps == 1


def test_messages_that_are_no_events_are_skipped(
    publisher: Publisher, subscriber: EventSubscriber, seen: list[KvEvent]
):
    subscriber.set_replicas({"a": publisher.addresses})
    publisher.answer()
    publisher.kept[1] = b"\xc1 no msgpack"
    for frames in ((b"", b"short", b""), (b"",), (b"", (1).to_bytes(8, "big"), publisher.kept[1])):
        publisher.events.send_multipart(frames)
    publisher.send(2, block(2))
    wait_for(lambda: seen == [block(2)])
    assert subscriber.n_unreadable == 3


def test_a_replica_that_is_gone_is_not_read_any_longer(
    publisher: Publisher, subscriber: EventSubscriber, seen: list[KvEvent]
):
    subscriber.set_replicas({"a": publisher.addresses})
    publisher.answer()
    publisher.send(1, block(1))
    wait_for(lambda: seen == [block(1)])
    subscriber.set_replicas({})
    wait_for(lambda: not subscriber._sources)
    publisher.send(2, block(2))
    subscriber.set_replicas({"a": publisher.addresses})
    publisher.answer()
    wait_for(lambda: seen == [block(1), block(1), block(2)])


def test_a_replica_that_left_and_returned_at_once_is_replayed(publisher: Publisher):
    seen: list[KvEvent] = []
    entered, go = threading.Event(), threading.Event()

    def apply(_: str, events: tuple[KvEvent, ...]) -> None:
        seen.extend(events)
        entered.set()
        assert go.wait(120)

    subscriber = EventSubscriber(apply)
    try:
        publisher.send(1, block(1))
        subscriber.set_replicas({"a": publisher.addresses})
        publisher.answer()
        assert entered.wait(120)
        subscriber.set_replicas({})  # the index forgets it
        subscriber.set_replicas({"a": publisher.addresses})
        go.set()
        publisher.answer()
        wait_for(lambda: seen == [block(1), block(1)])
        assert publisher.asked == [0, 0]
    finally:
        go.set()
        subscriber.close()


def test_events_that_cannot_be_applied_do_not_end_the_subscription(publisher: Publisher):
    seen: list[KvEvent] = []

    def apply(_: str, events: tuple[KvEvent, ...]) -> None:
        if events == (block(1),):
            raise OverflowError("a token id")
        seen.extend(events)

    subscriber = EventSubscriber(apply)
    try:
        publisher.send(1, block(1))
        publisher.send(2, block(2))
        subscriber.set_replicas({"a": publisher.addresses})
        publisher.answer()
        wait_for(lambda: seen == [block(2)] or not subscriber._thread.is_alive())
        assert seen == [block(2)]
        assert subscriber.n_unreadable == 1
    finally:
        subscriber.close()


def test_a_subscriber_that_fails_clears_what_it_has_passed_on(
    publisher: Publisher, subscriber: EventSubscriber, seen: list[KvEvent], monkeypatch: pytest.MonkeyPatch
):
    publisher.send(1, block(1))
    subscriber.set_replicas({"a": publisher.addresses})
    publisher.answer()
    wait_for(lambda: seen == [block(1)])

    def fail() -> None:
        raise zmq.ZMQError(zmq.ENOTSOCK)

    monkeypatch.setattr(subscriber, "_read", fail)
    subscriber._thread.join(120)
    assert seen == [block(1), AllBlocksCleared()]


def test_an_address_that_cannot_be_used_affects_no_other(
    publisher: Publisher, subscriber: EventSubscriber, seen: list[KvEvent]
):
    subscriber.set_replicas({"bad": Addresses("nonsense", "nonsense"), "a": publisher.addresses})
    publisher.answer()
    publisher.send(1, block(1))
    wait_for(lambda: seen == [block(1)])
