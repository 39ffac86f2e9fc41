"""Promises of the cache to its users, without a model or libllama."""

from __future__ import annotations

import gc
import logging
import resource
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import erllama
from erllama.cache import Block, Cache, FileTier, SaveReason, namespace_key, store, token_bytes
from erllama.cache.catalog.eviction_order import LeafLRU
from erllama.cache.catalog.prefix_tree import PrefixTree
from support.examples import examples
from support.paths import TESTS
from support.storage.blocks import NAMESPACE, OTHER, SIZE, blocks_of, hit, payload_of, save
from support.subprocesses import must_run, run_python
from support.threads import wait_until

# Few different tokens and short texts, so that prefixes are often shared.
contexts = st.lists(st.integers(0, 2), min_size=1, max_size=60).map(lambda ids: np.array(ids, np.int32))


def shared(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n


# --- lookups -----------------------------------------------------------------------------


@given(st.lists(contexts, max_size=6), contexts)
def test_a_hit_is_as_long_as_the_tokens_agree(saved: list[NDArray[np.int32]], wanted: NDArray[np.int32]) -> None:
    with Cache(block_size=SIZE) as cache:
        for tokens in saved:
            save(cache, tokens)
        assert hit(cache, wanted) == max((shared(tokens, wanted) for tokens in saved), default=0)
        assert hit(cache, wanted, OTHER) == 0


@given(st.lists(contexts, max_size=6), contexts)
def test_a_whole_hit_ends_where_a_stored_block_ends(
    saved: list[NDArray[np.int32]], wanted: NDArray[np.int32]
) -> None:
    with Cache(block_size=SIZE) as cache:
        for tokens in saved:
            save(cache, tokens, trimmable=False)
        found = hit(cache, wanted, whole=True)
        longest = max((shared(tokens, wanted) for tokens in saved), default=0)
        ends = {0} | {row.start + row.n_tokens for row in cache.rows()}
        assert found in ends
        assert longest // SIZE * SIZE <= found <= longest
        tail_stays = not any(len(t) // SIZE > len(wanted) // SIZE for t in saved)
        if tail_stays and any(np.array_equal(tokens, wanted) for tokens in saved):
            assert found == len(wanted), "only a full block replaces a tail"


@given(st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=6), max_size=12), st.data())
def test_superseded_blocks_are_the_proper_prefixes(siblings: list[list[int]], data: st.DataObject) -> None:
    tree = PrefixTree()
    raws = {token_bytes(np.array(ids, np.uint32)) for ids in siblings}
    for raw in raws:
        tree.add(Block.following(NAMESPACE, NAMESPACE, 0, raw, SaveReason.COLD), "ram")
    ids = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=8))
    if siblings and data.draw(st.booleans()):
        ids = siblings[0] + ids
    new = Block.following(NAMESPACE, NAMESPACE, 0, token_bytes(np.array(ids, np.uint32)), SaveReason.COLD)
    expected = {raw for raw in raws if new.tokens.startswith(raw) and raw != new.tokens}
    assert {block.tokens for block in tree.superseded_by(new)} == expected
    whole = tree.longest_whole(NAMESPACE, new.tokens)
    assert (whole.block.tokens if whole else b"") == max(
        (raw for raw in raws if new.tokens.startswith(raw)), key=len, default=b""
    )


