"""Several tiers: where blocks are written, where they are read from, and custom tiers."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import erllama
from erllama.cache import Block, Cache, FileTier, MemoryUsage, SaveReason, token_bytes
from erllama.cache.pipeline import tier_writer
from erllama.cache.pipeline.write_queue import PendingSave, WriteQueue
from support.faulty.tiers import SmallTier
from support.paths import TESTS
from support.storage.blocks import NAMESPACE, OTHER, SIZE, blocks_of, hit, payload_of, save
from support.storage.members import Live
from support.subprocesses import must_run
from support.threads import wait_until

MANY = np.arange(10 * SIZE, dtype=np.int32)
SOON = 120.0  # seconds; a tail that is not hurried waits longer, see `tails_wait`


@pytest.fixture(autouse=True)
def tails_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tail that is not hurried wait longer than any test, however busy the machine is."""
    monkeypatch.setattr(tier_writer, "TAIL_DELAY_SECONDS", 600.0)


def blocks_by_tier(cache: Cache) -> dict[str, int]:
    return {tier: int(cache.counters()[f"blocks_{tier}"]) for tier in cache.tier_names}


def test_a_save_reaches_every_tier(tmp_path: Path) -> None:
    shelf = SmallTier(str(tmp_path))
    with Cache(block_size=SIZE, ram_file=tmp_path / "f", disk=tmp_path / "d", tiers=[shelf]) as cache:
        assert cache.tier_names == ("ram", "ram_file", "disk", "remote")
        save(cache, MANY)
        assert blocks_by_tier(cache)["ram"] == 10, "through"
        cache.flush()
        assert set(blocks_by_tier(cache).values()) == {10}
        assert [(status.tier, status.error) for status in cache.tiers()] == [
            ("ram", None),
            ("ram_file", None),
            ("disk", None),
            ("remote", None),
        ]


def test_a_hit_in_a_slow_tier_is_promoted(tmp_path: Path) -> None:
    shelf = SmallTier(str(tmp_path))
    with Cache(block_size=SIZE, ram=0, tiers=[shelf]) as cache:
        save(cache, MANY)
    with Cache(block_size=SIZE, ram_file=tmp_path / "f", disk=tmp_path / "d", tiers=[shelf]) as cache:
        assert blocks_by_tier(cache) == {"ram": 0, "ram_file": 0, "disk": 0, "remote": 10}
        with cache.lookup(NAMESPACE, MANY) as match:
            assert {cache.load(block).tier for block in match.blocks} == {"remote"}  # type: ignore[union-attr]
            assert {cache.load(block).tier for block in match.blocks} == {"ram"}  # type: ignore[union-attr]
        cache.flush()
        assert set(blocks_by_tier(cache).values()) == {10}
        assert cache.counters()["promotions"] >= 10


def test_every_tier_stays_within_its_own_budget(tmp_path: Path) -> None:
    with Cache(
        block_size=SIZE,
        ram=3 * 64,
        ram_file=tmp_path / "f",
        ram_file_quota=5 * (64 + 264),
        disk=tmp_path / "d",
        disk_quota=7 * (64 + 264),
    ) as cache:
        for i in range(30):
            save(cache, np.array([i] * SIZE, dtype=np.int32))
        cache.flush()
        assert blocks_by_tier(cache) == {"ram": 3, "ram_file": 5, "disk": 7}
        counters = cache.counters()
        assert [counters[f"evictions_{tier}"] for tier in cache.tier_names] == [27, 25, 23]


