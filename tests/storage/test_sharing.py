"""Processes that share a directory: payloads are right, the quota holds, and each sees the work of others.

ERLLAMA_SHARING_SECONDS says for how long they work; `make stress` lets them work longer.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from erllama.cache import Block, Cache, FileTier
from support.storage.blocks import NAMESPACE, SIZE, blocks_of, hit, save
from support.storage.processes import (
    DiskUsageMonitor,
    assert_consistent,
    bytes_in,
    killed_at_end,
    output_of,
    start_python,
)

SHARING_SECONDS = float(os.environ.get("ERLLAMA_SHARING_SECONDS", "2"))
SOON_SECONDS = 120.0  # deadline for something that takes about a second; a busy machine may need longer


def wait_for(condition: Callable[[], bool], seconds: float = SOON_SECONDS) -> bool:
    """Wait for an effect of another process."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# --- under load ------------------------------------------------------------------------------------


WORKING = """
    root, quota, seed, seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    dice = random.Random(seed)
    n_loads = n_evictions = 0
    cache = Cache(block_size=SIZE, ram=(0, 60_000)[seed % 2], disk=root, disk_quota=quota)
    print("ready", flush=True)
    sys.stdin.readline()
    end = time.monotonic() + seconds
    while time.monotonic() < end or n_loads < 50:  # on a busy machine, it takes longer
        tokens, step = context(dice, 4), dice.random()
        if step < 0.4:
            save(cache, tokens)
        elif step < 0.9:
            n_loads += check(cache, tokens)[1]
        elif step < 0.95:
            cache.flush()
            n_evictions += cache.evict_bytes(dice.randrange(30_000), tiers=("disk",)) > 0
        elif step < 0.98:
            block = cache.stored(dice.choice(blocks_of(tokens)).key)
            loaded = block and cache.load(block)
            if loaded:  # whether or not anybody pins it
                assert loaded.payload == payload_of(block).data
                cache.save(block, loaded.payload, replace=True)
        else:
            cache.rows(), cache.contains(dice.randbytes(32)), cache.context(blocks_of(tokens)[-1].key)
    cache.flush()
    print(n_loads, n_evictions, flush=True)
    sys.stdin.readline()  # now no process writes

    deadline = time.monotonic() + 120
    there = {path.stem for path in (root / "blocks").iterdir()}
    while {row.key.hex() for row in cache.rows() if row.tier == "disk"} != there:
        assert time.monotonic() < deadline, "its picture is not what is there"
        time.sleep(0.05)
    assert cache.verify() == []
    cache.check_integrity()
    counters = cache.counters()
    assert counters["faults"] == counters["disk_errors"] == counters["corrupt_files"] == 0, counters
    cache.close()
"""


def indexed_bytes(root: Path) -> int:
    """Return the bytes that the index states as stored and reserved, at one moment."""
    query = "SELECT (SELECT total(file_bytes) FROM blocks) + (SELECT total(n_bytes) FROM reservations)"
    with closing(sqlite3.connect(root / "index.db")) as index:
        return int(index.execute(query).fetchone()[0])


def test_four_processes_share_a_directory_within_one_quota(tmp_path: Path) -> None:
    quota = 400_000  # about sixty of the more than four hundred blocks that they save
    children = [start_python(WORKING, tmp_path, quota, seed, SHARING_SECONDS) for seed in range(4)]
    with killed_at_end(*children):
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in children:
            tell(child)
        occupied, most_indexed = DiskUsageMonitor(tmp_path), 0
        outputs = [child.stdout for child in children]
        while len(select.select(outputs, [], [], 0)[0]) < len(outputs):  # until each has printed its counts
            occupied.sample_until(time.monotonic() + 0.02)
            most_indexed = max(most_indexed, indexed_bytes(tmp_path))
        counts = []
        for child in children:
            assert child.stdout is not None
            line = child.stdout.readline()
            assert line, output_of(child)
            counts.append([int(count) for count in line.split()])
        for child in children:
            tell(child)
        for child in children:
            output_of(child)
        assert 0.5 * quota < occupied.most <= quota
        assert most_indexed <= quota
        assert all(n_loads > 0 for n_loads, _ in counts)
        assert sum(n_evictions for _, n_evictions in counts) > 0
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, disk_quota=quota) as cache:
        assert_consistent(tmp_path, quota, cache)
        assert cache.rows()


def tell(child: object) -> None:
    stdin = child.stdin  # type: ignore[attr-defined]
    stdin.write("go\n")
    stdin.flush()


