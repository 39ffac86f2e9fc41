"""Read-only directories: stored blocks are served, no file is written, and the cache reports the state."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import erllama
from erllama.cache import Cache
from erllama.cache.admin.maintenance import CacheFiles
from support.storage.blocks import NAMESPACE, SIZE, blocks_of, hit, payload_of, save
from support.storage.processes import PRELUDE


def texts(first: int, n: int = 48) -> NDArray[np.int32]:
    return np.arange(first, first + n, dtype=np.int32)


def state(root: Path) -> dict[str, tuple[int, int, int]]:
    """Return all that a write would change: names, sizes, times and modes."""
    found = {}
    for path in (root, *root.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_size if path.is_file() else 0, status.st_mtime_ns, status.st_mode)
    return found


@pytest.fixture
def warm(tmp_path: Path) -> Path:
    """Create a closed directory with three contexts."""
    root = tmp_path / "kv"
    with Cache(block_size=SIZE, ram=0, disk=root, watch=False) as cache:
        for first in (0, 1000, 2000):
            save(cache, texts(first))
        cache.remember_fingerprint("model", "f" * 64)
        cache.remember_text(NAMESPACE, b"a text", texts(0, 3))
    return root


def payloads(cache: Cache, tokens: NDArray[np.int32]) -> int:
    with cache.lookup(NAMESPACE, tokens) as match:
        loaded = [cache.load(block) for block in match.blocks]
    assert all(found is not None and found.payload[:32] == found.block.key for found in loaded)
    return match.n_tokens


def test_a_directory_is_read_and_never_written(warm: Path) -> None:
    before = state(warm)
    with Cache(block_size=SIZE, ram="1MiB", disk=warm, read_only=True) as cache:
        assert cache.disk_error is None
        assert not cache.persistent
        assert cache.counters()["read_only_directories"] == 1
        assert [tier.read_only for tier in cache.tiers() if tier.tier == "disk"] == [True]
        assert payloads(cache, texts(1000)) == 48
        assert cache.counters()["blocks_ram"] == 3
        assert cache.fingerprint("model") == "f" * 64
        assert cache.longest_text(NAMESPACE, b"a text and more") is not None
        save(cache, texts(5000))
        cache.remember_fingerprint("other", "e" * 64)
        cache.remember_text(NAMESPACE, b"another text", texts(0, 4))
        assert cache.flush(120)
        assert cache.evict_bytes("1GiB", ("disk",)) == 0
        assert cache.gc() == 0
        assert cache.verify() == []
        cache.check_integrity()
        assert hit(cache, texts(5000)) == 48, "RAM has it"
        assert cache.counters()["blocks_disk"] == 9
        assert cache.counters()["disk_errors"] == cache.counters()["faults"] == 0
    assert state(warm) == before


def test_a_quota_below_the_stored_size_evicts_nothing(warm: Path) -> None:
    before = state(warm)
    with Cache(block_size=SIZE, ram=0, disk=warm, disk_quota=100, read_only=True) as cache:
        assert payloads(cache, texts(0)) == 48
        assert not any(cache.save(block, payload_of(block)) for block in blocks_of(texts(7000)))
        cache.gc()
        cache.check_integrity()
    assert state(warm) == before


def test_read_only_without_a_directory_is_refused() -> None:
    with pytest.raises(erllama.OptionError, match="disk or ram_file"):
        Cache(read_only=True)


def test_a_directory_without_a_cache_is_reported(tmp_path: Path) -> None:
    with Cache(block_size=SIZE, disk=tmp_path / "kv", read_only=True) as cache:
        assert "holds no cache to read" in str(cache.disk_error)
        save(cache, texts(0))
        assert hit(cache, texts(0)) == 48
    assert not (tmp_path / "kv").exists()


@pytest.mark.parametrize("name", ["root", "blocks"])
def test_a_directory_writable_by_others_is_not_trusted(warm: Path, name: str) -> None:
    path = warm if name == "root" else warm / "blocks"
    path.chmod(0o777)
    with Cache(block_size=SIZE, disk=warm, read_only=True) as cache:
        assert "can be written by other users" in str(cache.disk_error)
        assert hit(cache, texts(0)) == 0


@pytest.mark.parametrize("damage", ["missing", "garbage", "no tables"])
def test_without_a_usable_index_the_files_are_read(warm: Path, damage: str) -> None:
    index = warm / "index.db"
    if damage == "garbage":
        index.write_bytes(b"garbage" * 1000)
    else:
        index.unlink()
    if damage == "no tables":
        sqlite3.connect(index).close()
    before = state(warm)
    with Cache(block_size=SIZE, ram=0, disk=warm, read_only=True) as cache:
        assert cache.disk_error is None
        assert payloads(cache, texts(2000)) == 48
        cache.check_integrity()
    assert state(warm) == before


def test_a_damaged_file_is_a_miss_and_is_kept(warm: Path) -> None:
    second = warm / "blocks" / f"{blocks_of(texts(0))[1].key.hex()}.kvc"
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    before = state(warm)
    with Cache(block_size=SIZE, ram="1MiB", disk=warm, read_only=True) as cache:
        assert len(cache.verify()) == 1
        loaded = [cache.load(block) is not None for block in blocks_of(texts(0))]
        assert loaded == [True, False, True]
        assert cache.counters()["corrupt_files"] == 1
        save(cache, texts(0))
        assert payloads(cache, texts(0)) == 48, "RAM holds the recomputed block"
        cache.flush()
        cache.check_integrity()
    assert state(warm) == before


def test_the_write_ahead_log_of_a_dead_process_is_read(tmp_path: Path, warm: Path) -> None:
    """The write-ahead log was not merged when the directory was copied."""
    copy = tmp_path / "copy"
    with Cache(block_size=SIZE, ram=0, disk=warm, watch=False) as cache:
        save(cache, texts(3000))
        cache.flush()
        shutil.copytree(warm, copy)
    assert (copy / "index.db-wal").stat().st_size > 0
    for with_memory in (True, False):
        if not with_memory:
            (copy / "index.db-shm").unlink()
        before = state(copy)
        with Cache(block_size=SIZE, ram=0, disk=copy, read_only=True) as cache:
            assert payloads(cache, texts(3000)) == 48
            assert payloads(cache, texts(0)) == 48
        assert state(copy) == before


def test_blocks_written_by_another_process_are_found(warm: Path) -> None:
    with Cache(block_size=SIZE, ram=0, disk=warm, read_only=True) as cache:
        assert payloads(cache, texts(0)) == 48
        for first in (6000, 7000):
            with Cache(block_size=SIZE, ram=0, disk=warm, watch=False) as other:
                save(other, texts(first))
                other.flush()
                for _ in range(400):
                    if payloads(cache, texts(first)) == 48:
                        break
                    cache.counters()
                    cache.flush(120)
                else:
                    pytest.fail("the block was never seen")
        assert cache.counters()["faults"] == 0
        cache.check_integrity()


@pytest.mark.parametrize("order", [1, -1])
def test_read_only_and_writable_directories_form_one_tier(tmp_path: Path, warm: Path, order: int) -> None:
    warm.chmod(0o700)
    before = state(warm)
    own = tmp_path / "own"

    def opened() -> Cache:
        return Cache(block_size=SIZE, ram=0, disk=[own, warm][::order], watch=False)

    with pytest.MonkeyPatch.context() as patch:
        access = os.access
        patch.setattr(
            os,
            "access",
            lambda path, mode: access(path, mode) and not (mode & os.W_OK and str(path).startswith(str(warm))),
        )
        for _ in range(2):
            with opened() as cache:
                assert [tier.read_only for tier in cache.tiers()] == [False, True][::order]
                assert payloads(cache, texts(0)) == 48
                longer = texts(0, 80)
                save(cache, longer)
                block = blocks_of(texts(0))[0]
                cache.save(block, np.frombuffer(block.key * 4, np.uint8), replace=True)
                cache.flush()
                assert payloads(cache, longer) == 80
                loaded = cache.load(block)
                assert loaded is not None
                assert loaded.payload.nbytes == 128, "the newer version"
                cache.gc()
                cache.check_integrity()
                assert cache.verify() == []
                assert cache.counters()["disk_errors"] == cache.counters()["faults"] == 0
    assert state(warm) == before


def test_the_command_reads_but_does_not_change_a_read_only_directory(
    warm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not mode & os.W_OK)
    before = state(warm)
    with CacheFiles(warm) as files:
        assert files.read_only
        assert len(files.rows()) == 9
        assert len(files.contexts()) == 3
        assert files.verify() == []
        block, _ = files.read(files.rows()[0].block)
        for change in (
            files.gc,
            files.evict,
            files.remove_pins_texts_and_damaged,
            lambda: files.verify(repair=True),
            lambda: files.shrink(0),
            lambda: files.put(block, memoryview(b"x")),
        ):
            with pytest.raises(erllama.CacheError, match="read-only"):
                change()
    assert state(warm) == before


# --- as the system makes them -------------------------------------------------------------------------

READING = """
    root = Path(sys.argv[1])
    if len(sys.argv) > 2:
        os.setuid(int(sys.argv[2]))
    def texts(first): return np.arange(first, first + 48, dtype=np.int32)
    with Cache(block_size=SIZE, ram="1MiB", disk=root) as cache, Cache(block_size=SIZE, ram=0, disk=root) as other:
        for each in (cache, other):
            assert each.disk_error is None, each.disk_error
            assert each.counters()["read_only_directories"] == 1
            for first in (0, 1000, 2000):
                match = each.lookup(NAMESPACE, texts(first))
                assert match.n_tokens == 48 and all(each.load(block) for block in match.blocks)
                match.release()
        assert all(save(cache, texts(5000)))
        assert not any(save(other, texts(5000)))
        assert cache.flush(120) and cache.gc() == 0 and cache.verify() == []
        cache.check_integrity()
        counters = cache.counters()
        assert counters["disk_errors"] == counters["faults"] == counters["corrupt_files"] == 0, counters
    print("read")
