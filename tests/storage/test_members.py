"""Caches of models in processes of their own: the caller's cache sees and counts what they save, once.

Mostly in one process: two caches on the same directories stand for the caller and the process of a model.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama.cache import Block, Cache, FileTier, MemoryUsage, Row, TierStatus
from erllama.cache.pipeline import memory_directory, tier_writer
from erllama.cache.sharing.members import MemberReport
from support.faulty.tiers import SmallTier
from support.storage.blocks import NAMESPACE, SIZE, blocks_of, hit, payload_of, save
from support.storage.members import Live, Member, sent, through_message
from support.storage.processes import killed_at_end, start_python
from support.subprocesses import must_run
from support.threads import in_threads, wait_until

MANY = np.arange(10 * SIZE, dtype=np.int32)
TAIL = np.arange(5, dtype=np.int32)
FILE_BYTES = 64 + 264  # of a full block with the payload of `save`
SOON = 120.0  # seconds; a tail that is not hurried waits longer, see `tails_wait`


@pytest.fixture(autouse=True)
def tails_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tail that is not hurried wait longer than any test, however busy the machine is."""
    monkeypatch.setattr(tier_writer, "TAIL_DELAY_SECONDS", 600.0)


class Pair(NamedTuple):
    """The caller's cache, and that of the process of a model."""

    mine: Cache
    theirs: Cache
    member: Member


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    """A function that opens a cache, opens it again as another process would, and adds that as a member."""
    with ExitStack() as stack:

        def opened(**options: object) -> Pair:
            mine = stack.enter_context(Cache(block_size=SIZE, **options))  # type: ignore[arg-type]
            spec = sent(mine.share_with_process(ram_file=tmp_path / "memory"))
            theirs = stack.enter_context(Cache.of_spec(spec))
            member = Member(theirs)
            mine.add_member(member)
            return Pair(mine, theirs, member)

        yield opened


def rows_by_tier(cache: Cache) -> dict[str, int]:
    names = [row.tier for row in cache.rows()]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def park(cache: Cache, tokens: NDArray[np.int32] = MANY, n_bytes: int = 100) -> Live:
    """Attach a live tier that has the blocks of a context."""
    live = Live(10**6)
    cache.attach(live)
    for block in blocks_of(tokens):
        assert cache.report_stored(live, block, n_bytes)
    return live


# --- what the other process saves ------------------------------------------------------------------


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_what_the_other_process_saves_is_found_and_counted_once(
    shared: Callable[..., Pair], tmp_path: Path, disk: bool
) -> None:
    mine, theirs, _ = shared(disk=tmp_path / "d" if disk else None)
    save(theirs, MANY)
    theirs.flush()
    files = ("ram_file", "disk") if disk else ("ram_file",)
    assert rows_by_tier(mine) == dict.fromkeys(files, 10)
    counters = mine.counters()
    for name in files:
        assert (counters[f"blocks_{name}"], counters[f"bytes_{name}"]) == (10, 10 * FILE_BYTES)
    assert counters["bytes_ram"] == 0
    assert counters["saves_cold"] == 10
    assert [status.tier for status in mine.tiers()] == ["ram", *files]
    assert mine.verify() == []
    mine.check_integrity()
    assert hit(mine, MANY) == len(MANY)


def test_a_block_is_found_by_its_key_as_soon_as_it_is_saved(shared: Callable[..., Pair]) -> None:
    mine, theirs, _ = shared()
    first, second = blocks_of(MANY)[:2]
    for block, find in ((first, mine.stored), (second, mine.context)):
        mine.rows()  # polls, and the next poll of its own accord is a moment later
        assert not mine.contains(block.key)
        theirs.save(block, payload_of(block))
        theirs.flush()
        assert find(block.key) is not None
        assert mine.contains(block.key)


def test_texts_of_the_other_process_are_found(shared: Callable[..., Pair]) -> None:
    mine, theirs, _ = shared()
    theirs.remember_text(NAMESPACE, b"one two", TAIL)
    theirs.flush()
    found = mine.longest_text(NAMESPACE, b"one two three")
    assert found is not None
    assert (found[0], found[1].tolist()) == (7, TAIL.tolist())