def test_during_an_eviction_another_process_reads_the_payload_or_misses(tmp_path: Path) -> None:
    evicting = """
        cache = Cache(block_size=SIZE, ram=0, disk=sys.argv[1])
        contexts = [np.arange(first, first + 64, dtype=np.int32) for first in range(0, 1000, 100)]
        while not select.select([sys.stdin], [], [], 0)[0]:
            for tokens in contexts:
                save(cache, tokens)
            cache.flush()
            print("saved", flush=True)
            cache.evict_bytes("1GiB", tiers=("disk",))
        counters = cache.counters()
        assert counters["faults"] == counters["disk_errors"] == counters["corrupt_files"] == 0, counters
        cache.close()
    """
    child = start_python(evicting, tmp_path)
    with killed_at_end(child), Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        assert child.stdout is not None
        assert child.stdout.readline() == "saved\n"
        n_loads = 0
        end = time.monotonic() + SHARING_SECONDS / 2
        while time.monotonic() < end or not n_loads:
            for first in range(0, 1000, 100):
                with cache.lookup(NAMESPACE, np.arange(first, first + 64, dtype=np.int32)) as match:
                    for block in match.blocks:
                        loaded = cache.load(block)
                        if loaded is not None:
                            assert bytes(loaded.payload) == block.key * (64 + block.key[0])
                            n_loads += 1
        tell(child)
        output_of(child)
        counters = cache.counters()
        assert counters["faults"] == counters["disk_errors"] == counters["corrupt_files"] == 0
        cache.check_integrity()


def test_eviction_during_saves_keeps_the_quota_right(tmp_path: Path) -> None:
    """In one process: a block chosen for eviction takes room until it is removed."""

    class SlowToRemove(FileTier):
        may_go_on = threading.Event()
        removing = threading.Event()

        def remove(self, keys: Sequence[bytes]) -> None:
            if threading.current_thread() is evicting:
                self.removing.set()
                self.may_go_on.wait(120)
            super().remove(keys)

    n_blocks, n_bytes = 6, 6400
    quota = n_blocks * (n_bytes + 300)
    tier = SlowToRemove(tmp_path, quota)
    with Cache(block_size=SIZE, ram=0, tiers=[tier]) as cache:
        save(cache, np.arange(n_blocks * SIZE, dtype=np.int32), n_bytes=n_bytes)
        cache.flush()
        evicting = threading.Thread(target=cache.evict_bytes, args=(3 * n_bytes, ("disk",)))
        evicting.start()
        assert tier.removing.wait(SOON_SECONDS)
        save(cache, np.arange(1000, 1000 + 3 * SIZE, dtype=np.int32), n_bytes=n_bytes)
        cache.flush(1.0)
        occupied = bytes_in(tmp_path)
        tier.may_go_on.set()
        evicting.join(SOON_SECONDS)
        assert occupied <= quota
        assert cache.flush(SOON_SECONDS)
        assert cache.verify() == []


def test_dropping_damaged_blocks_during_saves_keeps_the_quota_right(tmp_path: Path) -> None:
    class Watched(FileTier):
        reserving, may_go_on = threading.Event(), threading.Event()
        most = 0

        def reserved(self) -> int:
            self.reserving.set()
            self.may_go_on.wait(SOON_SECONDS)
            return super().reserved()

        def _step(self, name: str) -> None:
            self.most = max(self.most, bytes_in(tmp_path))

    n_blocks, n_bytes = 3, 6400
    tier = Watched(tmp_path, n_blocks * (n_bytes + 300), watch=False)
    with Cache(block_size=SIZE, ram=0, tiers=[tier]) as cache:
        tier.may_go_on.set()
        tokens = np.arange(n_blocks * SIZE, dtype=np.int32)
        save(cache, tokens, n_bytes=n_bytes)
        cache.flush()
        tier.reserving.clear()
        tier.may_go_on.clear()
        last = blocks_of(tokens)[-1]
        content = tier.path_of(last.key).read_bytes()
        tier.path_of(last.key).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        save(cache, np.arange(1000, 1000 + SIZE, dtype=np.int32), n_bytes=n_bytes)
        assert tier.reserving.wait(SOON_SECONDS)  # it makes room now
        assert cache.load(last) is None
        tier.may_go_on.set()
        assert cache.flush(SOON_SECONDS)
        assert tier.most <= tier.budget