def test_several_directories_form_one_tier(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    with Cache(block_size=SIZE, ram=0, disk={a: 4 * 328, b: 8 * 328}) as cache:
        save(cache, MANY)
        cache.flush()
        assert blocks_by_tier(cache) == {"disk": 10}
        assert hit(cache, MANY) == len(MANY)
        assert {status.location: status.n_blocks > 0 for status in cache.tiers()} == {str(a): True, str(b): True}
        for i in range(100, 120):
            save(cache, np.array([i] * SIZE, dtype=np.int32))
        cache.flush()
        assert [status.n_blocks for status in cache.tiers()] == [4, 8]
    names = [path.name for path in tmp_path.rglob("*.kvc")]
    assert len(names) == len(set(names)) == 12, "a block is in one directory"


def test_another_directory_takes_over_when_one_fails(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("in the way")
    with Cache(block_size=SIZE, ram=0, disk=[tmp_path / "a", tmp_path / "b"]) as cache:
        assert "a" in str(cache.disk_error)
        save(cache, MANY)
        cache.flush()
        assert blocks_by_tier(cache) == {"disk": 10}
        assert [status.n_blocks for status in cache.tiers()] == [0, 10]


def test_a_block_in_two_directories_is_counted_once(tmp_path: Path) -> None:
    for name in "ab":
        with Cache(block_size=SIZE, ram=0, disk=tmp_path / name) as cache:
            save(cache, MANY)
    with Cache(block_size=SIZE, ram=0, disk=[tmp_path / "a", tmp_path / "b"]) as cache:
        cache.flush()
        assert hit(cache, MANY) == len(MANY)
        assert blocks_by_tier(cache) == {"disk": 10}
        cache.check_integrity()
    assert len(list(tmp_path.rglob("*.kvc"))) == 10


def test_a_ram_file_tier_outlives_its_process_and_serves_others(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, ram=0, ram_file=tmp_path) as cache:
        save(cache, MANY)
        cache.flush()
        with Cache(block_size=SIZE, ram_file=tmp_path) as other:
            assert hit(other, MANY) == len(MANY)
    with Cache(block_size=SIZE, ram_file=tmp_path) as cache, cache.lookup(NAMESPACE, MANY) as match:
        assert {cache.load(block).tier for block in match.blocks} == {"ram_file"}  # type: ignore[union-attr]


def test_the_default_ram_file_directory_belongs_to_the_user() -> None:
    place = Path("/dev/shm")
    if not place.is_dir():
        with pytest.raises(erllama.OptionError, match="dev/shm"):
            Cache(ram_file=True)
        return
    with Cache(ram_file=True) as cache:
        (status,) = [status for status in cache.tiers() if status.tier == "ram_file"]
        assert status.location.startswith("/dev/shm/erllama-")
        assert Path(status.location).stat().st_mode & 0o077 == 0


class Failing(SmallTier):
    """A remote store that is unavailable at first."""

    broken = True

    def open(self) -> None:
        if self.broken:
            raise OSError("no route to host")

    def write(self, block: Block, payload: memoryview) -> None:
        self.open()
        super().write(block, payload)


def test_a_custom_tier_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erllama.cache.pipeline.tier_set._REOPEN_SECONDS", 0.0)
    tier = Failing(str(tmp_path))
    with Cache(block_size=SIZE, tiers=[tier]) as cache:
        assert "no route" in str(cache.disk_error)
        save(cache, MANY)
        cache.flush()
        assert hit(cache, MANY) == len(MANY), "from RAM"
        assert blocks_by_tier(cache)["remote"] == 0
        tier.broken = False
        save(cache, np.arange(len(MANY) + SIZE, dtype=np.int32))
        cache.flush()
        assert blocks_by_tier(cache)["remote"] == 11, "missed blocks are written later"
        assert cache.disk_error is None
        tier.broken = True
        save(cache, np.arange(500, 500 + SIZE, dtype=np.int32))
        cache.flush()
        assert cache.counters()["disk_errors"] >= 2
        cache.check_integrity()


class Buggy(SmallTier):
    def read(self, block: Block) -> tuple[Block, memoryview]:
        raise ZeroDivisionError


def test_a_mistake_in_a_custom_tier_is_a_miss(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, ram=0, tiers=[Buggy(str(tmp_path))]) as cache:
        save(cache, MANY)
        cache.flush()
        with cache.lookup(NAMESPACE, MANY) as match:
            assert [cache.load(block) for block in match.blocks] == [None] * 10


class Slow(SmallTier):
    """Waits before each read until it is released."""

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.reading, self.go_on = threading.Event(), threading.Event()

    def read(self, block: Block) -> tuple[Block, memoryview]:
        found = super().read(block)
        self.reading.set()
        self.go_on.wait(120)
        return found


def test_loading_an_old_version_does_not_undo_a_newer_one(tmp_path: Path) -> None:
    tier = Slow(str(tmp_path))
    (block,) = blocks_of(MANY[:SIZE])
    with Cache(block_size=SIZE, ram=0, tiers=[tier]) as cache:
        cache.save(block, b"old")
    with Cache(block_size=SIZE, disk=tmp_path / "d", tiers=[tier]) as cache:
        loading = threading.Thread(target=cache.load, args=(block,))
        loading.start()
        assert tier.reading.wait(120)
        assert cache.save(block, b"new", replace=True)
        tier.go_on.set()
        loading.join()
        cache.flush()
        assert bytes(cache.load(block).payload) == b"new"  # type: ignore[union-attr]
        cache.evict_bytes(1000, ("ram",))
        assert bytes(cache.load(block).payload) == b"new"  # type: ignore[union-attr]
        assert bytes(tier.store[block.key][1]) == b"new"


def test_a_version_that_does_not_fit_keeps_the_old_one() -> None:
    (block,) = blocks_of(MANY[:SIZE])
    with Cache(block_size=SIZE, ram=100) as cache:
        cache.save(block, b"old")
        with cache.lookup(NAMESPACE, MANY) as match:
            assert not cache.save(block, bytes(200), replace=True)
            assert bytes(cache.load(match.blocks[0]).payload) == b"old"  # type: ignore[union-attr]


def test_a_dropped_match_pins_no_block() -> None:
    with Cache(block_size=SIZE) as cache:
        save(cache, MANY)
        cache.lookup(NAMESPACE, MANY)
        assert {row.pins for row in cache.rows()} == {0}


class Exiting(SmallTier):
    def write(self, block: Block, payload: memoryview) -> None:
        raise SystemExit


def test_a_tier_raising_system_exit_does_not_end_the_writer(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, disk=tmp_path / "d", tiers=[Exiting(str(tmp_path))]) as cache:
        save(cache, MANY)
        assert cache.flush(120)
        assert blocks_by_tier(cache) == {"ram": 10, "disk": 10, "remote": 0}


def test_a_dropped_cache_still_writes_its_queue(tmp_path: Path) -> None:
    program = """
        import sys
        sys.path.insert(0, sys.argv[2])
        import gc, numpy as np
        from support.storage.blocks import save
        from erllama.cache import Cache
        from support.storage.blocks import SIZE
        cache = Cache(block_size=SIZE, disk=sys.argv[1])
        save(cache, np.arange(5, dtype=np.int32))
        del cache
        gc.collect()
    """
    must_run(program, tmp_path, TESTS)
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        assert hit(cache, MANY[:5]) == 5
        assert len(list((tmp_path / "owners").iterdir())) == 1


def test_evicting_everything_empties_every_directory(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, ram=0, disk=[tmp_path / "a", tmp_path / "b"]) as cache:
        save(cache, MANY)
        cache.flush()
        assert cache.evict_bytes("1GiB", ("disk",)) == 10 * 328
        assert cache.rows() == []


def test_the_oldest_blocks_of_all_directories_are_evicted_first(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, ram=0, disk={tmp_path / "a": 5 * 328, tmp_path / "b": 5 * 328}) as cache:
        for i in range(40):
            save(cache, np.array([i] * SIZE, dtype=np.int32))
            cache.flush()
        assert [hit(cache, np.array([i] * SIZE, dtype=np.int32)) > 0 for i in range(40)] == [False] * 30 + [
            True
        ] * 10


@pytest.mark.parametrize("version", [0, 3, 1 + 2**24])
def test_a_file_of_another_version_is_quarantined(tmp_path: Path, version: int) -> None:
    """Its directory would have an index of that version, and that is not opened."""
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        save(cache, MANY[:SIZE])
    (path,) = (tmp_path / "blocks").iterdir()
    content = bytearray(path.read_bytes())
    content[8:12] = version.to_bytes(4, "little")
    path.write_bytes(content)
    os.utime(path, (0, 0))  # old enough not to be still being copied
    with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        assert hit_or_none(cache) == [None]
        assert cache.counters()["corrupt_files"] == 1
        cache.flush()  # it is quarantined in the background
        assert cache.verify() == []
        assert not path.exists()
        save(cache, MANY[:SIZE])  # until its block is saved anew
        cache.flush()
        assert hit(cache, MANY[:SIZE]) == SIZE
        assert cache.verify() == []


def hit_or_none(cache: Cache) -> list[object]:
    with cache.lookup(NAMESPACE, MANY[:SIZE]) as match:
        return [cache.load(block) for block in match.blocks]


# --- KV that is still in a context -------------------------------------------------------------------


def test_live_blocks_are_found_but_never_loaded() -> None:
    live, chain = Live(1000), blocks_of(MANY)
    with Cache(block_size=SIZE) as cache:
        cache.attach(live)
        assert cache.tier_names == ("live", "ram")
        for block in chain[:4]:
            assert cache.report_stored(live, block, 100)
        with cache.lookup(NAMESPACE, MANY) as match:
            assert match.n_tokens == 4 * SIZE
            assert cache.load(match.blocks[0]) is None
        save(cache, MANY[: 2 * SIZE])
        assert cache.counters()["blocks_ram"] == 2, "a block that is only live is not stored yet"
        cache.report_removed(live, [chain[3].key])
        with cache.lookup(NAMESPACE, MANY) as match:
            assert match.n_tokens == 3 * SIZE
        cache.check_integrity()
        cache.detach(live)
        assert [row.tier for row in cache.rows()] == ["ram", "ram"]


def test_the_provenance_of_a_live_block_does_not_describe_the_stored_one(tmp_path: Path) -> None:
    first = blocks_of(MANY)[0]
    better = Block(first.key, first.parent, NAMESPACE, 0, first.tokens, first.reason, b"r" * 16, SIZE)
    with (
        Cache(block_size=SIZE, disk=tmp_path, ram=0) as mine,
        Cache(block_size=SIZE, disk=tmp_path, ram=0) as theirs,
    ):
        live = Live(1000)
        mine.attach(live)
        mine.save(first, payload_of(first))
        mine.flush()
        assert mine.report_stored(live, first, 100)
        theirs.rows()
        theirs.save(better, payload_of(first), replace=True)
        theirs.flush()
        mine.rows()
        assert mine.stored(first.key) == better
        mine.detach(live)


def test_live_blocks_respect_budget_and_pins() -> None:
    live, chain = Live(500), blocks_of(MANY)
    with Cache(block_size=SIZE) as cache:
        cache.attach(live)
        for block in chain[:5]:
            assert cache.report_stored(live, block, 100)
        other = blocks_of(np.arange(900, 900 + SIZE, dtype=np.int32))[0]
        with cache.lookup(NAMESPACE, MANY):
            assert not cache.report_stored(live, other, 100), "all blocks are pinned"
        assert cache.report_stored(live, other, 100)
        assert live.given_up == [chain[4].key], "leaves first"
        assert cache.evict_bytes(250, ("live",)) == 300
        assert len(live.given_up) == 4
        assert cache.counters()["bytes_live"] == 200


def test_attach_refuses_a_tier_that_the_cache_writes_to(tmp_path: Path) -> None:
    with Cache() as cache, pytest.raises(erllama.OptionError, match="write_mode"):
        cache.attach(SmallTier(str(tmp_path)))


# --- sharing, waiting, cleaning up --------------------------------------------------------------------


def test_a_tail_is_written_soon_in_a_shared_directory(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, disk=tmp_path) as cache, Cache(block_size=SIZE, disk=tmp_path) as other:
        save(cache, MANY[:5])
        wait_until(lambda: hit(other, MANY[:5]) == 5, SOON)
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        save(cache, np.arange(700, 705, dtype=np.int32))
        time.sleep(0.6)
        assert cache.counters()["bytes_pending"] > 0, "alone, it waits to be superseded"


def test_a_process_that_joins_later_sees_a_queued_tail(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        save(cache, MANY[:5])
        time.sleep(0.3)
        with Cache(block_size=SIZE, disk=tmp_path) as other:
            wait_until(lambda: hit(other, MANY[:5]) == 5, SOON)


def test_tails_in_quick_succession_are_all_written(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        save(cache, MANY[:5])
        save(cache, MANY[:SIZE])  # supersedes it
        cache.flush()
        time.sleep(0.7)  # the queue is empty
        save(cache, MANY[: SIZE + 5])
        with Cache(block_size=SIZE, disk=tmp_path) as other:
            wait_until(lambda: hit(other, MANY[: SIZE + 5]) == SIZE + 5, SOON)


def test_the_check_for_other_processes_includes_the_newest_tail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer = WriteQueue.offer

    def offer_late(self: WriteQueue, save: PendingSave) -> bool:
        time.sleep(0.2)  # the writer thread has time for everything queued before
        return offer(self, save)

    monkeypatch.setattr(WriteQueue, "offer", offer_late)
    with Cache(block_size=SIZE, disk=tmp_path) as cache, Cache(block_size=SIZE, disk=tmp_path) as other:
        save(cache, MANY[:5])
        wait_until(lambda: hit(other, MANY[:5]) == 5, SOON)


def test_a_delayed_tail_is_dropped_when_the_queue_fills(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, disk=tmp_path, write_queue=1000) as cache:
        for i in range(20):
            save(cache, np.array([i], dtype=np.int32), n_bytes=320)
            wait_until(lambda: cache.counters()["bytes_pending"] <= 500, SOON)
        assert cache.counters()["saves_dropped"] == 0


def test_a_context_is_found_by_its_key(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        save(cache, MANY[:37])
        key = blocks_of(MANY[:37])[-1].key
        found = cache.context(key)
        assert found is not None
        assert found.tolist() == MANY[:37].tolist()
        assert cache.context(OTHER) is None


def test_a_lookup_waits_for_the_save_of_its_parent() -> None:
    chain = blocks_of(MANY[:20])
    with Cache(block_size=SIZE) as cache:
        save(cache, MANY[:16])
        saving = threading.Event()

        def finish() -> None:
            with cache.expecting(chain[1].key):
                saving.set()
                time.sleep(0.2)
                cache.save(chain[1], payload_of(chain[1]))

        thread = threading.Thread(target=finish)
        thread.start()
        saving.wait()
        with cache.lookup(NAMESPACE, MANY[:20], parent_key=chain[1].key, wait_ms=10_000) as match:
            assert match.n_tokens == 20
        thread.join()


@pytest.mark.timeout(120)
def test_a_lookup_does_not_wait_without_a_save() -> None:
    with Cache(block_size=SIZE) as cache:
        save(cache, MANY[:20])
        with cache.lookup(NAMESPACE, MANY[:20], parent_key=bytes(32), wait_ms=600_000) as match:
            assert match.n_tokens == 20


def test_memory_pressure_evicts(tmp_path: Path) -> None:
    looks = threading.Semaphore(0)

    def full() -> MemoryUsage:
        looks.release()
        return MemoryUsage(used=90_000, total=100_000)

    pressure = {
        "source": full,
        "interval": 0.01,
        "min_evict_bytes": 100,
        "high_watermark": 0.9,
        "low_watermark": 0.899,
    }
    with Cache(block_size=SIZE, disk=tmp_path, pressure=pressure) as cache:
        save(cache, MANY)
        cache.flush()
        for _ in range(12):
            assert looks.acquire(timeout=120)
        assert blocks_by_tier(cache) == {"ram": 0, "disk": 10}
        assert cache.counters()["pressure_evictions"] >= 5


def test_a_failing_pressure_source_is_counted() -> None:
    looks = threading.Semaphore(0)

    def broken() -> MemoryUsage:
        looks.release()
        raise OSError("no such sensor")

    with Cache(pressure={"source": broken, "interval": 0.01}) as cache:
        for _ in range(3):
            assert looks.acquire(timeout=120)
        assert cache.counters()["faults"] >= 2


def test_gc_removes_unreachable_blocks(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        save(cache, MANY)
        cache.flush()
        second = blocks_of(MANY)[1]
        (tmp_path / "blocks" / f"{second.key.hex()}.kvc").unlink()
        assert cache.gc() == 8 * (64 + 264)
        assert [row.start for row in cache.rows()] == [0]
        assert cache.verify() == []


def test_verify_reports_and_changes_nothing(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        save(cache, MANY)
        cache.flush()
        files = sorted((tmp_path / "blocks").iterdir())
        files[0].write_bytes(b"nonsense")
        files[1].unlink()
        (tmp_path / "blocks" / "stray.txt").write_text("hello")
        (tmp_path / "partial" / "dead-1.kvc").write_text("half")
        for _ in range(2):
            problems = cache.verify()
            assert sorted(Path(p.location).name for p in problems) == sorted(
                [files[0].name, files[1].name, "stray.txt", "dead-1.kvc"]
            )


# --- mistakes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"disk": ["/tmp/x", "/tmp/x/y"]}, "lies in the other"),
        ({"disk": ["/tmp/x", "/tmp/x"]}, "lies in the other"),
        ({"disk": "/tmp/x", "ram_file": "/tmp/x"}, "lies in the other"),
        ({"disk": {"/tmp/x": 0}}, "no room"),
        ({"disk": {"/tmp/x": "5 parsecs"}}, "5 parsecs"),
        ({"ram": "2 GIBS"}, "2 GIBS"),
        ({"ram": -1}, "negative"),
        ({"ram_file": 5}, "ram_file=5"),
        ({"tiers": [5]}, "erllama.cache.Tier"),
        ({"tiers": 5}, "list"),
        ({"tiers": [Live(5)]}, "external"),
        ({"pressure": {"high_watermak": 1}}, "high_watermark"),
        ({"pressure": {"tiers": ("rma",)}}, "rma"),
        ({"ramfile": "/x"}, "did you mean 'ram_file'"),
        ({"watch": 1}, "True or False"),
    ],
)
def test_wrong_options_raise_typed_errors(options: dict[str, object], words: str) -> None:
    with pytest.raises(erllama.OptionError) as caught:
        Cache(**options)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_the_same_tier_twice_is_refused(tmp_path: Path) -> None:
    tier = FileTier(tmp_path, 10)
    with pytest.raises(erllama.OptionError, match="twice"):
        Cache(tiers=[tier, tier])


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([-1], "-1"),
        ([2**32], "4294967296"),
        ([1.5], "float"),
        ([[1]], "shape"),
        (["a"], "integers"),
        ([2**70], "object"),
    ],
)
def test_tokens_must_be_u32(tokens: list[object], words: str) -> None:
    with Cache() as cache, pytest.raises(erllama.OptionError) as caught:
        cache.lookup(NAMESPACE, tokens)  # type: ignore[arg-type]
    assert words in str(caught.value)
    with pytest.raises(erllama.OptionError):
        token_bytes(tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "at least one byte"),
        (5, "type int"),
        ("text", "type str"),
        (np.zeros(4, np.float32), "items of 4"),
        (np.zeros((4, 4), np.uint8)[:, 1], "contiguous"),
    ],
)
def test_payloads_must_be_bytes(payload: object, words: str) -> None:
    (block,) = blocks_of(MANY[:SIZE])
    with Cache(block_size=SIZE) as cache, pytest.raises(erllama.OptionError) as caught:
        cache.save(block, payload)  # type: ignore[arg-type]
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"parent": b"short"}, "32, 32 and 16"),
        ({"tokens": b""}, "at least one"),
        ({"tokens": b"12345"}, "u32"),
        ({"start": -1}, "positions"),
        ({"start": 2**63}, "positions"),
    ],
)
def test_blocks_check_their_fields(parts: dict[str, object], words: str) -> None:
    whole = {"parent": NAMESPACE, "namespace": NAMESPACE, "start": 0, "tokens": bytes(8), "reason": SaveReason.COLD}
    with pytest.raises(erllama.OptionError) as caught:
        Block.following(**{**whole, **parts})  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_a_block_longer_than_block_size_is_refused() -> None:
    block = Block.following(NAMESPACE, NAMESPACE, 0, bytes(4 * 17), SaveReason.COLD)
    with Cache(block_size=16) as cache, pytest.raises(erllama.OptionError, match="block_size is 16"):
        cache.save(block, b"x")


def test_a_removal_spares_a_block_that_was_stored_again(tmp_path: Path) -> None:
    tokens = np.arange(SIZE, dtype=np.int32)
    (block,) = blocks_of(tokens)
    with (
        Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as one,
        Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as other,
    ):
        save(one, tokens)
        one.flush()
        wait_until(lambda: hit(other, tokens) == SIZE)
        assert other.evict_bytes(10**9, tiers=("disk",))
        with one._tier_set.locked():  # the thread that carries out removals waits
            assert one.load(block) is None
            save(other, tokens)
            other.flush()
            wait_until(lambda: one.lookup(block.namespace, tokens).n_tokens == SIZE)
        one.flush()
        one.check_integrity()
        assert hit(one, tokens) == SIZE
