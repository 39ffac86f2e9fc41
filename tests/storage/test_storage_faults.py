"""Storage that fails under a running cache: requests continue, faults are counted, and service recovers.

ERLLAMA_LOCK_SECONDS says how long another process keeps the database to itself; `make stress`: longer.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import random
import shutil
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama.cache import Block, Cache, FileTier
from erllama.cache.tiers.sqlite_index import Index
from support.storage.blocks import NAMESPACE, SIZE, blocks_of, hit, payload_of, save
from support.storage.processes import killed_at_end, output_of, start_python

LOCK_SECONDS = float(os.environ.get("ERLLAMA_LOCK_SECONDS", "1.0"))
PROMPT_SECONDS = 8.0  # limit for each call of a request; one that waits for the database takes ten
SOON_SECONDS = 120.0  # deadline for something that takes a second or two; a busy machine may need longer


def texts(first: int, n: int = 48) -> NDArray[np.int32]:
    return np.arange(first, first + n, dtype=np.int32)


def wait_for(condition: Callable[[], bool], seconds: float = SOON_SECONDS) -> bool:
    """Wait for something that happens in the background."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def within_time_limit() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < PROMPT_SECONDS


def make_request(cache: Cache, tokens: NDArray[np.int32], n_bytes: int = 64) -> int:
    """Make the calls of a request and check that each is quick. Returns the tokens that were found."""
    with within_time_limit():
        match = cache.lookup(NAMESPACE, tokens)
    with match:
        for block in match.blocks:
            with within_time_limit():
                loaded = cache.load(block)
            assert loaded is None or bytes(loaded.payload[:32]) == block.key
        for block in blocks_of(tokens):
            with within_time_limit():
                cache.save(block, payload_of(block, n_bytes))
        return match.n_tokens


def on_disk(root: Path) -> set[str]:
    return {path.stem for path in (root / "blocks").glob("*.kvc")}


def keys_of(tokens: NDArray[np.int32]) -> set[str]:
    return {block.key.hex() for block in blocks_of(tokens)}


def serves_again(cache: Cache, root: Path, seconds: float = SOON_SECONDS) -> bool:
    """Return whether saves reach the disk again after some time."""
    fresh = iter(range(10**6, 10**9, 10**3))

    def one_more() -> bool:
        tokens = texts(next(fresh))
        make_request(cache, tokens)
        assert cache.flush(SOON_SECONDS)
        return root.exists() and keys_of(tokens) <= on_disk(root)

    return wait_for(one_more, seconds)


# --- no room ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MiB, if that is permitted."""
    point = tmp_path / "small"
    point.mkdir(mode=0o700)
    if not mount("-t", "tmpfs", "-o", "size=1m,mode=700", "none", point):
        pytest.skip("needs permission to mount; test_cache.py tests a full disk without it")
    yield point
    subprocess.run(["umount", "--lazy", point], check=True)


def mount(*arguments: object) -> bool:
    try:
        return subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("ram", ["0", "64MiB"])
def test_a_full_disk_is_used_again_when_it_has_room(small_disk: Path, ram: str) -> None:
    root = small_disk / "kv"
    with Cache(block_size=SIZE, ram=ram, disk=root, watch=False) as cache:
        make_request(cache, texts(0))
        cache.flush()
        ballast = small_disk / "ballast"
        with pytest.raises(OSError, match="No space"):
            ballast.write_bytes(bytes(2**20))
        for first in range(1000, 5000, 1000):
            make_request(cache, texts(first), n_bytes=64_000)
            cache.flush()
        assert cache.counters()["disk_errors"] > 0
        assert cache.counters()["faults"] == 0
        assert list((root / "partial").iterdir()) == []
        assert hit(cache, texts(0)) == 48, "existing blocks are served"
        if cache.ram_budget:
            assert hit(cache, texts(4000)) == 48
        ballast.unlink()
        assert serves_again(cache, root)
        assert cache.verify() == []
        cache.check_integrity()


