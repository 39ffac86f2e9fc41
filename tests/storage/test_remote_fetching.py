"""Fetching from a remote tier: reads that requests share, their deadlines, cost and memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from erllama.cache import Block, Cache
from erllama.cache.blocks.key_file import SecretKeys
from erllama.cache.pipeline import fetcher
from erllama.cache.pipeline.fetcher import Fetch
from erllama.cache.remote.directory_store import DirectoryStore
from erllama.cache.remote.health import ReadCost
from erllama.cache.remote.stores import do_nothing
from erllama.cache.remote.tier import RemoteTier
from erllama.engine.kv.prefix_cache import PrefixCache
from support.storage.blocks import NAMESPACE, SIZE, save
from support.threads import wait_until

ONE = np.arange(10 * SIZE, dtype=np.int32)
TWO = np.arange(1000, 1000 + 10 * SIZE, dtype=np.int32)
KEYS = SecretKeys((b"k" * 32,))
N_THREADS = 4  # that read at once


class Slow(DirectoryStore):
    """A directory whose reads of blocks wait until `go_on`, before or after the answer begins."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go_on = threading.Event()
        self.go_on.set()
        self.answers = False
        self.names: list[str] = []

    def get(self, name: str, limit: int, on_response: Callable[[], None] = do_nothing) -> memoryview:
        if name.startswith("blocks/"):
            if self.answers:
                on_response()
            self.names.append(name)
            assert self.go_on.wait(60)
        return super().get(name, limit, on_response)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Slow]:
    store = Slow(tmp_path / "bucket")
    yield store
    store.go_on.set()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of all fetches: the attribute `now`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(fetcher, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def tier(store: Slow) -> RemoteTier:
    return RemoteTier(store, "there", KEYS, 10**6, publish_seconds=0.0)


@pytest.fixture
def suspended(tier: RemoteTier, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each time that a late read suspends the tier, which it does not do then."""
    calls: list[int] = []
    monkeypatch.setattr(tier._breaker, "record_late", lambda: calls.append(1))
    return calls


@pytest.fixture
def cache(tier: RemoteTier) -> Iterator[Cache]:
    """A cache that has the tier alone, with two contexts of ten blocks."""
    with Cache(ram=0, block_size=SIZE, tiers=[tier]) as cache:
        for tokens in (ONE, TWO):
            save(cache, tokens)
        assert cache.flush()
        yield cache


def blocks_of(cache: Cache, tokens: NDArray[np.int32]) -> list[Block]:
    with cache.lookup(NAMESPACE, tokens) as match:
        return list(match.blocks)


def fetch(cache: Cache, tokens: NDArray[np.int32], computing: float = 1000.0) -> Fetch:
    """Begin to fetch a context that takes so many seconds to compute."""
    return cache.fetch(blocks_of(cache, tokens), computing / len(tokens))


def finish(*fetches: Fetch) -> None:
    wait_until(lambda: all(each.done for each in fetches))


def n_reads(cache: Cache) -> int:
    return int(cache.counters()["remote_reads"])


def test_requests_with_the_same_prefix_read_it_once(cache: Cache, store: Slow) -> None:
    store.go_on.clear()
    fetches = [fetch(cache, ONE) for _ in range(4)]
    assert not any(each.done for each in fetches)
    store.go_on.set()
    finish(*fetches)
    assert n_reads(cache) == 10
    again = fetch(cache, ONE)
    assert again.done
    assert len(again.sources()) == 10
    assert n_reads(cache) == 10, "what another request has fetched is not read again"
    assert len({id(source) for each in (*fetches, again) for source in each.sources()}) == 10


def test_a_shared_read_goes_on_for_the_other_request(cache: Cache, store: Slow) -> None:
    store.go_on.clear()
    one, other = fetch(cache, ONE), fetch(cache, ONE)
    del one
    store.go_on.set()
    finish(other)
    assert len(other.sources()) == 10
    assert n_reads(cache) == 10


def test_the_reads_of_a_dropped_fetch_are_cancelled(cache: Cache, store: Slow, tier: RemoteTier) -> None:
    store.go_on.clear()
    one = fetch(cache, ONE)
    wait_until(lambda: len(store.names) == N_THREADS)
    del one
    store.go_on.set()
    wait([tier.run(do_nothing) for _ in range(20)], 60)  # after all reads in the queue
    assert n_reads(cache) == N_THREADS


def test_waiting_for_other_reads_is_not_late(
    cache: Cache, store: Slow, tier: RemoteTier, clock: SimpleNamespace
) -> None:
    tier._cost._per_byte = 0.05  # some blocks take minutes
    store.answers = True
    store.go_on.clear()
    one = fetch(cache, ONE)
    wait_until(lambda: len(store.names) == N_THREADS)
    other = fetch(cache, TWO)
    clock.now += 40  # more than the service may take to begin to answer
    assert not one.done
    assert not other.done, "the service answers, but all threads read for the first one"
    assert tier.serves
    store.go_on.set()
    finish(one, other)
    assert len(one.sources()) == len(other.sources()) == 10
    assert cache.counters()["remote_reads_late"] == 0


def test_reads_in_the_queue_count_as_time_to_wait(cache: Cache, store: Slow, tier: RemoteTier) -> None:
    store.go_on.clear()
    n_bytes = next(row.n_bytes for row in cache.rows())
    tier._cost._per_byte = 300.0 / (3 * n_bytes)  # ten blocks by four threads: three rounds
    one = fetch(cache, ONE)
    assert not one.done
    assert fetch(cache, TWO, 400.0).done, "twenty blocks would take 500 seconds"
    assert cache.counters()["remote_reads_skipped"] == 1
    store.go_on.set()


def test_a_service_that_is_silent_ends_the_fetches_in_the_queue(
    cache: Cache, store: Slow, clock: SimpleNamespace, suspended: list[int]
) -> None:
    store.go_on.clear()
    one = fetch(cache, ONE)
    wait_until(lambda: len(store.names) == N_THREADS)
    other = fetch(cache, TWO)
    del one  # its request was cancelled; its reads have threads still
    clock.now += 29
    assert not other.done
    clock.now += 2
    assert other.done
    assert cache.counters()["remote_reads_late"] == 1
    assert suspended == [1]
    assert other.sources() == []
    store.go_on.set()


def test_a_slow_service_that_answers_is_not_suspended(
    cache: Cache, store: Slow, tier: RemoteTier, clock: SimpleNamespace, suspended: list[int]
) -> None:
    store.answers = True
    store.go_on.clear()
    one = fetch(cache, ONE)
    wait_until(lambda: len(store.names) == N_THREADS)
    before = tier.expected_seconds(10**6, 10)
    clock.now += 1001
    assert one.done
    assert one.done
    assert cache.counters()["remote_reads_late"] == 1
    assert tier.expected_seconds(10**6, 10) > before
    assert suspended == []
    store.go_on.set()


def test_loading_locally_never_asks_the_service(store: Slow, tier: RemoteTier, tmp_path: Path) -> None:
    with Cache(ram=0, disk=tmp_path / "disk", block_size=SIZE, tiers=[tier], watch=False) as cache:
        save(cache, ONE)
        assert cache.flush()
        blocks = blocks_of(cache, ONE)
        for path in (tmp_path / "disk").rglob("*.kvc"):
            path.unlink()
        assert cache.load(blocks[0], local=True) is None
        assert list(cache.load_batches(blocks[1:], local=True)) == []
        assert store.names == []
        assert all(cache.load(block) is not None for block in blocks), "the service has them"


def test_one_payload_that_replaces_a_long_prompt_is_fetched(cache: Cache, store: Slow, tier: RemoteTier) -> None:
    """A recurrent model needs the last block alone, which saves computing all tokens before it."""
    backend = SimpleNamespace(limits=SimpleNamespace(whole_state=True))
    prefix_cache = PrefixCache(cache, backend, None, None, None)  # type: ignore[arg-type]
    # A round trip is worth it for 160 tokens, and would not be for the 16 of the last block.
    tier._cost._round_trip = 50.0
    prefix_cache.prefill_cost.seconds_per_token = 2500.0 / len(ONE)
    store.go_on.clear()
    with cache.lookup(NAMESPACE, ONE) as match:
        found = prefix_cache.fetch(match, 0)
        assert found is not None
        assert not found.done
        assert cache.counters()["remote_reads_skipped"] == 0
        rest = prefix_cache.fetch(match, len(ONE) - SIZE)
        assert rest is not None
        assert rest.done, "most of it is in the context"
        assert cache.counters()["remote_reads_skipped"] == 1
    store.go_on.set()


def test_all_fetches_together_keep_a_limited_number_of_bytes(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    n_bytes = next(row.n_bytes for row in cache.rows())
    monkeypatch.setattr(fetcher, "_LIMIT_BYTES", 14 * n_bytes)
    one, other = fetch(cache, ONE), fetch(cache, TWO)
    finish(one, other)
    assert (len(one.sources()), len(other.sources())) == (10, 4)
    same = fetch(cache, ONE)
    assert len(same.sources()) == 10, "kept once"
    assert fetch(cache, TWO[: 5 * SIZE]).done
    del one, same
    more = fetch(cache, TWO)
    finish(more)
    assert len(more.sources()) == 10


def test_blocks_that_were_fetched_are_kept_when_a_later_one_fails(tmp_path: Path, tier: RemoteTier) -> None:
    with Cache(ram=0, block_size=SIZE, tiers=[tier]) as cache:
        save(cache, ONE)
        assert cache.flush()
        blocks = blocks_of(cache, ONE)
    objects = [path for path in (tmp_path / "bucket" / "blocks").rglob("*-*") if blocks[5].key.hex() in path.name]
    assert len(objects) == 1
    objects[0].unlink()
    again = RemoteTier(DirectoryStore(tmp_path / "bucket"), "there", KEYS, 10**6)
    with Cache(ram=10**6, block_size=SIZE, tiers=[again]) as cache:
        one = cache.fetch(blocks, 10.0)
        finish(one)
        assert len(one.sources()) == 5
        del one
        wait_until(lambda: sum(row.tier == "ram" for row in cache.rows()) == 5)


def test_reads_at_the_same_time_share_the_cost() -> None:
    tier = RemoteTier(DirectoryStore(Path("unused")), "there", KEYS, 10**6)
    tier._cost.record(100, 0.010)
    tier._cost.record(1 << 20, 0.110)
    assert tier.expected_seconds(4 << 20, 4) == pytest.approx(0.110)
    assert tier.expected_seconds(8 << 20, 8) == pytest.approx(0.220)
    assert tier.expected_seconds(0, 0) == 0


def test_reads_that_are_late_together_count_as_one() -> None:
    cost = ReadCost()
    cost.record(100, 0.010)
    cost.record(1 << 20, 0.110)
    cost.record_late(1 << 20, 0.5)
    late = cost.expected(1 << 20)
    cost.record_late(1 << 20, 0.5)
    assert cost.expected(1 << 20) == late
    per_byte = late - cost.expected(0)
    cost.record_late(0, 2 * cost.expected(0))  # the service did not begin to answer
    assert cost.expected(1 << 20) - cost.expected(0) == pytest.approx(per_byte)
    assert cost.expected(0) > late - per_byte
    cost.record(1 << 20, 0.011)
    assert cost.expected(0) <= 0.011, "a read that was faster than a round trip should take corrects it"