def test_what_this_process_saves_is_found_by_the_other(shared: Callable[..., Pair]) -> None:
    mine, theirs, _ = shared()
    save(mine, MANY)
    mine.flush()
    assert hit(theirs, MANY) == len(MANY)
    assert rows_by_tier(mine) == {"ram": 10, "ram_file": 10}


def test_evicted_files_are_gone_in_both_processes(shared: Callable[..., Pair]) -> None:
    mine, theirs, member = shared()
    save(theirs, MANY)
    theirs.flush()
    assert mine.evict_bytes(3 * FILE_BYTES) == 3 * FILE_BYTES
    assert hit(theirs, MANY) == 7 * SIZE
    assert mine.counters()["evictions_ram_file"] == 3
    assert mine.gc() == 0
    assert hit(theirs, MANY) == 7 * SIZE
    assert ("evict_bytes", 3 * FILE_BYTES, ("ram",)) in member.calls, "it may have a RAM tier"


def test_the_blocks_remain_after_the_other_process(shared: Callable[..., Pair]) -> None:
    mine, theirs, member = shared()
    save(theirs, MANY[: 2 * SIZE + 5])
    wait_until(lambda: rows_by_tier(mine) == {"ram_file": 3}, SOON)
    mine.remove_member(member)
    theirs.abandon()
    assert hit(mine, MANY) == 2 * SIZE + 5


# --- the directory in memory -------------------------------------------------------------------------


def test_a_cache_in_ram_gains_a_private_directory_before_the_disk(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, ram=10**6, disk=tmp_path / "d") as cache:
        live = park(cache)
        spec = cache.share_with_process(ram_file=tmp_path / "m")
        assert cache.tier_names == ("live", "ram", "ram_file", "disk")
        assert list(cache._catalog.ledgers()) == [tier.name for tier in cache._tier_set] == list(cache.tier_names)
        assert [(s.tier, s.budget) for s in cache.tiers()][2] == ("ram_file", 10**6)
        assert (tmp_path / "m").stat().st_mode & 0o777 == 0o700
        assert spec.ram == 0
        assert [(root.tier, root.path) for root in spec.roots] == [
            ("ram_file", str(tmp_path / "m")),
            ("disk", str(tmp_path / "d")),
        ]
        assert cache.share_with_process(ram_file=tmp_path / "other") == spec, "one directory is enough"
        assert not (tmp_path / "other").exists()
        assert cache.persistent
        save(cache, MANY)
        cache.flush()
        assert rows_by_tier(cache) == {"live": 10, "ram": 10, "ram_file": 10, "disk": 10}
        cache.check_integrity()
        cache.detach(live)


def test_the_gained_directory_is_this_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erllama.cache.options.default_directory", lambda name: tmp_path / f"{name}-1")
    with Cache(block_size=SIZE) as cache:
        (root,) = cache.share_with_process().roots
        assert root.path == str(tmp_path / "ram_file-1")


def test_the_gained_directory_takes_half_of_a_small_tmpfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_directory, "_file_system_bytes", lambda path: 200 << 20)
    with Cache(block_size=SIZE, ram="1GiB") as cache:
        (root,) = cache.share_with_process(ram_file=tmp_path).roots
        assert root.budget == 100 << 20


def test_a_gained_directory_with_blocks_is_read_and_kept_within_budget(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, ram=0, ram_file=tmp_path) as cache:
        save(cache, MANY)
    with Cache(block_size=SIZE, ram=4 * FILE_BYTES) as cache:
        cache.share_with_process(ram_file=tmp_path)
        cache.flush()
        assert rows_by_tier(cache) == {"ram_file": 4}
        assert hit(cache, MANY) == 4 * SIZE
        cache.check_integrity()


@pytest.mark.parametrize("ram", [0, "1MiB"])
def test_existing_directories_in_memory_are_used(tmp_path: Path, ram: int | str) -> None:
    roots = {tmp_path / "a": 10**6, tmp_path / "b": 2 * 10**6}
    with Cache(block_size=SIZE, ram=ram, ram_file=roots, write_queue=10**7, watch=False) as cache:
        spec = cache.share_with_process(ram_file=tmp_path / "other")
        assert spec.ram == 0
        assert [(Path(root.path), root.budget) for root in spec.roots] == list(roots.items())
        assert (spec.block_size, spec.write_queue, spec.watch) == (SIZE, 10**7, False)
        with Cache.of_spec(sent(spec)) as theirs:
            assert theirs.share_with_process() == spec
            assert theirs.tier_names == ("ram_file",)
            assert [status.budget for status in theirs.tiers()] == list(roots.values())
    assert not (tmp_path / "other").exists()


