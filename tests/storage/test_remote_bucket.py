"""A remote tier in a bucket: moto's server behind a proxy that delays, loses and refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import erllama
from erllama.cache import Cache
from erllama.cache.blocks.key_file import create_key_file, read_key_file
from erllama.cache.remote.options import open_store
from erllama.cache.remote.tier import RemoteTier
from erllama.engine.kv.prefill_cost import PrefillCost
from erllama.errors import CacheFormatError, RemoteAccessError, RemoteUnreachable
from support.storage.blocks import NAMESPACE, SIZE, payload_of, save
from support.storage.network import (
    Proxy,
    bucket_server,
    environment,
    may_enter_network_namespace,
    proxied,
    s3_error,
)
from support.storage.processes import killed_at_end, output_of, start_python
from support.threads import wait_until

MANY = np.arange(10 * SIZE, dtype=np.int32)


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    with bucket_server() as port:
        yield port


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with proxied(("127.0.0.1", server)) as found:
        for name, value in environment(found.port).items():
            monkeypatch.setenv(name, value)
        yield found


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    create_key_file(tmp_path / "key")
    return tmp_path / "key"


def bucket_cache(name: str, key_file: Path, **options: object) -> Cache:
    """Return a cache that has the tier alone. It publishes and polls at once."""
    address = f"s3://bucket/{name}"
    options = {"poll_seconds": 0.05, "publish_seconds": 0.0} | options
    tier = RemoteTier(open_store(address), address, read_key_file(key_file), 10**8, **options)  # type: ignore[arg-type]
    return Cache(ram=0, block_size=SIZE, tiers=[tier])


def n_loaded(cache: Cache) -> int:
    with cache.lookup(NAMESPACE, MANY) as match:
        found = [cache.load(block) for block in match.blocks]
    assert all(bytes(each.payload) == payload_of(each.block).tobytes() for each in found if each is not None)
    return sum(each is not None for each in found)


def test_a_bucket_stores_objects_once(proxy: Proxy) -> None:
    store = open_store("s3://bucket/once")
    assert store.put("a/b", [b"one", memoryview(b"two")])
    assert not store.put("a/b", [b"other"])
    assert bytes(store.get("a/b", 100)) == b"onetwo"
    assert store.put("a/b", [b"replaced"], replace=True)
    assert [(each.name, each.n_bytes) for each in store.list("a")] == [("a/b", 8)]
    with pytest.raises(CacheFormatError, match="at most 7"):
        store.get("a/b", 7)
    store.delete(["a/b", "a/none"])
    with pytest.raises(FileNotFoundError):
        store.get("a/b", 100)
    assert list(store.list("a")) == []


def test_a_cache_survives_in_a_bucket(proxy: Proxy, key_file: Path) -> None:
    options = {"ram": 0, "block_size": SIZE, "remote": "s3://bucket/warm", "remote_key_file": key_file}
    with Cache(**options) as cache:  # type: ignore[arg-type]
        save(cache, MANY)
    with Cache(**options) as cache:  # type: ignore[arg-type]
        assert cache.disk_error is None
        assert n_loaded(cache) == 10
        assert cache.tiers()[0].location == "s3://bucket/warm"


CHILD = """
    from support.storage.network import enter_network_namespace, environment
    number, n_children, port, socket, key = int(sys.argv[1]), int(sys.argv[2]), *map(str, sys.argv[3:6])
    if socket:
        port = enter_network_namespace(socket)
    os.environ.update(environment(int(port)))
    from erllama.cache.blocks.key_file import read_key_file
    from erllama.cache.remote.options import open_store
    from erllama.cache.remote.tier import RemoteTier

    def tokens(child):
        return np.arange(1000 * child, 1000 * child + 6 * SIZE, dtype=np.int32)

    tier = RemoteTier(
        open_store("s3://bucket/shared"), "s3://bucket/shared", read_key_file(key), 10**8,
        poll_seconds=0.1, publish_seconds=0.0,
    )
    deadline = time.monotonic() + 50
    with Cache(ram=0, block_size=SIZE, tiers=[tier]) as cache:
        found = set()
        while len(found) < n_children and time.monotonic() < deadline:
            if (n_children > 1 or number) and number not in found:
                save(cache, tokens(number))
            for child in range(n_children):
                if check(cache, tokens(child)) == (6 * SIZE, 6):
                    found.add(child)
            time.sleep(0.05)
        counters = cache.counters()
    assert found == set(range(n_children)), (number, found, cache.disk_error, counters)
    assert counters["remote_signatures_refused"] == counters["faults"] == 0, counters
    print("found", len(found))