"""


def reading(*prefix: str) -> list[str]:
    return [*prefix, sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(READING)]


@pytest.fixture
def read_only_mount(warm: Path) -> list[str]:
    """Return a command prefix that mounts the directory read-only for one command."""
    mounting = f"mount --bind {warm} {warm} && mount -o remount,bind,ro {warm}"
    prefix = ["unshare", "--mount", "sh", "-c", f'{mounting} && exec "$@"', "sh"]
    try:
        possible = subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("needs permission to mount; the next test does not")
    return prefix


def test_several_processes_read_a_read_only_mount(warm: Path, read_only_mount: list[str]) -> None:
    before = state(warm)
    children = [
        subprocess.Popen(
            [*reading(*read_only_mount), str(warm)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for child in children:
        printed, complaints = child.communicate(timeout=120)
        assert printed == "read\n", complaints
    assert state(warm) == before


def test_a_directory_without_write_permission_is_read(warm: Path) -> None:
    if os.geteuid() == 0:
        # As in a container image: files of root that another user reads.
        open_root = Path(tempfile.mkdtemp(prefix="erllama-test-"))
        open_root.chmod(0o755)
        root = open_root / "kv"
        shutil.copytree(warm, root)
        for path in (root, *root.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        user = ["65534"]
    else:
        open_root, root, user = None, warm, []
        for path in (*root.rglob("*"), root):
            path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    try:
        before = state(root)
        done = subprocess.run(
            [*reading(), str(root), *user], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.stdout == "read\n", done.stderr
        assert state(root) == before
    finally:
        if open_root is not None:
            shutil.rmtree(open_root)
        else:
            for path in (root, *root.rglob("*")):
                path.chmod(path.stat().st_mode | stat.S_IWUSR)