def test_a_cache_without_ram_gains_no_directory(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path / "d") as cache:
        spec = cache.share_with_process(ram_file=tmp_path / "m")
        assert [root.tier for root in spec.roots] == ["disk"]
        assert cache.tier_names == ("disk",)


def test_read_only_directories_stay_read_only(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path / "d") as cache:
        save(cache, MANY[:SIZE])
    with Cache(block_size=SIZE, disk=tmp_path / "d", read_only=True) as mine:
        spec = mine.share_with_process(ram_file=tmp_path / "m")
        assert [(root.tier, root.read_only) for root in spec.roots] == [("ram_file", False), ("disk", True)]
        with Cache.of_spec(sent(spec)) as theirs:
            save(theirs, MANY)
            theirs.flush()
            assert hit(theirs, MANY) == len(MANY)
            assert rows_by_tier(mine) == {"ram_file": 10, "disk": 1}
            mine.add_member(Member(theirs))
            assert mine.counters()["read_only_directories"] == 1


def no_default(name: str) -> Path:
    raise erllama.OptionError("needs /dev/shm, which this system lacks")


def make_unusable(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """Return a directory that cannot be used; None if this system has none."""
    if how == "no tmpfs":
        monkeypatch.setattr("erllama.cache.options.default_directory", no_default)
        return None
    if how == "not mounted":
        monkeypatch.setattr("erllama.cache.options.default_directory", lambda name: tmp_path / "missing" / "e-1")
        return None
    if how == "too small":
        monkeypatch.setattr(memory_directory, "_file_system_bytes", lambda path: 100 << 20)
    if how in ("the disk", "in the disk"):
        return tmp_path / ("d" if how == "the disk" else "d/m")
    (tmp_path / "in the way").touch()
    return tmp_path / ("in the way" if how == "no directory" else "m")


@pytest.mark.parametrize(
    ("how", "disk"),
    [
        ("no tmpfs", False),
        ("not mounted", False),
        ("too small", False),
        ("no directory", False),
        ("no tmpfs", True),
        ("the disk", True),
        ("in the disk", True),
    ],
)
def test_without_a_usable_tmpfs_the_other_process_has_its_own_ram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str, disk: bool
) -> None:
    directory = make_unusable(how, tmp_path, monkeypatch)
    with Cache(block_size=SIZE, ram=10**6, disk=tmp_path / "d" if disk else None) as mine:
        spec = mine.share_with_process(ram_file=directory)
        assert spec.ram == 10**6
        assert mine.tier_names == (("ram", "disk") if disk else ("ram",))
        warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert len(warned) == (0 if disk else 1)
        if warned:
            assert "end with that process" in warned[0]
            assert "ram_file=" in warned[0]
            assert "disk=" in warned[0]
        with Cache.of_spec(sent(spec)) as theirs:
            save(theirs, MANY)
            assert hit(theirs, MANY) == len(MANY)
            assert theirs.counters()["bytes_ram"] == 640
    assert not (tmp_path / "missing").exists()