def test_a_block_evicted_right_after_its_write_is_not_offered(tmp_path: Path) -> None:
    tokens = np.arange(SIZE, dtype=np.int32)

    class Overtaken(FileTier):
        def write(self, block: Block, payload: memoryview) -> None:
            super().write(block, payload)
            assert wait_for(lambda: hit(other, tokens) == SIZE)
            assert other.evict_bytes("1GiB", tiers=("disk",)) > 0
            time.sleep(0.3)  # as a slow machine would
            cache.rows()  # a lookup of this process sees that it is removed

    other = Cache(block_size=SIZE, ram=0, disk=tmp_path, watch=False)
    cache = Cache(block_size=SIZE, ram=0, tiers=[Overtaken(tmp_path, 2**30, watch=False)])
    with other, cache:
        save(cache, tokens)
        cache.flush()
        assert list((tmp_path / "blocks").iterdir()) == []
        cache.gc()
        assert cache.rows() == []


# --- seeing one another ------------------------------------------------------------------------------


SAVING_ON_DEMAND = """
    with Cache(block_size=SIZE, disk=sys.argv[1]) as cache:
        print("ready", flush=True)
        for line in sys.stdin:
            first, n = map(int, line.split())
            save(cache, np.arange(first, first + n, dtype=np.int32))
            print("saved", flush=True)
"""


@pytest.mark.parametrize("n", [64, 40], ids=["full blocks", "with a tail"])
def test_a_save_is_visible_to_other_processes_within_a_second_or_so(
    tmp_path: Path, n: int, record_property: Callable[[str, object], None]
) -> None:
    child = start_python(SAVING_ON_DEMAND, tmp_path)
    with killed_at_end(child), Cache(block_size=SIZE, disk=tmp_path) as cache:
        assert child.stdout is not None
        assert child.stdin is not None
        assert child.stdout.readline() == "ready\n"
        took = []
        for first in range(0, 5000, 1000):
            tokens = np.arange(first, first + n, dtype=np.int32)
            child.stdin.write(f"{first} {n}\n")
            child.stdin.flush()
            assert child.stdout.readline() == "saved\n"
            began = time.monotonic()

            def seen(tokens: np.ndarray = tokens) -> bool:
                with cache.lookup(NAMESPACE, tokens) as match:
                    return match.n_tokens == len(tokens)

            assert wait_for(seen)
            took.append(time.monotonic() - began)
            with cache.lookup(NAMESPACE, tokens) as match:
                for block in match.blocks:
                    loaded = cache.load(block)
                    assert loaded is not None
                    assert bytes(loaded.payload) == block.key * (64 + block.key[0])
        record_property("seconds", [round(seconds, 3) for seconds in took])


def test_a_block_evicted_by_one_process_is_not_offered_by_another(tmp_path: Path) -> None:
    tokens = np.arange(64, dtype=np.int32)
    evicting = """
        with Cache(block_size=SIZE, disk=sys.argv[1]) as cache:
            assert cache.evict_bytes("1GiB", tiers=("disk",)) > 0
    """
    with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        save(cache, tokens)
        cache.flush()
        child = start_python(evicting, tmp_path)
        with killed_at_end(child):
            output_of(child)
        assert wait_for(lambda: cache.rows() == [])
        assert hit(cache, tokens) == 0
        assert cache.counters()["disk_errors"] == cache.counters()["corrupt_files"] == 0


# --- waiting for one another -------------------------------------------------------------------------


LONG_MS = 900_000  # longer than the time limit of a test: a lookup that waits this long fails it


def test_a_lookup_waits_for_the_save_of_its_parent(tmp_path: Path) -> None:
    tokens = np.arange(40, dtype=np.int32)
    parent = blocks_of(tokens)[-1].key
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        announced, asked = threading.Event(), threading.Event()

        def save_later() -> None:
            with cache.expecting(parent):
                announced.set()
                asked.wait(SOON_SECONDS)
                time.sleep(0.2)
                save(cache, tokens)

        saving = threading.Thread(target=save_later)
        saving.start()
        assert announced.wait(SOON_SECONDS)
        asked.set()
        with cache.lookup(NAMESPACE, tokens, parent_key=parent, wait_ms=LONG_MS) as match:
            assert match.n_tokens == 40
        saving.join()


def test_a_lookup_does_not_wait_for_an_abandoned_save(tmp_path: Path) -> None:
    tokens = np.arange(40, dtype=np.int32)
    parent = blocks_of(tokens)[-1].key
    with Cache(block_size=SIZE, disk=tmp_path) as cache:
        announced = threading.Event()

        def give_up() -> None:
            with cache.expecting(parent):
                announced.set()
                time.sleep(0.2)

        saving = threading.Thread(target=give_up)
        saving.start()
        assert announced.wait(SOON_SECONDS)
        with cache.lookup(NAMESPACE, tokens, parent_key=parent, wait_ms=LONG_MS) as match:
            assert match.n_tokens == 0
        saving.join()


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "stored"])
def test_a_lookup_does_not_wait_without_a_save_in_flight(tmp_path: Path, known: bool) -> None:
    tokens = np.arange(40, dtype=np.int32)
    with Cache(block_size=SIZE, disk=tmp_path) as cache, cache.expecting(bytes(32)):
        if known:
            save(cache, tokens)
        with cache.lookup(NAMESPACE, tokens, parent_key=blocks_of(tokens)[-1].key, wait_ms=LONG_MS) as match:
            assert match.n_tokens == (40 if known else 0)


