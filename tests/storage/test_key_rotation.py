"""Keys are rotated while processes use a directory, after any kill, and without losing a block."""

from __future__ import annotations

import errno
import os
import random
import signal
import sqlite3
import struct
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from erllama.cache import Cache
from erllama.cache.admin.key_rotation import rotate_keys
from erllama.cache.admin.wipe import wipe
from erllama.cache.blocks import kvc
from erllama.cache.blocks.key_file import read_key_file
from erllama.errors import CacheError, CacheKeyError
from support.storage.blocks import NAMESPACE, SIZE, blocks_of, save
from support.storage.keys import all_bytes, join_keys, new_key
from support.storage.processes import DEADLINE, killed_at_end, start_python
from support.threads import wait_until

KILLS = int(os.environ.get("ERLLAMA_KILLS", "12"))
TEXT = b"a text that was computed as other tokens " * 30


def context(seed: int, n: int = 6 * SIZE + 5) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(20_000, 120_000, n, np.int32)


def open_cache(root: Path, key_file: Path | None, **options: object) -> Cache:
    return Cache(**{"ram": 0, "disk": root, "block_size": SIZE, "key_file": key_file, **options})  # type: ignore[arg-type]


def fill(root: Path, key_file: Path, n: int = 3) -> list[NDArray[np.int32]]:
    contexts = [context(seed) for seed in range(n)]
    with open_cache(root, key_file) as cache:
        for tokens in contexts:
            save(cache, tokens)
        cache.remember_text(NAMESPACE, TEXT, context(9, 300))
        assert cache.flush()
        cache.pin_prefix(NAMESPACE, contexts[0][: 2 * SIZE], name="clause", model="m", model_key=NAMESPACE)
    return contexts


def stored(cache: Cache, tokens: NDArray[np.int32]) -> int:
    """Return how many tokens can be loaded, after checking every payload. A block may be gone at any moment."""
    with cache.lookup(NAMESPACE, tokens) as match:
        n_tokens = 0
        for block in match.blocks:
            loaded = cache.load(block)
            if loaded is None:
                break
            assert bytes(loaded.payload[:32]) == block.key, "the payload of another block"
            n_tokens = block.end
        return min(n_tokens, match.n_tokens)


def assert_has_all(root: Path, key_file: Path, contexts: list[NDArray[np.int32]]) -> None:
    with open_cache(root, key_file) as cache:
        assert cache.disk_error is None
        assert [stored(cache, tokens) for tokens in contexts] == [len(tokens) for tokens in contexts]
        assert [(pin.name, pin.complete) for pin in cache.pins()] == [("clause", True)]
        found = cache.longest_text(NAMESPACE, TEXT + b"more")
        assert found is not None
        assert np.array_equal(found[1], context(9, 300))
        assert cache.verify() == []
        cache.check_integrity()
        assert cache.counters()["disk_errors"] == cache.counters()["corrupt_files"] == 0


class Keys:
    """An old key and a new one, and a file that processes read."""

    def __init__(self, folder: Path) -> None:
        self.old, self.new = new_key(folder / "old.key"), new_key(folder / "new.key")
        self.both = join_keys(folder / "both.key", self.new, self.old)
        self.shared = join_keys(folder / "shared.key", self.old)

    def id_of(self, path: Path) -> str:
        return read_key_file(path).ids[0]


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """Files with an old and a new key."""
    return Keys(tmp_path)


def test_a_rotation_keeps_everything_and_ends_the_old_key(tmp_path: Path, keys: Keys) -> None:
    root = tmp_path / "cache"
    contexts = fill(root, keys.old)
    used = last_uses(root, keys.old)
    done = rotate_keys(root, keys.both)
    assert done.key_id == keys.id_of(keys.new)
    assert done.old_key_ids == (keys.id_of(keys.old),)
    assert done.encrypted.n_blocks == sum(len(blocks_of(tokens)) for tokens in contexts)
    assert bytes.fromhex(keys.id_of(keys.old)) not in all_bytes(root)
    assert last_uses(root, keys.new) == used
    assert_has_all(root, keys.new, contexts)
    with open_cache(root, keys.old) as cache:
        assert isinstance(cache.disk_error, CacheKeyError)
    again = rotate_keys(root, keys.both)
    assert (again.encrypted.n_blocks, again.old_key_ids) == (0, ())


def last_uses(root: Path, key_file: Path) -> dict[bytes, int]:
    from erllama.cache.admin.maintenance import CacheFiles

    with CacheFiles(root, key_file=key_file) as files:
        return {row.block.key: row.last_used for row in files.rows()}


def test_a_rotation_needs_the_keys_in_use(tmp_path: Path, keys: Keys) -> None:
    root, plain = tmp_path / "cache", tmp_path / "plain"
    contexts = fill(root, keys.old)
    with pytest.raises(CacheKeyError, match=keys.id_of(keys.old)):
        rotate_keys(root, keys.new)
    assert_has_all(root, keys.old, contexts)
    with open_cache(plain, None) as cache:
        save(cache, context(0))
    with pytest.raises(CacheKeyError, match="not encrypted"):
        rotate_keys(plain, keys.both)
    with pytest.raises(CacheError, match="holds no cache"):
        rotate_keys(tmp_path / "nothing", keys.both)