def test_an_unusable_directory_of_the_caller_keeps_the_ram(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with Cache(block_size=SIZE, ram=10**6, ram_file=tmp_path / "f") as cache:
        spec = cache.share_with_process(ram_file=tmp_path / "m")
        assert spec.ram == 10**6
        assert [root.path for root in spec.roots] == [str(tmp_path / "f")]
    assert not (tmp_path / "m").exists()


def test_caches_that_another_process_cannot_open_are_refused(tmp_path: Path) -> None:
    with Cache(tiers=[SmallTier(str(tmp_path))]) as cache:
        with pytest.raises(erllama.OptionError, match=r"tiers has 'remote'.*load the model in this process"):
            cache.share_with_process(ram_file=tmp_path / "m")
        assert cache.tier_names == ("ram", "remote")
    with pytest.raises(erllama.CacheError, match="closed"):
        cache.share_with_process(ram_file=tmp_path / "m")
    with Cache() as cache, pytest.raises(erllama.OptionError, match="ram_file=5"):
        cache.share_with_process(ram_file=5)  # type: ignore[arg-type]
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    with Cache(ram=0, disk=path) as cache, pytest.raises(erllama.OptionError, match=r"disk.*surrogate"):
        cache.share_with_process()
    assert not (tmp_path / "m").exists()


def test_a_cache_gains_one_directory_while_models_save(tmp_path: Path) -> None:
    def context(number: int, i: int) -> NDArray[np.int32]:
        return np.arange(10_000 * number + 100 * i, 10_000 * number + 100 * i + 40, dtype=np.int32)

    with Cache(block_size=SIZE, disk=tmp_path / "d") as cache:

        def work(number: int) -> None:
            for i in range(20):
                if number < 3:
                    save(cache, context(number, i))
                elif i == 10:
                    cache.share_with_process(ram_file=tmp_path / "m")
                hit(cache, context(0, i))

        in_threads(work, 5)
        cache.flush()
        assert [status.tier for status in cache.tiers()] == ["ram", "ram_file", "disk"]
        counters = cache.counters()
        assert counters["blocks_disk"] == counters["blocks_ram"] == 3 * 20 * 3
        assert counters["disk_errors"] == counters["faults"] == counters["saves_dropped"] == 0
        assert all(hit(cache, context(number, i)) == 40 for number in range(3) for i in range(20))
        cache.check_integrity()
        assert cache.verify() == []


def test_a_block_follows_one_that_still_waits_for_other_tiers(tmp_path: Path) -> None:
    chain = blocks_of(MANY[: 2 * SIZE])
    with Cache(block_size=SIZE, disk=tmp_path / "d") as cache:
        with cache._tier_set.locked():  # the writer waits
            cache.save(chain[0], payload_of(chain[0]))
            cache.evict_bytes("1GiB", ("ram",))
            cache.share_with_process(ram_file=tmp_path / "m")
            cache.save(chain[1], payload_of(chain[1]))
        cache.flush()
        assert rows_by_tier(cache) == {"ram": 1, "ram_file": 2, "disk": 2}
        assert cache.counters()["saves_dropped"] == 0


def test_a_context_whose_start_is_only_on_disk_is_still_saved_there(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, disk=tmp_path / "d") as cache:
        save(cache, MANY[: 4 * SIZE])
        cache.flush()
        cache.evict_bytes("1GiB", ("ram",))
        cache.share_with_process(ram_file=tmp_path / "m")
        following = blocks_of(MANY)[4]
        assert cache.save(following, payload_of(following))
        cache.flush()
        assert rows_by_tier(cache) == {"ram": 1, "disk": 5}
        assert cache.counters()["saves_dropped"] == 1
        cache.check_integrity()


# --- prompt writes -------------------------------------------------------------------------------------


def test_a_tail_is_in_memory_at_once_and_on_disk_later(tmp_path: Path) -> None:
    """Not even if other processes that have both directories are open."""
    with (
        Cache(block_size=SIZE, disk=tmp_path / "d") as mine,
        Cache.of_spec(sent(mine.share_with_process(ram_file=tmp_path / "m"))) as theirs,
    ):
        save(theirs, TAIL)
        wait_until(lambda: mine.stored(blocks_of(TAIL)[0].key), SOON)
        save(mine, TAIL + 100)
        wait_until(lambda: theirs.stored(blocks_of(TAIL + 100)[0].key), SOON)
        time.sleep(1.2)  # longer than a tail waits in a shared directory
        assert "disk" not in rows_by_tier(mine)
        assert theirs.counters()["bytes_pending"] == mine.counters()["bytes_pending"] == 64
        with Cache(block_size=SIZE, ram=0, disk=tmp_path / "d") as other:
            wait_until(lambda: hit(other, TAIL) == hit(other, TAIL + 100) == 5, SOON)


def test_a_tail_is_in_memory_at_once_without_other_processes(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, disk=tmp_path / "d") as cache:
        spec = cache.share_with_process(ram_file=tmp_path / "m")
    with Cache.of_spec(spec) as alone:
        save(alone, TAIL)
        wait_until(lambda: rows_by_tier(alone) == {"ram_file": 1}, SOON)
        assert alone.counters()["bytes_pending"] == 64
        assert alone.flush()
        assert rows_by_tier(alone) == {"ram_file": 1, "disk": 1}
        assert alone.counters()["bytes_pending"] == 0


def test_saves_are_in_memory_before_any_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, bytes]] = []
    write = FileTier.write

    def record(self: FileTier, block: Block, payload: memoryview) -> None:
        written.append((self.name, block.key))
        write(self, block, payload)

    monkeypatch.setattr(FileTier, "write", record)
    with Cache(block_size=SIZE, disk=tmp_path / "d") as cache:
        spec = cache.share_with_process(ram_file=tmp_path / "m")
    keys = [block.key for block in blocks_of(MANY)]
    with Cache.of_spec(spec) as theirs:
        with theirs._tier_set.locked():  # the writer waits
            save(theirs, MANY)
        theirs.flush()
    assert written == [("ram_file", key) for key in keys] + [("disk", key) for key in keys]


