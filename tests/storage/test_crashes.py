"""Processes killed at any moment: published blocks stay, budgets hold, and leftovers are removed.

ERLLAMA_KILLS says how many are killed; `make stress` kills more.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from erllama.cache import Block, Cache
from support.storage.blocks import SIZE, blocks_of, hit, payload_of, save
from support.storage.processes import (
    DEADLINE,
    DiskUsageMonitor,
    assert_consistent,
    killed_at_end,
    output_of,
    reservations,
    start_python,
)

KILLS = int(os.environ.get("ERLLAMA_KILLS", "8"))


# --- at any moment ---------------------------------------------------------------------------


SAVING = """
    import json
    root, quota, seed, variety = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    dice = random.Random(seed)
    sys.stdin.readline()  # until it is our turn
    cache = Cache(block_size=SIZE, ram=0, disk=root, disk_quota=quota)
    while True:
        tokens = context(dice, variety)
        save(cache, tokens)
        if dice.random() < 0.7:
            cache.flush()
            check(cache, tokens)
            print(json.dumps(tokens.tolist()), flush=True)
"""


def published_by_children_that_are_killed(
    root: Path, quota: int, variety: int, n_kills: int
) -> Iterator[list[list[int]]]:
    """Yield, after each kill, the contexts that the child saw on the disk. Budgets are checked while it runs."""
    dice = random.Random(variety)
    waiting = [start_python(SAVING, root, quota, seed, variety) for seed in range(min(n_kills, 2))]
    started = list(waiting)
    try:
        for seed in range(n_kills):
            child = waiting.pop(0)
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("go\n")
            child.stdin.flush()
            first = child.stdout.readline()
            occupied = DiskUsageMonitor(root)
            occupied.sample_until(time.monotonic() + dice.uniform(0, 0.25))
            child.send_signal(signal.SIGKILL)
            rest, complaints = child.communicate(timeout=DEADLINE)
            assert child.returncode == -signal.SIGKILL, complaints
            assert occupied.most <= quota
            if seed + 2 < n_kills:
                waiting.append(start_python(SAVING, root, quota, seed + 2, variety))
                started.append(waiting[-1])
            # The last line may be incomplete.
            yield [json.loads(line) for line in (first + rest).splitlines(keepends=True) if line.endswith("\n")]
    finally:
        with killed_at_end(*started):
            pass


def test_published_blocks_survive_any_kill(tmp_path: Path) -> None:
    quota = 2**40
    everything: list[list[int]] = []
    for published in published_by_children_that_are_killed(tmp_path, quota, 7, (KILLS + 1) // 2):
        assert published
        with Cache(block_size=SIZE, ram=0, disk=tmp_path, disk_quota=quota) as cache:
            assert_consistent(tmp_path, quota, cache)
            for tokens in published:
                assert hit(cache, np.array(tokens, np.int32)) == len(tokens)
        everything += published
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, disk_quota=quota) as cache:
        for tokens in everything:
            with cache.lookup(blocks_of(np.zeros(1, np.int32))[0].namespace, tokens) as match:
                assert match.n_tokens == len(tokens)


def test_budgets_hold_during_and_after_any_kill(tmp_path: Path) -> None:
    quota = 120_000  # about twenty blocks of the hundreds that are saved
    for _ in published_by_children_that_are_killed(tmp_path, quota, 5, (KILLS + 1) // 2):
        with Cache(block_size=SIZE, ram=0, disk=tmp_path, disk_quota=quota) as cache:
            assert_consistent(tmp_path, quota, cache)
            assert cache.counters()["blocks_disk"] > 0
            for row in cache.rows():
                block = cache.stored(row.key)
                assert block is not None
                loaded = cache.load(block)
                assert loaded is not None
                assert bytes(loaded.payload) == block.key * (payload_bytes(block) // 32)
                assert cache.context(row.key) is not None, "its parent is stored, too"


# --- at each step ------------------------------------------------------------------------------


DYING = """
    root, quota, step, n = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])

    class Dying(FileTier):
        def _step(self, name):
            global n
            n -= name == step
            if not n:
                os.kill(os.getpid(), signal.SIGKILL)

    cache = Cache(block_size=SIZE, ram=0, tiers=[Dying(root, quota)])
    assert cache.disk_error is None, cache.disk_error
    for block in blocks_of(np.arange(64, dtype=np.int32)):
        cache.save(block, payload_of(block), replace=len(sys.argv) > 5)
    cache.flush()