def test_damaged_and_missing_files_do_not_stop_a_rotation(tmp_path: Path, keys: Keys) -> None:
    root = tmp_path / "cache"
    contexts = fill(root, keys.old)
    with open_cache(root, keys.old, watch=False) as cache:
        lost, damaged = cache.rows()[-1], cache.rows()[-2]
        assert stored(cache, contexts[0])
    paths = sorted((root / "blocks").iterdir())
    content = bytearray(paths[0].read_bytes())
    content[-1] ^= 1
    paths[0].write_bytes(content)
    assert lost.key != damaged.key
    done = rotate_keys(root, keys.both)
    assert done.n_damaged == 1
    assert done.encrypted.n_blocks == len(paths) - 1
    assert list((root / "damaged").iterdir()) == []
    with open_cache(root, keys.new) as cache:
        assert cache.disk_error is None
        assert cache.verify() == []


def test_a_rotation_keeps_blocks_of_a_newer_release(tmp_path: Path, keys: Keys) -> None:
    root = tmp_path / "cache"
    fill(root, keys.old)
    path, *others = sorted((root / "blocks").iterdir())
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, 8, 99)  # the version
    path.write_bytes(content)
    with pytest.raises(CacheError, match="newer release"):
        rotate_keys(root, keys.both)
    assert path.read_bytes() == content
    with open_cache(root, keys.both) as cache:
        assert len(cache.rows()) == len(others) + 1, "the others are encrypted again"