def test_a_block_that_is_being_written_is_not_wanted_again(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, disk=tmp_path / "d") as cache:
        spec = cache.share_with_process(ram_file=tmp_path / "m")
    (tail,) = blocks_of(TAIL)
    with Cache.of_spec(spec) as theirs:
        with theirs._tier_set.locked():  # the writer waits before it writes to memory
            save(theirs, TAIL)
            wait_until(lambda: theirs._queue._current_save, SOON)
            assert not theirs.wants(tail.key)
        assert theirs.flush()
        assert rows_by_tier(theirs) == {"ram_file": 1, "disk": 1}


def test_a_tail_that_waits_for_the_disk_may_be_superseded(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, disk=tmp_path / "d") as cache:
        spec = cache.share_with_process(ram_file=tmp_path / "m")
    with Cache.of_spec(spec) as theirs:
        save(theirs, TAIL)
        wait_until(lambda: rows_by_tier(theirs) == {"ram_file": 1}, SOON)
        save(theirs, MANY[:SIZE])
        theirs.flush()
        assert [(row.tier, row.n_tokens) for row in theirs.rows()] == [("ram_file", SIZE), ("disk", SIZE)]
        assert theirs.counters()["tails_superseded"] == 1
        assert theirs.counters()["bytes_pending"] == 0
        theirs.check_integrity()


def test_a_newer_version_replaces_one_that_waits_for_the_disk(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, disk=tmp_path / "d") as cache:
        spec = cache.share_with_process(ram_file=tmp_path / "m")
    (tail,) = blocks_of(TAIL)
    with Cache.of_spec(spec) as theirs:
        theirs.save(tail, b"old")
        wait_until(lambda: rows_by_tier(theirs) == {"ram_file": 1}, SOON)
        theirs.save(tail, b"newer", replace=True)
        theirs.flush()
        assert theirs.counters()["bytes_pending"] == 0
    for name in ("m", "d"):
        with Cache(block_size=SIZE, ram=0, disk=tmp_path / name) as cache:
            loaded = cache.load(tail)
            assert loaded is not None
            assert bytes(loaded.payload) == b"newer"


def test_a_chat_of_20_turns_writes_its_tokens_to_the_disk_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier_writer, "SHARED_TAIL_DELAY_SECONDS", 0.001)
    monkeypatch.setattr(tier_writer, "_SHARED_CHECK_SECONDS", 0.001)
    on_disk: list[Block] = []
    write = FileTier.write

    def record(self: FileTier, block: Block, payload: memoryview) -> None:
        if self.name == "disk":
            on_disk.append(block)
        write(self, block, payload)

    monkeypatch.setattr(FileTier, "write", record)
    with (
        Cache(block_size=SIZE, disk=tmp_path / "d") as mine,
        Cache.of_spec(sent(mine.share_with_process(ram_file=tmp_path / "m"))) as theirs,
    ):
        history = np.arange(20 * 21, dtype=np.int32)
        for turn in range(1, 21):
            so_far = history[: 21 * turn]
            save(theirs, so_far)
            last = blocks_of(so_far)[-1].key
            wait_until(lambda key=last: mine.stored(key), SOON)  # type: ignore[misc]
            time.sleep(0.03)
        theirs.flush()
    assert [block.start for block in on_disk] == list(range(0, len(history), SIZE)), "each token once"