def test_an_incomplete_write_affects_only_its_own_block(tmp_path: Path) -> None:
    """A limit on file size replaces the full disk if none can be mounted."""
    child = start_python(
        """
        import logging, resource
        logging.getLogger("erllama.cache").setLevel(logging.ERROR)
        with Cache(block_size=SIZE, ram=0, disk=sys.argv[1], watch=False) as cache:
            save(cache, np.arange(64, dtype=np.int32))
            cache.flush()
            for first in range(1000, 9000, 1000):
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000 + first % 3000, -1))
                save(cache, np.arange(first, first + 64, dtype=np.int32))
                cache.flush()
                assert check(cache, np.arange(64, dtype=np.int32)) == (64, 4)
            assert cache.counters()["disk_errors"] >= 8, cache.counters()
            assert os.listdir(sys.argv[1] + "/partial") == []
            resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
            for i in range(2):  # the first may find the index still to be opened anew
                save(cache, np.arange(64, dtype=np.int32) + 10_000 * (1 + i))
                cache.flush()
            assert check(cache, np.arange(64, dtype=np.int32) + 20_000) == (64, 4)
            assert cache.verify() == []
            assert cache.counters()["faults"] == 0
        """,
        tmp_path,
    )
    with killed_at_end(child):
        output_of(child)


# --- a directory that goes -------------------------------------------------------------------------


@pytest.mark.parametrize("ram", [0, "1MiB"])
def test_a_removed_directory_is_recreated(tmp_path: Path, ram: str | int) -> None:
    root = tmp_path / "kv"
    with Cache(block_size=SIZE, ram=ram, disk=root) as cache:
        make_request(cache, texts(0))
        cache.flush()
        for round_ in range(1, 3):
            before = cache.counters()["disk_errors"]
            shutil.rmtree(root)
            assert make_request(cache, texts(1000 * round_)) == 0
            assert serves_again(cache, root)
            assert cache.counters()["disk_errors"] > before
            assert on_disk(root) >= {row.key.hex() for row in cache.rows() if row.tier == "disk"}
            assert hit(cache, texts(0)) == (48 if ram else 0)
        assert root.stat().st_mode & 0o777 == 0o700
        assert cache.disk_error is None
        assert cache.verify() == []
        assert cache.counters()["faults"] == 0
        cache.check_integrity()


