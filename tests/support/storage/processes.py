"""Child processes that share a cache directory, and checks of the directory afterwards."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from erllama.cache import Cache
from support.paths import TESTS

DEADLINE = 300.0  # seconds; far longer than any call takes, also on a busy machine


# The start of the code of children, also in other test modules. It imports only the cache.
PRELUDE = f"""
    import os, random, select, signal, sys, time
    sys.path.append({str(TESTS)!r})
    from pathlib import Path
    import numpy as np
    from support.storage.blocks import NAMESPACE, SIZE, blocks_of
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
    """Start a child that begins with PRELUDE and can receive input on stdin."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(code), *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )


@contextmanager
def killed_at_end(*started: subprocess.Popen[str]) -> Iterator[None]:
    """Kill the children and close their pipes when the context ends."""
    try:
        yield
    finally:
        for child in started:
            child.kill()
            child.communicate()


def output_of(child: subprocess.Popen[str]) -> str:
    """Wait until a child ends successfully. Returns what it printed."""
    printed, complaints = child.communicate(timeout=DEADLINE)
    assert child.returncode == 0, f"exit {child.returncode}\n{printed}\n{complaints}"
    return printed


class DiskUsageMonitor:
    """The bytes in `blocks/` and `partial/` at one moment, from listings that take longer than a moment.

    A file that two successive listings show unchanged was there from one to the other. So all such
    files were there together, between the two.
    """

    def __init__(self, root: Path) -> None:
        self._directories = (root / "partial", root / "blocks")
        self._last: dict[tuple[int, int], int] = {}
        self.most = 0

    def sample(self) -> None:
        now = self._list()
        self.most = max(self.most, sum(n_bytes for file, n_bytes in now.items() if file in self._last))
        self._last = now

    def sample_until(self, moment: float) -> None:
        while time.monotonic() < moment:
            self.sample()
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


def assert_consistent(root: Path, quota: int, cache: Cache) -> None:
    """Check a cache that was opened after a crash and is the only one."""
    assert cache.disk_error is None
    assert cache.verify() == []
    cache.check_integrity()
    assert bytes_in(root) <= quota
    assert list((root / "partial").iterdir()) == []
    assert len(list((root / "owners").iterdir())) == 1, "only ours"
    assert list((root / "damaged").iterdir()) == []
    assert reservations(root) == 0
    keys, names = {row.key.hex() for row in cache.rows()}, {path.stem for path in (root / "blocks").iterdir()}
    assert keys == names if cache.key_file is None else len(keys) == len(names)  # or the names are encrypted
    assert cache.counters()["disk_errors"] == cache.counters()["faults"] == cache.counters()["corrupt_files"] == 0
