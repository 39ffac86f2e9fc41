"""Pinned prefixes survive quotas, eviction, gc and restarts, within a bound, until their time to live ends."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama.cache import Cache, Pin
from erllama.cache.admin.archive import export_blocks, import_blocks
from erllama.cache.admin.maintenance import CacheFiles
from erllama.cache.blocks.pins import PinRecord, admitted_pins, pack_blocks, unpack_blocks
from support.storage.blocks import NAMESPACE, OTHER, SIZE, blocks_of, hit, save
from support.storage.processes import assert_consistent, bytes_in, killed_at_end, output_of, start_python
from support.threads import wait_until

BYTES = 640  # of a payload; about 900 in a file
QUOTA = 20_000


def ids(first: int, n: int = 40) -> NDArray[np.int32]:
    return np.arange(first, first + n, dtype=np.int32)


def disk_cache(root: Path, **options: object) -> Cache:
    usual: dict[str, object] = {"ram": 0, "disk": root, "disk_quota": QUOTA, "block_size": SIZE, "watch": False}
    return Cache(**{**usual, **options})  # type: ignore[arg-type]


def pin(cache: Cache, tokens: NDArray[np.int32], name: str = "a", **options: object) -> Pin:
    usual: dict[str, object] = {"model": "m", "model_key": NAMESPACE, "name": name}
    return cache.pin_prefix(NAMESPACE, tokens, **{**usual, **options})  # type: ignore[arg-type]


def save_and_pin(cache: Cache, tokens: NDArray[np.int32], name: str = "a", **options: object) -> Pin:
    save(cache, tokens, n_bytes=BYTES)
    return pin(cache, tokens, name, **options)


def fill(cache: Cache, n: int = 30) -> None:
    """Save more than the quota holds."""
    for i in range(n):
        save(cache, ids(10_000 + 1000 * i), n_bytes=BYTES)
    cache.flush()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with disk_cache(tmp_path / "kv") as found:
        yield found


# --- what pins survive ------------------------------------------------------------------------------


def test_a_pinned_prefix_survives_quota_eviction_gc_and_restart(tmp_path: Path) -> None:
    tokens, other = ids(0), ids(500)
    with disk_cache(tmp_path) as cache:
        save(cache, other, n_bytes=BYTES)
        made = save_and_pin(cache, tokens)
        assert made.complete
        assert (made.name, made.n_tokens, made.n_stored, made.expires) == ("a", 40, 40, None)
        fill(cache)
        assert hit(cache, tokens) == 40
        assert hit(cache, other) == 0, "the quota was never reached"
        assert cache.evict_bytes(10**9, ("disk",)) > 0
        cache.gc()
        assert {row.n_tokens for row in cache.rows()} == {SIZE, 8}
        assert hit(cache, tokens) == 40
    with disk_cache(tmp_path) as cache:
        assert cache.pins() == [made]
        cache.gc()
        fill(cache)
        assert hit(cache, tokens) == 40
        cache.check_integrity()
    assert bytes_in(tmp_path) <= QUOTA


def test_other_processes_of_the_directory_do_not_evict_pinned_blocks(tmp_path: Path) -> None:
    with disk_cache(tmp_path) as cache, disk_cache(tmp_path) as other:
        save_and_pin(cache, ids(0))
        other.evict_bytes(10**9, ("disk",))
        fill(other)
        other.gc()
        assert hit(cache, ids(0)) == 40
        assert [each.name for each in other.pins()] == ["a"]
        assert other.unpin("a")
        assert cache.pins() == []
        cache.evict_bytes(10**9, ("disk",))
        other.rows()  # reads the changes of the other process
        assert hit(other, ids(0)) == 0


def test_shared_blocks_are_protected_until_their_last_pin_ends(cache: Cache) -> None:
    shared = ids(0, 2 * SIZE)
    long_a, long_b = np.append(shared, ids(100, SIZE)), np.append(shared, ids(200, SIZE))
    save_and_pin(cache, long_a, "a")
    save_and_pin(cache, long_b, "b")
    assert cache.counters()["bytes_pinned"] < sum(each.n_bytes for each in cache.pins())
    assert cache.unpin("a")
    cache.evict_bytes(10**9, ("disk",))
    assert hit(cache, long_a) == 2 * SIZE
    assert hit(cache, long_b) == 3 * SIZE
    assert cache.unpin("b")
    cache.evict_bytes(10**9, ("disk",))
    assert hit(cache, long_b) == 0


def test_a_pinned_tail_outlives_the_block_that_contains_it(cache: Cache) -> None:
    tokens = ids(0, SIZE + 5)
    save_and_pin(cache, tokens)
    save(cache, ids(0, 3 * SIZE), n_bytes=BYTES)  # supersedes the tail
    cache.flush()
    cache.evict_bytes(10**9, ("disk",))
    assert hit(cache, tokens) == hit(cache, tokens, whole=True) == SIZE + 5
    assert hit(cache, ids(0, 3 * SIZE)) == SIZE + 5


def test_another_process_does_not_supersede_a_pinned_tail(tmp_path: Path) -> None:
    tokens = ids(0, SIZE + 5)
    with disk_cache(tmp_path) as cache, disk_cache(tmp_path) as other:
        save(cache, tokens, n_bytes=BYTES)
        cache.flush()
        other.rows()
        pin(cache, tokens)
        save(other, ids(0, 3 * SIZE), n_bytes=BYTES)
        other.flush()
        assert hit(cache, tokens, whole=True) == SIZE + 5


def test_memory_that_cannot_be_cut_keeps_both_resume_points(cache: Cache) -> None:
    """The prompt itself resumes before its last token, and prompts that continue it after that token."""
    tokens = ids(0, SIZE + 9)
    save(cache, tokens[:-1], n_bytes=BYTES, trimmable=False)
    save(cache, tokens, n_bytes=BYTES, trimmable=False)
    save(cache, ids(0, 3 * SIZE), n_bytes=BYTES, trimmable=False)
    save(cache, tokens[:-1], n_bytes=BYTES, trimmable=False)
    save(cache, tokens, n_bytes=BYTES, trimmable=False)
    assert pin(cache, tokens, whole=True).complete
    cache.evict_bytes(10**9, ("disk",))
    assert hit(cache, tokens[:-1], whole=True) == SIZE + 8
    assert hit(cache, np.append(tokens, 7), whole=True) == SIZE + 9


def test_without_a_directory_pins_are_in_ram() -> None:
    with Cache(ram=QUOTA, block_size=SIZE) as cache:
        save_and_pin(cache, ids(0))
        fill(cache)
        cache.evict_bytes(10**9)
        assert hit(cache, ids(0)) == 40
        cache.check_integrity()
        assert cache.unpin("a")
        assert not cache.unpin("a")
        cache.evict_bytes(10**9)
        assert hit(cache, ids(0)) == 0


def test_a_prefix_that_only_ram_has_is_written_to_the_disk(tmp_path: Path) -> None:
    with disk_cache(tmp_path, ram="1MiB") as cache:
        save(cache, ids(0), n_bytes=BYTES)
        cache.flush()
        cache.evict_bytes(10**9, ("disk",))
        assert pin(cache, ids(0)).complete
    with disk_cache(tmp_path) as cache:
        assert hit(cache, ids(0)) == 40


def test_a_disk_tier_comes_before_a_directory_in_memory(tmp_path: Path) -> None:
    with disk_cache(tmp_path / "d", ram_file=tmp_path / "f", ram_file_quota=QUOTA) as cache:
        save_and_pin(cache, ids(0))
        cache.evict_bytes(10**9, ("ram_file", "disk"))
        assert {row.tier for row in cache.rows()} == {"disk"}
    with Cache(ram=0, ram_file=tmp_path / "f", block_size=SIZE, watch=False) as cache:
        save_and_pin(cache, ids(0))
        cache.evict_bytes(10**9, ("ram_file",))
        assert hit(cache, ids(0)) == 40


def test_all_directories_of_a_tier_protect_a_pin(tmp_path: Path) -> None:
    roots = {tmp_path / "a": QUOTA, tmp_path / "b": QUOTA}
    with disk_cache(tmp_path, disk=roots) as cache:
        save_and_pin(cache, ids(0, 6 * SIZE))
        assert all(len(list((root / "blocks").iterdir())) for root in roots)
        cache.evict_bytes(10**9, ("disk",))
        assert hit(cache, ids(0, 6 * SIZE)) == 6 * SIZE
        cache.check_integrity()
    for root in roots:
        with CacheFiles(root) as files:
            assert [each.name for each in files.pins()] == ["a"]


# --- names ------------------------------------------------------------------------------------------


def test_a_pin_of_the_same_name_is_replaced(cache: Cache) -> None:
    save_and_pin(cache, ids(0))
    save_and_pin(cache, ids(500), expires=time.time() + 100)
    (found,) = cache.pins()
    assert found.expires is not None
    cache.evict_bytes(10**9, ("disk",))
    assert (hit(cache, ids(0)), hit(cache, ids(500))) == (0, 40)


@pytest.mark.parametrize("name", ["", "x" * 201, "two\nlines", 7])
def test_names_that_are_not_printable_texts_are_refused(cache: Cache, name: object) -> None:
    save(cache, ids(0))
    with pytest.raises(erllama.OptionError, match="printable"):
        pin(cache, ids(0), name)  # type: ignore[arg-type]


# --- the bound --------------------------------------------------------------------------------------


def test_a_pin_over_the_bound_is_refused_with_figures(tmp_path: Path) -> None:
    with disk_cache(tmp_path, pin_quota=3000) as cache:
        save_and_pin(cache, ids(0))
        save(cache, ids(500), n_bytes=BYTES)
        with pytest.raises(
            erllama.PinQuotaExceeded, match=r"would protect \d+ bytes .* 3000; unpin others"
        ) as error:
            pin(cache, ids(500), "b")
        assert error.value.quota == 3000 < error.value.n_bytes < 6000
        assert [each.name for each in cache.pins()] == ["a"]
        assert cache.counters()["pins_refused"] == 1
        pin(cache, ids(500), "a")  # in the place of the other one
        assert cache.unpin("a")
        pin(cache, ids(0), "b")


def test_the_default_bound_is_half_of_the_quota(tmp_path: Path) -> None:
    with disk_cache(tmp_path) as cache:
        for i in range(3):
            save_and_pin(cache, ids(1000 * i), f"{i}")
        with pytest.raises(erllama.PinQuotaExceeded) as error:
            save_and_pin(cache, ids(3000), "3")
        assert error.value.quota == QUOTA // 2
        assert cache.counters()["bytes_pinned"] <= QUOTA // 2


def test_saves_are_dropped_and_counted_where_pins_take_all_room(tmp_path: Path) -> None:
    with disk_cache(tmp_path, disk_quota=2800, pin_quota=2800) as cache:
        save_and_pin(cache, ids(0))
        dropped = cache.counters()["saves_dropped"]
        fill(cache, 3)
        assert cache.counters()["saves_dropped"] > dropped
        assert hit(cache, ids(0)) == 40
        assert cache.evict_bytes(10**9, ("disk",)) == 0
        cache.gc()
    with Cache(ram=2000, pin_quota=2000, block_size=SIZE) as cache:
        save_and_pin(cache, ids(0))
        fill(cache, 3)
        assert hit(cache, ids(0)) == 40


def test_a_smaller_quota_ends_the_protection_of_the_youngest_pins(tmp_path: Path) -> None:
    with disk_cache(tmp_path) as cache:
        save_and_pin(cache, ids(0), "old")
        save_and_pin(cache, ids(500), "young")
    with disk_cache(tmp_path, disk_quota=6000) as cache:
        assert [(each.name, each.complete) for each in cache.pins()] == [("old", True), ("young", False)]
        fill(cache)
        assert (hit(cache, ids(0)), hit(cache, ids(500))) == (40, 0)
    assert bytes_in(tmp_path) <= 6000


def test_a_pin_beyond_a_smaller_quota_counts_while_an_older_one_is_lost(tmp_path: Path) -> None:
    with disk_cache(tmp_path) as cache:
        save_and_pin(cache, ids(0), "old")
        save_and_pin(cache, ids(500), "young")
    with disk_cache(tmp_path, pin_quota=3500) as cache:
        assert [each.complete for each in cache.pins()] == [True, False]
        for each in blocks_of(ids(0)):
            (tmp_path / "blocks" / f"{each.key.hex()}.kvc").write_bytes(b"?")
        with cache.lookup(NAMESPACE, ids(0)) as match:
            assert [cache.load(block) for block in match.blocks] == [None] * 3
        assert [each.complete for each in cache.pins()] == [False, True]
        save(cache, ids(0), n_bytes=BYTES)
        cache.flush()
        assert [each.complete for each in cache.pins()] == [True, False]


def test_writes_to_a_full_tier_compute_once_what_pins_protect(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def count(*arguments: object) -> object:
        calls.append(arguments)
        return admitted_pins(*arguments)  # type: ignore[arg-type]

    save_and_pin(cache, ids(0), "a")
    save_and_pin(cache, ids(0, SIZE + 5), "b", expires=time.time() + 1000)
    monkeypatch.setattr("erllama.cache.catalog.pin_book.admitted_pins", count)
    fill(cache)
    assert len(calls) <= 1
    assert hit(cache, ids(0)) == 40


def test_a_larger_prefix_than_the_tier_holds_is_refused(tmp_path: Path) -> None:
    with disk_cache(tmp_path, ram="1MiB", disk_quota=3000) as cache:
        save(cache, ids(0, 200), n_bytes=BYTES)
        with pytest.raises(erllama.PinQuotaExceeded):
            pin(cache, ids(0, 200))
        assert cache.pins() == []


def test_a_prefix_that_is_not_stored_is_refused(cache: Cache) -> None:
    save(cache, ids(0), n_bytes=BYTES)
    with pytest.raises(erllama.PinError, match="40 of the 50 tokens"):
        pin(cache, ids(0, 50))
    with Cache(ram=0) as none, pytest.raises(erllama.PinError, match="neither"):
        pin(none, ids(0))


# --- expiry -----------------------------------------------------------------------------------------


def test_an_expired_pin_protects_no_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with disk_cache(tmp_path) as cache:
        save_and_pin(cache, ids(0), expires=time.time() + 1000)
        cache.evict_bytes(10**9, ("disk",))
        assert hit(cache, ids(0)) == 40
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 1001)
        assert cache.pins() == []
        assert cache.counters()["bytes_pinned"] == 0
        cache.evict_bytes(10**9, ("disk",))
        assert hit(cache, ids(0)) == 0
        cache.gc()
    with closing(sqlite3.connect(tmp_path / "index.db")) as index:
        assert index.execute("SELECT count(*) FROM pins").fetchone() == (0,)


def test_expired_pins_of_ram_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    with Cache(ram=QUOTA, block_size=SIZE) as cache:
        save_and_pin(cache, ids(0), "a", expires=time.time() + 1000)
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 1001)
        save_and_pin(cache, ids(500), "b")
        (root,) = cache._catalog.ledger("ram").roots
        assert [each.name for each in cache._catalog.pin_book.pins(root)] == ["b"]


# --- damage -----------------------------------------------------------------------------------------


def test_a_damaged_pinned_block_is_dropped_and_shown_until_repaired(tmp_path: Path) -> None:
    tokens = ids(0, 3 * SIZE)
    with disk_cache(tmp_path) as cache:
        save_and_pin(cache, tokens)
        second = blocks_of(tokens)[1]
        path = tmp_path / "blocks" / f"{second.key.hex()}.kvc"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        with cache.lookup(NAMESPACE, tokens) as match:
            assert cache.load(match.blocks[1]) is None
        assert cache.counters()["corrupt_files"] == 1
        (found,) = cache.pins()
        assert (found.complete, found.n_stored) == (False, SIZE)
        cache.gc()
        cache.evict_bytes(10**9, ("disk",))
        save(cache, tokens, n_bytes=BYTES)  # the next computation
        cache.flush()
        assert cache.pins()[0].complete
        cache.evict_bytes(10**9, ("disk",))
        assert hit(cache, tokens) == 3 * SIZE


@pytest.mark.parametrize("change", ["blocks = x'00'", "model = CAST(x'ff' AS TEXT)", "n_tokens = 0"])
def test_a_damaged_pin_is_removed_and_others_stay(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    with disk_cache(tmp_path) as cache:
        save_and_pin(cache, ids(0), "bad")
        good = save_and_pin(cache, ids(500), "good")
        cache.remember_text(NAMESPACE, b"text", ids(0, 3))
    with closing(sqlite3.connect(tmp_path / "index.db", isolation_level=None)) as index:
        index.execute(f"UPDATE pins SET {change} WHERE name = 'bad'")
    with disk_cache(tmp_path) as cache:
        assert cache.pins() == [good]
        assert cache.longest_text(NAMESPACE, b"text") is not None
        assert hit(cache, ids(0)) == 40
    assert "removed damaged rows of pins: 1" in caplog.text
    assert not list(tmp_path.glob("*.damaged-*"))
    with closing(sqlite3.connect(tmp_path / "index.db")) as index:
        assert index.execute("SELECT name FROM pins").fetchall() == [("good",)]


def test_a_pin_that_is_damaged_while_the_cache_is_open_costs_no_other(tmp_path: Path) -> None:
    with disk_cache(tmp_path) as cache, disk_cache(tmp_path) as other:
        save_and_pin(cache, ids(0), "bad")
        good = save_and_pin(cache, ids(500), "good")
        with closing(sqlite3.connect(tmp_path / "index.db", isolation_level=None)) as index:
            index.execute("UPDATE pins SET blocks = x'00' WHERE name = 'bad'")
        assert other.pins() == [good]
    assert not list(tmp_path.glob("*.damaged-*"))


# --- older directories, copies and archives -----------------------------------------------------------


def test_an_index_of_version_5_is_migrated_with_its_texts(tmp_path: Path) -> None:
    with disk_cache(tmp_path) as cache:
        save(cache, ids(0), n_bytes=BYTES)
        cache.remember_text(NAMESPACE, b"text", ids(0, 3))
    with closing(sqlite3.connect(tmp_path / "index.db", isolation_level=None)) as index:
        index.execute("DROP TABLE pins")
        index.execute("PRAGMA user_version=5")
    with disk_cache(tmp_path, read_only=True) as cache:
        assert cache.pins() == []
        assert cache.longest_text(NAMESPACE, b"text") is not None
    with disk_cache(tmp_path) as cache:
        assert cache.longest_text(NAMESPACE, b"text") is not None
        assert pin(cache, ids(0)).complete
    with closing(sqlite3.connect(tmp_path / "index.db")) as index:
        assert index.execute("PRAGMA user_version").fetchone() == (6,)


def test_an_archive_has_the_blocks_of_pins_and_no_pins(tmp_path: Path) -> None:
    with disk_cache(tmp_path / "a") as cache:
        save_and_pin(cache, ids(0))
    with disk_cache(tmp_path / "b"):
        pass
    with CacheFiles(tmp_path / "a") as a, CacheFiles(tmp_path / "b") as b:
        with (tmp_path / "tar").open("wb") as out:
            export_blocks(a, out)
        with (tmp_path / "tar").open("rb") as archive:
            assert import_blocks(b, archive).n_blocks == 3
        assert b.pins() == []
        assert a.verify() == b.verify() == []


def test_maintenance_spares_pinned_blocks_unless_all_is_removed(tmp_path: Path) -> None:
    with disk_cache(tmp_path) as cache:
        save_and_pin(cache, ids(0))
        save(cache, ids(500), n_bytes=BYTES)
    with CacheFiles(tmp_path) as files:
        assert files.pinned().n_blocks == 3
        assert files.gc(0).removed.n_blocks == 3
        assert files.evict().n_blocks == files.shrink(0).n_blocks == 0
        assert files.evict(used_before=time.time_ns()).n_blocks == 0
        (found,) = files.pins()
        assert found.complete
        assert files.evict(pinned=True).n_blocks == 3
        assert files.pins()[0].n_stored == 0
        assert files.unpin("a")
        assert not files.unpin("a")


def test_pins_of_a_read_only_directory_have_no_effect(tmp_path: Path) -> None:
    with disk_cache(tmp_path / "a") as cache:
        save_and_pin(cache, ids(0))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with disk_cache(tmp_path, disk=tmp_path / "b", read_only=True, ram="1MiB") as cache:
        assert cache.pins() == []
        assert not cache.unpin("a")
        assert hit(cache, ids(0)) == 40
        pin(cache, ids(0), "b")  # in RAM
        assert [each.name for each in cache.pins()] == ["b"]


# --- warming ----------------------------------------------------------------------------------------


def in_ram(cache: Cache) -> int:
    return int(cache.counters()["bytes_ram"])


def test_the_pins_of_a_model_are_read_into_ram(tmp_path: Path) -> None:
    with disk_cache(tmp_path) as cache:
        save_and_pin(cache, ids(0), "a")
        save_and_pin(cache, ids(500), "b", model_key=OTHER)
        fill(cache, 2)
    with disk_cache(tmp_path, ram="1MiB") as cache:
        cache.warm_pins(NAMESPACE)
        wait_until(lambda: in_ram(cache) == 3 * BYTES)
        assert cache.flush()
        cache.evict_bytes(10**9, ("disk",))
        with cache.lookup(NAMESPACE, ids(0)) as match:
            assert [cache.load(block).tier for block in match.blocks] == ["ram"] * 3  # type: ignore[union-attr]
        cache.warm_pins(NAMESPACE)
        assert in_ram(cache) == 3 * BYTES


def test_warming_reads_at_most_what_ram_holds(tmp_path: Path) -> None:
    with disk_cache(tmp_path) as cache:
        save_and_pin(cache, ids(0, 6 * SIZE))
    with disk_cache(tmp_path, ram=2 * BYTES + 500) as cache:
        cache.warm_pins(NAMESPACE)
        wait_until(lambda: in_ram(cache) > 0)
        cache.flush()
        wait_until(lambda: not cache._queue._tasks)
        assert cache.counters()["evictions_ram"] == 0


def test_a_directory_in_memory_is_warmed_where_there_is_no_ram_tier(tmp_path: Path) -> None:
    with disk_cache(tmp_path / "d") as cache:
        save_and_pin(cache, ids(0))
    with disk_cache(tmp_path / "d", ram_file=tmp_path / "f", ram_file_quota=QUOTA) as cache:
        cache.warm_pins(NAMESPACE)
        wait_until(lambda: cache.counters()["blocks_ram_file"] == 3)


# --- threads and processes ----------------------------------------------------------------------------


def test_pins_made_while_others_save_and_evict_are_whole(tmp_path: Path) -> None:
    stop, failures = threading.Event(), []
    with (
        disk_cache(tmp_path, ram=4000, disk_quota=60_000) as cache,
        disk_cache(tmp_path, disk_quota=60_000) as other,
    ):

        def churn() -> None:
            n = 0
            while not stop.is_set():
                try:
                    save(other, ids(50_000 + 100 * n), n_bytes=BYTES)
                    other.evict_bytes(5000, ("disk",))
                except Exception as error:
                    failures.append(error)
                n += 1

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for i in range(5):
                for _ in range(20):
                    save(cache, ids(1000 * i), n_bytes=BYTES)
                    try:
                        assert pin(cache, ids(1000 * i), f"{i}").complete
                        break
                    except erllama.PinQuotaExceeded:
                        raise
                    except erllama.PinError:
                        continue  # evicted between the save and the pin
                else:
                    pytest.fail("the prefix was never stored long enough")
        finally:
            stop.set()
            thread.join()
        assert failures == []
        assert [hit(cache, ids(1000 * i)) for i in range(5)] == [40] * 5
        cache.check_integrity()


KILLED = """
    root, n = Path(sys.argv[1]), 0
    cache = Cache(block_size=SIZE, ram=0, disk=root, disk_quota=60_000, watch=False)
    print("ready", flush=True)
    while True:
        for name in "abc":
            tokens = np.arange(100 * n, 100 * n + 40, dtype=np.int32) % 997
            save(cache, tokens)
            cache.pin_prefix(NAMESPACE, tokens, name=name, model="m", model_key=NAMESPACE)
            n += 1
