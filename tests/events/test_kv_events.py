"""KV events of a model: what subscribers learn, when they connect late, stall or lose messages, and bad options."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest
import zmq

import erllama
from erllama.cache.blocks.key_file import create_key_file
from erllama.engine.backends.stub import StubBackend
from erllama.events import publisher as publishing
from erllama.events.publisher import Publisher
from erllama.events.wire import AllBlocksCleared, decode
from support.event_subscriber import (
    Subscriber,
    free_address,
    namespace_of,
    replay,
    replay_address,
    stored_in,
    subscribed,
)
from support.threads import wait_until

STUB = "erllama.engine.backends.stub:StubBackend"
BLOCK = 16
SMALL = 4


def prompt(seed: int, n_tokens: int = 8 * BLOCK) -> list[int]:
    return [(7 * index + seed * 31) % 250 for index in range(n_tokens)]


@contextmanager
def loaded(cache: erllama.Cache, address: str, **options: object) -> Iterator[erllama.Model]:
    events = {"address": address, "block_size": SMALL, **options.pop("events", {})}  # type: ignore[dict-item]
    with erllama.load_backend(STUB, {"n_ctx": 1024}, cache=cache, kv_events=events, **options) as model:  # type: ignore[arg-type]
        yield model


@pytest.fixture
def cache() -> Iterator[erllama.Cache]:
    with erllama.Cache(block_size=BLOCK) as cache:
        yield cache


@pytest.fixture
def address() -> str:
    return free_address()


def in_step(subscriber: Subscriber, cache: erllama.Cache, model: erllama.Model) -> None:
    """Wait until the subscriber knows what the tiers hold."""
    assert cache.flush()
    subscriber.wait_for(stored_in(cache, namespace_of(model), SMALL))


# --- what subscribers learn -----------------------------------------------------------------------------


def test_subscribers_know_what_the_tiers_hold(address: str, tmp_path: Path) -> None:
    with (
        erllama.Cache(block_size=BLOCK, disk=tmp_path) as cache,
        loaded(cache, address) as model,
        subscribed(address) as subscriber,
    ):
        model.prefill(prompt(1))
        in_step(subscriber, cache, model)
        assert {medium for _, medium in subscriber.known} == {"GPU", "CPU", "DISK"}
        model.complete(prompt(1)[: 3 * BLOCK], max_tokens=20)
        model.prefill(prompt(2))
        in_step(subscriber, cache, model)
        cache.evict_bytes("1GiB", ("ram",))
        model.evict()
        in_step(subscriber, cache, model)
        assert {medium for _, medium in subscriber.known} == {"DISK"}
        cache.evict_bytes("1GiB", ("disk",))
        subscriber.wait_for(set())


def test_short_blocks_and_salted_blocks_are_absent(cache: erllama.Cache, address: str) -> None:
    with loaded(cache, address) as model, subscribed(address) as subscriber:
        model.prefill(prompt(1), cache_salt="secret")
        model.prefill(prompt(2, 2 * BLOCK + 5))
        in_step(subscriber, cache, model)
        assert len(subscriber.known) == 2 * 2 * BLOCK // SMALL  # two blocks, in cells and in RAM
        tokens = [token for each in subscriber.tokens.values() for token in each]
        assert sorted(tokens) == sorted(prompt(2, 2 * BLOCK))


def test_models_that_share_a_cache_publish_their_own_blocks(cache: erllama.Cache) -> None:
    first, second = free_address(), free_address()
    with ExitStack() as stack:
        models = [
            stack.enter_context(erllama.load_backend(STUB, {"seed": seed}, cache=cache, kv_events=events))
            for seed, events in ((1, {"address": first, "block_size": SMALL}), (2, {"address": second}))
        ]
        subscribers = [stack.enter_context(subscribed(each)) for each in (first, second)]
        models[0].prefill(prompt(1))
        models[1].prefill(prompt(1))
        subscribers[0].wait_for(stored_in(cache, namespace_of(models[0]), SMALL))
        subscribers[1].wait_for(stored_in(cache, namespace_of(models[1]), 16))
        assert subscribers[0].known
        assert subscribers[1].known
        assert not subscribers[0].known & subscribers[1].known


def test_blocks_of_another_process_are_published(address: str, tmp_path: Path) -> None:
    with (
        erllama.Cache(block_size=BLOCK, disk=tmp_path) as ours,
        erllama.Cache(block_size=BLOCK, disk=tmp_path) as theirs,
        loaded(ours, address) as model,
        subscribed(address) as subscriber,
        erllama.load_backend(STUB, {"n_ctx": 1024}, cache=theirs) as other,
    ):
        other.prefill(prompt(3))
        assert theirs.flush()
        expected = {
            (each, "DISK") for each, medium in stored_in(theirs, namespace_of(model), SMALL) if medium == "CPU"
        }
        assert expected
        subscriber.wait_for(expected)


def test_a_start_announces_what_the_tiers_hold(address: str, tmp_path: Path) -> None:
    with erllama.Cache(block_size=BLOCK, disk=tmp_path) as cache, loaded(cache, address) as model:
        model.prefill(prompt(1))
    with (
        erllama.Cache(block_size=BLOCK, disk=tmp_path) as cache,
        loaded(cache, address) as model,
        subscribed(address) as subscriber,
    ):
        in_step(subscriber, cache, model)
        assert {medium for _, medium in subscriber.known} == {"DISK"}


@pytest.mark.parametrize("n_batches", [0, 1, 2, 3, 50])
def test_a_subscriber_of_the_process_before_forgets_its_blocks(
    cache: erllama.Cache, address: str, n_batches: int
) -> None:
    with loaded(cache, address) as model, subscribed(address, first=n_batches) as subscriber:
        subscriber.known, subscriber.checks_parents = {(1, "GPU")}, False
        model.prefill(prompt(1))
        in_step(subscriber, cache, model)


def test_an_unloaded_model_clears_all_blocks(cache: erllama.Cache, address: str) -> None:
    with subscribed(address) as subscriber:
        with loaded(cache, address) as model:
            model.prefill(prompt(1))
            in_step(subscriber, cache, model)
            assert subscriber.known
        subscriber.wait_for(set())


def test_the_process_of_a_model_publishes(tmp_path: Path, address: str) -> None:
    with (
        erllama.Cache(block_size=BLOCK, ram=0, disk=tmp_path) as cache,
        loaded(cache, address, process=True) as model,
        subscribed(address) as subscriber,
    ):
        model.prefill(prompt(1))
        in_disk = stored_on_disk(cache, model)
        subscriber.wait_for(in_disk | {(each, "GPU") for each, _ in in_disk})
        assert cache.counters()["event_batches"] > 0
        os.kill(model._runner.pid, signal.SIGKILL)
        wait_until(lambda: model._runner.restarts == 1 and model._runner.pid > 0)
        # Its numbers start at 0 again: a subscriber that has seen as many batches before may not notice.
        with subscribed(address) as another:
            another.wait_for(in_disk)


def stored_on_disk(cache: erllama.Cache, model: erllama.Model) -> set[tuple[int, str]]:
    assert cache.flush()
    cache.rows()  # reads what the process has written
    return {(each, medium) for each, medium in stored_in(cache, namespace_of(model), SMALL) if medium == "DISK"}


# --- late, slow and lost subscribers -------------------------------------------------------------------------


def test_a_late_subscriber_gets_all_blocks(
    cache: erllama.Cache, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_START_SECONDS", 0.0)
    with loaded(cache, address) as model:
        model.prefill(prompt(1))
        wait_until(lambda: cache.counters()["event_batches"] > 1)
        with subscribed(address) as subscriber:
            in_step(subscriber, cache, model)
            assert subscriber.replays == 1
        assert cache.counters()["event_replays"] == 1


def test_a_replay_begins_at_the_requested_number(cache: erllama.Cache, address: str) -> None:
    with loaded(cache, address) as model, zmq.Context() as context, subscribed(address) as subscriber:
        for seed in range(5):
            model.prefill(prompt(seed))
            in_step(subscriber, cache, model)
        batches = replay(context, replay_address(address), 3)
        assert len(batches) >= subscriber.next - 3
        assert [number for number, _ in batches] == list(range(3, 3 + len(batches)))
        assert replay(context, replay_address(address), 10**9) == []


def test_malformed_replay_requests_are_ignored(cache: erllama.Cache, address: str) -> None:
    with loaded(cache, address), zmq.Context() as context:
        with context.socket(zmq.DEALER) as dealer:
            dealer.connect(replay_address(address))
            for frames in ([b""], [b"", b"short"], [b"x", bytes(8)], [b"", bytes(8), b""]):
                dealer.send_multipart(frames)
            dealer.send_multipart([b"", bytes(8)])
            assert dealer.poll(60_000)
        assert replay(context, replay_address(address), 0)


def test_a_snapshot_replaces_batches_that_are_not_kept(
    cache: erllama.Cache, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_START_SECONDS", 0.0)
    monkeypatch.setattr(publishing, "_ANNOUNCE_SECONDS", 0.0)
    with (
        loaded(cache, address, events={"replay_batches": 2}) as model,
        zmq.Context() as context,
        subscribed(address) as first,
    ):
        for seed in range(6):
            model.prefill(prompt(seed))
            in_step(first, cache, model)
        batches = replay(context, replay_address(address), 0)
        assert isinstance(decode(batches[0][1]).events[0], AllBlocksCleared)
        numbers = [number for number, _ in batches]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        with subscribed(address) as late:  # refuses the snapshot, and learns all blocks from the announcement
            in_step(late, cache, model)
        in_step(first, cache, model)


def test_a_log_that_is_full_announces_all_blocks(
    cache: erllama.Cache, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_GATHER_SECONDS", 0.2)
    with loaded(cache, address, events={"max_pending": 3}) as model, subscribed(address) as subscriber:
        for seed in range(4):
            model.prefill(prompt(seed))
        in_step(subscriber, cache, model)
        assert cache.counters()["event_overflows"] > 0


def test_a_stalled_subscriber_delays_no_request(
    cache: erllama.Cache, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_HIGH_WATER_MARK", 1)
    with loaded(cache, address) as model, zmq.Context() as context, context.socket(zmq.SUB) as stalled:
        stalled.setsockopt(zmq.RCVHWM, 1)
        stalled.setsockopt(zmq.RCVBUF, 1024)
        stalled.subscribe(b"")
        stalled.connect(address)
        with subscribed(address) as subscriber:
            for seed in range(40):
                model.prefill(prompt(seed))
            in_step(subscriber, cache, model)


def test_a_long_announcement_waits_now_and_then(
    cache: erllama.Cache, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_PACE_AFTER", 4), ("_PACE_BATCHES", 2), ("_START_SECONDS", 0.0)):
        monkeypatch.setattr(publishing, name, value)
    pauses: list[int] = []
    monkeypatch.setattr(publishing, "payloads", partial(publishing.payloads, per_batch=1))
    monkeypatch.setattr(Publisher, "_pause", lambda self: pauses.append(self._number))
    with loaded(cache, address) as model:
        for seed in range(4):
            model.prefill(prompt(seed))
        assert cache.flush()
        namespace = namespace_of(model)
    assert not pauses
    publisher = Publisher(erllama.KvEvents(address, block_size=SMALL), cache, "m", namespace)
    try:
        with subscribed(address) as subscriber:
            subscriber.wait_for(stored_in(cache, namespace, SMALL))
        n_blocks = publisher.stats.blocks
    finally:
        publisher.close()
    assert n_blocks > 10
    assert pauses == list(range(4, n_blocks, 2))


def test_a_failing_publisher_fails_no_request(
    cache: erllama.Cache, address: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with loaded(cache, address) as model:
        monkeypatch.setattr(publishing, "encode", lambda batch: 1 / 0)
        model.prefill(prompt(1))
        wait_until(lambda: "publishing its KV events failed" in caplog.text)
        assert model.complete(prompt(1), max_tokens=3).cache.tokens
    assert not [thread for thread in threading.enumerate() if "erllama-events" in thread.name]


# --- tiers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiers", "media"), [(None, {"GPU", "CPU"}), (["live", "ram", "remote"], {"GPU", "CPU", "DISK"})]
)
def test_the_remote_tier_is_reported_on_request(
    address: str, tmp_path: Path, tiers: list[str] | None, media: set[str]
) -> None:
    """Every replica has all blocks of a bucket, so they do not tell replicas apart."""
    create_key_file(tmp_path / "key")
    without = "remote" if tiers is None else ""
    with (
        erllama.Cache(block_size=BLOCK, remote=tmp_path / "bucket", remote_key_file=tmp_path / "key") as cache,
        loaded(cache, address, events={"tiers": tiers}) as model,
        subscribed(address) as subscriber,
    ):
        for seed in (1, 2):  # what the first one adds in the bucket was sent before the second one
            model.prefill(prompt(seed))
            assert cache.flush()
            assert any("remote" in entry.places for entry in cache._catalog.entries())
            subscriber.wait_for(stored_in(cache, namespace_of(model), SMALL, without))
        assert {medium for _, medium in subscriber.known} == media


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["address", "replay_address"])
def test_an_address_in_use_is_an_error(cache: erllama.Cache, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_BIND_SECONDS", 0.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        events = {"address": free_address(), option: address, "block_size": SMALL}
        if option == "address":
            events["replay_address"] = free_address()
        with pytest.raises(erllama.EventsError, match=f"{option}='{address}' cannot be bound.*another port"):
            erllama.load_backend(StubBackend(), cache=cache, kv_events=events)
    assert not erllama.list_models()


def test_an_address_in_use_is_an_error_in_a_process(tmp_path: Path) -> None:
    with erllama.Cache(ram=0, disk=tmp_path) as cache, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(erllama.EventsError, match="cannot be bound"):
            erllama.load_backend(STUB, cache=cache, process=True, kv_events=address)


def test_a_replacement_waits_for_its_address(
    cache: erllama.Cache, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "_BIND_SECONDS", 0.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(address.rpartition(":")[2])))
        taken.listen()
        options = erllama.KvEvents(address, block_size=BLOCK)
        publisher = Publisher(options, cache, "m", b"n" * 32, wait_for_address=True)
    with subscribed(address) as subscriber:
        wait_until(lambda: subscriber.receive() != [] or subscriber.next > 0)
    publisher.close()


def test_without_pyzmq_the_error_names_the_package(cache: erllama.Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zmq", None)
    with pytest.raises(erllama.MissingPackage, match=r"pip install 'erllama\[events\]'"):
        erllama.load_backend(StubBackend(), cache=cache, kv_events=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("tcp://0.0.0.0:5557", "can be reached from other machines.*trusted_network=True"),
        ("tcp://*:5557", "can be reached from other machines"),
        ("tcp://10.1.2.3:5557", "can be reached from other machines"),
        ("127.0.0.1:5557", "pass an address such as 'tcp://127.0.0.1:5557'"),
        ("http://127.0.0.1:5557", "pass an address such as"),
        ("tcp://127.0.0.1:99999", "ports are 0 to 65535"),
        ("ipc://", "1 to 100 bytes"),
        ("ipc://" + "x" * 101, "1 to 100 bytes"),
        (5557, "pass an address"),
        ({"adress": "tcp://127.0.0.1:1"}, "did you mean 'address'"),
        ({"block_size": 3}, "at least 4"),
        ({"replay_batches": 0}, "at least 1"),
        ({"tiers": "ram"}, "list of names"),
        ({"tiers": []}, "at least one"),
        ({"topic": 5}, "must be a text"),
        ({"trusted_network": 1}, "must be True or False"),
        ({"address": "tcp://127.0.0.1:5", "replay_address": "tcp://127.0.0.1:5"}, "another port"),
        ({"block_size": 48}, "does not divide the cache's block size, 16"),
    ],
)
def test_wrong_options_are_refused(cache: erllama.Cache, value: object, message: str) -> None:
    with pytest.raises(erllama.OptionError, match=message):
        erllama.load_backend(StubBackend(), cache=cache, kv_events=value)  # type: ignore[arg-type]
    assert not erllama.list_models()


def test_an_address_without_a_next_port_needs_a_replay_address() -> None:
    with pytest.raises(erllama.OptionError, match="pass a replay_address"):
        assert erllama.KvEvents("tcp://127.0.0.1:65535").addresses


def test_other_addresses_are_accepted() -> None:
    assert erllama.KvEvents.of(False) is None
    assert erllama.KvEvents.of(True) == erllama.KvEvents()
    assert erllama.KvEvents("tcp://[::1]:7").addresses == ("tcp://[::1]:7", "tcp://[::1]:8")
    assert erllama.KvEvents("tcp://localhost:*").addresses[1] == "tcp://localhost:*"
    assert erllama.KvEvents("ipc:///tmp/e").addresses[1] == "ipc:///tmp/e.replay"
    assert erllama.KvEvents("tcp://0.0.0.0:7", trusted_network=True).addresses[1] == "tcp://0.0.0.0:8"
    chosen = erllama.KvEvents("tcp://127.0.0.1:*").with_ports()
    assert chosen.address != chosen.replay_address
    assert "*" not in chosen.address + str(chosen.replay_address)


def test_the_blocks_of_the_adapters_in_effect_are_published(
    cache: erllama.Cache, address: str, tiny_gguf: Path, loras: list[Path]
) -> None:
    events = erllama.KvEvents(address, block_size=SMALL)
    with (
        erllama.load_model(tiny_gguf, cache=cache, n_ctx=512, n_threads=1, kv_events=events) as model,
        subscribed(address) as subscriber,
    ):
        model.prefill(prompt(1))
        in_step(subscriber, cache, model)
        without = set(subscriber.known)
        with_adapter = model.load_adapter(loras[0])
        subscriber.wait_for(set())
        model.prefill(prompt(1))
        in_step(subscriber, cache, model)
        assert subscriber.known
        assert not subscriber.known & without
        with_adapter.unload()
        in_step(subscriber, cache, model)
        assert {each for each, _ in subscriber.known} == {each for each, _ in without}
