"""Texts that were computed are found again by what begins with them, as the tokens that they were computed as."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erllama.cache import Cache
from erllama.cache.texts import KnownTexts, TextDigests

NAMESPACE, OTHER = b"n" * 32, b"o" * 32


def ids(*tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(tokens, np.int32)


def found(cache: Cache, text: bytes, namespace: bytes = NAMESPACE) -> tuple[int, list[int]] | None:
    known = cache.longest_text(namespace, text)
    return None if known is None else (known[0], known[1].tolist())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 1300)), max_size=6), st.data())
def test_the_longest_text_that_another_begins_with_is_found(
    parts: list[tuple[str, int]], data: st.DataObject
) -> None:
    texts = ["".join(letter * n for letter, n in parts[:i]).encode() for i in range(len(parts) + 1)]
    known = KnownTexts()
    remembered = data.draw(st.lists(st.sampled_from(texts), unique=True))
    for text in remembered:
        known.remember(TextDigests(NAMESPACE, text).known_as(ids(len(text))))
    asked = data.draw(st.sampled_from(texts)) + data.draw(st.binary(max_size=600))
    best = max((text for text in remembered if asked.startswith(text)), key=len, default=None)
    got = known.longest(TextDigests(NAMESPACE, asked))
    assert (got.tokens.tolist() if got else None) == (None if best is None else [len(best)])
    assert known.longest(TextDigests(OTHER, asked)) is None


def test_the_least_recently_used_text_goes_first() -> None:
    known = KnownTexts(limit_bytes=40)
    for name in (b"a", b"b", b"c"):
        known.remember(TextDigests(NAMESPACE, name).known_as(ids(1, 2, 3, 4)))
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


def test_no_text_is_stored(tmp_path: Path) -> None:
    with Cache(disk=tmp_path) as cache:
        cache.remember_text(NAMESPACE, b"a secret" * 100, ids(1))
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_tokens_that_are_not_what_was_stored_are_not_used(tmp_path: Path) -> None:
    with Cache(disk=tmp_path) as cache:
        cache.remember_text(NAMESPACE, b"text", ids(1, 2))
    with sqlite3.connect(tmp_path / "index.db") as db:
        db.execute("UPDATE texts SET tokens = ?", [ids(1, 3).tobytes()])
    db.close()
    with Cache(disk=tmp_path) as cache:
        assert found(cache, b"text and more") is None


def test_stored_texts_have_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erllama.cache.file_tier._TEXT_BYTES", 100)
    with Cache(disk=tmp_path) as cache:
        for i in range(50):
            cache.remember_text(NAMESPACE, b"%d" % i, np.arange(10, dtype=np.int32))
    with sqlite3.connect(tmp_path / "index.db") as db:
        assert [row[0] for row in db.execute("SELECT n_bytes FROM texts")] == [2, 2]
    db.close()
    with Cache(disk=tmp_path) as cache:
        assert found(cache, b"49") is not None


def test_an_index_of_the_release_before_keeps_its_blocks_and_gets_texts(tmp_path: Path) -> None:
    with Cache(disk=tmp_path) as cache:
        cache.remember_text(NAMESPACE, b"text", ids(1))
    with sqlite3.connect(tmp_path / "index.db") as db:
        db.execute("DROP TABLE texts")
        db.execute("PRAGMA user_version=3")
    db.close()
    with Cache(disk=tmp_path) as cache:
        assert found(cache, b"text") is None
        cache.remember_text(NAMESPACE, b"text", ids(2))
        cache.flush()
    with Cache(disk=tmp_path) as cache:
        assert found(cache, b"text") == (4, [2])


def test_a_locked_database_makes_nobody_wait(tmp_path: Path) -> None:
    with Cache(disk=tmp_path) as cache:
        db = sqlite3.connect(tmp_path / "index.db", isolation_level=None)
        db.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        cache.remember_text(NAMESPACE, b"text", ids(1))
        assert found(cache, b"text") == (4, [1])
        assert found(cache, b"other") is None
        assert time.monotonic() - began < 5
        db.execute("ROLLBACK")
        db.close()