@pytest.mark.parametrize(
    "lost",
    [
        "blocks",
        "partial",
        "owners",
        "damaged",
    ],
)
def test_a_removed_subdirectory_is_recreated(tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erllama.cache.pipeline.tier_set._REOPEN_SECONDS", 0.1)
    with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        make_request(cache, texts(0))
        cache.flush()
        shutil.rmtree(tmp_path / lost)
        assert make_request(cache, texts(0)) == 48
        assert serves_again(cache, tmp_path, 1.5)
        assert cache.counters()["faults"] == 0


# --- a database that is busy, goes, or is damaged -----------------------------------------------------


HOLD = {
    "a transaction": "BEGIN EXCLUSIVE",
    "something to write": "BEGIN IMMEDIATE; INSERT INTO fingerprints VALUES ('x', 'y'); DELETE FROM blocks",
}
# An exclusive lock blocks readers, too. It needs a database that is not open, so before a cache starts.
ALONE = "PRAGMA locking_mode=EXCLUSIVE; BEGIN IMMEDIATE; INSERT INTO fingerprints VALUES ('x', 'y')"


@contextmanager
def held_by_another(root: Path, statements: str) -> Iterator[None]:
    """While the context is active, another process has the database locked."""
    child = start_python(
        """
        import sqlite3
        connection = sqlite3.connect(sys.argv[1], isolation_level=None)
        connection.executescript(sys.argv[2])
        print("held", flush=True)
        sys.stdin.readline()
        connection.execute("ROLLBACK")
        connection.close()
        """,
        root / "index.db",
        statements,
    )
    with killed_at_end(child):
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield
        output_of(child)


@pytest.mark.parametrize(("how", "ram"), [("a transaction", "1MiB"), ("something to write", 0)])
def test_a_database_locked_by_another_process_blocks_no_request(tmp_path: Path, how: str, ram: str | int) -> None:
    with Cache(block_size=SIZE, ram=ram, disk=tmp_path, watch=False) as cache:
        make_request(cache, texts(0))
        cache.flush()
        during, began = [], time.monotonic()
        with held_by_another(tmp_path, HOLD[how]):
            until_then = time.monotonic() + LOCK_SECONDS
            while time.monotonic() < until_then:
                during.append(texts(1000 * (1 + len(during))))
                assert make_request(cache, during[-1]) == 0
                assert make_request(cache, during[-1]) == 48, "it waits to be written and can be loaded"
                assert make_request(cache, texts(0)) == 48
                with within_time_limit():
                    cache.rows()
                    cache.counters()
                    cache.contains(bytes(32))
                time.sleep(0.05)
        held_seconds = time.monotonic() - began
        assert cache.flush(2 * SOON_SECONDS)
        if held_seconds < 5:  # the cache waits ten; a busy machine may hold the lock for longer
            for tokens in (texts(0), *during):
                assert keys_of(tokens) <= on_disk(tmp_path)
            assert cache.counters()["disk_errors"] == 0
        assert serves_again(cache, tmp_path)
        assert cache.counters()["faults"] == 0
        assert cache.verify() == []
        cache.check_integrity()


def test_a_cache_opens_when_the_database_is_unlocked(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        save(cache, texts(0))
    with held_by_another(tmp_path, ALONE):
        opened: list[int] = []

        def open_it() -> None:
            with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
                opened.append(hit(cache, texts(0)))

        thread = threading.Thread(target=open_it)
        thread.start()
        time.sleep(min(LOCK_SECONDS, 3.0))
    thread.join(SOON_SECONDS)
    assert opened == [48]


def test_saves_that_outwait_a_database_lock_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erllama.cache.tiers.index_schema._BUSY_SECONDS", 0.1)
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        make_request(cache, texts(0))
        cache.flush()
        with held_by_another(tmp_path, HOLD["something to write"]):
            make_request(cache, texts(1000))
            assert cache.flush(SOON_SECONDS)
            assert make_request(cache, texts(0)) == 48
        assert cache.counters()["disk_errors"] > 0
        assert serves_again(cache, tmp_path)
        assert make_request(cache, texts(0)) == 48
        assert cache.counters()["faults"] == 0
        assert cache.verify() == []
        cache.check_integrity()


def test_a_database_locked_at_the_start_is_used_once_unlocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erllama.cache.tiers.index_schema._BUSY_SECONDS", 0.1)
    monkeypatch.setattr("erllama.cache.pipeline.tier_set._REOPEN_SECONDS", 0.1)
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        save(cache, texts(0))
    with held_by_another(tmp_path, ALONE):
        cache = Cache(block_size=SIZE, ram="1MiB", disk=tmp_path, watch=False)
        assert "locked" in str(cache.disk_error)
        assert make_request(cache, texts(1000)) == 0
        assert make_request(cache, texts(1000)) == 48
        cache.flush()
    with cache:
        assert serves_again(cache, tmp_path)
        assert cache.disk_error is None
        assert make_request(cache, texts(0)) == 48
        assert cache.counters()["faults"] == 0


@pytest.mark.parametrize("gone", [("index.db",), ("index.db", "index.db-wal", "index.db-shm")])
def test_a_deleted_database_is_rebuilt_from_the_files(tmp_path: Path, gone: tuple[str, ...]) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        make_request(cache, texts(0))
        cache.flush()
        for name in gone:
            (tmp_path / name).unlink()
        make_request(cache, texts(1000))
        assert serves_again(cache, tmp_path)
        assert wait_for(lambda: make_request(cache, texts(0)) == 48)
        assert cache.counters()["disk_errors"] > 0
        assert cache.verify() == []
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        assert hit(cache, texts(0)) == 48
        assert cache.verify() == []


def garbage(sound: bytes, kind: str) -> bytes:
    dice = random.Random(kind)
    return {
        "noise": dice.randbytes(len(sound)),
        "zeros": bytes(len(sound)),
        "text": b"this is no database\n" * 500,
        "nothing": b"",
        "half": sound[: len(sound) // 2 // 4096 * 4096 + 100],
        "noise behind the header": sound[:100] + dice.randbytes(len(sound) - 100),
    }[kind]


KINDS = ["noise", "zeros", "text", "nothing", "half", "noise behind the header"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_database_overwritten_while_open_is_rebuilt(tmp_path: Path, kind: str) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        for first in range(0, 3000, 100):
            make_request(cache, texts(first))
        cache.flush()
        path = tmp_path / "index.db"
        with sqlite3.connect(
            path
        ) as connection:  # otherwise everything would be in the log, and nothing would be lost
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        path.write_bytes(garbage(path.read_bytes(), kind))
        make_request(cache, texts(10_000))
        assert serves_again(cache, tmp_path)
        assert make_request(cache, texts(0)) in (0, 48)
        assert cache.counters()["faults"] == 0
        assert not any(name.startswith("index.db") for name in on_disk(tmp_path))
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        assert cache.disk_error is None
        assert hit(cache, texts(0)) == 48
        assert cache.verify() == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_overwritten_database_is_rebuilt_at_the_next_start(tmp_path: Path, kind: str) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        for first in range(0, 3000, 100):
            make_request(cache, texts(first))
    path = tmp_path / "index.db"
    path.write_bytes(garbage(path.read_bytes(), kind))
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        assert cache.disk_error is None
        assert all(make_request(cache, texts(first)) == 48 for first in range(0, 3000, 100))
        cache.flush()
        assert cache.counters()["faults"] == cache.counters()["corrupt_files"] == 0
        assert cache.verify() == []


def test_a_database_of_a_newer_release_is_refused_unchanged(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        save(cache, texts(0))
    with sqlite3.connect(tmp_path / "index.db") as connection:
        connection.execute("PRAGMA user_version=99")
    connection.close()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with Cache(block_size=SIZE, disk=tmp_path, watch=False) as cache:
        assert isinstance(cache.disk_error, erllama.CacheError)
        assert "version 99" in str(cache.disk_error)
        assert "Upgrade" in str(cache.disk_error)
        make_request(cache, texts(1000))
        cache.gc()
        assert cache.verify() != [], "it reports that the disk is unavailable"
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


# --- files that cannot be read ------------------------------------------------------------------------


def test_a_directory_in_place_of_a_file_is_a_miss(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        make_request(cache, texts(0))
        cache.flush()
        second = tmp_path / "blocks" / f"{blocks_of(texts(0))[1].key.hex()}.kvc"
        second.unlink()
        second.mkdir()
        assert [cache.load(block) is not None for block in blocks_of(texts(0))] == [True, False, True]
        assert wait_for(lambda: not second.is_dir()), "it is set aside"
        assert wait_for(lambda: make_request(cache, texts(0)) == 48 and cache.flush() and second.is_file())
        assert all(cache.load(block) is not None for block in blocks_of(texts(0)))
        assert cache.counters()["corrupt_files"] + cache.counters()["disk_errors"] > 0
        assert cache.counters()["faults"] == 0


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), OSError(errno.EIO, "bad sector")])
def test_a_file_that_cannot_be_read_now_is_a_miss_and_is_kept(tmp_path: Path, error: OSError) -> None:
    class Unreadable(FileTier):
        refused: frozenset[bytes] = frozenset()

        def read(self, block: Block) -> tuple[Block, memoryview]:
            if block.key in self.refused:
                raise error
            return super().read(block)

    tier = Unreadable(tmp_path, 2**30)
    with Cache(block_size=SIZE, ram=0, tiers=[tier]) as cache:
        make_request(cache, texts(0))
        cache.flush()
        tier.refused = frozenset({blocks_of(texts(0))[1].key})
        assert [cache.load(block) is not None for block in blocks_of(texts(0))] == [True, False, True]
        assert cache.counters()["disk_errors"] == 1
        assert cache.counters()["faults"] == cache.counters()["corrupt_files"] == 0
        tier.refused = frozenset()
        assert hit(cache, texts(0)) == 48


def test_a_version_that_cannot_be_indexed_keeps_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    (block,) = blocks_of(texts(0, SIZE))
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        cache.save(block, payload_of(block))
        cache.flush()
        monkeypatch.setattr(Index, "put", locked)
        cache.save(block, payload_of(block, 640), replace=True)
        cache.flush()
        monkeypatch.undo()
        assert cache.verify() == []
        assert hit(cache, texts(0, SIZE)) == SIZE


def test_a_file_that_cannot_be_removed_counts_towards_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def refuse(self: Path, missing_ok: bool = False) -> None:
        if self.parent.name == "blocks":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        unlink(self, missing_ok)

    n_bytes = 6400
    quota = 3 * (n_bytes + 300)
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, disk_quota=quota, watch=False) as cache:
        make_request(cache, texts(0), n_bytes)
        cache.flush()
        monkeypatch.setattr(Path, "unlink", refuse)
        make_request(cache, texts(1000), n_bytes)
        cache.flush()
        assert sum(path.stat().st_size for path in (tmp_path / "blocks").iterdir()) <= quota


# --- file systems that do not let us ------------------------------------------------------------------


def test_a_file_system_that_is_read_only_is_read(small_disk: Path) -> None:
    root = small_disk / "kv"
    with Cache(block_size=SIZE, ram=0, disk=root, watch=False) as cache:
        make_request(cache, texts(0))
    assert mount("-o", "remount,ro", small_disk)
    with Cache(block_size=SIZE, ram=0, disk=root, watch=False) as cache:
        assert cache.disk_error is None
        assert cache.tiers()[0].read_only
        assert hit(cache, texts(0)) == 48
    with Cache(block_size=SIZE, disk=small_disk / "new", watch=False) as cache:
        assert isinstance(cache.disk_error, erllama.CacheError)
        assert "Read-only file system" in str(cache.disk_error)
        assert str(small_disk / "new") in str(cache.disk_error)
        make_request(cache, texts(0))
        assert hit(cache, texts(0)) == 48
    assert mount("-o", "remount,rw", small_disk)
    with Cache(block_size=SIZE, ram=0, disk=root, watch=False) as cache:
        assert hit(cache, texts(0)) == 48


def test_a_file_system_that_becomes_read_only_still_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opening = os.open

    def refuse(path: object, flags: int, *arguments: object, **options: object) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opening(path, flags, *arguments, **options)  # type: ignore[call-overload, no-any-return]

    with Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False) as cache:
        make_request(cache, texts(0))
        cache.flush()
        monkeypatch.setattr(os, "open", refuse)
        make_request(cache, texts(1000))
        assert cache.flush(SOON_SECONDS)
        assert cache.counters()["disk_errors"] > 0
        assert make_request(cache, texts(0)) == 48
        monkeypatch.undo()
        assert serves_again(cache, tmp_path)
        assert cache.counters()["faults"] == 0
        assert cache.verify() == []


def test_a_directory_that_cannot_be_created_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with Cache(block_size=SIZE, disk=tmp_path / "kv", watch=False) as cache:
        assert isinstance(cache.disk_error, erllama.CacheError)
        assert "Read-only file system" in str(cache.disk_error)
        assert "use a writable one" in str(cache.disk_error)
        make_request(cache, texts(0))
        assert hit(cache, texts(0)) == 48


@pytest.mark.parametrize("locks", ["none", "granted to everyone"])
def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: str
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks if locks == "none" else lambda *_: None)
    with Cache(block_size=SIZE, disk=tmp_path, watch=False) as cache:
        assert isinstance(cache.disk_error, erllama.CacheError)
        assert "locks" in str(cache.disk_error)
        assert "local disk" in str(cache.disk_error)
        make_request(cache, texts(0))
    assert not (tmp_path / "index.db").exists()


