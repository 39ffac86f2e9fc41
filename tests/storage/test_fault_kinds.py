"""Faults of storage, signals and clocks by kind: what must hold for every example.

Each test states what a user relies on: others can write after an exception, counted bytes are bytes on disk,
flush() returns under load, a wrong clock has no lasting effect, a lack of descriptors harms no other process.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable, ItemsView
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama.cache import Block, Cache, FileTier
from erllama.cache.catalog.eviction_order import LeafLRU
from erllama.cache.tiers.directory import CacheDirectory
from erllama.cache.tiers.read_only import ReadOnlyFileTier
from erllama.cache.tiers.sqlite_index import FileStamp, Index
from support.storage.blocks import NAMESPACE, SIZE, blocks_of, hit, payload_of, save
from support.storage.processes import bytes_in, killed_at_end, output_of, start_python
from support.subprocesses import must_run

TEN_YEARS = 10 * 365 * 86400 * 10**9


def texts(first: int, n: int = 48) -> NDArray[np.int32]:
    return np.arange(first, first + n, dtype=np.int32)


def fill(cache: Cache, n: int) -> None:
    for first in range(0, n * 1000, 1000):
        save(cache, texts(first))
    assert cache.flush(60)


def others_can_write(root: Path) -> None:
    with closing(sqlite3.connect(root / "index.db", timeout=2, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")


def counted(cache: Cache) -> float:
    return cache.counters()["bytes_disk"]


# --- exceptions of any kind -------------------------------------------------------------------------


class Interrupting:
    """A connection that raises right after its n-th statement of a kind, as a signal handler may."""

    def __init__(self, connection: sqlite3.Connection, statement: str) -> None:
        self._connection, self._statement, self.raised = connection, statement, False

    def execute(self, sql: str, *values: object) -> sqlite3.Cursor:
        found = self._connection.execute(sql, *values)
        if sql.startswith(self._statement) and not self.raised:
            self.raised = True
            raise KeyboardInterrupt
        return found

    def __getattr__(self, name: str) -> object:
        return getattr(self._connection, name)


@pytest.mark.parametrize("statement", ["BEGIN", "SAVEPOINT", "RELEASE", "COMMIT", "DELETE"])
def test_an_exception_at_any_statement_leaves_no_transaction_open(tmp_path: Path, statement: str) -> None:
    index = Index(tmp_path / "index.db")
    connection = index.db.conn
    index.db.conn = interrupting = Interrupting(connection, statement)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        index.release(b"k" * 32, "nobody")
    assert interrupting.raised
    assert not connection.in_transaction
    others_can_write(tmp_path)
    index.reserve(b"k" * 32, "somebody", 1)
    assert index.reserved_by(b"k" * 32) == "somebody"
    index.close()


@pytest.mark.parametrize("statement", ["BEGIN", "SELECT"])
def test_an_exception_while_reading_leaves_no_transaction_open(tmp_path: Path, statement: str) -> None:
    index, other = Index(tmp_path / "index.db"), Index(tmp_path / "index.db")
    other.put(blocks_of(texts(0))[0], FileStamp(1, 1), 1)
    connection = index._reader
    index._reader = Interrupting(connection, statement)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        index.changes()
    assert not connection.in_transaction
    found = index.changes()
    assert found is not None
    assert len(found.stored) == 1
    index.close()
    other.close()


def test_statements_in_the_wrong_order_do_not_discard_the_index(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        fill(cache, 2)
        (tier,) = cache._tier_set
        assert isinstance(tier, FileTier)
        assert tier.usable
        with pytest.raises(sqlite3.OperationalError), tier._using() as index:
            index.db.execute("COMMIT")  # SQLITE_ERROR: no transaction is open
        fill(cache, 4)
        assert cache.flush(120)
        assert hit(cache, texts(0)) == 48
        assert list(tmp_path.glob("index.db.damaged-*")) == []
        cache.check_integrity()


@pytest.mark.parametrize(
    "damage", ["DROP TABLE changes", "DROP TRIGGER noted_insert", "ALTER TABLE blocks DROP COLUMN reason"]
)
def test_a_damaged_schema_is_rebuilt(tmp_path: Path, damage: str) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        fill(cache, 2)
    with closing(sqlite3.connect(tmp_path / "index.db")) as index:
        index.executescript(damage)
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        assert hit(cache, texts(1000)) == 48
        fill(cache, 3)
        assert cache.disk_error is None
        assert cache.verify() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError(errno.EIO, "no"), MemoryError])
@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("ram", [0, "1MiB"])
def test_a_partly_failed_eviction_counts_the_remaining_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, done: bool, ram: str | int
) -> None:
    unlink, n = Path.unlink, 0

    def failing(path: Path, missing_ok: bool = False) -> None:
        nonlocal n
        n += path.parent.name == "blocks"
        if n == 5 and not done:
            raise error
        unlink(path, missing_ok)
        if n == 5:
            n += 1
            raise error

    with Cache(block_size=SIZE, ram=ram, disk=tmp_path, watch=False) as cache:
        fill(cache, 10)
        before = bytes_in(tmp_path)
        monkeypatch.setattr(Path, "unlink", failing)
        freed = None
        with suppress(KeyboardInterrupt):
            freed = cache.evict_bytes(before // 2, ("disk",))
        assert freed in (None, before - bytes_in(tmp_path))
        assert (freed is None) == (error is KeyboardInterrupt)
        monkeypatch.undo()
        assert n >= 5
        cache.check_integrity()
        assert counted(cache) == bytes_in(tmp_path)
        assert cache.verify() == []
        others_can_write(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("method", ["remove", "changes", "rows", "reserve", "write"])
def test_the_catalog_matches_a_tier_after_any_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], method: str
) -> None:
    class Raising(FileTier):
        raising = False

    def raise_once(self: Raising, *arguments: object) -> object:
        if Raising.raising:
            Raising.raising = False
            raise error
        return getattr(FileTier, method)(self, *arguments)

    setattr(Raising, method, raise_once)
    quota = 8_000
    with Cache(block_size=SIZE, ram=0, tiers=[Raising(tmp_path, quota)]) as cache:
        fill(cache, 3)
        for call in (
            lambda: cache.evict_bytes(1_000, ("disk",)),
            cache.gc,
            lambda: fill(cache, 5),
            lambda: hit(cache, texts(0)),
        ):
            Raising.raising = True
            with suppress(error):
                call()
            Raising.raising = False
            assert cache.flush(120)
            cache.gc()
            cache.check_integrity()
            assert counted(cache) == bytes_in(tmp_path) <= quota
        fill(cache, 12)
        assert bytes_in(tmp_path) <= quota
        assert cache.verify() == []


def test_check_integrity_compares_with_the_files(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        fill(cache, 3)
        cache.check_integrity()
        one, two, *_ = sorted((tmp_path / "blocks").iterdir())
        content = one.read_bytes()
        one.write_bytes(content + b"x")
        with pytest.raises(erllama.IntegrityError, match=f"{len(content) + 1} bytes"):
            cache.check_integrity()
        os.utime(one, (0, 0))  # a file written just now may still be being copied
        cache.gc()
        cache.check_integrity()
        two.rename(tmp_path / "blocks" / ("00" * 32 + ".kvc"))
        with pytest.raises(erllama.IntegrityError, match="the index does not list"):
            cache.check_integrity()
        cache.gc()
        cache.check_integrity()


# --- bytes that were not removed ----------------------------------------------------------------------


def test_bytes_that_were_not_removed_are_not_reported_as_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name == "blocks":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        unlink(path, missing_ok)

    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        fill(cache, 5)
        before = bytes_in(tmp_path)
        monkeypatch.setattr(Path, "unlink", refuse)
        assert cache.evict_bytes(10_000, ("disk",)) == 0
        assert counted(cache) == before == bytes_in(tmp_path)
        monkeypatch.undo()
        assert cache.evict_bytes("1GiB", ("disk",)) == before
        assert bytes_in(tmp_path) == 0


# --- flush under load ---------------------------------------------------------------------------------


class SlowTier(FileTier):
    def write(self, block: Block, payload: memoryview) -> None:
        time.sleep(0.002)
        super().write(block, payload)


@pytest.mark.parametrize("call", [lambda cache: cache.flush(), lambda cache: cache.gc()])
def test_a_flush_waits_for_what_was_queued_when_it_was_called(
    tmp_path: Path, call: Callable[[Cache], object]
) -> None:
    stop, saved = threading.Event(), []

    def keep_saving(cache: Cache) -> None:
        for first in range(10_000, 10**9, 1000):
            if stop.is_set():
                return
            save(cache, texts(first))
            saved.append(first)
            while cache.counters()["bytes_pending"] > 10_000:
                time.sleep(0.0005)

    with Cache(block_size=SIZE, ram=0, tiers=[SlowTier(tmp_path, 2**30)], write_queue="1MiB") as cache:
        saving = threading.Thread(target=keep_saving, args=(cache,))
        saving.start()
        try:
            while len(saved) < 5:
                time.sleep(0.001)
            mine = texts(5)
            save(cache, mine)
            call(cache)
            assert all((tmp_path / "blocks" / f"{b.key.hex()}.kvc").exists() for b in blocks_of(mine))
            assert saving.is_alive()
        finally:
            stop.set()
            saving.join()


def test_tasks_have_their_turn_under_load(tmp_path: Path) -> None:
    done = threading.Event()
    with Cache(block_size=SIZE, ram=0, tiers=[SlowTier(tmp_path, 2**30)]) as cache:
        for first in range(0, 8_000, 1000):
            save(cache, texts(first))
        cache._queue.defer(done.set)
        for first in range(100_000, 10**9, 1000):
            if done.wait(0.002):
                break
            assert first < 2_000_000, "later saves must not always go first"
            save(cache, texts(first))


# --- a file that cannot be read -----------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EBADMSG])
@pytest.mark.parametrize("ram", [0, "1MiB"])
def test_a_file_that_cannot_be_read_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, ram: str | int
) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        fill(cache, 1)
    second = tmp_path / "blocks" / f"{blocks_of(texts(0))[1].key.hex()}.kvc"
    bad = second.stat().st_ino
    readv = os.readv

    def failing(descriptor: int, buffers: object) -> int:
        if os.fstat(descriptor).st_ino == bad:
            raise OSError(number, os.strerror(number))
        return readv(descriptor, buffers)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "readv", failing)
    with Cache(block_size=SIZE, ram=ram, disk=tmp_path, watch=False) as cache:
        assert hit_loads(cache, texts(0)) == 1
        assert cache.wants(blocks_of(texts(0))[1].key)
        save(cache, texts(0))
        assert cache.flush(120)
        assert hit_loads(cache, texts(0)) == 3
        assert second.stat().st_ino != bad
        assert cache.counters()["blocks_ram"] == (3 if ram else 0)
        assert not cache.wants(blocks_of(texts(0))[1].key)
        assert cache.verify() == []
        cache.check_integrity()


def hit_loads(cache: Cache, tokens: NDArray[np.int32]) -> int:
    """Return blocks that can be restored one after another."""
    with cache.lookup(NAMESPACE, tokens) as match:
        n = 0
        for block in match.blocks:
            if cache.load(block) is None:
                break
            n += 1
        return n


# --- a clock that was ahead -----------------------------------------------------------------------------


def test_a_block_used_in_the_future_is_no_newer_than_one_used_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = time.time_ns
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        monkeypatch.setattr(time, "time_ns", lambda: clock() + TEN_YEARS)
        save(cache, texts(0))
        assert hit(cache, texts(0)) == 48
        cache.flush()
        monkeypatch.undo()
        save(cache, texts(1000))
        cache.flush()
        assert hit(cache, texts(1000)) == 48
        freed = cache.evict_bytes(int(counted(cache)) // 2, ("disk",))
        assert freed > 0
        assert hit(cache, texts(1000)) == 48, "the block used last stays"
        assert hit(cache, texts(0)) < 48


@pytest.mark.parametrize("ahead", ["the other", "this"])
def test_uses_are_recorded_after_a_clock_was_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: str
) -> None:
    clock = time.time_ns
    if ahead == "this":
        monkeypatch.setattr(time, "time_ns", lambda: clock() + TEN_YEARS)
    tier = FileTier(tmp_path, 2**30, watch=False)
    tier.open()
    other = FileTier(tmp_path, 2**30, watch=False)
    other.open()
    (block,) = blocks_of(texts(0, SIZE))
    with other._using() as index:
        index.put(block, FileStamp(1, 1), clock())
    monkeypatch.setattr(time, "time_ns", lambda: clock() + TEN_YEARS)
    other.touch([(block.key, time.time_ns())])
    tier.uses()
    monkeypatch.undo()
    tier.uses()
    other.touch([(block.key, used := time.time_ns())])
    assert dict(tier.uses())[block.key] >= used - 10**9
    assert dict(tier.uses())[block.key] <= time.time_ns()
    assert all(row.last_used <= time.time_ns() for row in tier.rows())
    tier.close()
    other.close()


# --- no descriptors left ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EIO, errno.ENOMEM])
def test_an_owner_that_cannot_be_checked_counts_as_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    one, two = CacheDirectory(tmp_path), CacheDirectory(tmp_path)
    opening = os.open

    def failing(path: object, *arguments: object, **options: object) -> int:
        if str(path).endswith(".lock"):
            raise OSError(number, os.strerror(number), str(path))
        return opening(path, *arguments, **options)  # type: ignore[arg-type]

    assert one.is_alive(two.owner)
    monkeypatch.setattr(os, "open", failing)
    assert one.is_alive(two.owner)
    monkeypatch.undo()
    two.leave()
    assert not one.is_alive(two.owner)
    one.leave()


def test_a_process_without_file_descriptors_delays_no_other_save(tmp_path: Path) -> None:
    """The other process writes while this one, without free descriptors, checks which processes live."""
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        fill(cache, 1)
        child = start_python(
            """
            import resource
            cache = Cache(block_size=SIZE, ram=0, disk=sys.argv[1], watch=False)
            cache.rows()
            held = []
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            try:
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                pass
            print("ready", flush=True)
            sys.stdin.readline()
            for tier in cache._tier_set:
                tier.release_stale_reservations()
            for descriptor in held:
                os.close(descriptor)
            """,
            tmp_path,
        )
        with killed_at_end(child):
            assert child.stdout is not None
            assert child.stdin is not None
            assert child.stdout.readline() == "ready\n"
            (tier,) = cache._tier_set
            (block,) = blocks_of(texts(5000, SIZE))
            with tier.exclusive():
                assert tier.reserve(block, 500)
            child.stdin.write("go\n")
            child.stdin.flush()
            output_of(child)
            tier.write(block, memoryview(payload_of(block)))
        cache.gc()
        assert hit(cache, texts(5000, SIZE)) == SIZE


# --- private directories ------------------------------------------------------------------------------


def test_created_directories_are_private_for_every_umask(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b" / "kv"
    before = os.umask(0)
    try:
        with Cache(block_size=SIZE, ram=0, disk=root):
            pass
    finally:
        os.umask(before)
    made = [tmp_path / "a", tmp_path / "a" / "b", root, *(path for path in root.iterdir() if path.is_dir())]
    assert {path: path.stat().st_mode & 0o777 for path in made} == dict.fromkeys(made, 0o700)


# --- quotas -----------------------------------------------------------------------------------------


def test_an_older_version_counts_until_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved: list[int] = []
    unlink = Path.unlink

    def watching(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name == "partial" and path.exists():
            with closing(sqlite3.connect(tmp_path / "index.db")) as other:
                reserved.append(other.execute("SELECT count(*) FROM reservations").fetchone()[0])
        unlink(path, missing_ok)

    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        save(cache, texts(0, SIZE))
        assert cache.flush(60)
        monkeypatch.setattr(Path, "unlink", watching)
        (block,) = blocks_of(texts(0, SIZE))
        assert cache.save(block, payload_of(block), replace=True)
        assert cache.flush(60)
        cache.check_integrity()
        with closing(sqlite3.connect(tmp_path / "index.db")) as other:
            assert other.execute("SELECT count(*) FROM reservations").fetchone() == (0,)
    assert reserved == [1]


# --- found by review ----------------------------------------------------------------------------------


def test_the_cost_of_a_lookup_depends_on_the_blocks_it_finds() -> None:
    lru = LeafLRU()
    for i in range(1000):
        lru.add(i.to_bytes(4, "little"), b"", 10, last_used=i)
    walked = 0

    class Counting(dict[bytes, Any]):
        def items(self) -> ItemsView[bytes, Any]:
            nonlocal walked
            walked += 1
            return super().items()

    lru._nodes = Counting(lru._nodes)
    for now in (2_000, 2_000, 2_000, 3_000):
        lru.clamp(now)
        lru.touch((now % 7).to_bytes(4, "little"), now)
    assert walked == 0
    lru.clamp(2_500)  # the clock was set back
    lru.touch(b"\1\0\0\0", 2_500)
    lru.clamp(2_500)
    assert walked == 1


def test_files_that_cannot_be_checked_are_not_treated_as_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        fill(cache, 3)
        before = counted(cache)

        def refuse(path: Path, *_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "the directory cannot be searched", str(path))

        monkeypatch.setattr(Path, "unlink", refuse)
        monkeypatch.setattr(Path, "lstat", refuse)
        monkeypatch.setattr(os.path, "lexists", lambda path: False)
        assert cache.evict_bytes("1GiB", tiers=("disk",)) == 0
        monkeypatch.undo()
        cache.check_integrity()
        assert counted(cache) == before == bytes_in(tmp_path)


def test_errors_without_damage_do_not_discard_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        fill(cache, 1)

    def no_memory(self: Index) -> None:
        raise MemoryError

    monkeypatch.setattr(Index, "_open", no_memory)
    with pytest.raises(MemoryError):
        Index(tmp_path / "index.db")
    assert list(tmp_path.glob("index.db.damaged-*")) == []


def test_an_interrupted_announcement_of_a_save_blocks_no_lookup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        announce = type(cache._saver)._announce

        def interrupted(*given: object) -> None:
            announce(*given)  # type: ignore[arg-type]
            raise KeyboardInterrupt  # as a handler does when the call completes in the background

        monkeypatch.setattr(type(cache._saver), "_announce", interrupted)
        with pytest.raises(KeyboardInterrupt), cache.expecting(b"k" * 32):
            pass
        assert not cache.awaits(b"k" * 32)


def test_a_block_that_cannot_be_replaced_stays_in_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path / "a", watch=False) as cache:
        save(cache, texts(0, SIZE))
        assert cache.flush(60)
    (block,) = blocks_of(texts(0, SIZE))
    read_only = ReadOnlyFileTier(tmp_path / "a", 2**30)
    with Cache(block_size=SIZE, ram=0, tiers=[read_only, FileTier(tmp_path / "b", 2**30, watch=False)]) as cache:

        def full(self: FileTier, *_: object) -> None:
            raise OSError(errno.ENOSPC, "no space")

        monkeypatch.setattr(FileTier, "write", full)
        cache.save(block, payload_of(block), replace=True)
        assert cache.flush(60)
        assert hit(cache, texts(0, SIZE)) == SIZE
        assert cache.load(block) is not None
        cache.check_integrity()


def test_a_cache_can_be_created_while_its_module_is_imported(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        """
from erllama.cache import Cache, Tier

class Mine(Tier):
    def __init__(self):
        super().__init__("mine", 1000)
    def rows(self):
        import mine  # as a tier that loads something at first use
        return []
    def read(self, block):
        raise FileNotFoundError
    def write(self, block, payload):
        pass
    def remove(self, keys):
        pass

CACHE = Cache(ram=0, tiers=[Mine()])
"""
    )
    must_run("import sys; sys.path.insert(0, sys.argv[1]); import mine; mine.CACHE.close()", tmp_path)
