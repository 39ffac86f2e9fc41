"""Stored texts are found by any text that they begin, with the tokens that they were computed as."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import sqlite3
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erllama.cache import Cache
from erllama.cache.texts import text_tokens as texts_module
from erllama.cache.texts.text_tokens import TextCache, TextDigests
from erllama.cache.tiers import sqlite_index as index_module
from support.examples import examples
from support.storage.blocks import SIZE, save

NAMESPACE, OTHER = b"n" * 32, b"o" * 32


def ids(*tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(tokens, np.int32)


def found(cache: Cache, text: bytes, namespace: bytes = NAMESPACE) -> tuple[int, list[int]] | None:
    known = cache.longest_text(namespace, text)
    return None if known is None else (known[0], known[1].tolist())


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 1300)), max_size=6), st.data())
def test_the_longest_stored_prefix_of_a_text_is_found(parts: list[tuple[str, int]], data: st.DataObject) -> None:
    texts = ["".join(letter * n for letter, n in parts[:i]).encode() for i in range(len(parts) + 1)]
    known = TextCache()
    remembered = data.draw(st.lists(st.sampled_from(texts), unique=True))
    for text in remembered:
        known.remember(TextDigests(NAMESPACE, text).record(ids(len(text))))
    asked = data.draw(st.sampled_from(texts)) + data.draw(st.binary(max_size=600))
    best = max((text for text in remembered if asked.startswith(text)), key=len, default=None)
    got = known.longest(TextDigests(NAMESPACE, asked))
    assert (got.tokens.tolist() if got else None) == (None if best is None else [len(best)])
    assert known.longest(TextDigests(OTHER, asked)) is None


def test_the_least_recently_used_text_is_dropped_first() -> None:
    known = TextCache(limit_bytes=2000)  # two of them
    for name in (b"a", b"b", b"c"):
        known.remember(TextDigests(NAMESPACE, name).record(ids(1, 2, 3, 4)))
        assert known.longest(TextDigests(NAMESPACE, b"a")) is not None
    assert known.longest(TextDigests(NAMESPACE, b"b")) is None
    assert known.longest(TextDigests(NAMESPACE, b"c")) is not None


def test_texts_survive_a_restart_and_are_shared_by_processes(tmp_path: Path) -> None:
    text = b"once upon a time " * 100
    with Cache(disk=tmp_path) as cache, Cache(disk=tmp_path) as other:
        cache.remember_text(NAMESPACE, text[:1000], ids(1, 2))
        cache.remember_text(NAMESPACE, text[:1200], ids(1, 2, 3))
        cache.flush()
        assert found(other, text) == (1200, [1, 2, 3])
    with Cache(disk=tmp_path) as cache:
        assert found(cache, text) == (1200, [1, 2, 3])
        assert found(cache, text[:1100]) == (1000, [1, 2])
        assert found(cache, text[:900]) is None
        assert found(cache, text, OTHER) is None


def test_texts_themselves_are_not_stored(tmp_path: Path) -> None:
    with Cache(disk=tmp_path) as cache:
        cache.remember_text(NAMESPACE, b"a secret" * 100, ids(1))
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@contextlib.contextmanager
def database(root: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(sqlite3.connect(root / "index.db")) as db, db:
        yield db


# --- what the database says is believed where it proves it ---------------------------------------


def test_changed_tokens_are_not_used(tmp_path: Path) -> None:
    with Cache(disk=tmp_path) as cache:
        cache.remember_text(NAMESPACE, b"text", ids(1, 2))
    with database(tmp_path) as db:
        db.execute("UPDATE text_pieces SET tokens = ?", [ids(1, 3).tobytes()])
    with Cache(disk=tmp_path) as cache:
        assert found(cache, b"text and more") is None
        cache.remember_text(NAMESPACE, b"text", ids(1, 2))
    with Cache(disk=tmp_path) as cache:  # the damage did not last
        assert found(cache, b"text and more") == (4, [1, 2])


def test_a_text_never_gets_the_tokens_of_another(tmp_path: Path) -> None:
    with Cache(disk=tmp_path) as cache:
        cache.remember_text(NAMESPACE, b"one", ids(1))
        cache.remember_text(NAMESPACE, b"other", ids(2))
    with database(tmp_path) as db:
        ((head,),) = db.execute("SELECT head FROM texts WHERE n_bytes = 3").fetchall()
        db.execute("UPDATE texts SET head = ? WHERE n_bytes = 5", [head])
    with Cache(disk=tmp_path) as cache:
        assert found(cache, b"other") is None
        assert found(cache, b"one") == (3, [1])


@pytest.mark.parametrize("wrong", ["x", 7.5, -1, 0, 3, 1 << 62, b"\xff"])
def test_a_wrong_length_hides_one_text_without_a_fault(tmp_path: Path, wrong: object) -> None:
    with Cache(disk=tmp_path) as cache:
        cache.remember_text(NAMESPACE, b"once", ids(1))
        cache.remember_text(NAMESPACE, b"once upon", ids(1, 2))
    with database(tmp_path) as db:
        db.execute("UPDATE texts SET n_bytes = ? WHERE n_bytes = 9", [wrong])
    with Cache(disk=tmp_path) as cache:
        assert found(cache, b"once upon a time") == (4, [1])
        assert cache.counters()["faults"] == cache.counters()["disk_errors"] == 0


@pytest.mark.parametrize("column", ["parent", "tokens"])
@pytest.mark.parametrize("wrong", ["x", 7, b"", b"\xff" * 32])
def test_a_damaged_piece_is_a_miss(tmp_path: Path, column: str, wrong: object) -> None:
    with Cache(disk=tmp_path) as cache:
        cache.remember_text(NAMESPACE, b"text", np.arange(1000, dtype=np.int32))
    with database(tmp_path) as db:
        db.execute(f"UPDATE text_pieces SET {column} = ? WHERE key IN (SELECT head FROM texts)", [wrong])
    with Cache(disk=tmp_path) as cache:
        assert found(cache, b"text") is None
        assert cache.counters()["faults"] == cache.counters()["disk_errors"] == 0


def test_a_text_without_its_first_tokens_is_not_found(tmp_path: Path) -> None:
    with Cache(disk=tmp_path) as cache:
        cache.remember_text(NAMESPACE, b"text", np.arange(1000, dtype=np.int32))
    with database(tmp_path) as db:
        db.execute("DELETE FROM text_pieces WHERE parent = ?", [bytes(32)])
    with Cache(disk=tmp_path) as cache:
        assert found(cache, b"text") is None


# --- bounds, on disk and in memory ----------------------------------------------------------------


def test_stored_texts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erllama.cache.tiers.file_tier._TEXT_BYTES", 1500)
    with Cache(disk=tmp_path) as cache:
        for i in range(50):
            cache.remember_text(NAMESPACE, b"%d" % i, np.arange(i, i + 10, dtype=np.int32))
            cache.flush()
    with database(tmp_path) as db:
        assert db.execute("SELECT COUNT(*) FROM texts").fetchone() == (2,)
        assert db.execute("SELECT COUNT(*) FROM text_pieces").fetchone() == (2,)
    with Cache(disk=tmp_path) as cache:
        assert found(cache, b"49") is not None


def test_texts_in_use_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erllama.cache.tiers.file_tier._TEXT_BYTES", 3000)
    with Cache(disk=tmp_path) as cache:
        cache.remember_text(NAMESPACE, b"in use", ids(1))
        for i in range(50):
            cache.remember_text(NAMESPACE, b"%d" % i, ids(100 + i))
            assert found(cache, b"in use, too") == (6, [1])
            cache.flush()
    with Cache(disk=tmp_path) as cache:
        assert found(cache, b"in use") == (6, [1])
        assert found(cache, b"0") is None


def test_lookups_record_uses_later_and_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cache(disk=tmp_path) as cache:
        cache.remember_text(NAMESPACE, b"text", ids(1))
        cache.flush()
        with database(tmp_path) as db:
            before = db.execute("PRAGMA data_version").fetchone()
            for _ in range(100):
                assert found(cache, b"text") is not None
            assert db.execute("PRAGMA data_version").fetchone() == before


def turns(n_turns: int, n_tokens: int, rewrite: bool = False) -> Iterator[tuple[bytes, np.ndarray[Any, Any]]]:
    """The texts of a conversation and their tokens: each turn as sampled and as rendered.

    Args:
        rewrite: whether the next turn renders a turn as another text with other tokens.
    """
    draw = np.random.default_rng(7)
    text, tokens = b"", np.zeros(0, np.int32)
    for turn in range(n_turns):
        added = draw.integers(0, 150_000, n_tokens // n_turns, np.int32)
        output = b" turn %d " % turn + bytes(3 * len(added))
        yield text + output, np.concatenate([tokens, added])
        yield text + output + b"<end>", np.concatenate([tokens, added])
        kept = len(added) // 2 if rewrite else len(added)
        text, tokens = text + output[: 3 * kept] + b"<end>", np.concatenate([tokens, added[:kept]])


def distinct_bytes(texts: list[tuple[bytes, np.ndarray[Any, Any]]]) -> int:
    """Return the tokens that no earlier text had, in order."""
    seen = {tokens[:n].tobytes()[-64:] for _, tokens in texts for n in range(1, len(tokens) + 1)}
    return 4 * len(seen)


@pytest.mark.parametrize("rewrite", [False, True])
@pytest.mark.parametrize(("n_tokens", "most_tokens", "most_rows"), [(32_000, 1.1, 1.4), (4_000, 1.4, 2.1)])
def test_twenty_turns_take_about_their_distinct_tokens_on_disk(
    tmp_path: Path, rewrite: bool, n_tokens: int, most_tokens: float, most_rows: float
) -> None:
    texts = list(turns(20, n_tokens, rewrite))
    distinct = distinct_bytes(texts)
    with Cache(disk=tmp_path) as cache:
        for text, tokens in texts:
            cache.remember_text(NAMESPACE, text, tokens)
            cache.flush()
    with database(tmp_path) as db:  # no text was removed, so stored and written sizes are equal
        (stored,) = db.execute("SELECT TOTAL(LENGTH(tokens)) FROM text_pieces").fetchone()
        (keys,) = db.execute("SELECT 64 * COUNT(*) FROM text_pieces").fetchone()
        (rows,) = db.execute("SELECT 144 * COUNT(*) FROM texts").fetchone()
    assert distinct <= stored <= most_tokens * distinct
    assert stored + keys + rows <= most_rows * distinct
    with Cache(disk=tmp_path) as cache:
        for text, tokens in texts:
            assert found(cache, text) == (len(text), tokens.tolist())


def test_twenty_turns_take_about_their_distinct_tokens_in_memory() -> None:
    texts = list(turns(20, 32_000))
    known = TextCache(limit_bytes=3 * distinct_bytes(texts))
    for text, tokens in texts:
        known.remember(TextDigests(NAMESPACE, text).record(tokens))
    for text, tokens in texts:
        got = known.longest(TextDigests(NAMESPACE, text))
        assert got is not None
        assert got.tokens.tolist() == tokens.tolist()


@pytest.mark.parametrize(("n_texts", "n_tokens"), [(2000, 1), (200, 3000)])
def test_the_size_counted_in_memory_is_the_real_size(n_texts: int, n_tokens: int) -> None:
    tracemalloc.start()
    try:
        known = TextCache()
        before = tracemalloc.get_traced_memory()[0]
        for i in range(n_texts):
            text = b"%d" % i * 200
            known.remember(TextDigests(NAMESPACE, text).record(np.full(n_tokens, i, np.int32)))
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.7 * taken < known.n_bytes < 1.5 * taken


@pytest.mark.parametrize(("n_texts", "n_tokens"), [(3000, 1), (100, 3000)])
def test_the_size_counted_on_disk_is_the_real_size(tmp_path: Path, n_texts: int, n_tokens: int) -> None:
    with Cache(disk=tmp_path) as cache:
        cache.flush()
        with database(tmp_path) as db:
            (empty,) = db.execute(
                "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
            ).fetchone()
        for i in range(n_texts):
            cache.remember_text(NAMESPACE, b"%d" % i * 200, np.full(n_tokens, i, np.int32))
    with database(tmp_path) as db:
        (full,) = db.execute("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size").fetchone()
        (counted,) = db.execute("SELECT n_bytes FROM text_total").fetchone()
    assert 0.7 * (full - empty) < counted < 1.5 * (full - empty)


@settings(max_examples=examples(25), deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 400), st.integers(0, 1)), max_size=30))
def test_forgotten_texts_take_no_space(steps: list[tuple[int, int, int]]) -> None:
    known = TextCache(limit_bytes=5000)
    for name, n_tokens, first in steps:
        tokens = np.full(n_tokens, first, np.int32)
        known.remember(TextDigests(NAMESPACE, b"%d" % name).record(tokens))
        got = known.longest(TextDigests(NAMESPACE, b"%d" % name))
        assert got is not None
        assert got.tokens.tolist() == tokens.tolist()
        assert known.n_bytes <= 5000
    known._limit = 0
    known.remember(TextDigests(NAMESPACE, b"last").record(ids(1)))
    assert (known.n_bytes, known._chunks._chunks, known._chunks._references, known._lengths) == (0, {}, {}, {})


WRONG_TOTALS = ("9e999", "-9e999", "'x'", "x'00'", "-1e11", "1e300", "1 << 60")


@pytest.mark.parametrize(
    "damage",
    [f"UPDATE text_total SET n_bytes = {wrong}" for wrong in WRONG_TOTALS]
    + ["DELETE FROM text_total", "INSERT INTO text_total VALUES (1)"],
)
def test_a_damaged_total_keeps_the_bound_and_the_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr("erllama.cache.tiers.file_tier._TEXT_BYTES", 1500)
    with Cache(disk=tmp_path) as cache:
        cache.remember_text(NAMESPACE, b"first", ids(1))
    with database(tmp_path) as db:
        db.execute(damage)
    with Cache(disk=tmp_path) as cache:
        for i in range(5):
            cache.remember_text(NAMESPACE, b"%d" % i, np.arange(i, i + 10, dtype=np.int32))
            cache.flush()
        assert cache.counters()["faults"] == cache.counters()["disk_errors"] == 0
    with Cache(disk=tmp_path) as cache:
        assert found(cache, b"4") == (1, list(range(4, 14)))
    with database(tmp_path) as db:
        (rows,) = db.execute("SELECT 300 * COUNT(*) FROM texts").fetchone()
        (pieces,) = db.execute("SELECT TOTAL(250 + LENGTH(tokens)) FROM text_pieces").fetchone()
        assert db.execute("SELECT * FROM text_total").fetchall() == [(rows + pieces,)]
        assert rows + pieces <= 1500


@settings(max_examples=examples(20), deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 400), st.integers(0, 1)), max_size=20))
def test_the_total_on_disk_is_the_sum_of_all_rows(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, int]]
) -> None:
    root = tmp_path_factory.mktemp("texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("erllama.cache.tiers.file_tier._TEXT_BYTES", 5000)
        with Cache(disk=root, watch=False) as one, Cache(disk=root, watch=False) as two:
            for at, (name, n_tokens, first) in enumerate(steps):
                cache = (one, two)[at % 2]
                cache.remember_text(NAMESPACE, b"%d" % name, np.full(n_tokens, first, np.int32))
                cache.flush()
    with database(root) as db:
        (total,) = db.execute("SELECT n_bytes FROM text_total").fetchone()
        (rows,) = db.execute("SELECT 300 * COUNT(*) FROM texts").fetchone()
        (pieces,) = db.execute("SELECT TOTAL(250 + LENGTH(tokens)) FROM text_pieces").fetchone()
        uses = dict(db.execute("SELECT key, uses FROM text_pieces").fetchall())
        needs = [key for (key,) in db.execute("SELECT head FROM texts UNION ALL SELECT parent FROM text_pieces")]
    assert total == rows + pieces <= 5000
    assert uses == {key: needs.count(key) for key in uses}
    assert set(needs) <= {*uses, bytes(32)}


# --- how much work it is --------------------------------------------------------------------------


class CountedHash:
    """sha256 that counts digests and hashed bytes."""

    digests = n_bytes = 0

    def __init__(self, start: bytes = b"", state: hashlib._Hash | None = None) -> None:
        self._state = hashlib.sha256() if state is None else state
        self.update(start)

    def update(self, more: bytes) -> None:
        CountedHash.n_bytes += len(more)
        self._state.update(more)

    def copy(self) -> CountedHash:
        return CountedHash(state=self._state.copy())

    def digest(self) -> bytes:
        CountedHash.digests += 1
        digest: bytes = self._state.digest()
        return digest


@pytest.fixture
def hashing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, int]]:
    """Return the digests and bytes hashed for texts since the last call."""

    class Hashlib:
        sha256 = CountedHash

    monkeypatch.setattr(texts_module, "hashlib", Hashlib)

    def since() -> tuple[int, int]:
        counted = (CountedHash.digests, CountedHash.n_bytes)
        CountedHash.digests = CountedHash.n_bytes = 0
        return counted

    return since


def test_the_cost_of_a_lookup_does_not_grow_with_similar_texts(
    tmp_path: Path, hashing: Callable[[], tuple[int, int]]
) -> None:
    system = bytes(1024)
    with Cache(disk=tmp_path) as cache:
        for i in range(3000):
            cache.remember_text(NAMESPACE, system + b"question %04d" % i, ids(i))
        hashing()
        assert found(cache, system + b"question 0007 and more") == (1037, [7])
        assert hashing()[0] < 10
        assert found(cache, system + b"something else") is None
        assert hashing()[0] < 10
    with Cache(disk=tmp_path) as cache:
        hashing()
        assert found(cache, system + b"question 0007 and more") == (1037, [7])
        assert hashing()[0] < 10


def test_texts_of_many_lengths_are_searched_in_one_pass(
    tmp_path: Path, hashing: Callable[[], tuple[int, int]]
) -> None:
    text = bytes(range(256)) * 8
    with Cache(disk=tmp_path) as cache:
        for n_bytes in range(1, len(text), 3):
            cache.remember_text(NAMESPACE, text[:n_bytes], ids(n_bytes))
    other = text[:1024] + b"x" * 1024  # none of its last lengths matches
    for _ in "memory and disk", "disk":
        with Cache(disk=tmp_path) as cache:
            hashing()
            assert found(cache, other) == (1024, [1024])
            digests, n_bytes = hashing()
            assert digests < 1000
            assert n_bytes < 3 * len(other) + 100


def test_a_lookup_without_stored_texts_hashes_nothing(
    tmp_path: Path, hashing: Callable[[], tuple[int, int]]
) -> None:
    with Cache(disk=tmp_path) as cache:
        hashing()
        assert found(cache, bytes(1 << 20)) is None
        assert hashing() == (0, 0)


def test_the_cost_of_remembering_does_not_grow_with_stored_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = itertools.count()
    connect = index_module.connect

    def counted(path: Path, *, wait: bool) -> sqlite3.Connection:
        connection = connect(path, wait=wait)
        connection.set_progress_handler(lambda: next(steps) < 0, 10)  # every ten instructions of SQLite
        return connection

    monkeypatch.setattr(index_module, "connect", counted)
    took = []
    with Cache(disk=tmp_path, watch=False) as cache:
        for i in range(1000):
            before = next(steps)
            cache.remember_text(NAMESPACE, b"%d" % i, ids(i))
            cache.flush()
            took.append(next(steps) - before)
    assert sum(took[-100:]) < 2 * sum(took[:100])


# --- sharing a database -----------------------------------------------------------------------------


def test_an_older_index_keeps_its_blocks_and_gains_texts(tmp_path: Path) -> None:
    with Cache(disk=tmp_path, block_size=SIZE) as cache:
        save(cache, np.arange(3 * SIZE, dtype=np.int32))
    with database(tmp_path) as db:
        for table in ("texts", "text_pieces", "text_total"):
            db.execute(f"DROP TABLE {table}")
        db.execute("CREATE TABLE texts (digest BLOB PRIMARY KEY, anchor BLOB, n_bytes INT, tokens BLOB, seal BLOB)")
        db.execute("CREATE INDEX texts_by_anchor ON texts (anchor)")
        db.execute("PRAGMA user_version=4")
        rows = db.execute("SELECT * FROM blocks").fetchall()
        assert len(rows) == 3
    with Cache(disk=tmp_path, block_size=SIZE) as cache:
        assert found(cache, b"text") is None
        cache.remember_text(NAMESPACE, b"text", ids(2))
    with Cache(disk=tmp_path, block_size=SIZE) as cache:
        assert found(cache, b"text") == (4, [2])
    with database(tmp_path) as db:
        assert db.execute("SELECT * FROM blocks").fetchall() == rows


def test_a_locked_database_delays_no_text_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A call that waits for the database exceeds the time limit of the test.
    monkeypatch.setattr("erllama.cache.tiers.index_schema._BUSY_SECONDS", 900.0)
    with Cache(disk=tmp_path) as cache:
        db = sqlite3.connect(tmp_path / "index.db", isolation_level=None)
        db.execute("BEGIN EXCLUSIVE")
        cache.remember_text(NAMESPACE, b"text", ids(1))
        assert found(cache, b"text") == (4, [1])
        assert found(cache, b"other") is None
        db.execute("ROLLBACK")
        db.close()