def test_a_bad_sector_does_not_stop_a_rotation(tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "cache"
    fill(root, keys.old)
    bad, *others = sorted((root / "blocks").iterdir())
    read = kvc.read

    def read_sectors(path: Path, *arguments: object) -> object:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(kvc, "read", read_sectors)
    done = rotate_keys(root, keys.both)
    assert (done.n_damaged, done.encrypted.n_blocks) == (1, len(others))
    with open_cache(root, keys.new) as cache:
        assert cache.disk_error is None
        assert cache.verify() == []


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES])
def test_a_passing_error_ends_a_rotation_and_removes_nothing(
    tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    root = tmp_path / "cache"
    contexts = fill(root, keys.old)

    def fail(path: Path, *_: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as faulty:
        faulty.setattr(kvc, "read", fail)
        with pytest.raises(OSError, match=os.strerror(number)):
            rotate_keys(root, keys.both)
    assert rotate_keys(root, keys.both).n_damaged == 0
    assert_has_all(root, keys.new, contexts)


def test_an_error_of_writing_removes_no_block(tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "cache"
    contexts = fill(root, keys.old)

    def fail(self: object, *_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as faulty:
        faulty.setattr("erllama.cache.tiers.file_tier.FileTier.write_used", fail)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            rotate_keys(root, keys.both)
    assert rotate_keys(root, keys.both).n_damaged == 0
    assert_has_all(root, keys.new, contexts)


def test_another_process_follows_a_rotation_of_its_key_file(tmp_path: Path, keys: Keys) -> None:
    root = tmp_path / "cache"
    contexts = fill(root, keys.shared)
    with open_cache(root, keys.shared) as cache:
        assert stored(cache, contexts[0]) == len(contexts[0])
        join_keys(keys.shared, keys.new, keys.old)
        rotate_keys(root, keys.shared)
        for tokens in contexts:
            wait_until(lambda tokens=tokens: stored(cache, tokens) == len(tokens))
        join_keys(keys.shared, keys.new)
        save(cache, context(7))
        assert cache.flush()
        assert stored(cache, context(7)) == len(context(7))
        assert cache.disk_error is None
        cache.check_integrity()
    assert_has_all(root, keys.new, [*contexts, context(7)])


def test_a_process_without_the_new_key_serves_cold_and_loses_nothing(tmp_path: Path, keys: Keys) -> None:
    root = tmp_path / "cache"
    contexts = fill(root, keys.old)
    with open_cache(root, keys.old) as cache:
        rotate_keys(root, keys.both)
        wait_until(lambda: stored(cache, contexts[0]) == 0 and isinstance(cache.disk_error, CacheKeyError))
        save(cache, context(7))
        cache.flush()
        cache.gc()
        assert cache.evict_bytes(10**9, ("disk",)) == 0
        assert stored(cache, contexts[1]) == 0
    assert_has_all(root, keys.new, contexts)


def test_processes_work_while_keys_are_rotated(tmp_path: Path, keys: Keys) -> None:
    root = tmp_path / "cache"
    contexts = fill(root, keys.both, 4)
    children = [start_python(WORKING, root, keys.both, seed) for seed in range(2)]
    with killed_at_end(*children):
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for newest, older in ((keys.old, keys.new), (keys.new, keys.old)):
            join_keys(keys.both, newest, older)
            done = rotate_keys(root, keys.both)
            assert done.key_id == keys.id_of(newest)
        for child in children:
            printed, complaints = child.communicate("stop\n", timeout=DEADLINE)
            assert child.returncode == 0, complaints
            assert int(printed) > 0
    with open_cache(root, keys.both) as cache:
        assert cache.verify() == []
        cache.check_integrity()
        for tokens in contexts:
            assert stored(cache, tokens) == len(tokens)
        assert keys_in_use(root) == {keys.id_of(keys.new)}


WORKING = """
    import threading
    root, key_file, seed = sys.argv[1:]
    dice = random.Random(int(seed))
    cache = Cache(block_size=SIZE, ram=0, disk=root, key_file=key_file)
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()
    print("ready", flush=True)
    n = 0
    while not stop.is_set():
        tokens = context(dice, 9)
        save(cache, tokens)
        if dice.random() < 0.3:
            cache.flush()
        check(cache, context(dice, 9))
        n += 1
        time.sleep(0.02)
    cache.close()
    print(n)
"""


def keys_in_use(root: Path) -> set[str]:
    with closing(sqlite3.connect(root / "index.db")) as index:
        return {key_id.hex() for (key_id,) in index.execute("SELECT key_id FROM encryption")}


ROTATING = """
    from erllama.cache.admin.key_rotation import rotate_keys
    sys.stdin.readline()
    print("started", flush=True)
    rotate_keys(Path(sys.argv[1]), Path(sys.argv[2]))
    print("done", flush=True)
"""


def test_a_rotation_that_is_killed_continues(tmp_path: Path, keys: Keys) -> None:
    root, dice = tmp_path / "cache", random.Random(5)
    contexts = fill(root, keys.old, 10)
    n_killed = 0
    newest, older = keys.new, keys.old
    children = [start_python(ROTATING, root, keys.both)]
    for _ in range(KILLS // 3):
        child = children[-1]
        children.append(start_python(ROTATING, root, keys.both))  # its imports take long
        with killed_at_end(child):
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write("go\n")
            child.stdin.flush()
            assert child.stdout.readline() == "started\n"
            time.sleep(dice.uniform(0, 0.1))
            child.send_signal(signal.SIGKILL)
            printed, _ = child.communicate(timeout=DEADLINE)
        with open_cache(root, keys.both) as cache:
            assert cache.disk_error is None
            assert cache.verify() == []
            cache.check_integrity()
            assert [stored(cache, tokens) for tokens in contexts] == [len(tokens) for tokens in contexts]
        if printed == "done\n":
            newest, older = older, newest
            join_keys(keys.both, newest, older)
        else:
            n_killed += 1
    with killed_at_end(children[-1]):
        pass
    rotate_keys(root, keys.both)
    assert keys_in_use(root) == {keys.id_of(newest)}
    assert_has_all(root, newest, contexts)
    assert n_killed > 0


def test_a_killed_step_of_a_rotation_is_completed(
    tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    from erllama.cache.tiers.file_tier import FileTier
    from erllama.cache.tiers.tier import SimulatedCrash

    for number, step in enumerate(("reserved", "written", "published")):
        root = tmp_path / f"cache {number}"
        contexts = fill(root, keys.old)

        def crash(self: FileTier, name: str, at: str = step) -> None:
            if name == at:
                raise SimulatedCrash

        with monkeypatch.context() as patch:
            patch.setattr(FileTier, "_step", crash)
            patch.setattr(FileTier, "close", FileTier.abandon)
            with pytest.raises(SimulatedCrash):
                rotate_keys(root, keys.both)
        assert_has_all(root, keys.both, contexts)
        rotate_keys(root, keys.both)
        assert_has_all(root, keys.new, contexts)


# --- wiping -----------------------------------------------------------------------------------------


def test_a_wiped_directory_has_no_content_and_takes_another_key(tmp_path: Path, keys: Keys) -> None:
    root = tmp_path / "cache"
    contexts = fill(root, keys.old)
    (root / "responses.sqlite").write_bytes(b"responses")
    (root / "index.db.damaged-1").write_bytes(b"an older index")
    (root / "damaged" / "1-file.kvc").write_bytes(b"a damaged file")
    with open_cache(root, keys.old), pytest.raises(CacheError, match="in use"):
        wipe(root)
    assert_has_all(root, keys.old, contexts)
    removed = wipe(root)
    assert removed.n_blocks == sum(len(blocks_of(tokens)) for tokens in contexts)
    assert [path for path in root.rglob("*") if path.is_file()] == []
    with open_cache(root, keys.new) as cache:
        assert cache.disk_error is None
        assert stored(cache, contexts[0]) == 0
        save(cache, contexts[0])
        assert cache.flush()
        assert stored(cache, contexts[0]) == len(contexts[0])


def test_a_directory_that_is_not_a_cache_is_not_wiped(tmp_path: Path) -> None:
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "mine.txt").write_text("mine")
    with pytest.raises(CacheError, match="holds no cache"):
        wipe(tmp_path)
    assert (tmp_path / "blocks" / "mine.txt").read_text() == "mine"