"""


def die(root: Path, step: str, n: int, *, quota: int = 2**30, replace: bool = False) -> None:
    child = start_python(DYING, root, quota, step, n, *(["replace"] if replace else []))
    with killed_at_end(child):
        _, complaints = child.communicate(timeout=DEADLINE)
        assert child.returncode == -signal.SIGKILL, complaints


@pytest.mark.parametrize(("step", "n_lost"), [("reserved", 1), ("written", 1), ("published", 0)])
def test_an_interrupted_write_is_undone_or_completed(tmp_path: Path, step: str, n_lost: int) -> None:
    n = 3
    die(tmp_path, step, n)
    assert reservations(tmp_path) == 1, "the child died before it was done"
    with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        assert_consistent(tmp_path, 2**30, cache)
        assert hit(cache, np.arange(64, dtype=np.int32)) == (n - n_lost) * SIZE
        save(cache, np.arange(64, dtype=np.int32))
        cache.flush()
        assert hit(cache, np.arange(64, dtype=np.int32)) == 64
        assert cache.verify() == []


@pytest.mark.parametrize(
    "step",
    [
        "reserved",
        "written",
        "published",
    ],
)
def test_an_interrupted_replacement_leaves_one_version(tmp_path: Path, step: str) -> None:
    tokens = np.arange(64, dtype=np.int32)
    with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        save(cache, tokens)
    die(tmp_path, step, 2, replace=True)
    with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        assert hit(cache, tokens) == 64
        assert_consistent(tmp_path, 2**30, cache)


@pytest.mark.parametrize(
    ("step", "watch"),
    [
        ("reserved", True),
        ("written", True),
        ("written", False),
        ("published", False),
        ("published", True),
    ],
)
def test_living_processes_clean_up_after_dead_ones(tmp_path: Path, step: str, watch: bool) -> None:
    """Without a restart, as soon as room is needed, and always within the quota."""
    # Blocks as large as the largest of the dead process, so that its leftovers matter.
    n_bytes = max(payload_bytes(block) for block in blocks_of(np.arange(64, dtype=np.int32)))
    quota = 6 * (n_bytes + 300)
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, disk_quota=quota, watch=watch) as cache:
        fill(cache, 1000, n_bytes)
        die(tmp_path, step, 2, quota=quota)
        occupied = DiskUsageMonitor(tmp_path)
        for block in blocks_of(np.arange(5000, 5000 + 6 * SIZE, dtype=np.int32)):
            cache.save(block, payload_of(block, n_bytes))
            cache.flush()
            occupied.sample()
            occupied.sample()
        assert reservations(tmp_path) == 0
        cache.gc()
        assert_consistent(tmp_path, quota, cache)
        assert occupied.most <= quota


def payload_bytes(block: Block) -> int:
    """Return the contexts that a child saves."""
    return len(block.key) * (64 + block.key[0])


def fill(cache: Cache, first: int, n_bytes: int) -> None:
    for block in blocks_of(np.arange(first, first + 6 * SIZE, dtype=np.int32)):
        cache.save(block, payload_of(block, n_bytes))
    cache.flush()


def test_a_process_paused_during_a_write_is_not_treated_as_dead(tmp_path: Path) -> None:
    stopping = """
        root, n = Path(sys.argv[1]), 2

        class Stopping(FileTier):
            def _step(self, name):
                global n
                n -= name == "written"
                if not n:
                    n = -1
                    os.kill(os.getpid(), signal.SIGSTOP)
                    time.sleep(0.2)  # it reaches this thread a moment later

        with Cache(block_size=SIZE, ram=0, tiers=[Stopping(root, 2**30)]) as cache:
            save(cache, np.arange(64, dtype=np.int32))
            cache.flush()
            assert check(cache, np.arange(64, dtype=np.int32)) == (64, 4)
            assert cache.counters()["disk_errors"] == 0
    """
    child = start_python(stopping, tmp_path)
    with killed_at_end(child):
        assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
        with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
            assert cache.gc() == 0
            assert len(list((tmp_path / "partial").iterdir())) == 1
            assert reservations(tmp_path) == 1
            save(cache, np.arange(100, 164, dtype=np.int32))
            cache.flush()
            assert hit(cache, np.arange(100, 164, dtype=np.int32)) == 64
        child.send_signal(signal.SIGCONT)
        output_of(child)
    with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        assert_consistent(tmp_path, 2**30, cache)