def test_a_lookup_waits_no_longer_than_its_timeout(tmp_path: Path) -> None:
    tokens = np.arange(40, dtype=np.int32)
    parent = blocks_of(tokens)[-1].key
    with Cache(block_size=SIZE, disk=tmp_path) as cache, cache.expecting(parent):
        began = time.monotonic()
        with cache.lookup(NAMESPACE, tokens, parent_key=parent, wait_ms=100) as match:
            assert match.n_tokens == 0
        assert time.monotonic() - began >= 0.1


WRITING = """
    class Stopping(FileTier):
        def _step(self, name):
            if name == "written":
                os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(0.2)  # it reaches this thread a moment later

    with Cache(block_size=SIZE, ram=0, tiers=[Stopping(Path(sys.argv[1]), 2**30)]) as cache:
        save(cache, np.arange(16, dtype=np.int32))
"""


@pytest.mark.parametrize(
    "ends",
    [
        signal.SIGCONT,
        signal.SIGKILL,
    ],
)
def test_a_lookup_waits_for_a_save_of_another_process(tmp_path: Path, ends: signal.Signals) -> None:
    """It does not wait for a process that died during the write."""
    child = start_python(WRITING, tmp_path)
    tokens = np.arange(16, dtype=np.int32)
    parent = blocks_of(tokens)[0].key
    with killed_at_end(child), Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
        began = time.monotonic()
        with cache.lookup(NAMESPACE, tokens, parent_key=parent, wait_ms=100) as match:
            assert match.n_tokens == 0
        assert time.monotonic() - began >= 0.1
        threading.Timer(0.2, child.send_signal, [ends]).start()
        with cache.lookup(NAMESPACE, tokens, parent_key=parent, wait_ms=LONG_MS) as match:
            assert match.n_tokens == (16 if ends == signal.SIGCONT else 0)


def test_processes_that_save_one_chain_keep_the_blocks_of_each(tmp_path: Path) -> None:
    """A block is written although another process is still writing its parent."""
    child = start_python(WRITING, tmp_path)
    tokens = np.arange(64, dtype=np.int32)
    with killed_at_end(child), Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
        save(cache, tokens)
        threading.Timer(0.3, child.send_signal, [signal.SIGCONT]).start()
        cache.flush()
        output_of(child)
        assert wait_for(lambda: hit(cache, tokens) >= 16)
        assert hit(cache, tokens) == 64


def test_uses_by_other_processes_count_for_eviction(tmp_path: Path) -> None:
    quota = 6 * (64 + 264)
    old = [np.array([i] * SIZE, dtype=np.int32) for i in range(6)]
    with (
        Cache(block_size=SIZE, ram=0, disk=tmp_path, disk_quota=quota) as mine,
        Cache(block_size=SIZE, ram=0, disk=tmp_path, disk_quota=quota) as theirs,
    ):
        for tokens in old:
            save(mine, tokens)
        mine.flush()
        assert theirs.rows()
        assert hit(theirs, old[0]) == SIZE
        theirs.flush()  # and tells the index of it
        save(mine, np.array([99] * SIZE, dtype=np.int32))
        mine.flush()
        assert [hit(mine, tokens) for tokens in old] == [SIZE, 0, SIZE, SIZE, SIZE, SIZE]


def test_more_changed_files_than_are_remembered_are_all_checked(tmp_path: Path) -> None:
    """Many changes by others take bounded memory, and none is missed."""
    tokens = np.arange(SIZE, dtype=np.int32)
    with Cache(block_size=SIZE, disk=tmp_path / "other") as other:
        save(other, tokens)
    (source,) = (tmp_path / "other" / "blocks").iterdir()
    tier = FileTier(tmp_path / "own", 2**30, watch=False)
    with Cache(block_size=SIZE, ram=0, tiers=[tier]) as cache:
        target = tmp_path / "own" / "blocks" / source.name
        shutil.copy(source, target)
        cache.flush()
        tier._changed_files.add(source.name)
        for i in range(5000):
            tier._changed_files.add(f"{i:064x}.kvc")
        assert len(tier._changed_files) <= 1001
        deadline = time.monotonic() + 120
        while hit(cache, tokens) != SIZE:
            assert time.monotonic() < deadline, "it is not added to the catalog"
            time.sleep(0.01)