def test_a_refused_directory_holds_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    Cache(block_size=SIZE, disk=tmp_path).close()
    assert list((tmp_path / "owners").iterdir()) == [], "the cache tries again every few seconds"


def test_a_cache_inside_another_cache_is_refused(tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    with Cache(block_size=SIZE, disk=outer, watch=False) as cache:
        make_request(cache, texts(0))
        for inner in (outer / "inner", outer / "blocks" / "deep" / "inner", outer / "blocks"):
            with Cache(block_size=SIZE, disk=inner, watch=False) as other:
                assert isinstance(other.disk_error, erllama.CacheError)
                assert str(outer) in str(other.disk_error)
                make_request(other, texts(0))
        assert not (outer / "inner").exists()
    for roots in ([outer, outer / "inner"], [outer / "inner", outer], [outer, outer]):
        with pytest.raises(erllama.OptionError, match="separate directories"):
            Cache(block_size=SIZE, disk=roots)
    with pytest.raises(erllama.OptionError, match="separate directories"):
        Cache(block_size=SIZE, disk=outer, ram_file=outer / "inner")


# --- files that people put there, and take away ---------------------------------------------------------


@pytest.fixture
def donor(tmp_path: Path) -> Path:
    """Create the directory of another cache, with one context in three files."""
    root = tmp_path / "donor"
    with Cache(block_size=SIZE, ram=0, disk=root) as cache:
        save(cache, texts(0), n_bytes=64_000)
    return root


def copy(source: Path, target: Path, pieces: int) -> None:
    """Copy as `cp` does, in several pieces, with default permissions."""
    content = source.read_bytes()
    step = -(-len(content) // pieces)
    with target.open("wb") as file:
        for at in range(0, len(content), step):
            file.write(content[at : at + step])
            file.flush()
            if pieces > 1:
                time.sleep(0.8 / pieces)
    target.chmod(0o644)


@pytest.mark.parametrize(
    ("named", "pieces"),
    [("as there", 1), ("otherwise", 1), ("otherwise", 10)],
    ids=["at once", "renamed", "slowly"],
)
def test_copied_files_are_used(tmp_path: Path, donor: Path, pieces: int, named: str) -> None:
    mine = tmp_path / "mine"
    with Cache(block_size=SIZE, ram=0, disk=mine) as cache:
        copiers = []
        for i, source in enumerate(sorted((donor / "blocks").iterdir())):
            name = source.name if named == "as there" else f"copy of {i}.kvc"
            copiers.append(threading.Thread(target=copy, args=(source, mine / "blocks" / name, pieces)))
            copiers[-1].start()
        assert wait_for(lambda: use_only(cache, texts(0)) == 48)
        for copier in copiers:
            copier.join()
        assert hit(cache, texts(0)) == 48
        assert on_disk(mine) == on_disk(donor), "each has its own name"
        assert wait_for(lambda: {p.stat().st_mode & 0o777 for p in (mine / "blocks").iterdir()} == {0o600})
        cache.flush()
        assert cache.verify() == []
        assert cache.counters()["corrupt_files"] == cache.counters()["disk_errors"] == 0
        assert list((mine / "damaged").iterdir()) == []


def use_only(cache: Cache, tokens: NDArray[np.int32]) -> int:
    with cache.lookup(NAMESPACE, tokens) as match:
        return match.n_tokens


def test_copied_files_count_towards_the_quota(tmp_path: Path, donor: Path) -> None:
    mine, quota = tmp_path / "mine", 150_000
    with Cache(block_size=SIZE, ram=0, disk=mine, disk_quota=quota) as cache:
        for first in (1000, 2000):
            make_request(cache, texts(first), n_bytes=16_000)
        cache.flush()
        for source in (donor / "blocks").iterdir():
            shutil.copy(source, mine / "blocks")
        assert wait_for(lambda: any(row.n_bytes > 60_000 for row in cache.rows()))
        assert wait_for(lambda: sum(p.stat().st_size for p in (mine / "blocks").iterdir()) <= quota)
        assert cache.counters()["evictions_disk"] > 0
        cache.check_integrity()


def test_a_removed_file_disappears_from_the_rows(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        make_request(cache, texts(0))
        cache.flush()
        last = blocks_of(texts(0))[-1].key
        assert last in {row.key for row in cache.rows()}
        (tmp_path / "blocks" / f"{last.hex()}.kvc").unlink()
        assert wait_for(lambda: last not in {row.key for row in cache.rows()})
        assert use_only(cache, texts(0)) == 32
        assert cache.verify() == []
        assert cache.counters()["corrupt_files"] == cache.counters()["disk_errors"] == 0


def test_a_file_that_is_replaced_by_garbage_is_quarantined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erllama.cache.tiers.reconciler._SETTLED_SECONDS", 0.3)
    with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        make_request(cache, texts(0))
        cache.flush()
        last = blocks_of(texts(0))[-1].key
        path = tmp_path / "blocks" / f"{last.hex()}.kvc"
        path.write_bytes(b"garbage")
        assert wait_for(lambda: last not in {row.key for row in cache.rows()})
        assert not path.exists()
        assert [aside.read_bytes() for aside in (tmp_path / "damaged").iterdir()] == [b"garbage"]
        assert cache.counters()["corrupt_files"] == 1
        assert make_request(cache, texts(0)) == 32, "and saves it again"
        cache.flush()
        assert use_only(cache, texts(0)) == 48


def litter(directory: Path, target: Path) -> list[Path]:
    """Create one of each kind of path that is not a file, under names of block files."""
    names = [directory / f"{i:064x}.kvc" for i in range(5)]
    link, dangling, fifo, listening, inner = names
    link.symlink_to(target)
    dangling.symlink_to(target.with_name("nowhere"))
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(directory, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{here}/{listening.name}")  # a socket's path is short
        os.close(here)
    inner.mkdir()
    return names


@pytest.mark.parametrize("when", ["open", "closed"])
def test_paths_that_are_not_files_are_quarantined(tmp_path: Path, donor: Path, when: str) -> None:
    mine = tmp_path / "mine"
    target = sorted((donor / "blocks").iterdir())[0]
    before = target.read_bytes(), target.stat().st_mode
    with Cache(block_size=SIZE, ram=0, disk=mine) as cache:
        if when == "open":
            names = litter(mine / "blocks", target)
            # No event reports a directory. It stays until gc or the next start.
            assert wait_for(lambda: not any(os.path.lexists(name) for name in names[:-1]))
            cache.gc()
    if when == "closed":
        names = litter(mine / "blocks", target)
    with Cache(block_size=SIZE, ram=0, disk=mine) as cache:
        assert list((mine / "blocks").iterdir()) == []
        assert len(list((mine / "damaged").iterdir())) == 5
        assert cache.rows() == []
        assert cache.verify() == []
        assert cache.counters()["faults"] == cache.counters()["disk_errors"] == 0
    assert (target.read_bytes(), target.stat().st_mode) == before


def test_the_files_of_one_cache_serve_another(tmp_path: Path) -> None:
    donor, mine = tmp_path / "donor", tmp_path / "mine"
    with Cache(block_size=SIZE, ram=0, disk=donor) as cache:
        for first in range(0, 2000, 100):
            save(cache, texts(first))
    with Cache(block_size=SIZE, ram=0, disk=mine) as cache:
        save(cache, texts(5000))
        cache.flush()
        shutil.copytree(donor / "blocks", mine / "blocks", dirs_exist_ok=True)
        (mine / "blocks").chmod(0o700)
        assert wait_for(lambda: all(use_only(cache, texts(first)) == 48 for first in range(0, 2000, 100)))
        assert all(hit(cache, texts(first)) == 48 for first in range(0, 2000, 100))
        assert hit(cache, texts(5000)) == 48
        cache.flush()
        assert cache.verify() == []
        assert cache.counters()["corrupt_files"] == cache.counters()["disk_errors"] == 0


@pytest.mark.parametrize("times", ["kept", "new"])
def test_a_copied_directory_works(tmp_path: Path, donor: Path, times: str) -> None:
    """As restored from a backup, with `cp -a` and with `cp -r`."""
    mine = tmp_path / "mine"
    shutil.copytree(donor, mine, copy_function=shutil.copy2 if times == "kept" else shutil.copy)
    with Cache(block_size=SIZE, ram=0, disk=mine, watch=False) as cache:
        assert hit(cache, texts(0)) == 48
        cache.gc()
        assert cache.verify() == []


def test_an_unreadable_file_does_not_stop_the_scan(
    tmp_path: Path, donor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the index among several new files loses none of them."""
    put, failures = Index.put, iter([sqlite3.OperationalError("database is locked")])

    def fails_once(self: Index, *arguments: object, **options: object) -> None:
        for failure in failures:
            raise failure
        put(self, *arguments, **options)  # type: ignore[arg-type]

    mine = tmp_path / "mine"
    with Cache(block_size=SIZE, ram=0, disk=mine) as cache:
        monkeypatch.setattr(Index, "put", fails_once)
        for source in (donor / "blocks").iterdir():
            shutil.copy(source, mine / "blocks")
        assert wait_for(lambda: use_only(cache, texts(0)) == 48, 2.5)


def test_a_file_that_cannot_be_opened_now_is_not_treated_as_damaged(
    tmp_path: Path, donor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that temporarily has no free file descriptors."""
    opening, failures = os.open, iter([OSError(errno.EMFILE, os.strerror(errno.EMFILE))])

    def fails_once(path: object, *arguments: object, **options: object) -> int:
        if str(path).startswith(str(tmp_path / "mine" / "blocks")):
            for failure in failures:
                raise failure
        return opening(path, *arguments, **options)  # type: ignore[call-overload, no-any-return]

    mine = tmp_path / "mine"
    shutil.copytree(donor / "blocks", mine / "blocks")
    for path in (mine, mine / "blocks"):
        path.chmod(0o700)
    for path in (mine / "blocks").iterdir():
        os.utime(path, (0, 0))  # it was copied long ago
    monkeypatch.setattr(os, "open", fails_once)
    with Cache(block_size=SIZE, ram=0, disk=mine, watch=False) as cache:
        cache.gc()
        assert list((mine / "damaged").iterdir()) == []
        assert use_only(cache, texts(0)) == 48


def test_a_slow_copy_delays_no_save(tmp_path: Path) -> None:
    """It does not delay `flush` either, which waits for saves only."""
    with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        stop = threading.Event()

        def copy_for_ever() -> None:
            with (tmp_path / "blocks" / f"{'ab' * 32}.kvc").open("wb") as file:
                while not stop.wait(0.05):
                    file.write(b"x" * 100)
                    file.flush()

        copier = threading.Thread(target=copy_for_ever)
        copier.start()
        try:
            time.sleep(1.0)  # until the cache has noticed it
            save(cache, texts(0))
            assert cache.flush(SOON_SECONDS)  # the copy never ends
            assert keys_of(texts(0)) <= on_disk(tmp_path)
        finally:
            stop.set()
            copier.join()


def test_closing_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for i in range(2):
            with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
                save(cache, texts(1000 * i))
                cache.flush()
                for n in range(20):
                    path = tmp_path / "blocks" / f"{n}.kvc"
                    path.touch()
                    os.utime(path, (0, 0))
    assert [record for record in caplog.records if not record.name.startswith("erllama")] == []
