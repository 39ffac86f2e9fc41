"""An encrypted directory shows no content, refuses changed content, and loses nothing for lack of a key."""

from __future__ import annotations

import hashlib
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from numpy.typing import NDArray

from erllama.cache import Block, Cache, FileTier, SaveReason, child_key, token_bytes
from erllama.cache.admin.archive import export_blocks, import_blocks
from erllama.cache.admin.maintenance import CacheFiles
from erllama.cache.blocks import kvc
from erllama.cache.blocks.encryption import Encryption
from erllama.cache.blocks.key_file import SecretKeys
from erllama.errors import CacheFormatError, CacheKeyError, OptionError
from erllama.testing import CacheMachine, TierConformance
from support.storage.blocks import NAMESPACE, SIZE, blocks_of, hit, payload_of, save
from support.storage.keys import all_bytes, join_keys, new_key, traces_of_text, traces_of_tokens

KEYS = Encryption.of_keys(SecretKeys((b"\x01" * 32, b"\x02" * 32)))
TEXT = "the treaty of the seven provinces, clause nine: "
NAME, MODEL = "pinned-clause", "model-of-the-archive"


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A file with a new key."""
    return new_key(tmp_path / "cache.key")


def context(seed: int, n: int = 5 * SIZE + 3) -> NDArray[np.int32]:
    """Return tokens with large ids: their bytes appear nowhere by chance."""
    return np.random.default_rng(seed).integers(20_000, 120_000, n, np.int32)


def open_cache(root: Path, key_file: Path | None, **options: object) -> Cache:
    return Cache(**{"ram": 0, "disk": root, "block_size": SIZE, "key_file": key_file, **options})  # type: ignore[arg-type]


def fill(root: Path, key_file: Path | None) -> list[NDArray[np.int32]]:
    """Store three contexts, a text and a pin."""
    contexts = [context(seed) for seed in range(3)]
    with open_cache(root, key_file) as cache:
        for tokens in contexts:
            save(cache, tokens)
        cache.remember_text(NAMESPACE, (TEXT * 40).encode(), context(9, 300))
        assert cache.flush()
        cache.pin_prefix(NAMESPACE, contexts[0][: 2 * SIZE], name=NAME, model=MODEL, model_key=NAMESPACE)
        assert cache.disk_error is None
    return contexts


# --- what the bytes of a directory show ------------------------------------------------------------


def traces() -> dict[str, bytes]:
    """Return the bytes that would show a part of what `fill` stores, or confirm a guess at it."""
    found: dict[str, bytes] = {}
    for name, tokens in {
        **{f"context {seed}": context(seed) for seed in range(3)},
        "text": context(9, 300),
    }.items():
        found |= {f"{name} as {form}": trace for form, trace in traces_of_tokens(tokens).items()}
    for text in (TEXT[:20], NAME, MODEL):
        found |= {f"{text} as {form}": trace for form, trace in traces_of_text(text).items()}
    digest = hashlib.sha256(NAMESPACE + (TEXT * 40).encode()).digest()
    keys = {"namespace": NAMESPACE, "digest of a text": digest, "key of tokens": child_key(bytes(32), b"")}
    keys |= {f"key {i}": block.key for i, block in enumerate(blocks_of(context(0)))}
    for name, value in keys.items():
        found |= {name: value, f"{name} in hex": value.hex().encode()}
    payload = payload_of(blocks_of(context(0))[0]).tobytes()
    return found | {"payload": payload[:16]}


def test_no_file_shows_content_or_confirms_a_guess(tmp_path: Path, key: Path) -> None:
    root = tmp_path / "cache"
    with open_cache(root, key) as cache:  # open meanwhile, so that the log of the index stays
        fill(root, key)
        with CacheFiles(root, key_file=key) as files, (root / "blocks.tar").open("wb") as archive:
            assert export_blocks(files, archive).n_blocks
        content = all_bytes(root)
        assert hit(cache, context(0)) == len(context(0))
    assert len(content) > 20_000
    assert [name for name, trace in traces().items() if trace in content] == []


def test_the_same_search_finds_content_without_a_key(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    fill(root, None)
    content = all_bytes(root)
    found = {name for name, trace in traces().items() if trace in content}
    assert {"context 0 as int32", "text as int32", "namespace", "payload", "digest of a text"} <= found
    assert {"key 0 in hex", f"{NAME} as utf-8", f"{MODEL} as utf-8"} <= found


@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40),
    start=st.integers(0, 2**63 - 1),
    payload=st.binary(max_size=300),
    number=st.integers(0, 1),
)
def test_a_block_round_trips_and_hides_its_content(
    tokens: list[int], start: int, payload: bytes, number: int
) -> None:
    parent = child_key(NAMESPACE, b"before") if start else NAMESPACE
    raw = token_bytes(np.array(tokens, np.uint32))
    block = Block.following(parent, NAMESPACE, start, raw, SaveReason.FINISH, bytes(range(16)), start)
    content_key = KEYS.keys[number]
    content = b"".join(map(bytes, kvc.encode(block, memoryview(payload), content_key)))
    assert len(content) == kvc.file_bytes(len(tokens), len(payload), encrypted=True)
    found, found_payload = kvc.decode(memoryview(content), content_key)
    assert (found, found_payload.tobytes()) == (block, payload)
    assert all(part not in content for part in (raw, payload, NAMESPACE, block.key, parent) if len(part) > 7)
    assert content != b"".join(map(bytes, kvc.encode(block, memoryview(payload), content_key)))
    with pytest.raises(CacheFormatError, match="another key"):
        kvc.decode(memoryview(content), KEYS.keys[1 - number])
    with pytest.raises(CacheKeyError, match="encrypted"):
        kvc.decode(memoryview(content))


@pytest.mark.parametrize("n_bytes", [0, 1, (256 << 10) - 1, 256 << 10, (512 << 10) + 5])
def test_payloads_of_any_length_round_trip_in_files(tmp_path: Path, n_bytes: int) -> None:
    path, [block, *_] = tmp_path / "block.kvc", blocks_of(context(1))
    payload = np.random.default_rng(2).integers(0, 256, n_bytes, np.uint8)
    assert kvc.write(path, block, payload.data, content_key=KEYS.current) == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600
    assert kvc.read_header(path, KEYS.current) == (block, n_bytes)
    found, read = kvc.read(path, KEYS.current)
    assert found == block
    assert np.array_equal(read, payload)


def test_sealed_content_never_repeats_and_is_bound_to_its_place() -> None:
    sealed = {KEYS.seal(b"one", b"here") for _ in range(1000)}
    assert len(sealed) == 1000
    one = sealed.pop()
    assert KEYS.open(one, b"here") == b"one"
    with pytest.raises(CacheFormatError):
        KEYS.open(one, b"there")
    for wrong in (None, "text", one[:20], one[:-1], one + b"x"):
        with pytest.raises(CacheFormatError):
            KEYS.open(wrong, b"here")
    other = Encryption.of_keys(SecretKeys((b"\x03" * 32,)))
    with pytest.raises(CacheKeyError, match="add that key"):
        other.open(one, b"here")


# --- changed files ----------------------------------------------------------------------------------


def encoded(block: Block, payload: bytes) -> bytes:
    return b"".join(map(bytes, kvc.encode(block, memoryview(payload), KEYS.current)))


def test_every_flipped_bit_of_a_file_is_detected() -> None:
    content = encoded(blocks_of(context(1))[0], b"payload")
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(CacheFormatError):
            kvc.decode(memoryview(damaged), KEYS.current)


def test_every_truncation_and_extension_of_a_file_is_detected() -> None:
    content = encoded(blocks_of(context(1))[0], b"payload")
    for length in range(len(content)):
        with pytest.raises(CacheFormatError):
            kvc.decode(memoryview(content[:length]), KEYS.current)
    with pytest.raises(CacheFormatError):
        kvc.decode(memoryview(content + b"\0"), KEYS.current)


def test_header_and_payload_of_two_files_do_not_fit() -> None:
    one, other, *_ = blocks_of(context(1))
    a, b = encoded(one, b"payload"), encoded(other, b"PAYLOAD")
    same = encoded(one, b"payload")
    n_header = len(a) - len(b"payload") - 16
    for end in (b, same):
        with pytest.raises(CacheFormatError):
            kvc.decode(memoryview(a[:n_header] + end[n_header:]), KEYS.current)


def flip(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, dice: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: dice.randrange(path.stat().st_size)])


def swap(path: Path, dice: random.Random) -> None:
    other = dice.choice([each for each in path.parent.iterdir() if each != path])
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def replace_by_plain(path: Path, dice: random.Random) -> None:
    """A forger without a key can write valid files that are not encrypted."""
    path.unlink()
    kvc.write(path, blocks_of(context(0))[0], payload_of(blocks_of(context(0))[0]).data)


@pytest.mark.parametrize("change", [flip, truncate, swap, replace_by_plain])
def test_changed_files_are_counted_and_never_restored(
    tmp_path: Path, key: Path, change: Callable[[Path, random.Random], None]
) -> None:
    root, dice = tmp_path / "cache", random.Random(3)
    tokens = context(0, 12 * SIZE)
    for _ in range(5):
        with open_cache(root, key, watch=False) as cache:
            save(cache, tokens)
            assert cache.flush()
            paths = sorted((root / "blocks").iterdir())
            changed = dice.choice(paths)
            change(changed, dice)
            with cache.lookup(NAMESPACE, tokens) as match:
                loaded = [cache.load(block) for block in match.blocks]
            wrong = [each for each in loaded if each is None]
            right = [each for each in loaded if each is not None]
            assert len(wrong) == (2 if change is swap else 1)
            assert all(bytes(each.payload[:32]) == each.block.key for each in right)
            assert cache.counters()["corrupt_files"] == len(wrong)


def test_damaged_rows_lose_the_index_and_no_block(tmp_path: Path, key: Path) -> None:
    root = tmp_path / "cache"
    contexts = fill(root, key)
    with closing(sqlite3.connect(root / "index.db")) as index:
        name, sealed = index.execute("SELECT key, tokens FROM blocks LIMIT 1").fetchone()
        index.execute("UPDATE blocks SET tokens = ? WHERE key = ?", [sealed[:-1] + b"x", name])
        index.commit()
    with open_cache(root, key) as cache:
        assert [hit(cache, tokens) for tokens in contexts] == [len(tokens) for tokens in contexts]
        assert list(root.glob("index.db.damaged-*"))
        assert cache.verify() == []


def test_damaged_texts_are_not_used(tmp_path: Path, key: Path) -> None:
    root = tmp_path / "cache"
    fill(root, key)
    with open_cache(root, key) as cache:
        found = cache.longest_text(NAMESPACE, (TEXT * 41).encode())
        assert found is not None
        assert found[0] == len(TEXT * 40)
        assert np.array_equal(found[1], context(9, 300))
    with closing(sqlite3.connect(root / "index.db")) as index:
        rows = index.execute("SELECT key, tokens FROM text_pieces").fetchall()
        (a, stored), (b, other) = rows[:2]
        index.executemany("UPDATE text_pieces SET tokens = ? WHERE key = ?", [(other, a), (stored, b)])
        index.commit()
    with open_cache(root, key) as cache:
        assert cache.longest_text(NAMESPACE, (TEXT * 41).encode()) is None


# --- missing and wrong keys ---------------------------------------------------------------------------


def listing(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in (root / "blocks").iterdir()}


@pytest.mark.parametrize("loses_index", [False, True], ids=["with index", "without index"])
@pytest.mark.parametrize("read_only", [False, True], ids=["writable", "read-only"])
@pytest.mark.parametrize("wrong", [None, "other.key"], ids=["no key", "wrong key"])
def test_a_missing_or_wrong_key_is_an_error_that_loses_nothing(
    tmp_path: Path, key: Path, wrong: str | None, read_only: bool, loses_index: bool
) -> None:
    root = tmp_path / "cache"
    contexts = fill(root, key)
    if loses_index:
        for path in root.glob("index.db*"):
            path.unlink()
    before = listing(root)
    wrong_key = None if wrong is None else new_key(tmp_path / wrong)
    for _ in range(2):
        with open_cache(root, wrong_key, read_only=read_only) as cache:
            assert isinstance(cache.disk_error, CacheKeyError)
            assert hit(cache, contexts[0]) == 0
            save(cache, contexts[0])
            cache.flush()
            cache.gc()
        with pytest.raises(CacheKeyError):
            CacheFiles(root, key_file=wrong_key)
    assert listing(root) == before
    assert list((root / "damaged").iterdir()) == []
    with open_cache(root, key) as cache:
        assert [hit(cache, tokens) for tokens in contexts] == [len(tokens) for tokens in contexts]
        assert loses_index or [pin.name for pin in cache.pins()] == [NAME]
        assert cache.verify() == []


@pytest.mark.parametrize("loses_index", [False, True], ids=["with index", "without index"])
def test_a_key_for_a_directory_without_one_is_an_error(tmp_path: Path, key: Path, loses_index: bool) -> None:
    root = tmp_path / "cache"
    contexts = fill(root, None)
    if loses_index:
        for path in root.glob("index.db*"):
            path.unlink()
    before = listing(root)
    with open_cache(root, key) as cache:
        assert isinstance(cache.disk_error, CacheKeyError)
        assert "not encrypted" in str(cache.disk_error)
        save(cache, contexts[0])
        cache.flush()
    assert listing(root) == before
    with open_cache(root, None) as cache:
        assert [hit(cache, tokens) for tokens in contexts] == [len(tokens) for tokens in contexts]


def test_a_directory_without_content_takes_the_key(tmp_path: Path, key: Path) -> None:
    root = tmp_path / "cache"
    open_cache(root, None).close()
    with open_cache(root, key) as cache:
        assert cache.disk_error is None
        save(cache, context(0))
    with open_cache(root, None) as cache:
        assert isinstance(cache.disk_error, CacheKeyError)


def test_key_files_that_cannot_be_used_raise_at_once(tmp_path: Path, key: Path) -> None:
    key.chmod(0o644)
    with pytest.raises(CacheKeyError, match="chmod 600"):
        open_cache(tmp_path / "cache", key)
    with pytest.raises(CacheKeyError, match="new-key"):
        open_cache(tmp_path / "cache", tmp_path / "missing")
    with pytest.raises(OptionError, match="key_file=5"):
        Cache(key_file=5)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="key_file"):
        Cache(keyfile=key)  # type: ignore[arg-type]
    assert not (tmp_path / "cache").exists()


def test_foreign_files_stay_where_they_are(tmp_path: Path, key: Path) -> None:
    root, other = tmp_path / "cache", tmp_path / "other"
    fill(root, key)
    fill(other, new_key(tmp_path / "other.key"))
    plain = blocks_of(context(7))[0]
    foreign = next((other / "blocks").iterdir())
    target = root / "blocks" / foreign.name
    target.write_bytes(foreign.read_bytes())
    kvc.write(root / "blocks" / f"{plain.key.hex()}.kvc", plain, payload_of(plain).data)
    with open_cache(root, key) as cache:
        cache.gc()
        assert cache.disk_error is None
        assert hit(cache, context(0)) == len(context(0))
        assert hit(cache, context(7)) == 0
    assert target.read_bytes() == foreign.read_bytes()
    assert (root / "blocks" / f"{plain.key.hex()}.kvc").exists()


# --- other parts of a cache ------------------------------------------------------------------------------


def test_a_process_with_the_spec_uses_the_key(tmp_path: Path, key: Path) -> None:
    root = tmp_path / "cache"
    with open_cache(root, key) as cache:
        spec = cache.share_with_process()
        assert spec.key_file == str(key)
        with Cache.of_spec(spec) as child:
            save(child, context(0))
            assert child.flush()
        assert hit(cache, context(0)) == len(context(0))


def test_the_directory_in_memory_is_encrypted_too(tmp_path: Path, key: Path) -> None:
    with Cache(ram=1 << 20, ram_file=tmp_path / "memory", block_size=SIZE, key_file=key) as cache:
        save(cache, context(0))
        assert cache.flush()
        assert context(0)[:8].tobytes() not in all_bytes(tmp_path / "memory")
    with CacheFiles(tmp_path / "memory", in_memory=True, key_file=key) as files:
        assert files.keys is not None
        assert len(files.rows()) == len(blocks_of(context(0)))


def test_archives_move_blocks_into_directories_with_other_keys(tmp_path: Path, key: Path) -> None:
    contexts = fill(tmp_path / "from", key)
    archive = BytesIO()
    with CacheFiles(tmp_path / "from", key_file=key) as files:
        n_blocks = export_blocks(files, archive).n_blocks
    assert NAMESPACE not in archive.getvalue()
    newer = new_key(tmp_path / "newer.key")
    both = join_keys(tmp_path / "both.key", newer, key)
    for root, wrong in ((tmp_path / "plain", None), (tmp_path / "to", newer)):
        open_cache(root, wrong).close()
        archive.seek(0)
        with CacheFiles(root, key_file=wrong) as files, pytest.raises(CacheKeyError):
            import_blocks(files, archive)
    archive.seek(0)
    with CacheFiles(tmp_path / "to", key_file=both) as files:
        done = import_blocks(files, archive)
        assert (done.n_blocks, done.refused) == (n_blocks, [])
    with open_cache(tmp_path / "to", newer) as cache:
        assert [hit(cache, tokens) for tokens in contexts] == [len(tokens) for tokens in contexts]


def test_an_archive_without_encryption_is_encrypted_on_import(tmp_path: Path, key: Path) -> None:
    contexts = fill(tmp_path / "from", None)
    archive = BytesIO()
    with CacheFiles(tmp_path / "from") as files:
        export_blocks(files, archive)
    open_cache(tmp_path / "to", key).close()
    archive.seek(0)
    with CacheFiles(tmp_path / "to", key_file=key) as files:
        assert import_blocks(files, archive).refused == []
    assert contexts[0][:8].tobytes() not in all_bytes(tmp_path / "to")
    with open_cache(tmp_path / "to", key) as cache:
        assert hit(cache, contexts[0]) == len(contexts[0])


def test_two_processes_that_create_a_directory_agree(tmp_path: Path, key: Path) -> None:
    with open_cache(tmp_path, key) as first, open_cache(tmp_path, None) as second:
        assert first.disk_error is None
        assert isinstance(second.disk_error, CacheKeyError)
        save(second, context(1))
        save(first, context(0))
        assert first.flush()
        assert hit(first, context(0)) == len(context(0))
    assert context(1)[:8].tobytes() not in all_bytes(tmp_path)


# --- the harness ---------------------------------------------------------------------------------------


class TestEncryptedTier(TierConformance):
    """The rules of tiers, on an encrypted directory."""

    n_blocks = 60

    @pytest.fixture(autouse=True)
    def set_key_file(self, key: Path) -> None:
        """Set the key of the tiers."""
        self.key_file = key

    def make_tier(self, directory: Path) -> FileTier:
        return FileTier(directory, 10**6, watch=False, key_file=self.key_file)


def test_the_state_machine_passes_with_a_key(key: Path) -> None:
    class Encrypted(CacheMachine):
        def make_cache(self, directory: Path) -> Cache:
            return Cache(ram=1000, disk=directory, disk_quota=12_000, block_size=16, watch=False, key_file=key)

    run_state_machine_as_test(Encrypted, settings=settings(max_examples=10, stateful_step_count=25))