"""


def test_four_processes_share_a_bucket(proxy: Proxy, key_file: Path, tmp_path: Path) -> None:
    """Two of them in network namespaces of their own, over a network that is slow and loses requests."""
    if not may_enter_network_namespace():
        pytest.skip("the kernel refuses new network namespaces")
    proxy.delay, proxy.loss = 0.005, 0.02
    way_in = Proxy(("127.0.0.1", proxy.port), str(tmp_path / "socket"))
    try:
        children = [
            start_python(CHILD, number, 4, proxy.port, str(tmp_path / "socket") if number % 2 else "", key_file)
            for number in range(4)
        ]
        with killed_at_end(*children):
            assert [output_of(child) for child in children] == ["found 4\n"] * 4
    finally:
        way_in.close()
    assert way_in.n_requests > 0, "the namespaces led somewhere else"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (s3_error("403 Forbidden", "AccessDenied"), "lack a permission"),
        (s3_error("403 Forbidden", "InvalidAccessKeyId"), "credentials"),
        (s3_error("403 Forbidden", "RequestTimeTooSkewed"), "set the clock"),
        (s3_error("301 Moved Permanently", "PermanentRedirect"), "another region"),
        (s3_error("400 Bad Request", "AuthorizationHeaderMalformed"), "another region"),
        (s3_error("404 Not Found", "NoSuchBucket"), "no such bucket"),
    ],
)
def test_what_a_user_can_correct_is_said_at_the_start(
    proxy: Proxy, key_file: Path, answer: bytes, message: str
) -> None:
    proxy.answer = answer
    with bucket_cache("refused", key_file) as cache:
        assert isinstance(cache.disk_error, RemoteAccessError)
        assert message in str(cache.disk_error)
        save(cache, MANY)
        assert cache.flush()
        assert n_loaded(cache) == 0
        assert cache.counters()["faults"] == 0


def test_a_cache_recovers_when_the_permission_is_granted(
    proxy: Proxy, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erllama.cache.pipeline.tier_set._REOPEN_SECONDS", 0.0)
    proxy.answer = s3_error("403 Forbidden", "AccessDenied")
    with bucket_cache("granted", key_file) as cache:
        assert cache.disk_error is not None
        proxy.answer = None

        def stored() -> bool:
            save(cache, MANY)
            return cache.flush() and n_loaded(cache) == 10

        wait_until(stored)
        assert cache.disk_error is None


def test_a_server_that_is_gone_costs_misses_only(proxy: Proxy, key_file: Path) -> None:
    with bucket_cache("gone", key_file) as cache:
        save(cache, MANY)
        assert cache.flush()
        proxy.gone = True
        wait_until(lambda: n_loaded(cache) == 0 and cache.disk_error is not None)
        assert isinstance(cache.disk_error, RemoteUnreachable)
        assert cache.counters()["faults"] == 0
        proxy.gone = False
        wait_until(lambda: cache.disk_error is None)
        assert n_loaded(cache) == 10


PROMPT = [(7 * i) % 200 + 5 for i in range(400)]


def loaded_model(cache: Cache) -> erllama.Model:
    return erllama.load_model(erllama.demo_model(), cache=cache, n_ctx=1024, n_seq_max=2, n_threads=1)


@pytest.fixture
def slow_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure any model as one that takes hours, so that a fetch has a deadline of minutes."""

    def record(cost: PrefillCost, n_tokens: int, seconds: float) -> None:
        cost.seconds_per_token = 100.0

    monkeypatch.setattr(PrefillCost, "record", record)


@pytest.mark.usefixtures("slow_model")
def test_a_model_restores_a_prompt_from_a_bucket(proxy: Proxy, key_file: Path) -> None:
    with bucket_cache("model", key_file) as cache, loaded_model(cache) as model:
        expected = model.complete(PROMPT, max_tokens=4, temperature=0).tokens
        assert cache.flush()
    with bucket_cache("model", key_file) as cache, loaded_model(cache) as model:
        model.complete([9] * 200, max_tokens=1, temperature=0)  # measures how long computing takes
        found = model.complete(PROMPT, max_tokens=4, temperature=0)
        assert found.tokens == expected
        assert found.cache.tier == "remote"
        assert found.cache.tokens == len(PROMPT) - 1


@pytest.mark.usefixtures("slow_model")
def test_a_request_never_waits_in_the_model_thread(proxy: Proxy, key_file: Path) -> None:
    """While one request waits for a bucket that is silent, another one is computed to its end."""
    with bucket_cache("silent", key_file) as cache, loaded_model(cache) as model:
        model.complete(PROMPT, max_tokens=1)
        assert cache.flush()
    with bucket_cache("silent", key_file) as cache, loaded_model(cache) as model:
        model.complete([9] * 50, max_tokens=1)
        proxy.black_hole = True
        waiting = model.stream(PROMPT, max_tokens=4)
        assert model.complete([8] * 50, max_tokens=20).finish_reason in ("length", "stop")
        assert cache.counters()["remote_reads"] > 0
        waiting.cancel()
        assert waiting.result().finish_reason == "cancelled"
        proxy.black_hole = False