# --- counters ---------------------------------------------------------------------------------------------


def work_on(cache: Cache, n: int) -> None:
    """Count `n` events of several kinds."""
    for _ in range(n):
        cache.count_request("exact", 7)
        cache.count_request("cold", 0)
        cache.count_fault()
    save(cache, MANY[: n * SIZE])
    cache.flush()
    hit(cache, MANY)


EVENTS = ("hits_exact", "misses", "tokens_reused", "faults", "saves_cold", "hits_longest_prefix", "bytes_written")
SECONDS = ("lookup_seconds", "load_seconds", "write_seconds")


def test_counts_are_summed_and_stay_after_a_member_is_removed(tmp_path: Path) -> None:
    with ExitStack() as stack:
        mine = stack.enter_context(Cache(block_size=SIZE, ram=0, disk=tmp_path / "mine"))
        others = [stack.enter_context(Cache(block_size=SIZE, ram=0, disk=tmp_path / name)) for name in "ab"]
        for n, cache in enumerate((mine, *others), 1):
            work_on(cache, n)
        alone = [cache.counters() for cache in (mine, *others)]
        members = [Member(cache) for cache in others]
        for member in (*members, members[0]):
            mine.add_member(member)

        def check() -> None:
            counters = mine.counters()
            for name in EVENTS:
                assert counters[name] == sum(each[name] for each in alone) > 0, name
            for name in SECONDS:
                assert counters[name] == pytest.approx(sum(each[name] for each in alone)), name
                assert counters[name] > 0
            assert counters["blocks_disk"] == 1, "not those of other directories"
            assert counters.keys() == alone[0].keys()

        check()
        for member in (members[0], members[0], members[1]):
            mine.remove_member(member)
            check()
        assert mine.counters()["hits_exact"] == 6
        others[0].count_request("exact", 1)
        check()


def test_bytes_that_wait_are_summed_over_present_members(shared: Callable[..., Pair], tmp_path: Path) -> None:
    mine, theirs, member = shared(disk=tmp_path / "d")
    save(theirs, TAIL)
    wait_until(lambda: rows_by_tier(mine) == {"ram_file": 1}, SOON)
    save(mine, TAIL + 100)
    wait_until(lambda: mine.counters()["blocks_ram_file"] == 2, SOON)
    assert mine.counters()["bytes_pending"] == 128
    mine.remove_member(member)
    assert mine.counters()["bytes_pending"] == 64


def test_cells_of_all_processes_are_listed_and_summed(shared: Callable[..., Pair], tmp_path: Path) -> None:
    mine, theirs, member = shared(disk=tmp_path / "d")
    other = park(theirs, MANY[: 2 * SIZE])
    assert mine.counters()["bytes_live"] == 200
    assert mine.tier_names == ("live", "ram", "ram_file", "disk")
    own = park(mine, MANY[:SIZE], 30)
    assert [(s.tier, s.n_bytes, s.n_blocks) for s in mine.tiers()][:2] == [("live", 30, 1), ("live", 200, 2)]
    assert [status.tier for status in mine.tiers()] == ["live", "live", "ram", "ram_file", "disk"]
    assert mine.counters()["bytes_live"] == 230
    assert mine.counters()["blocks_live"] == 3
    rows = [(row.tier, row.start, row.n_tokens, row.n_bytes) for row in mine.rows()]
    assert sorted(rows) == [("live", 0, SIZE, 30), ("live", 0, SIZE, 100), ("live", SIZE, SIZE, 100)]
    mine.remove_member(member)
    assert mine.counters()["bytes_live"] == 30
    assert len(mine.rows()) == 1
    mine.detach(own)
    theirs.detach(other)