"""


def test_a_process_killed_while_it_pins_leaves_whole_pins(tmp_path: Path) -> None:
    for round in range(4):
        child = start_python(KILLED, tmp_path)
        with killed_at_end(child):
            assert child.stdout is not None
            child.stdout.readline()
            time.sleep(0.05 + 0.13 * round)
            child.send_signal(signal.SIGKILL)
            child.wait()
        with disk_cache(tmp_path, disk_quota=60_000) as cache:
            assert_consistent(tmp_path, 60_000, cache)
            assert all(each.complete for each in cache.pins())
            cache.evict_bytes(10**9, ("disk",))
            assert all(each.complete for each in cache.pins())
            assert sum(row.n_tokens for row in cache.rows()) <= 3 * 40
            with CacheFiles(tmp_path) as files:
                assert all(each.complete for each in files.pins())


WARM = """
    with Cache(block_size=SIZE, ram=0, disk=Path(sys.argv[1]), disk_quota=20_000, watch=False) as cache:
        print(check(cache, np.arange(40, dtype=np.int32))[0], [pin.name for pin in cache.pins()])
"""


def test_another_process_finds_the_pins_of_a_directory(tmp_path: Path) -> None:
    code = WARM.replace("check(cache, np.arange(40, dtype=np.int32))[0]", "len(cache.rows())")
    with disk_cache(tmp_path) as cache:
        save_and_pin(cache, ids(0))
        assert output_of(start_python(code, tmp_path)).split() == ["3", "['a']"]


# --- records ----------------------------------------------------------------------------------------


def test_blocks_of_records_survive_packing() -> None:
    record = PinRecord("a", "m", NAMESPACE, 40, (), 0.0, None)
    blocks = tuple((block.key, block.end) for block in blocks_of(ids(0)))
    assert (
        unpack_blocks(pack_blocks(unpack_blocks(b"".join(k + e.to_bytes(8, "little") for k, e in blocks))))
        == blocks
    )
    for raw in (b"", b"x", bytes(39), bytes(32) + b"\xff" * 8):
        with pytest.raises(ValueError):
            unpack_blocks(raw)
    assert admitted_pins([record], {}, 0, 1.0)[0] == [record]
