"""A remote tier in a directory that several machines mount: sharing, signatures, manifests, lifetimes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from erllama.cache import Block, Cache, CacheSpec, Tier
from erllama.cache.blocks.key_file import SecretKeys, create_key_file
from erllama.cache.remote import manifest
from erllama.cache.remote.block_list import BlockList
from erllama.cache.remote.directory_store import DirectoryStore
from erllama.cache.remote.health import CircuitBreaker, ReadCost
from erllama.cache.remote.manifest import Entry, Event
from erllama.cache.remote.object_codec import BLOCK, ObjectCodec
from erllama.cache.remote.signatures import SIGNATURE_BYTES, Signer
from erllama.cache.remote.stores import do_nothing
from erllama.cache.remote.tier import RemoteTier
from erllama.errors import (
    CacheError,
    CacheFormatError,
    OptionError,
    RemoteAccessError,
    RemoteUnreachable,
    SignatureRefused,
)
from erllama.testing import CacheMachine, TierConformance
from support.paths import TESTS
from support.storage.blocks import NAMESPACE, OTHER, SIZE, blocks_of, hit, payload_of, save
from support.storage.members import sent
from support.subprocesses import must_run
from support.threads import wait_until

EXAMPLES = int(os.environ.get("ERLLAMA_HARNESS_EXAMPLES", "15"))
MACHINE = settings(max_examples=EXAMPLES, stateful_step_count=30, phases=[Phase.generate])
MANY = np.arange(10 * SIZE, dtype=np.int32)
KEYS = SecretKeys((b"k" * 32,))
OTHER_KEYS = SecretKeys((b"o" * 32,))


def tier_in(directory: Path, budget: int = 10**6, **options: object) -> RemoteTier:
    """Return a tier that publishes and polls at once."""
    options = {"keys": KEYS, "poll_seconds": 0.05, "publish_seconds": 0.0} | options
    keys = options.pop("keys")
    return RemoteTier(DirectoryStore(directory), str(directory), keys, budget, **options)  # type: ignore[arg-type]


def cache_in(directory: Path, **options: object) -> Cache:
    """Return a cache that has the tier alone."""
    return Cache(ram=0, block_size=SIZE, tiers=[tier_in(directory, **options)])  # type: ignore[arg-type]


def stored_objects(directory: Path) -> list[Path]:
    return sorted((directory / "blocks").rglob("*-*"))


def loaded(cache: Cache, tokens: np.ndarray[tuple[int], np.dtype[np.int32]]) -> int:
    """Return how many blocks of a context can be loaded. Checks each payload."""
    n = 0
    with cache.lookup(NAMESPACE, tokens) as match:
        for block in match.blocks:
            found = cache.load(block)
            if found is not None:
                assert bytes(found.payload) == payload_of(block).tobytes(), "the payload of another block"
                n += 1
    return n


# --- the harness ------------------------------------------------------------------------------------


class TestRemoteTier(TierConformance):
    n_blocks = 40

    def make_tier(self, directory: Path) -> Tier:
        return RemoteTier(DirectoryStore(directory / "bucket"), str(directory / "bucket"), KEYS, 10**6)


def machine_cache(self: CacheMachine, directory: Path) -> Cache:
    tier = RemoteTier(DirectoryStore(directory / "bucket"), str(directory / "bucket"), KEYS, 12_000)
    return Cache(ram=600, disk=directory / "disk", disk_quota=6000, tiers=[tier], block_size=16, watch=False)


def test_the_state_machine_passes_with_a_remote_tier() -> None:
    kind = type("Remote", (CacheMachine,), {"make_cache": machine_cache, "shared": False, "n_blocks": 20})
    run_state_machine_as_test(kind, settings=MACHINE)


# --- one and several machines -----------------------------------------------------------------------


def test_a_new_machine_finds_what_another_stored(tmp_path: Path) -> None:
    create_key_file(tmp_path / "key")
    options = {"block_size": SIZE, "remote": tmp_path / "bucket", "remote_key_file": tmp_path / "key"}
    with Cache(disk=tmp_path / "a", **options) as cache:  # type: ignore[arg-type]
        assert cache.tier_names == ("ram", "disk", "remote")
        save(cache, MANY)
    with Cache(disk=tmp_path / "b", **options) as cache:  # type: ignore[arg-type]
        assert {row.tier for row in cache.rows()} == {"remote"}
        assert hit(cache, MANY) == len(MANY)
        assert hit(cache, MANY, OTHER) == 0, "namespaces are separate"
        cache.flush()
        assert sorted({row.tier for row in cache.rows()}) == ["disk", "ram", "remote"], "stored in faster tiers"
        assert cache.verify() == []
        cache.check_integrity()


def test_running_machines_see_each_others_blocks(tmp_path: Path) -> None:
    with cache_in(tmp_path) as one, cache_in(tmp_path) as other:
        save(one, MANY)
        wait_until(lambda: loaded(other, MANY) == 10)
        other.evict_bytes(10**9, ("remote",))
        wait_until(lambda: loaded(one, MANY) == 0)
        assert one.counters()["disk_errors"] == other.counters()["disk_errors"] == 0


def test_the_same_block_of_two_machines_is_stored_once(tmp_path: Path) -> None:
    late = {"poll_seconds": 1000.0, "publish_seconds": 1000.0}
    with cache_in(tmp_path, **late) as one, cache_in(tmp_path, **late) as other:
        for cache in (one, other):
            save(cache, MANY)
            assert cache.flush()
        assert len(stored_objects(tmp_path)) == 10
    with cache_in(tmp_path) as cache:
        assert loaded(cache, MANY) == 10


def test_a_block_that_another_machine_removed_is_a_miss(tmp_path: Path) -> None:
    with cache_in(tmp_path) as one:
        save(one, MANY)
        one.flush()
        with cache_in(tmp_path, poll_seconds=1000.0) as other:
            one.evict_bytes(10**9, ("remote",))
            one.flush()
            assert stored_objects(tmp_path) == []
            assert loaded(other, MANY) == 0
            other.flush()
            assert other.counters()["blocks_remote"] == 0
            assert other.counters()["corrupt_files"] == 0
            save(other, MANY)
            other.flush()
            assert loaded(other, MANY) == 10


def test_the_budget_holds_for_all_machines_together(tmp_path: Path) -> None:
    size = tier_in(tmp_path).size(blocks_of(MANY)[0], 64)
    with cache_in(tmp_path, budget=5 * size) as one:
        for i in range(5):
            save(one, np.full(SIZE, i, np.int32))
        one.flush()
        with cache_in(tmp_path, budget=5 * size) as other:
            for i in range(5, 8):
                save(other, np.full(SIZE, i, np.int32))
            other.flush()
            assert other.counters()["evictions_remote"] == 3
            wait_until(lambda: one.counters()["bytes_remote"] == 5 * size)
    assert len(stored_objects(tmp_path)) == 5


def test_unused_blocks_are_removed_after_their_lifetime(tmp_path: Path) -> None:
    with cache_in(tmp_path, lifetime=0.2) as cache:
        save(cache, MANY)
        assert cache.flush()
        wait_until(lambda: cache.counters()["remote_expired"] == 10)
        wait_until(lambda: loaded(cache, MANY) == 0)
        cache.flush()
        assert stored_objects(tmp_path) == []


def test_a_clock_that_was_ahead_does_not_keep_a_block_listed() -> None:
    blocks = BlockList()
    (block,) = blocks_of(MANY[:SIZE])
    ahead = time.time_ns() + 3600 * 10**9
    stored = Entry(Event.STORED, ahead, block.key, block, 100, b"v" * 8, ahead, object_name="blocks/v")
    blocks.merge([stored])
    removal, _ = blocks.remove(block.key) or (None, None)
    assert removal is not None
    assert removal.at > ahead, "later than what it removes, though this clock is behind"
    blocks.merge([stored])
    assert blocks.get(block.key) is None


def test_lists_agree_in_whatever_order_segments_are_read() -> None:
    events = []
    for i, block in enumerate(blocks_of(MANY)):
        for version in (b"one_____", b"two_____"):
            name = f"blocks/{i}-{version.decode()}"
            events.append(Entry(Event.STORED, 100 + i, block.key, block, 100, version, 1, object_name=name))
        if i % 2:
            events.append(Entry(Event.REMOVED, 100 + i + i % 3, block.key))
    forwards, backwards = BlockList(), BlockList()
    forwards.merge(events)
    backwards.merge([*events[::-1], *events[::-1]])
    assert {(r.block.key, r.n_bytes) for r in forwards.rows()} == {
        (r.block.key, r.n_bytes) for r in backwards.rows()
    }
    assert forwards.names() == backwards.names()
    assert all("two" in name for name in forwards.names())


def test_manifests_are_merged_and_stay_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erllama.cache.remote.manifest_log._MERGE_FROM", 4)
    with cache_in(tmp_path) as cache:
        for i in range(30):
            save(cache, np.full(SIZE, i, np.int32))
            cache.flush()
        wait_until(lambda: len(list((tmp_path / "manifests").iterdir())) <= 8)
    with cache_in(tmp_path) as cache:
        assert cache.counters()["blocks_remote"] == 30
        cache.gc()
        assert len(list((tmp_path / "manifests").iterdir())) == 1
    with cache_in(tmp_path) as cache:
        assert cache.counters()["blocks_remote"] == 30


def test_gc_removes_old_objects_that_no_manifest_lists(tmp_path: Path) -> None:
    with cache_in(tmp_path) as cache:
        save(cache, MANY)
        cache.flush()
        old, new = tmp_path / "blocks/ff/old-1", tmp_path / "blocks/ff/new-1"
        old.parent.mkdir()
        for path in (old, new):
            path.write_bytes(b"left by a machine that was killed")
        os.utime(old, (1, 1))
        cache.gc()
        assert not old.exists()
        assert new.exists(), "its machine may list it soon"
        assert loaded(cache, MANY) == 10


def test_a_read_only_machine_changes_no_object(tmp_path: Path) -> None:
    with cache_in(tmp_path) as cache:
        save(cache, MANY)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with cache_in(tmp_path, read_only=True) as cache:
        assert loaded(cache, MANY) == 10
        save(cache, np.full(SIZE, 7, np.int32))
        cache.evict_bytes(10**9, ("remote",))
        cache.gc()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_model_in_another_process_gets_the_remote_tier(tmp_path: Path) -> None:
    create_key_file(tmp_path / "key")
    with Cache(
        ram=0,
        disk=tmp_path / "disk",
        remote=tmp_path / "bucket",
        remote_key_file=tmp_path / "key",
        remote_lifetime="30d",
        block_size=SIZE,
    ) as cache:
        spec = sent(cache.share_with_process())
        assert isinstance(spec, CacheSpec)
        assert spec.remote is not None
        assert spec.remote.lifetime == 30 * 86400
        with Cache.of_spec(spec) as child:
            assert child.tier_names == ("disk", "remote")
            save(child, MANY)
    with Cache(ram=0, remote=tmp_path / "bucket", remote_key_file=tmp_path / "key", block_size=SIZE) as cache:
        assert loaded(cache, MANY) == 10


def test_a_dropped_cache_is_still_uploaded(tmp_path: Path) -> None:
    program = f"""
        import sys
        sys.path.insert(0, {str(TESTS)!r})
        from pathlib import Path
        import numpy as np
        from support.storage.blocks import SIZE, save
        from erllama.cache import Cache
        cache = Cache(ram=0, remote=Path(sys.argv[1]), remote_key_file=sys.argv[2], block_size=SIZE)
        save(cache, np.arange(10 * SIZE, dtype=np.int32))
        del cache
    """
    create_key_file(tmp_path / "key")
    must_run(program, tmp_path / "bucket", tmp_path / "key")
    with Cache(ram=0, remote=tmp_path / "bucket", remote_key_file=tmp_path / "key", block_size=SIZE) as cache:
        assert loaded(cache, MANY) == 10


# --- signatures -------------------------------------------------------------------------------------


def test_flipped_bytes_are_never_restored_and_each_is_counted(tmp_path: Path) -> None:
    dice = np.random.default_rng(1)
    with cache_in(tmp_path) as cache:
        save(cache, MANY)
        assert cache.flush()
        (first, *_), (path, *_) = blocks_of(MANY), stored_objects(tmp_path)
        tier = next(iter(cache._tier_set))
        by_name = {tier.location_of(block).rsplit("/", 1)[-1]: block for block in blocks_of(MANY)}
        block, content = by_name[path.name], path.read_bytes()
        for n in range(1, 1001):
            damaged = bytearray(content)
            damaged[dice.integers(len(damaged))] ^= 1 << dice.integers(8)
            path.write_bytes(damaged)
            with pytest.raises(CacheFormatError):
                tier.read(block)
            assert cache.counters()["remote_signatures_refused"] == n
        path.write_bytes(content)
        assert tier.read(block)[1] == payload_of(block).data
        assert first in by_name.values()


def forge(path: Path, keys: SecretKeys | None) -> None:
    """Replace the payload of a block by another one, with right checksums, signed with these keys."""
    from erllama.cache.blocks import kvc

    block, payload = kvc.decode(memoryview(path.read_bytes())[SIGNATURE_BYTES:])
    parts = list(kvc.encode(block, memoryview(b"\xff" * payload.nbytes)))
    signature = Signer(keys).sign(BLOCK, parts) if keys is not None else path.read_bytes()[:SIGNATURE_BYTES]
    path.write_bytes(b"".join([signature, *parts]))


@pytest.mark.parametrize("keys", [None, OTHER_KEYS], ids=["old signature", "another key"])
def test_forged_blocks_are_never_restored(tmp_path: Path, keys: SecretKeys | None) -> None:
    with cache_in(tmp_path) as cache:
        save(cache, MANY)
        cache.flush()
        for path in stored_objects(tmp_path):
            forge(path, keys)
        assert loaded(cache, MANY) == 0
        counters = cache.counters()
        assert counters["remote_signatures_refused"] == counters["corrupt_files"] == 10
        cache.flush()
        # What has the key of others stays; what is damaged goes.
        assert len(stored_objects(tmp_path)) == (10 if keys else 0)
        save(cache, MANY)
        cache.flush()
        assert loaded(cache, MANY) == 10, "written again, over the forged ones"


def test_a_block_under_the_name_of_another_is_refused(tmp_path: Path) -> None:
    with cache_in(tmp_path) as cache:
        save(cache, MANY)
        cache.flush()
        one, other = stored_objects(tmp_path)[:2]
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
        assert loaded(cache, MANY) == 8
        assert cache.counters()["corrupt_files"] == 2


def test_a_manifest_is_no_block_and_an_unsigned_one_is_ignored(tmp_path: Path) -> None:
    packed = b"".join(manifest.encode([], ObjectCodec(KEYS)))
    with pytest.raises(SignatureRefused):
        Signer(KEYS).open(BLOCK, memoryview(packed))
    with cache_in(tmp_path) as cache:
        save(cache, MANY)
    forged = manifest.encode(
        [Entry(Event.REMOVED, 2**62, block.key) for block in blocks_of(MANY)], ObjectCodec(OTHER_KEYS)
    )
    (tmp_path / "manifests/0123456789abcdef-00000001-10").write_bytes(b"".join(forged))
    with cache_in(tmp_path) as cache:
        assert loaded(cache, MANY) == 10
        assert cache.counters()["remote_manifests_refused"] == 1


@pytest.mark.parametrize("keep", [0, 10, 47, 48, 60, -1])
def test_a_truncated_manifest_is_ignored_and_counted(tmp_path: Path, keep: int) -> None:
    with cache_in(tmp_path) as cache:
        save(cache, MANY[:SIZE])
    (path,) = (tmp_path / "manifests").iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    with cache_in(tmp_path) as cache:
        assert cache.disk_error is None
        assert cache.counters()["remote_manifests_refused"] == 1
        save(cache, MANY[:SIZE])
        cache.flush()
        assert loaded(cache, MANY[:SIZE]) == 1


def test_keys_can_be_rotated(tmp_path: Path) -> None:
    both = SecretKeys((b"n" * 32, b"k" * 32))
    with cache_in(tmp_path) as cache:
        save(cache, MANY)
    with cache_in(tmp_path, keys=both) as cache:
        assert loaded(cache, MANY) == 10
        save(cache, np.full(SIZE, 7, np.int32))
    with cache_in(tmp_path, keys=SecretKeys((b"n" * 32,))) as cache:
        assert loaded(cache, np.full(SIZE, 7, np.int32)) == 1
        assert loaded(cache, MANY) == 0
    with cache_in(tmp_path) as cache:
        assert loaded(cache, MANY) == 10, "a machine with other keys removes nothing"


# --- what a user can do wrong -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remote": "s3://bucket"}, "new-key"),
        ({"remote": "s4://bucket", "remote_key_file": "k"}, "'s3'"),
        ({"remote": "s3://", "remote_key_file": "k"}, "no bucket"),
        ({"remote": "s3://me:secret@bucket", "remote_key_file": "k"}, "credentials"),
        ({"remote": "file://host/directory", "remote_key_file": "k"}, "three slashes"),
        ({"remote": 7, "remote_key_file": "k"}, "an address"),
        ({"remote": "/tmp/b", "remote_key_file": 7}, "the path of a file"),
        ({"remote": "/tmp/b", "remote_key_file": "k", "remote_quota": 0}, "remote_quota"),
        ({"remote": "/tmp/b", "remote_key_file": "k", "remote_lifetime": "3s"}, "a minute"),
        ({"remote": "/tmp/b/c", "remote_key_file": "k", "disk": "/tmp/b"}, "lies in the other"),
        ({"remote_key_file": "k"}, "without remote"),
        ({"remote_lifetime": "30d"}, "without remote"),
        ({"remot": "/tmp/b"}, "did you mean 'remote'"),
    ],
)
def test_mistaken_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        Cache(**options)  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


def test_a_key_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="new-key"):
        Cache(remote=tmp_path / "bucket", remote_key_file=tmp_path / "key")


def test_a_directory_that_cannot_be_written_reports_itself(tmp_path: Path) -> None:
    (tmp_path / "bucket").write_text("a file in the way")
    with cache_in(tmp_path / "bucket") as cache:
        assert isinstance(cache.disk_error, RemoteUnreachable | RemoteAccessError)
        save(cache, MANY)
        assert cache.flush()
        assert hit(cache, MANY) == 0


# --- a service that fails -----------------------------------------------------------------------------


class Failing(DirectoryStore):
    """A directory whose calls fail, or wait, while that is wanted."""

    error: Exception | None = None
    go_on: threading.Event | None = None

    def get(self, name: str, limit: int, on_response: Callable[[], None] = do_nothing) -> memoryview:
        self.call()
        return super().get(name, limit, on_response)

    def put(self, name: str, parts: object, *, replace: bool = False) -> bool:
        self.call()
        return super().put(name, parts, replace=replace)  # type: ignore[arg-type]

    def list(self, prefix: str) -> object:  # type: ignore[override]
        self.call()
        return super().list(prefix)

    def call(self) -> None:
        if self.go_on is not None:
            assert self.go_on.wait(60)
        if self.error is not None:
            raise self.error


@pytest.fixture
def failing(tmp_path: Path) -> Failing:
    return Failing(tmp_path / "bucket")


def failing_cache(store: Failing, **options: object) -> Cache:
    options = {"poll_seconds": 0.05, "publish_seconds": 0.0} | options
    return Cache(ram=0, block_size=SIZE, tiers=[RemoteTier(store, "there", KEYS, 10**6, **options)])  # type: ignore[arg-type]


def test_a_service_that_fails_is_left_alone_until_it_answers(failing: Failing) -> None:
    with failing_cache(failing) as cache:
        save(cache, MANY)
        cache.flush()
        failing.error = RemoteUnreachable("no route to host")
        assert loaded(cache, MANY) == 0
        wait_until(lambda: cache.disk_error is not None)
        assert "no route" in str(cache.disk_error)
        assert cache.tiers()[0].error is cache.disk_error
        wait_until(lambda: cache.counters()["remote_outages"] == 1)
        n_reads = cache.counters()["remote_reads"]
        assert loaded(cache, MANY) == 0
        assert cache.counters()["remote_reads"] == n_reads, "no request reaches a service that does not answer"
        save(cache, np.full(SIZE, 7, np.int32))
        assert not cache.flush(30)
        failing.error = None
        wait_until(lambda: cache.disk_error is None)
        assert cache.flush()
        assert loaded(cache, MANY) == 10
        assert loaded(cache, np.full(SIZE, 7, np.int32)) == 1, "uploaded when the service was back"


def test_a_permission_that_is_missing_is_reported_at_the_start(failing: Failing) -> None:
    failing.error = RemoteAccessError("the credentials lack a permission")
    with failing_cache(failing) as cache:
        assert isinstance(cache.disk_error, RemoteAccessError)
        save(cache, MANY)
        assert hit(cache, MANY) == 0


def test_uploads_beyond_their_limit_are_dropped_and_counted(failing: Failing) -> None:
    with failing_cache(failing, upload_bytes=5 * 64) as cache:
        failing.go_on = threading.Event()
        save(cache, MANY)
        wait_until(lambda: cache.counters()["bytes_pending"] == 0)
        assert cache.counters()["saves_dropped"] == 5
        assert cache.counters()["blocks_remote"] == 5
        assert loaded(cache, MANY) == 5, "read from memory until they are uploaded"
        failing.go_on.set()
        assert cache.flush()
    assert len(stored_objects(failing.root)) == 5


def test_closing_does_not_wait_for_a_service_that_fails(failing: Failing) -> None:
    cache = failing_cache(failing)
    failing.error = RemoteUnreachable("no route to host")
    save(cache, MANY)
    wait_until(lambda: cache.disk_error is not None)
    cache.close()
    assert stored_objects(failing.root) == []


# --- fetching ----------------------------------------------------------------------------------------


def fetch(cache: Cache, seconds_per_token: float) -> tuple[object, Callable[[], int]]:
    """Begin to fetch a context. Returns the fetch, and a function that counts the blocks that it brought."""
    with cache.lookup(NAMESPACE, MANY) as match:
        blocks: list[Block] = list(match.blocks)
    found = cache.fetch(blocks, seconds_per_token)
    return found, lambda: sum(len(batch) for batch in cache.load_batches(blocks, local=True))


def test_a_fetch_brings_blocks_without_a_wait(failing: Failing) -> None:
    with failing_cache(failing) as cache:
        save(cache, MANY)
        cache.flush()
        failing.go_on = threading.Event()
        fetched, n_local = fetch(cache, 10.0)
        assert not fetched.done  # type: ignore[attr-defined]
        assert n_local() == 0, "blocks that were not fetched are not waited for"
        failing.go_on.set()
        wait_until(lambda: fetched.done)  # type: ignore[attr-defined]
        assert n_local() == 10
        fetched = None
        assert n_local() == 0, "without a faster tier, they are dropped with the fetch"


def test_a_late_fetch_ends_at_its_deadline(failing: Failing) -> None:
    with failing_cache(failing) as cache:
        save(cache, MANY)
        cache.flush()
        failing.go_on = threading.Event()
        fetched, n_local = fetch(cache, 0.1)
        wait_until(lambda: fetched.done)  # type: ignore[attr-defined]
        assert n_local() == 0
        assert cache.counters()["remote_reads_late"] == 1
        assert fetch(cache, 10.0)[0].done, "suspended until a probe succeeds"  # type: ignore[attr-defined]
        failing.go_on.set()


def test_a_fetch_slower_than_computing_is_not_begun(failing: Failing) -> None:
    with failing_cache(failing) as cache:
        save(cache, MANY)
        cache.flush()
        fetched, _ = fetch(cache, 1e-9)
        assert fetched.done  # type: ignore[attr-defined]
        assert cache.counters()["remote_reads_skipped"] == 1
        wait_until(lambda: cache.counters()["remote_reads"] == 1)  # one, to measure, that no request waits for


def test_a_service_far_away_is_read_for_the_next_request(failing: Failing, tmp_path: Path) -> None:
    with failing_cache(failing) as cache:
        save(cache, MANY)
    tier = RemoteTier(failing, "there", KEYS, 10**6)
    with Cache(ram=10**6, block_size=SIZE, tiers=[tier]) as cache:
        tier._cost.record(100, 100.0)
        fetched, n_local = fetch(cache, 2.0)
        assert fetched.done  # type: ignore[attr-defined]
        assert cache.counters()["remote_reads_skipped"] == 1
        wait_until(lambda: n_local() == 10)


def test_the_breaker_suspends_at_once_and_opens_after_three() -> None:
    opened: list[int] = []
    breaker = CircuitBreaker("there", lambda: opened.append(1))
    breaker.record_failure(RemoteUnreachable("one"))
    assert not breaker.closed
    assert not breaker.open
    assert breaker.seconds_to_probe() == 0.0, "a probe follows at once"
    breaker.record_success()
    assert breaker.closed
    for text in ("one", "two", "three", "four"):
        breaker.record_failure(RemoteUnreachable(text))
    assert breaker.open
    assert str(breaker.problem) == "four"
    assert opened == [1]
    assert 0 < (breaker.seconds_to_probe() or 0) < 30
    breaker.record_success()
    assert breaker.problem is None


def test_the_cost_of_reads_follows_the_measurements() -> None:
    cost = ReadCost()
    cost.record(100, 0.010)
    cost.record(1 << 20, 0.110)
    assert cost.expected(1 << 20) == pytest.approx(0.110)
    assert cost.expected(2 << 20, 2) == pytest.approx(0.220)
    before = cost.expected(1 << 20)
    cost.record_late(1 << 20, 0.5)
    assert cost.expected(1 << 20) > 4 * before