def test_a_ram_tier_of_the_other_process_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erllama.cache.options.default_directory", no_default)
    with (
        Cache(block_size=SIZE, disk=tmp_path / "d") as mine,
        Cache.of_spec(sent(mine.share_with_process())) as theirs,
    ):
        mine.add_member(Member(theirs))
        save(theirs, MANY)
        save(mine, MANY[: 2 * SIZE] + 100)
        mine.flush()
        assert mine.counters()["bytes_ram"] == 12 * 64
        assert mine.counters()["blocks_disk"] == 12
        assert [(s.tier, s.n_blocks) for s in mine.tiers()] == [("ram", 2), ("ram", 10), ("disk", 12)]
        assert rows_by_tier(mine) == {"ram": 12, "disk": 12}
        assert mine.evict_bytes(5 * 64) == 5 * 64, "its own first"
        assert [s.n_blocks for s in mine.tiers()] == [0, 7, 12]


# --- calls of members -------------------------------------------------------------------------------------


def test_a_failing_member_is_logged_once_and_its_last_report_counts(
    shared: Callable[..., Pair], caplog: pytest.LogCaptureFixture
) -> None:
    mine, theirs, member = shared()
    live = park(theirs)
    theirs.count_request("exact", 7)
    before = mine.counters()
    caplog.clear()  # the directory is not in memory
    member.error = OSError("no route to the process")
    save(mine, MANY)
    for _ in range(3):
        counters = mine.counters()
        assert counters["hits_exact"] == before["hits_exact"] == 1
        assert counters["bytes_live"] == before["bytes_live"] == 1000
        assert [status.tier for status in mine.tiers()] == ["live", "ram", "ram_file"]
        assert len([row for row in mine.rows() if row.tier == "live"]) == 10
        assert not mine.flush()
        assert mine.evict_bytes(64, ("live", "ram")) == 64
    assert mine.counters()["faults"] == 1
    assert len(caplog.records) == 1
    assert "no route to the process" in caplog.text
    member.error = None
    theirs.count_request("exact", 7)
    assert mine.counters()["hits_exact"] == 2
    member.error = OSError("again")
    mine.remove_member(member)
    assert mine.counters()["hits_exact"] == 2
    assert mine.counters()["faults"] == 2
    theirs.detach(live)


def test_a_report_of_another_type_counts_as_a_failure(shared: Callable[..., Pair]) -> None:
    mine, _, member = shared()
    member.report = lambda wait: None  # type: ignore[assignment, method-assign, return-value]
    assert mine.counters()["faults"] == 1
    assert mine.rows() == []


def test_a_signal_handler_gets_the_last_report_without_waiting(shared: Callable[..., Pair]) -> None:
    mine, theirs, member = shared()
    live = park(theirs)
    theirs.count_request("exact", 7)
    assert mine.counters()["hits_exact"] == 1
    found: list[tuple[Mapping[str, int | float], list[TierStatus]]] = []
    report = member.report

    def interrupted(wait: bool) -> MemberReport:
        if wait:
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: found)
        return report(wait)

    member.report = interrupted  # type: ignore[method-assign]
    before = signal.signal(signal.SIGUSR1, lambda *_: found.append((mine.counters(), mine.tiers())))
    try:
        theirs.count_request("exact", 7)
        assert mine.counters()["hits_exact"] == 2
    finally:
        signal.signal(signal.SIGUSR1, before)
    (seen,) = found
    assert (seen[0]["hits_exact"], seen[0]["bytes_live"]) == (1, 1000)
    assert [status.tier for status in seen[1]] == ["live", "ram", "ram_file"]
    theirs.detach(live)


def test_eviction_and_pressure_reach_the_cells_of_the_other_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = [0]

    def memory() -> MemoryUsage:
        return MemoryUsage(used[0], 10_000)

    pressure = {"source": memory, "interval": 3600, "tiers": ("live",), "min_evict_bytes": 1}
    with (
        Cache(block_size=SIZE, pressure=pressure) as mine,
        Cache.of_spec(sent(mine.share_with_process(ram_file=tmp_path / "m"))) as theirs,
    ):
        mine.add_member(Member(theirs))
        own, other = park(mine, MANY[: 2 * SIZE]), park(theirs)
        assert mine.evict_bytes(300, ("live",)) == 300
        assert (len(own.given_up), len(other.given_up)) == (2, 1), "its own first"
        used[0] = 8000  # 500 above the low watermark, and below the high one
        assert mine._pressure is not None
        assert mine._pressure.check() == 0
        used[0] = 8800
        assert mine._pressure.check() == 900, "all that is left"
        assert mine.counters()["evictions_live"] == 12
        assert theirs._pressure is None
        mine.detach(own)
        theirs.detach(other)