def test_a_longer_tail_replaces_a_shorter_one(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        save(cache, np.arange(20, dtype=np.int32))
        cache.flush()
        save(cache, np.arange(25, dtype=np.int32))
        save(cache, np.arange(40, dtype=np.int32))
        cache.flush()
        assert sorted((row.tier, row.start, row.n_tokens) for row in cache.rows()) == [
            ("disk", 0, 16),
            ("disk", 16, 16),
            ("disk", 32, 8),
            ("ram", 0, 16),
            ("ram", 16, 16),
            ("ram", 32, 8),
        ]
        assert cache.counters()["tails_superseded"] == 2
    assert len(list(tmp_path.rglob("*.kvc"))) == 3


def test_a_full_block_leaves_the_tail_that_is_to_be_kept(tmp_path: Path) -> None:
    first, kept, full = (np.arange(n, dtype=np.int32) for n in (9, SIZE - 1, SIZE))
    (tail,), (block,) = blocks_of(kept), blocks_of(full)
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        for tokens in (first, kept):
            save(cache, tokens, trimmable=False)
        cache.flush()
        cache.save(block, payload_of(block), trimmable=False, kept_tail=tail.key)
        cache.flush()
        stored = sorted((row.tier, row.n_tokens) for row in cache.rows())
        assert stored == [("disk", SIZE - 1), ("disk", SIZE), ("ram", SIZE - 1), ("ram", SIZE)]


def test_a_block_is_stored_once() -> None:
    tokens = np.arange(40, dtype=np.int32)
    with Cache(block_size=SIZE) as cache:
        save(cache, tokens)
        save(cache, tokens)
        assert cache.counters()["saves_cold"] == 3
        assert cache.counters()["duplicates_dropped"] == 3
        assert cache.counters()["bytes_ram"] == 3 * 64


def test_replacing_a_block_replaces_it_in_every_tier(tmp_path: Path) -> None:
    (block,) = blocks_of(np.arange(SIZE, dtype=np.int32))
    better = Block.following(
        block.parent, block.namespace, 0, block.tokens, SaveReason.COLD, b"r" * 16, slice_end=SIZE
    )
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        cache.save(block, np.zeros(8, np.uint8))
        cache.flush()
        cache.save(better, np.ones(8, np.uint8), replace=True)
        loaded = cache.load(better)
        assert loaded is not None
        assert bytes(loaded.payload) == bytes([1] * 8)
        assert cache.stored(block.key) == better
    with Cache(block_size=SIZE, disk=tmp_path, ram=0) as cache:
        assert cache.stored(block.key) == better
        loaded = cache.load(better)
        assert loaded is not None
        assert bytes(loaded.payload) == bytes([1] * 8)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("ram", [0, "1MiB"])
def test_a_rejected_block_that_was_just_written_is_removed(tmp_path: Path, ram: int | str, replace: bool) -> None:
    """Its row in the index is newer than the last poll for changes, as that of a block stored anew would be."""
    tokens = np.arange(3 * SIZE, dtype=np.int32)
    block = blocks_of(tokens)[-1]
    with Cache(block_size=SIZE, disk=tmp_path / "kv", ram=ram, watch=False) as cache:
        save(cache, tokens)
        cache.flush()
        if replace:
            cache.save(block, payload_of(block), replace=True)
            cache.flush()
        cache.reject(block, ValueError("refused"))
        cache.flush()
        assert hit(cache, tokens) == 2 * SIZE
        assert len(list((tmp_path / "kv" / "blocks").iterdir())) == 2
        save(cache, tokens)
        cache.flush()
        assert hit(cache, tokens) == 3 * SIZE
        cache.check_integrity()


# --- budgets ---------------------------------------------------------------------------------


@settings(max_examples=examples(25))
@given(st.lists(contexts, min_size=1, max_size=10), st.integers(0, 600), st.integers(1, 4000))
def test_no_budget_is_ever_exceeded(
    tmp_path_factory: pytest.TempPathFactory, saved: list[NDArray[np.int32]], ram: int, quota: int
) -> None:
    directory = tmp_path_factory.mktemp("kv")
    with Cache(block_size=SIZE, ram=ram, disk=directory, disk_quota=quota) as cache:
        for tokens in saved:
            save(cache, tokens)
            assert cache.counters()["bytes_ram"] <= ram
            cache.flush()
            assert cache.counters()["bytes_disk"] <= quota
            assert sum(path.stat().st_size for path in directory.rglob("*.kvc")) <= quota
            assert hit(cache, tokens) <= len(tokens)
            # Every block is reachable, because its parent is stored, too.
            rows = cache.rows()
            keys = {row.key for row in rows}
            for row in rows:
                block = cache.stored(row.key)
                assert block is not None
                assert block.parent == NAMESPACE or block.parent in keys


def test_the_least_recently_used_leaves_are_evicted_first() -> None:
    a, b = np.arange(32, dtype=np.int32), np.arange(100, 132, dtype=np.int32)
    with Cache(block_size=SIZE, ram=5 * 64) as cache:
        save(cache, a)
        save(cache, b)
        hit(cache, a)  # b is now the older one
        save(cache, np.arange(200, 232, dtype=np.int32))
        assert hit(cache, a) == 32
        assert hit(cache, b) == 16
        assert cache.counters()["evictions_ram"] == 1


def test_pinned_blocks_are_not_evicted() -> None:
    tokens = np.arange(32, dtype=np.int32)
    with Cache(block_size=SIZE, ram=2 * 64) as cache:
        save(cache, tokens)
        with cache.lookup(NAMESPACE, tokens) as match:
            save(cache, np.arange(100, 132, dtype=np.int32))
            assert all(cache.load(block) is not None for block in match.blocks)
            assert [row.pins for row in cache.rows()] == [1, 1]
        save(cache, np.arange(100, 132, dtype=np.int32))
        assert hit(cache, tokens) == 0


@pytest.mark.parametrize("tier", ["ram", "disk"])
def test_bytes_are_evicted_on_request(tmp_path: Path, tier: str) -> None:
    with Cache(block_size=SIZE, disk=tmp_path, ram=0 if tier == "disk" else "1MiB") as cache:
        save(cache, np.arange(64, dtype=np.int32))
        cache.flush()
        before = cache.counters()[f"bytes_{tier}"]
        freed = cache.evict_bytes(65, tiers=(tier,))
        assert freed >= 65
        assert cache.counters()[f"bytes_{tier}"] == before - freed
        assert hit(cache, np.arange(64, dtype=np.int32)) == (64 if tier == "ram" else 48)
        with pytest.raises(erllama.OptionError, match="tiers"):
            cache.evict_bytes(1, tiers=("tape",))


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "touch", "evict"]), st.integers(0, 9)), max_size=60))
def test_the_lru_matches_a_simple_model(steps: list[tuple[str, int]]) -> None:
    lru = LeafLRU()
    plain: dict[int, int] = {}
    parent_of = {0: -1, **{i: (i - 1) // 2 for i in range(1, 10)}}

    def key(i: int) -> bytes:
        return bytes([i + 1])

    for now, (step, i) in enumerate(steps, 1):
        if step == "add" and i not in plain:
            lru.add(key(i), key(parent_of[i]), 10, now)
            plain[i] = now
        elif step == "remove":
            assert lru.remove(key(i)) == (10 if plain.pop(i, None) else 0)
        elif step == "touch" and i in plain:
            lru.touch(key(i), now)
            plain[i] = now
        elif step == "evict":
            leaves = [j for j in plain if not any(parent_of[k] == j for k in plain)]
            oldest = min(leaves, key=lambda j: plain[j], default=None)
            assert lru.oldest_leaf(()) == (None if oldest is None else key(oldest))
        assert lru.n_bytes == 10 * len(plain)


class GatedTier(FileTier):
    """A file tier that writes when its gate is opened."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, 10**9)
        self.gate = threading.Event()

    def write(self, block: Block, payload: memoryview) -> None:
        self.gate.wait()
        super().write(block, payload)


def test_saves_beyond_the_queue_are_dropped_and_counted(tmp_path: Path) -> None:
    tier = GatedTier(tmp_path)
    with Cache(block_size=SIZE, tiers=[tier], write_queue=200) as cache:
        save(cache, np.arange(10 * SIZE, dtype=np.int32))  # returns while the disk is blocked
        assert cache.counters()["bytes_pending"] <= 200
        assert cache.counters()["saves_dropped"] == 7
        assert hit(cache, np.arange(10 * SIZE, dtype=np.int32)) == 10 * SIZE, "RAM still holds them"
        tier.gate.set()
        cache.flush()
        assert cache.counters()["blocks_disk"] == 3
        tier.gate.clear()
        save(cache, np.arange(8 * SIZE, dtype=np.int32))
        save(cache, np.arange(11 * SIZE, dtype=np.int32)[: 10 * SIZE + 1])
        tier.gate.set()
        cache.flush()
        assert cache.counters()["blocks_disk"] == 6, "dropped saves are repeated when the queue has room"


# --- restarts and faults -------------------------------------------------------------------------


@settings(max_examples=examples(25))
@given(st.lists(contexts, min_size=1, max_size=5))
def test_everything_survives_a_restart(
    tmp_path_factory: pytest.TempPathFactory, saved: list[NDArray[np.int32]]
) -> None:
    directory = tmp_path_factory.mktemp("kv")
    with Cache(block_size=SIZE, disk=directory) as cache:
        for tokens in saved:
            save(cache, tokens)
    with Cache(block_size=SIZE, disk=directory) as cache:
        for tokens in saved:
            assert hit(cache, tokens) == len(tokens)
        assert cache.counters()["corrupt_files"] == cache.counters()["disk_errors"] == 0


def test_queued_saves_are_written_at_interpreter_exit(tmp_path: Path) -> None:
    program = """
        import sys
        sys.path.insert(0, sys.argv[2])
        import numpy as np
        from support.storage.blocks import save
        from erllama.cache import Cache
        from support.storage.blocks import SIZE
        cache = Cache(block_size=SIZE, disk=sys.argv[1])
        save(cache, np.arange(40, dtype=np.int32))
    """
    must_run(program, tmp_path, TESTS)
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        assert hit(cache, np.arange(40, dtype=np.int32)) == 40


def test_the_directory_and_its_files_are_private(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "kv"
    with Cache(block_size=SIZE, disk=root) as cache:
        save(cache, np.arange(40, dtype=np.int32))
    for path in [root, *root.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "another block"])
def test_a_damaged_file_is_a_counted_and_logged_miss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    tokens = np.arange(48, dtype=np.int32)
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        save(cache, tokens)
    chain = blocks_of(tokens)
    paths = {path.stem: path for path in tmp_path.rglob("*.kvc")}
    victim = paths[chain[1].key.hex()]
    content = victim.read_bytes()
    victim.write_bytes(
        {
            "flip": content[:-1] + bytes([content[-1] ^ 1]),
            "truncate": content[:-5],
            "empty": b"",
            "another block": paths[chain[2].key.hex()].read_bytes(),
        }[damage]
    )
    with Cache(block_size=SIZE, disk=tmp_path, ram=0) as cache, caplog.at_level(logging.WARNING, "erllama.cache"):
        with cache.lookup(NAMESPACE, tokens) as match:
            assert [cache.load(block) is not None for block in match.blocks] == [True, False, True]
        cache.flush()
        assert cache.counters()["corrupt_files"] == 1
        assert str(victim) in caplog.text
        assert not victim.exists(), "it is set aside"
        assert hit(cache, tokens) == 16
        save(cache, tokens)  # and can be saved again
        cache.flush()
        assert hit(cache, tokens) == 48
    assert len(list((tmp_path / "damaged").iterdir())) == 1


def test_a_missing_file_is_a_miss(tmp_path: Path) -> None:
    tokens = np.arange(48, dtype=np.int32)
    with Cache(block_size=SIZE, disk=tmp_path, ram=0) as cache:
        save(cache, tokens)
        cache.flush()
        for path in tmp_path.rglob("*.kvc"):
            path.unlink()
        with cache.lookup(NAMESPACE, tokens) as match:
            assert cache.load(match.blocks[0]) is None
        assert hit(cache, tokens) == 0
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        assert cache.rows() == []


def test_a_lost_or_damaged_index_is_rebuilt_from_the_files(tmp_path: Path) -> None:
    tokens = np.arange(40, dtype=np.int32)
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        save(cache, tokens)
    for damage in (None, b"this is no database", bytes(5000)):
        (tmp_path / "index.db").unlink()
        if damage is not None:
            (tmp_path / "index.db").write_bytes(damage)
        with Cache(block_size=SIZE, disk=tmp_path) as cache:
            assert cache.disk_error is None
            assert hit(cache, tokens) == 40


def test_a_database_of_a_newer_release_is_not_changed(tmp_path: Path) -> None:
    Cache(disk=tmp_path).close()
    connection = sqlite3.connect(tmp_path / "index.db")
    connection.execute("PRAGMA user_version=999")
    connection.close()
    content = (tmp_path / "index.db").read_bytes()
    with Cache(disk=tmp_path) as cache:
        assert isinstance(cache.disk_error, erllama.CacheError)
        assert "999" in str(cache.disk_error)
        save(cache, np.arange(40, dtype=np.int32))
        assert hit(cache, np.arange(40, dtype=np.int32)) > 0
    assert (tmp_path / "index.db").read_bytes() == content


@pytest.mark.parametrize("where", ["/proc/erllama", "/dev/null/kv", "/dev/null"])
def test_an_unusable_directory_disables_only_the_disk_tier(where: str, caplog: pytest.LogCaptureFixture) -> None:
    with Cache(block_size=SIZE, disk=where) as cache:
        assert isinstance(cache.disk_error, erllama.CacheError)
        assert where in str(cache.disk_error)
        assert where in caplog.text
        assert cache.counters()["disk_errors"] == 1
        save(cache, np.arange(40, dtype=np.int32))
        assert hit(cache, np.arange(40, dtype=np.int32)) == 40


def test_a_symbolic_link_as_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with Cache(disk=tmp_path / "link") as cache:
        assert "link" in str(cache.disk_error)
    assert list((tmp_path / "real").iterdir()) == []


def test_a_full_disk_drops_saves_until_it_has_room(tmp_path: Path) -> None:
    """A limit on file size replaces the full disk, so that writes fail half-way."""
    program = """
        import resource, sys
        sys.path.insert(0, sys.argv[2])
        import numpy as np
        from support.storage.blocks import hit, save
        from erllama.cache import Cache
        from support.storage.blocks import SIZE
        tokens = np.arange(48, dtype=np.int32)
        with Cache(block_size=SIZE, disk=sys.argv[1]) as cache:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
            save(cache, tokens, n_bytes=320_000)
            cache.flush()
            assert hit(cache, tokens) == 48, "RAM still serves"
            counters = cache.counters()
            assert counters["disk_errors"] >= 1 and counters["blocks_disk"] == 0, counters
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
            other = tokens + 100
            save(cache, other, n_bytes=320_000)
            cache.flush()
            assert cache.counters()["blocks_disk"] == 3
    """
    must_run(program, tmp_path, TESTS)
    assert len(list(tmp_path.rglob("*.kvc"))) == 3
    assert list((tmp_path / "partial").iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_leftovers_of_a_killed_process_are_cleaned_up(tmp_path: Path) -> None:
    program = """
        import os, signal, sys, threading
        sys.path.insert(0, sys.argv[2])
        import numpy as np
        from support.storage.blocks import save
        from erllama.cache import Cache
        from support.storage.blocks import SIZE
        cache = Cache(block_size=SIZE, disk=sys.argv[1])
        threading.Timer(float(sys.argv[3]), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        i = 0
        while True:
            save(cache, np.arange(i, i + 64, dtype=np.int32), n_bytes=64_000)
            i += 1000
    """
    for delay in (0.02, 0.05, 0.1, 0.15):
        finished = run_python(program, tmp_path, TESTS, delay)
        assert finished.returncode == -9
    with Cache(block_size=SIZE, disk=tmp_path, ram=0) as cache:
        assert list((tmp_path / "partial").iterdir()) == []
        rows = cache.rows()
        assert {row.key.hex() for row in rows} == {path.stem for path in tmp_path.rglob("*.kvc")}
        for row in rows:
            block = cache.stored(row.key)
            assert block is not None
            assert cache.load(block) is not None
        assert cache.counters()["corrupt_files"] == 0


def test_two_processes_can_share_a_directory(tmp_path: Path) -> None:
    mine, theirs = np.arange(40, dtype=np.int32), np.arange(100, 140, dtype=np.int32)
    program = """
        import sys
        sys.path.insert(0, sys.argv[2])
        import numpy as np
        from support.storage.blocks import hit, save
        from erllama.cache import Cache
        from support.storage.blocks import SIZE
        with Cache(block_size=SIZE, disk=sys.argv[1]) as cache:
            print(hit(cache, np.arange(40, dtype=np.int32)))
            save(cache, np.arange(100, 140, dtype=np.int32))
    """
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        save(cache, mine)
        cache.flush()
        assert must_run(program, tmp_path, TESTS).strip() == "40"
        assert hit(cache, theirs) == 40


# --- lifetimes and options ----------------------------------------------------------------------------


def test_a_dropped_cache_holds_no_thread(tmp_path: Path) -> None:
    cache = Cache(block_size=SIZE, disk=tmp_path)
    save(cache, np.arange(32, dtype=np.int32))
    cache.flush()
    wait_until(lambda: not any(t.name == "erllama-cache-writer" for t in threading.enumerate()))
    cache.close()
    cache.close()
    assert hit(cache, np.arange(32, dtype=np.int32)) == 0
    del cache
    gc.collect()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ram": "2 GIBS"}, "ram='2 GIBS'"),
        ({"ram": -1}, "negative"),
        ({"ram": 1.5}, "ram=1.5"),
        ({"disk_quota": "lots"}, "disk_quota"),
        ({"disk": "kv", "disk_quota": 0}, "disk_quota=0"),
        ({"disk": 7}, "disk=7"),
        ({"disk": ""}, "disk=''"),
        ({"block_size": 100}, "power of two"),
        ({"block_size": 8}, "at least 16"),
        ({"block_size": "256"}, "integer"),
        ({"dsk": "kv"}, "did you mean 'disk'"),
        ({"write_queue": None}, "write_queue"),
    ],
)
def test_wrong_options_raise_typed_errors(options: dict[str, object], words: str) -> None:
    with pytest.raises(erllama.OptionError) as caught:
        Cache(**options)  # type: ignore[arg-type]
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("0", 0), ("1KiB", 1024), ("2 MB", 2_000_000), ("1.5GiB", 3 * 2**29), ("7b", 7), (4096, 4096)],
)
def test_sizes_are_parsed_with_units(text: str | int, n_bytes: int) -> None:
    assert Cache(ram=text).ram_budget == n_bytes


def test_the_cache_needs_no_libllama() -> None:
    must_run(
        """
        import sys
        sys.modules["erllama.llama_ffi"] = None
        import numpy as np
        import erllama
        from erllama.cache import Block, SaveReason, namespace_key, token_bytes
        cache = erllama.Cache()
        namespace = namespace_key({"model": "m"})
        tokens = np.arange(300)
        first = Block.following(namespace, namespace, 0, token_bytes(tokens[:256]), SaveReason.COLD)
        cache.save(first, np.zeros(10, np.uint8))
        assert cache.lookup(namespace, tokens).n_tokens == 256
        assert not any(name.startswith("erllama.llama_ffi.") for name in sys.modules)
        """
    )


def test_exit_closes_tiers_that_become_busy_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of remote tiers add and remove them while the interpreter exits."""

    class Busy:
        def __init__(self) -> None:
            self.n_closed = 0

        @property
        def close(self) -> Callable[[], None]:
            busy.add(Busy())
            return self._close

        def _close(self) -> None:
            self.n_closed += 1

    first = [Busy(), Busy()]
    busy = set(first)
    for name, open_ones in (("busy_tiers", busy), ("_open_caches", set()), ("_open_tier_sets", set())):
        monkeypatch.setattr(store, name, open_ones)
    store.close_all()
    assert [tier.n_closed for tier in first] == [1, 1]


def test_namespaces_depend_on_every_part() -> None:
    parts = {"model": "a", "kv_type": "f16", "n": 1}
    keys = {namespace_key(parts), *(namespace_key({**parts, name: "x"}) for name in parts), namespace_key({})}
    assert len(keys) == 5
    assert namespace_key(dict(reversed(parts.items()))) == namespace_key(parts)
