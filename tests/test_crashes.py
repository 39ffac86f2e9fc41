"""Processes killed at any moment of saving and evicting: what was published stays, budgets hold, nothing is left.

ERLLAMA_KILLS says how many are killed; `make stress` kills more.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from test_cache import SIZE, blocks_of, hit, payload_of, save

from erllama.cache import Block, Cache

KILLS = int(os.environ.get("ERLLAMA_KILLS", "12"))
DEADLINE = 60.0  # generous: nothing here should come near it


# Also what the children of other test modules begin with. They import nothing but the cache.
PRELUDE = f"""
    import os, random, signal, sys, time
    sys.path.append({str(Path(__file__).parent)!r})
    from pathlib import Path
    import numpy as np
    from blocks import NAMESPACE, SIZE, blocks_of
    from erllama.cache import Block, Cache, FileTier, SaveReason, namespace_key, token_bytes

    def payload_of(block):
        return np.frombuffer(block.key * (64 + block.key[0]), np.uint8)  # 2 to 10 KB

    def save(cache, tokens):
        return [cache.save(block, payload_of(block)) for block in blocks_of(tokens)]

    def context(dice, variety):
        n_blocks, n_tail = dice.randrange(1, 5), dice.choice((0, 5, 9))
        ids = [dice.randrange(variety) for _ in range(n_blocks + 1)]
        return np.repeat(np.array(ids, np.int32), SIZE)[: n_blocks * SIZE + n_tail]

    def check(cache, tokens):
        with cache.lookup(NAMESPACE, tokens) as match:
            n_loads = 0
            for block in match.blocks:
                loaded = cache.load(block)
                if loaded is None:
                    break
                assert loaded.payload == payload_of(block).data, "the payload of another block"
                n_loads += 1
            return match.n_tokens, n_loads