def test_a_flush_includes_members_within_one_timeout(shared: Callable[..., Pair], tmp_path: Path) -> None:
    mine, theirs, member = shared(disk=tmp_path / "d")
    second = Member(theirs)
    mine.add_member(second)
    save(mine, TAIL + 100)
    save(theirs, TAIL)
    assert mine.flush()
    assert rows_by_tier(mine) == {"ram": 1, "ram_file": 2, "disk": 2}
    assert member.calls[0] == ("flush", None)
    with theirs._tier_set.locked():
        save(theirs, TAIL + 200)
        assert not mine.flush(0.05)
        (name, timeout) = member.calls[-1]
        assert name == "flush"
        assert isinstance(timeout, float)
        assert 0 < timeout <= 0.05
        assert second.calls[-1] == ("flush", 0.0), "the first used all of it"
    assert mine.gc() == 0
    assert ("flush", None) in member.calls[2:]


def test_a_closed_cache_forgets_its_members(shared: Callable[..., Pair]) -> None:
    mine, theirs, member = shared()
    theirs.count_request("exact", 7)
    mine.rows()
    mine.close()
    member.calls.clear()
    assert mine.counters()["hits_exact"] == 1
    mine.add_member(member)
    assert mine.tiers() == mine.rows() == []
    assert mine.flush()
    assert member.calls == []


def test_a_forked_process_has_no_members() -> None:
    printed = must_run(
        """
        import os, warnings
        warnings.simplefilter("ignore")
        from erllama.cache import Cache, MemberReport

        class Member:
            def report(self, wait):
                assert os.getpid() == parent
                return MemberReport({"misses": 3})

        parent = os.getpid()
        cache = Cache()
        cache.add_member(Member())
        assert cache.counters()["misses"] == 3
        pid = os.fork()
        if pid == 0:
            assert cache.counters()["misses"] == 0
            assert cache.tiers() == []
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        print("whole")
        """
    )
    assert printed == "whole\n"


def test_a_report_is_sent_as_plain_values() -> None:
    status = TierStatus("live", "a context", 100, 50, 1, erllama.CacheError("lost; load it again"))
    report = MemberReport({"misses": 3}, (status,), (Row(b"k" * 32, "live", 0, 16, 50, 1),))
    found = MemberReport.of_plain(through_message(report.as_plain()))  # type: ignore[arg-type]
    assert (found.counters, found.rows) == (report.counters, report.rows)
    assert str(found.tiers[0].error) == "lost; load it again"
    assert isinstance(found.tiers[0].error, erllama.CacheError)
    assert found.tiers[0]._replace(error=None) == status._replace(error=None)


# --- a real process -----------------------------------------------------------------------------------


SAVING = """
    import json
    from erllama.cache import CacheSpec

    cache = Cache.of_spec(CacheSpec.of_plain(json.loads(sys.argv[1])))
    tokens = np.arange(5 * SIZE + 5, dtype=np.int32)
    assert all(save(cache, tokens))
    if sys.argv[2] == "flushed":
        cache.flush()
    print("saved", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("when", ["flushed", "made"])
@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_saves_outlive_a_process_that_is_killed(tmp_path: Path, when: str, disk: bool) -> None:
    tokens = np.arange(5 * SIZE + 5, dtype=np.int32)
    with Cache(block_size=SIZE, disk=tmp_path / "d" if disk else None) as cache:
        spec = cache.share_with_process(ram_file=tmp_path / "m")
        child = start_python(SAVING, json.dumps(spec.as_plain()), when)
        with killed_at_end(child):
            assert child.stdout is not None
            assert child.stdout.readline() == "saved\n"
            if when == "made":
                wait_until(lambda: cache.stored(blocks_of(tokens)[-1].key), SOON)
            child.send_signal(signal.SIGKILL)
            child.wait()
        with cache.lookup(NAMESPACE, tokens) as match:
            assert match.n_tokens == len(tokens)
            for block in match.blocks:
                loaded = cache.load(block)
                assert loaded is not None
                assert bytes(loaded.payload) == block.key * (64 + block.key[0])
                assert loaded.tier == "ram_file"
        cache.gc()
        assert cache.verify() == []
        cache.check_integrity()
