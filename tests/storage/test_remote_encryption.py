"""An encrypted remote tier shows no content, is shared by machines with its keys, and loses nothing without."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from numpy.typing import NDArray

from erllama.cache import Cache, CacheSpec, Tier
from erllama.cache.blocks.encryption import Encryption
from erllama.cache.blocks.key_file import SecretKeys
from erllama.cache.remote.directory_store import DirectoryStore
from erllama.cache.remote.signatures import SIGNATURE_BYTES, Signer
from erllama.cache.remote.tier import RemoteTier
from erllama.errors import CacheFormatError, CacheKeyError, OptionError
from erllama.testing import CacheMachine, TierConformance
from support.storage.blocks import NAMESPACE, SIZE, blocks_of, payload_of, save
from support.storage.keys import all_bytes, join_keys, new_key, traces_of_tokens
from support.storage.members import sent
from support.threads import wait_until

EXAMPLES = int(os.environ.get("ERLLAMA_HARNESS_EXAMPLES", "4"))
MACHINE = settings(max_examples=EXAMPLES, stateful_step_count=30, phases=[Phase.generate])
OLD, NEW, THIRD = b"o" * 32, b"n" * 32, b"t" * 32
SIGNING = SecretKeys((b"s" * 32,))


def context(seed: int, n: int = 5 * SIZE) -> NDArray[np.int32]:
    """Return tokens with large ids: their bytes appear nowhere by chance."""
    return np.random.default_rng(seed).integers(20_000, 120_000, n, np.int32)


def tier_in(directory: Path, *keys: bytes, budget: int = 10**6, **options: object) -> RemoteTier:
    """Return a tier that publishes and polls at once. It encrypts with these keys, or not at all without one."""
    options = {"poll_seconds": 0.05, "publish_seconds": 0.0} | options
    options["encryption"] = Encryption.of_keys(SecretKeys(keys)) if keys else None
    return RemoteTier(DirectoryStore(directory), str(directory), SIGNING, budget, **options)  # type: ignore[arg-type]


def cache_in(directory: Path, *keys: bytes, **options: object) -> Cache:
    """Return a cache that has the tier alone."""
    return Cache(ram=0, block_size=SIZE, tiers=[tier_in(directory, *keys, **options)])  # type: ignore[arg-type]


def loaded(cache: Cache, tokens: NDArray[np.int32]) -> int:
    """Return how many blocks of a context can be loaded. Checks each payload."""
    n = 0
    with cache.lookup(NAMESPACE, tokens) as match:
        for block in match.blocks:
            found = cache.load(block)
            if found is not None:
                assert bytes(found.payload) == payload_of(block).tobytes(), "the payload of another block"
                n += 1
    return n


def objects(directory: Path) -> list[Path]:
    """Return the files of all blocks that are encrypted."""
    return sorted((directory / "encrypted").rglob("*/*"))


def content_of(directory: Path) -> dict[Path, bytes]:
    """Return the files of blocks and manifests."""
    names = ("blocks", "encrypted", "manifests")
    return {path: path.read_bytes() for name in names for path in (directory / name).rglob("*") if path.is_file()}


def make_old(directory: Path) -> None:
    """Date all blocks before yesterday, so that a collection of garbage may remove them."""
    for path in objects(directory):
        os.utime(path, (1, 1))


class TestEncryptedRemoteTier(TierConformance):
    n_blocks = 40

    def make_tier(self, directory: Path) -> Tier:
        return tier_in(directory / "bucket", NEW, OLD, poll_seconds=60.0, publish_seconds=5.0)


def machine_cache(self: CacheMachine, directory: Path) -> Cache:
    tier = tier_in(directory / "bucket", NEW, budget=14_000, poll_seconds=60.0, publish_seconds=5.0)
    return Cache(ram=600, disk=directory / "disk", disk_quota=6000, tiers=[tier], block_size=16, watch=False)


def test_the_state_machine_passes_with_an_encrypted_remote_tier() -> None:
    kind = type("Remote", (CacheMachine,), {"make_cache": machine_cache, "shared": False, "n_blocks": 20})
    run_state_machine_as_test(kind, settings=MACHINE)


# --- what the bucket shows --------------------------------------------------------------------------


def traces() -> dict[str, bytes]:
    """Return bytes that would show a part of two contexts, or confirm a guess at it."""
    found = {"namespace": NAMESPACE, "beginning of the namespace": NAMESPACE[:8]}
    for seed in range(2):
        found |= {f"context {seed} as {form}": trace for form, trace in traces_of_tokens(context(seed)).items()}
        for i, block in enumerate(blocks_of(context(seed))):
            found |= {f"key {seed}.{i}": block.key, f"recipe {seed}.{i}": block.tokens[:16]}
            found[f"payload {seed}.{i}"] = payload_of(block).tobytes()[:16]
    return found | {f"{name} in hex": value.hex().encode() for name, value in found.items()}


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_search_of_the_bucket_finds_no_content(tmp_path: Path, encrypted: bool) -> None:
    bucket = tmp_path / "bucket"
    with cache_in(bucket, *([NEW] if encrypted else [])) as cache:
        for seed in range(2):
            save(cache, context(seed))
            assert cache.flush()
        cache.evict_bytes(1, ("remote",))
        cache.flush()
        assert loaded(cache, context(1)) + loaded(cache, context(0)) == 9
        if not encrypted:
            cache.gc()  # packs the manifests, which zlib may not compress
    shown = all_bytes(bucket)
    found = {name for name, trace in traces().items() if trace in shown}
    assert len(shown) > 5000
    if encrypted:
        assert found == set()
        assert not (bucket / "blocks").exists()
    else:  # the search finds what there is
        assert {"context 1 as int32", "key 1.0 in hex", "payload 1.0", "namespace"} <= found


# --- machines that share it --------------------------------------------------------------------------


def test_machines_share_it_with_one_key_file_alone(tmp_path: Path) -> None:
    key = new_key(tmp_path / "key")
    options = {"block_size": SIZE, "remote": tmp_path / "bucket", "key_file": key}
    with Cache(disk=tmp_path / "a", **options) as one:  # type: ignore[arg-type]
        save(one, context(0))
    with Cache(disk=tmp_path / "b", **options) as other:  # type: ignore[arg-type]
        assert {row.tier for row in other.rows()} == {"remote"}
        assert loaded(other, context(0)) == 5
        assert other.verify() == []
        save(other, context(1))
        spec = sent(other.share_with_process())
        assert isinstance(spec, CacheSpec)
        with Cache.of_spec(spec) as child:
            assert child.disk_error is None
            save(child, context(2))
    assert len(objects(tmp_path / "bucket")) == 15
    with Cache(ram=0, **options) as cache:  # type: ignore[arg-type]
        assert [loaded(cache, context(seed)) for seed in range(3)] == [5, 5, 5]


def test_signatures_may_have_a_key_file_of_their_own(tmp_path: Path) -> None:
    key, signing = new_key(tmp_path / "key"), new_key(tmp_path / "signing")
    options = {"ram": 0, "block_size": SIZE, "remote": tmp_path / "bucket", "key_file": key}
    with Cache(remote_key_file=signing, **options) as cache:  # type: ignore[arg-type]
        save(cache, context(0))
    with Cache(**options) as cache:  # type: ignore[arg-type]
        assert loaded(cache, context(0)) == 0, "signed with another key"
        assert cache.counters()["remote_manifests_refused"] == 1
    with Cache(remote_key_file=signing, **options) as cache:  # type: ignore[arg-type]
        assert loaded(cache, context(0)) == 5
    with pytest.raises(OptionError, match="without a key"):
        Cache(remote=tmp_path / "bucket")


def test_two_machines_store_an_encrypted_block_once(tmp_path: Path) -> None:
    late = {"poll_seconds": 1000.0, "publish_seconds": 1000.0}
    with cache_in(tmp_path, NEW, **late) as one, cache_in(tmp_path, NEW, **late) as other:
        for cache in (one, other):
            save(cache, context(0))
            assert cache.flush()
        assert len(objects(tmp_path)) == 5
    with cache_in(tmp_path, NEW) as cache:
        assert loaded(cache, context(0)) == 5


# --- rotation and missing keys ------------------------------------------------------------------------


def test_a_rotation_keeps_old_blocks_while_their_key_is_known(tmp_path: Path) -> None:
    with cache_in(tmp_path, OLD) as cache:
        save(cache, context(0))
    with cache_in(tmp_path, NEW, OLD) as cache:
        assert loaded(cache, context(0)) == 5
        save(cache, context(1))
        cache.flush()
        cache.gc()  # writes the manifests under the new key
        assert loaded(cache, context(0)) == 5
    old, new = (Encryption.of_keys(SecretKeys((key,))).current.key_id.hex() for key in (OLD, NEW))
    assert sorted(path.name for path in (tmp_path / "encrypted").iterdir()) == sorted([old, new])
    before = content_of(tmp_path)
    with cache_in(tmp_path, NEW) as cache:
        assert cache.disk_error is None
        assert (loaded(cache, context(0)), loaded(cache, context(1))) == (0, 5)
        assert cache.counters()["remote_unknown_keys"] == 1
        assert cache.counters()["blocks_remote"] == 5, "hidden blocks take no part of the quota"
        assert cache.counters()["corrupt_files"] == 0
        cache.gc()
    assert before.keys() <= content_of(tmp_path).keys()
    with cache_in(tmp_path, NEW, OLD) as cache:
        assert (loaded(cache, context(0)), loaded(cache, context(1))) == (5, 5)
        assert cache.evict_bytes(10**9, ("remote",)) > 0
        cache.flush()
        assert objects(tmp_path) == [], "blocks of both keys can be removed"


def test_merging_manifests_keeps_blocks_with_unknown_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cache_in(tmp_path, OLD) as cache:
        save(cache, context(0))
    with cache_in(tmp_path, NEW, OLD) as cache:
        save(cache, context(1))
        cache.flush()
        cache.gc()
    with cache_in(tmp_path, NEW) as cache:  # lacks the old key, and merges what lists its blocks
        save(cache, context(2))
        cache.flush()
        make_old(tmp_path)
        cache.gc()
        assert len(list((tmp_path / "manifests").iterdir())) == 1
    with cache_in(tmp_path, NEW, OLD) as cache:
        assert [loaded(cache, context(seed)) for seed in range(3)] == [5, 5, 5]


def test_gc_removes_nothing_that_unreadable_manifests_may_list(tmp_path: Path) -> None:
    with cache_in(tmp_path, OLD, poll_seconds=1000.0) as lagging:  # has not received the new key yet
        with cache_in(tmp_path, OLD) as cache:
            save(cache, context(0))
        with cache_in(tmp_path, NEW, OLD) as cache:
            save(cache, context(1))
            cache.flush()
            cache.gc()  # all blocks are in one manifest, under the new key
        assert len(list((tmp_path / "manifests").iterdir())) == 1
        with cache_in(tmp_path, OLD) as refused:
            assert isinstance(refused.disk_error, CacheKeyError)
        make_old(tmp_path)
        lagging.gc()
        assert lagging.disk_error is None
        assert lagging.counters()["remote_unknown_keys"] == 1
    assert len(objects(tmp_path)) == 10
    with cache_in(tmp_path, NEW, OLD) as cache:
        assert (loaded(cache, context(0)), loaded(cache, context(1))) == (5, 5)


def test_a_block_saved_again_replaces_a_hidden_one(tmp_path: Path) -> None:
    with cache_in(tmp_path, OLD) as cache:
        save(cache, context(0))
    with cache_in(tmp_path, NEW, OLD) as cache:
        save(cache, context(1))
        cache.flush()
        cache.gc()
    with cache_in(tmp_path, NEW) as cache:
        save(cache, context(0))
        cache.flush()
        assert loaded(cache, context(0)) == 5
    with cache_in(tmp_path, NEW) as cache:
        assert (loaded(cache, context(0)), loaded(cache, context(1))) == (5, 5)


@pytest.mark.parametrize("keys", [(), (THIRD,)], ids=["no key", "another key"])
def test_a_machine_without_the_keys_gets_an_error_and_changes_nothing(
    tmp_path: Path, keys: tuple[bytes, ...]
) -> None:
    with cache_in(tmp_path, NEW) as cache:
        save(cache, context(0))
    before = content_of(tmp_path)
    with cache_in(tmp_path, *keys) as cache:
        assert isinstance(cache.disk_error, CacheKeyError)
        key_id = Encryption.of_keys(SecretKeys((NEW,))).current.key_id.hex()
        assert key_id in str(cache.disk_error)
        assert "key_file" in str(cache.disk_error)
        save(cache, context(1))
        assert cache.flush(), "the tier is closed, so nothing waits"
        assert loaded(cache, context(0)) == 0
        assert [problem.description for problem in cache.verify()] == [str(cache.disk_error)]
        cache.gc()
    assert content_of(tmp_path) == before
    with cache_in(tmp_path, NEW) as cache:
        assert loaded(cache, context(0)) == 5


def test_a_bucket_with_content_and_no_encryption_refuses_a_key(tmp_path: Path) -> None:
    with cache_in(tmp_path) as cache:
        save(cache, context(0))
    before = content_of(tmp_path)
    with cache_in(tmp_path, NEW) as cache:
        assert isinstance(cache.disk_error, CacheKeyError)
        assert "not encrypted" in str(cache.disk_error)
        save(cache, context(1))
    assert content_of(tmp_path) == before


def test_running_machines_hide_what_others_encrypt_with_other_keys(tmp_path: Path) -> None:
    with cache_in(tmp_path, NEW) as one, cache_in(tmp_path, OLD) as other, cache_in(tmp_path) as plain:
        for seed, cache in enumerate((one, other, plain)):
            save(cache, context(seed))
            assert cache.flush()
        for seed, cache in enumerate((one, other, plain)):
            wait_until(lambda cache=cache: cache.counters()["remote_unknown_keys"] >= 2)  # type: ignore[misc]
            assert [loaded(cache, context(each)) for each in range(3)] == [5 * (each == seed) for each in range(3)]
            assert cache.disk_error is None
            cache.gc()
    for seed, keys in enumerate([(NEW,), (OLD,), ()]):
        with cache_in(tmp_path, *keys) as cache:
            assert loaded(cache, context(seed)) == 5


# --- changed objects ----------------------------------------------------------------------------------


def flip_after_signing(path: Path, at: int) -> None:
    """Change a byte of the encrypted block, and sign it again, as who has the signing key alone can."""
    content = bytearray(path.read_bytes()[SIGNATURE_BYTES:])
    content[at % len(content)] ^= 1
    path.write_bytes(Signer(SIGNING).sign("block", [bytes(content)]) + content)


def test_changed_objects_are_never_restored_even_if_signed(tmp_path: Path) -> None:
    dice = np.random.default_rng(1)
    with cache_in(tmp_path, NEW) as cache:
        save(cache, context(0, SIZE))
        assert cache.flush()
        (path,), (block,) = objects(tmp_path), blocks_of(context(0, SIZE))
        tier, content = next(iter(cache._tier_set)), path.read_bytes()
        for number in range(300):
            if number % 2:
                flip_after_signing(path, int(dice.integers(10**6)))
            else:
                damaged = bytearray(content)
                damaged[dice.integers(len(damaged))] ^= 1 << dice.integers(8)
                path.write_bytes(damaged)
            with pytest.raises(CacheFormatError):
                tier.read(block)
            path.write_bytes(content)
        assert tier.read(block)[1] == payload_of(block).data
        assert cache.counters()["remote_signatures_refused"] == 150


def test_encrypted_blocks_under_other_names_are_refused(tmp_path: Path) -> None:
    with cache_in(tmp_path, NEW) as cache:
        save(cache, context(0))
        assert cache.flush()
        one, other = objects(tmp_path)[:2]
        content = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
        assert loaded(cache, context(0)) == 3
        assert cache.counters()["corrupt_files"] == 2


def test_changed_encrypted_manifests_are_ignored_and_counted(tmp_path: Path) -> None:
    with cache_in(tmp_path, NEW) as cache:
        save(cache, context(0, SIZE))
    (path,) = (tmp_path / "manifests").iterdir()
    content = path.read_bytes()
    inner = bytearray(content[SIGNATURE_BYTES:])
    inner[-1] ^= 1
    for changed in (content[:-1], Signer(SIGNING).sign("manifest", [bytes(inner)]) + inner):
        path.write_bytes(changed)
        with cache_in(tmp_path, NEW) as cache:
            assert cache.disk_error is None
            assert loaded(cache, context(0)) == 0
            assert cache.counters()["remote_manifests_refused"] == 1
    path.write_bytes(content)
    with cache_in(tmp_path, NEW) as cache:
        assert loaded(cache, context(0)) == 1


def test_a_key_file_with_both_keys_reads_both(tmp_path: Path) -> None:
    old, new = new_key(tmp_path / "old"), new_key(tmp_path / "new")
    options = {"ram": 0, "block_size": SIZE, "remote": tmp_path / "bucket"}
    with Cache(key_file=old, **options) as cache:  # type: ignore[arg-type]
        save(cache, context(0))
    both = join_keys(tmp_path / "both", new, old)
    with Cache(key_file=both, **options) as cache:  # type: ignore[arg-type]
        assert loaded(cache, context(0)) == 5