"""


def start_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A child that begins with PRELUDE, and may be told things by its standard input."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )


@contextmanager
def running(*started: subprocess.Popen[str]) -> Iterator[None]:
    """Whatever happens, the children end, and their pipes are closed."""
    try:
        yield
    finally:
        for child in started:
            child.kill()
            child.communicate()


def finished(child: subprocess.Popen[str]) -> str:
    """What a child printed, which ended by itself and well."""
    printed, complaints = child.communicate(timeout=DEADLINE)
    assert child.returncode == 0, f"exit {child.returncode}\n{printed}\n{complaints}"
    return printed


class Occupied:
    """The bytes that lay in `blocks/` and `partial/` at one moment, from listings that take longer than a moment.

    A file that two listings in a row show, the same and unchanged, lay there from the one to the other: all such
    files lay there together, between the two.
    """

    def __init__(self, root: Path) -> None:
        self._directories = (root / "partial", root / "blocks")
        self._last: dict[tuple[int, int], int] = {}
        self.most = 0

    def look(self) -> None:
        now = self._list()
        self.most = max(self.most, sum(n_bytes for file, n_bytes in now.items() if file in self._last))
        self._last = now

    def look_until(self, moment: float) -> None:
        while time.monotonic() < moment:
            self.look()
            time.sleep(0.001)

    def _list(self) -> dict[tuple[int, int], int]:
        found: dict[tuple[int, int], int] = {}
        for directory in self._directories:
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        try:
                            status = entry.stat(follow_symlinks=False)
                        except FileNotFoundError:
                            continue
                        found[status.st_ino, status.st_mtime_ns] = status.st_size
            except FileNotFoundError:
                continue
        return found


def bytes_in(root: Path) -> int:
    return sum(path.stat().st_size for name in ("blocks", "partial") for path in (root / name).iterdir())


def reservations(root: Path) -> int:
    with closing(sqlite3.connect(root / "index.db")) as index:
        return int(index.execute("SELECT count(*) FROM reservations").fetchone()[0])


def assert_nothing_is_wrong(root: Path, quota: int, cache: Cache) -> None:
    """Of a cache that was opened after a crash, and is the only one."""
    assert cache.disk_error is None
    assert cache.verify() == []
    cache.check_integrity()
    assert bytes_in(root) <= quota
    assert list((root / "partial").iterdir()) == []
    assert len(list((root / "owners").iterdir())) == 1, "only ours"
    assert list((root / "damaged").iterdir()) == []
    assert reservations(root) == 0
    assert {row.key.hex() for row in cache.rows()} == {path.stem for path in (root / "blocks").iterdir()}
    assert cache.counters()["disk_errors"] == cache.counters()["faults"] == cache.counters()["corrupt_files"] == 0


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
    """After each kill, the contexts that the child had seen on the disk. Budgets are checked while it runs."""
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
            occupied = Occupied(root)
            occupied.look_until(time.monotonic() + dice.uniform(0, 0.25))
            child.send_signal(signal.SIGKILL)
            rest, complaints = child.communicate(timeout=DEADLINE)
            assert child.returncode == -signal.SIGKILL, complaints
            assert occupied.most <= quota
            if seed + 2 < n_kills:
                waiting.append(start_python(SAVING, root, quota, seed + 2, variety))
                started.append(waiting[-1])
            # The last line may be half a line.
            yield [json.loads(line) for line in (first + rest).splitlines(keepends=True) if line.endswith("\n")]
    finally:
        with running(*started):
            pass


def test_what_was_published_is_there_after_any_kill(tmp_path: Path) -> None:
    quota = 2**40
    everything: list[list[int]] = []
    for published in published_by_children_that_are_killed(tmp_path, quota, 7, (KILLS + 1) // 2):
        assert published
        with Cache(block_size=SIZE, ram=0, disk=tmp_path, disk_quota=quota) as cache:
            assert_nothing_is_wrong(tmp_path, quota, cache)
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
            assert_nothing_is_wrong(tmp_path, quota, cache)
            assert cache.counters()["blocks_disk"] > 0
            for row in cache.rows():
                block = cache.stored(row.key)
                assert block is not None
                loaded = cache.load(block)
                assert loaded is not None
                assert bytes(loaded.payload) == block.key * (payload_bytes(block) // 32)
                assert cache.context(row.key) is not None, "what it follows is there, too"


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
    with running(child):
        _, complaints = child.communicate(timeout=DEADLINE)
        assert child.returncode == -signal.SIGKILL, complaints


@pytest.mark.parametrize(("step", "n_lost"), [("reserved", 1), ("written", 1), ("published", 0)])
def test_a_write_that_was_cut_short_is_undone_or_completed(tmp_path: Path, step: str, n_lost: int) -> None:
    n = 3
    die(tmp_path, step, n)
    assert reservations(tmp_path) == 1, "it died before it was done"
    with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        assert_nothing_is_wrong(tmp_path, 2**30, cache)
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
def test_a_new_version_that_was_cut_short_leaves_one_or_the_other(tmp_path: Path, step: str) -> None:
    tokens = np.arange(64, dtype=np.int32)
    with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        save(cache, tokens)
    die(tmp_path, step, 2, replace=True)
    with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        assert hit(cache, tokens) == 64
        assert_nothing_is_wrong(tmp_path, 2**30, cache)


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
def test_who_lives_on_clears_up_after_who_died(tmp_path: Path, step: str, watch: bool) -> None:
    """Without a restart, as soon as room is needed, and without going over the quota meanwhile."""
    # Blocks as large as the largest of the dead one's, so that what it leaves matters.
    n_bytes = max(payload_bytes(block) for block in blocks_of(np.arange(64, dtype=np.int32)))
    quota = 6 * (n_bytes + 300)
    with Cache(block_size=SIZE, ram=0, disk=tmp_path, disk_quota=quota, watch=watch) as cache:
        fill(cache, 1000, n_bytes)
        die(tmp_path, step, 2, quota=quota)
        occupied = Occupied(tmp_path)
        for block in blocks_of(np.arange(5000, 5000 + 6 * SIZE, dtype=np.int32)):
            cache.save(block, payload_of(block, n_bytes))
            cache.flush()
            occupied.look()
            occupied.look()
        assert reservations(tmp_path) == 0
        cache.gc()
        assert_nothing_is_wrong(tmp_path, quota, cache)
        assert occupied.most <= quota


def payload_bytes(block: Block) -> int:
    """Of what a child saves."""
    return len(block.key) * (64 + block.key[0])


def fill(cache: Cache, first: int, n_bytes: int) -> None:
    for block in blocks_of(np.arange(first, first + 6 * SIZE, dtype=np.int32)):
        cache.save(block, payload_of(block, n_bytes))
    cache.flush()


def test_a_process_that_stands_still_in_the_middle_of_a_write_is_not_taken_for_dead(tmp_path: Path) -> None:
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
    with running(child):
        assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
        with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
            assert cache.gc() == 0
            assert len(list((tmp_path / "partial").iterdir())) == 1
            assert reservations(tmp_path) == 1
            save(cache, np.arange(100, 164, dtype=np.int32))
            cache.flush()
            assert hit(cache, np.arange(100, 164, dtype=np.int32)) == 64
        child.send_signal(signal.SIGCONT)
        finished(child)
    with Cache(block_size=SIZE, ram=0, disk=tmp_path) as cache:
        assert_nothing_is_wrong(tmp_path, 2**30, cache)
