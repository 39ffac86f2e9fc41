"""A remote tier loses nothing: with manifests it cannot read, keys it lacks, lost requests and missing mounts."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from erllama.cache import Block, Cache, Tier
from erllama.cache.blocks.key_file import SecretKeys
from erllama.cache.remote.block_list import BlockList
from erllama.cache.remote.daemon_threads import DaemonThreads
from erllama.cache.remote.directory_store import DirectoryStore
from erllama.cache.remote.manifest import Entry, Event
from erllama.cache.remote.object_codec import BLOCK
from erllama.cache.remote.signatures import SIGNATURE_BYTES, Signer
from erllama.cache.remote.stores import do_nothing
from erllama.cache.remote.tier import RemoteTier
from erllama.errors import RemoteUnreachable
from support.storage.blocks import NAMESPACE, SIZE, blocks_of, payload_of, save
from support.threads import wait_until

MANY = np.arange(10 * SIZE, dtype=np.int32)
KEYS = SecretKeys((b"k" * 32,))
OTHER_KEYS = SecretKeys((b"o" * 32,))
BOTH_KEYS = SecretKeys((b"o" * 32, b"k" * 32))
LATE = {"poll_seconds": 1000.0, "publish_seconds": 1000.0}
DAY_NS = 24 * 3600 * 10**9


def tier_in(directory: Path, **options: object) -> RemoteTier:
    """Return a tier that publishes and polls at once."""
    options = {"keys": KEYS, "poll_seconds": 0.05, "publish_seconds": 0.0} | options
    return RemoteTier(DirectoryStore(directory), str(directory), budget=10**6, **options)  # type: ignore[arg-type]


def cache_in(directory: Path, **options: object) -> Cache:
    """Return a cache that has the tier alone."""
    return Cache(ram=0, block_size=SIZE, tiers=[tier_in(directory, **options)])


def stored_objects(directory: Path) -> list[Path]:
    return sorted((directory / "blocks").rglob("*-*"))


def loaded(cache: Cache, tokens: NDArray[np.int32]) -> int:
    """Return how many blocks of a context can be loaded. Checks each payload."""
    with cache.lookup(NAMESPACE, tokens) as match:
        found = [cache.load(block) for block in match.blocks]
        for block, each in zip(match.blocks, found, strict=True):
            assert each is None or bytes(each.payload) == payload_of(block).tobytes(), (
                "the payload of another block"
            )
    return sum(each is not None for each in found)


def make_old(directory: Path) -> None:
    """Let all blocks be older than a day."""
    for path in stored_objects(directory):
        os.utime(path, (1, 1))


def manifests(directory: Path) -> list[Path]:
    """Return the segments, of one machine in the order in which it wrote them."""
    return sorted((directory / "manifests").iterdir())


def remote_of(cache: Cache) -> RemoteTier:
    tier: Tier = next(iter(cache._tier_set))
    assert isinstance(tier, RemoteTier)
    return tier


# --- manifests that cannot be read --------------------------------------------------------------------


def cut(directory: Path) -> None:
    path = manifests(directory)[0]
    path.write_bytes(path.read_bytes()[:-1])


def of_a_newer_release(directory: Path) -> None:
    path = manifests(directory)[0]
    path.rename(path.with_name(f"v3-{path.name}"))


@pytest.mark.parametrize("damage", [cut, of_a_newer_release])
def test_gc_removes_nothing_beside_an_unread_manifest(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    with cache_in(tmp_path, **LATE) as cache:
        save(cache, MANY[: 5 * SIZE])
        cache.flush()
        save(cache, MANY)
        cache.flush()
    assert len(manifests(tmp_path)) == 2
    damage(tmp_path)
    make_old(tmp_path)
    with cache_in(tmp_path, **LATE) as cache:
        assert cache.counters()["blocks_remote"] == 5, "the others follow blocks that are in the first manifest"
        assert cache.gc() == 0
        cache.flush()
        assert cache.counters()["blocks_remote"] == 5
        assert remote_of(cache).unlisted is not None
    assert len(stored_objects(tmp_path)) == 10


def test_gc_without_the_signing_key_removes_nothing(tmp_path: Path) -> None:
    with cache_in(tmp_path) as cache:
        save(cache, MANY)
    make_old(tmp_path)
    with cache_in(tmp_path, keys=OTHER_KEYS) as cache:
        save(cache, np.full(SIZE, 7, np.int32))
        cache.flush()
        cache.gc()
    assert len(stored_objects(tmp_path)) == 11


def test_gc_removes_nothing_after_a_listing_that_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cache_in(tmp_path) as cache:
        for i in range(4):
            save(cache, np.full(SIZE, i, np.int32))
            cache.flush()
    make_old(tmp_path)
    monkeypatch.setattr("erllama.cache.remote.manifest_log._MOST_LISTED", 1)
    with cache_in(tmp_path, **LATE) as cache:
        cache.gc()
    assert len(stored_objects(tmp_path)) == 4


# --- blocks that this machine cannot use ----------------------------------------------------------------


def test_blocks_signed_with_unknown_keys_stay_for_others(tmp_path: Path) -> None:
    with cache_in(tmp_path, **LATE) as cache:
        for part in (MANY[: 5 * SIZE], MANY):
            save(cache, part)
            cache.flush()
    with cache_in(tmp_path, keys=BOTH_KEYS, **LATE) as cache:
        cache.gc()  # signs the manifests with the new key
    make_old(tmp_path)
    with cache_in(tmp_path, keys=OTHER_KEYS) as cache:
        assert cache.counters()["blocks_remote"] == 10
        assert loaded(cache, MANY) == 0
        cache.flush()
        save(cache, np.full(SIZE, 7, np.int32))
        cache.flush()
        cache.gc()
        assert cache.counters()["blocks_remote"] == 1
    with cache_in(tmp_path, keys=BOTH_KEYS) as cache:
        assert loaded(cache, MANY) == 10


def test_blocks_of_a_newer_release_stay_for_others(tmp_path: Path) -> None:
    with cache_in(tmp_path) as cache:
        save(cache, MANY)
    before = {}
    for path in stored_objects(tmp_path):
        content = bytearray(path.read_bytes()[SIGNATURE_BYTES:])
        struct.pack_into("<I", content, 8, 99)  # the version
        path.write_bytes(Signer(KEYS).sign(BLOCK, [bytes(content)]) + content)
        before[path] = path.read_bytes()
    with cache_in(tmp_path) as cache:
        assert loaded(cache, MANY) == 0
        cache.flush()
        cache.gc()
        assert cache.counters()["blocks_remote"] == 0, "hidden"
        assert {path: path.read_bytes() for path in stored_objects(tmp_path)} == before
    with cache_in(tmp_path) as cache:
        assert cache.counters()["blocks_remote"] == 10, "still in the manifests"
        assert loaded(cache, MANY) == 0
        cache.flush()
        save(cache, MANY)
        cache.flush()
        assert loaded(cache, MANY) == 10, "written again, as this release can read it"


# --- a mount that is gone ---------------------------------------------------------------------------------


def test_a_missing_mount_is_an_outage_and_no_empty_store(tmp_path: Path) -> None:
    root, away = tmp_path / "mount", tmp_path / "away"
    with cache_in(root) as cache:
        save(cache, MANY)
        assert cache.flush()
        root.rename(away)
        root.mkdir()
        loaded(cache, MANY)
        save(cache, np.full(SIZE, 7, np.int32))
        wait_until(lambda: cache.disk_error is not None)
        assert "erllama-store" in str(cache.disk_error)
        assert list(root.iterdir()) == [], "nothing is written beside the mount"
        root.rmdir()
        loaded(cache, MANY)
        assert not root.exists(), "and the mount point is not made"
        away.rename(root)
        wait_until(lambda: cache.disk_error is None)
        assert cache.flush()
        assert loaded(cache, MANY) == 10
    with cache_in(root) as cache:
        assert cache.counters()["blocks_remote"] == 11


def test_a_read_only_machine_creates_no_store(tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    with cache_in(tmp_path / "mount", read_only=True) as cache:
        assert isinstance(cache.disk_error, RemoteUnreachable)
    with cache_in(tmp_path / "none", read_only=True) as cache:
        assert isinstance(cache.disk_error, RemoteUnreachable)
    assert [path.name for path in tmp_path.rglob("*")] == ["mount"]


# --- requests that are lost -------------------------------------------------------------------------------


class Lossy(DirectoryStore):
    """Loses the first upload. The next one succeeds after that failure was recorded."""

    n_uploads = 0
    lock = threading.Lock()
    failed: Callable[[], bool]

    def put(self, name: str, parts: object, *, replace: bool = False) -> bool:
        if name.startswith("blocks/"):
            with self.lock:
                self.n_uploads += 1
                first, second = self.n_uploads == 1, self.n_uploads == 2
            if first:
                wait_until(lambda: self.n_uploads >= 2)
                raise RemoteUnreachable("a request was lost")
            if second:
                wait_until(self.failed)
        return super().put(name, parts, replace=replace)  # type: ignore[arg-type]


def test_an_upload_that_was_lost_is_tried_again(tmp_path: Path) -> None:
    store = Lossy(tmp_path)
    tier = RemoteTier(store, "there", KEYS, 10**6, **LATE)  # type: ignore[arg-type]
    store.failed = lambda: not tier._breaker.closed
    with Cache(ram=0, block_size=SIZE, tiers=[tier]) as cache:
        for i in range(2):
            save(cache, np.full(SIZE, i, np.int32))
        wait_until(lambda: tier._uploads.idle)
        assert cache.flush()
    assert len(stored_objects(tmp_path)) == 2


def test_an_upload_waits_until_a_thread_can_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, failures = threading.Thread.start, [1, 1]

    def limited(thread: threading.Thread) -> None:
        if thread.name == "erllama-remote-writer" and failures:
            failures.pop()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with cache_in(tmp_path, **LATE) as cache:
        save(cache, MANY[:SIZE])
        wait_until(lambda: len(stored_objects(tmp_path)) == 1)
    assert failures == []
    assert DaemonThreads(1, "erllama-remote-reader").submit(lambda: 1).result(60) == 1


# --- manifests that do not grow -----------------------------------------------------------------------------


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erllama.cache.remote.manifest_log._LARGE_ENTRIES", 8)


@pytest.mark.usefixtures("small_segments")
def test_a_large_manifest_of_removed_blocks_is_removed(tmp_path: Path) -> None:
    with cache_in(tmp_path, publish_seconds=1000.0) as cache:
        save(cache, MANY)
        cache.flush()
        (large,) = manifests(tmp_path)
        cache.evict_bytes(10**9, ("remote",))
        cache.flush()
        wait_until(lambda: not large.exists())
    with cache_in(tmp_path) as cache:
        assert cache.counters()["blocks_remote"] == 0


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("n_removed", [3, 10])
def test_removed_blocks_never_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_removed: int) -> None:
    now = time.time_ns
    with cache_in(tmp_path, **LATE) as cache:
        save(cache, MANY)
        cache.flush()
        tier = remote_of(cache)
        for block in blocks_of(MANY)[-n_removed:]:
            tier.remove([block.key])
            cache.flush()
        monkeypatch.setattr(time, "time_ns", lambda: now() + 2 * DAY_NS)
        tier.collect_garbage()
        assert len(manifests(tmp_path)) == (0 if n_removed == 10 else 2), (
            "a removal matters while the block is listed"
        )
    for _ in range(2):
        with cache_in(tmp_path, **LATE) as cache:
            assert cache.counters()["blocks_remote"] == 10 - n_removed
            remote_of(cache).collect_garbage()


def test_large_blocks_are_listed_in_more_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erllama.cache.remote.manifest._MAX_RAW_BYTES", 2000)
    monkeypatch.setattr("erllama.cache.remote.manifest.FULL_BYTES", 1000, raising=False)
    with cache_in(tmp_path, **LATE) as cache:
        save(cache, MANY)
        cache.flush()
        assert len(manifests(tmp_path)) == 3
        cache.gc()
    with cache_in(tmp_path) as cache:
        assert loaded(cache, MANY) == 10
        assert cache.counters()["remote_manifests_refused"] == 0


# --- versions of one block ------------------------------------------------------------------------------------


def opened(directory: Path, **options: object) -> RemoteTier:
    tier = tier_in(directory, **LATE | options)
    tier.open()
    return tier


def versions_of(block: Block) -> tuple[memoryview, memoryview]:
    return payload_of(block).data, payload_of(block, 128).data


def test_a_new_version_can_be_read_as_soon_as_it_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,), store, found = blocks_of(MANY[:SIZE]), BlockList.store, []
    first, second = versions_of(block)
    tier = opened(tmp_path)

    def store_and_read(self: BlockList, *arguments: object) -> object:
        result = store(self, *arguments)  # type: ignore[arg-type]
        found.append(bytes(tier.read(block)[1]))
        return result

    monkeypatch.setattr(BlockList, "store", store_and_read)
    for payload in (first, second):
        tier.write(block, payload)
        assert tier.flush()
    assert found == [bytes(first), bytes(second)]
    tier.close()


class Replaced(DirectoryStore):
    """Calls a function before the first read of a block."""

    before_read: Callable[[], object] | None = None

    def get(self, name: str, limit: int, on_response: Callable[[], None] = do_nothing) -> memoryview:
        if name.startswith("blocks/") and self.before_read is not None:
            call, self.before_read = self.before_read, None
            call()
        return super().get(name, limit, on_response)


def test_a_version_replaced_during_a_read_is_read_again(tmp_path: Path) -> None:
    (block,) = blocks_of(MANY[:SIZE])
    first, second = versions_of(block)
    store = Replaced(tmp_path)
    tier = RemoteTier(store, "there", KEYS, 10**6, **LATE)  # type: ignore[arg-type]
    tier.open()
    tier.write(block, first)
    assert tier.flush()
    store.before_read = lambda: (tier.write(block, second), tier.flush())
    assert bytes(tier.read(block)[1]) == bytes(second)
    tier.close()


def test_a_missing_object_does_not_remove_a_later_version(tmp_path: Path) -> None:
    (block,) = blocks_of(MANY[:SIZE])
    first, second = versions_of(block)
    one = opened(tmp_path)
    one.write(block, first)
    assert one.flush()
    other = opened(tmp_path)
    one.write(block, second)
    assert one.flush()
    assert len(stored_objects(tmp_path)) == 1
    with pytest.raises(FileNotFoundError):
        other.read(block)
    other.remove([block.key])  # as the cache does
    assert other.flush()
    third = opened(tmp_path)
    assert bytes(third.read(block)[1]) == bytes(second)
    for tier in (one, other, third):
        tier.close()


# --- memory -----------------------------------------------------------------------------------------------


def test_what_is_removed_takes_no_memory(tmp_path: Path) -> None:
    (block,) = blocks_of(MANY[:SIZE])
    tier = opened(tmp_path)
    tier.write(block, payload_of(block).data)
    assert tier.flush()
    tier.remove([block.key])
    assert tier._own == set()
    blocks = tier._blocks
    removal = Entry(Event.REMOVED, time.time_ns(), block.key)
    used = Entry(Event.USED, time.time_ns(), block.key)
    blocks.merge([used, removal, used])
    assert (blocks._used, blocks._uses_of_others) == ({}, {})
    blocks.forget_removals(blocks.old_removals())
    tier.close()
