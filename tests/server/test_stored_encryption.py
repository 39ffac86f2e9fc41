"""Stored responses with a key: encrypted, bound to their ids, and rotated while a server uses them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

import erllama
from erllama.errors import CacheKeyError
from erllama.server.conduct.errors import ApiError
from erllama.server.stored_responses import (
    FILE_NAME,
    MissingResponseError,
    ResponseStore,
    StoredResponse,
    encrypt_again,
)
from support.storage.keys import all_bytes, join_keys, new_key, traces_of_text

TEXT = "the seventh clause of the treaty"


def stored(id: str, text: str = TEXT) -> StoredResponse:
    output = [{"type": "message", "content": text}]
    return StoredResponse(id, "", None, [{"role": "user", "content": text}], {"id": id, "output": output})


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A file with a new key."""
    return new_key(tmp_path / "server.key")


def open_store(tmp_path: Path, key_file: Path | None) -> ResponseStore:
    return ResponseStore(10, tmp_path / "state", key_file=key_file)


def test_no_text_of_a_stored_response_is_in_the_file(tmp_path: Path, key: Path) -> None:
    store = open_store(tmp_path, key)
    store.save(stored("resp_1"))
    found = store.get("resp_1", "")
    content = all_bytes(tmp_path / "state")
    store.close()
    assert found == stored("resp_1")
    assert [form for form, trace in traces_of_text(TEXT).items() if trace in content] == []
    reopened = open_store(tmp_path, key)
    assert reopened.conversation("resp_1", "")[0].output[0]["content"] == TEXT
    reopened.close()


def test_responses_without_encryption_are_encrypted_when_a_key_is_set(tmp_path: Path, key: Path) -> None:
    plain = open_store(tmp_path, None)
    plain.save(stored("resp_1"))
    plain.close()
    assert TEXT.encode() in all_bytes(tmp_path / "state")
    store = open_store(tmp_path, key)
    assert store.get("resp_1", "") == stored("resp_1")
    store.close()
    assert TEXT.encode() not in all_bytes(tmp_path / "state")


def test_a_missing_or_wrong_key_of_responses_loses_nothing(tmp_path: Path, key: Path) -> None:
    store = open_store(tmp_path, key)
    store.save(stored("resp_1"))
    store.close()
    for wrong in (None, new_key(tmp_path / "other.key")):
        with pytest.raises(CacheKeyError):
            open_store(tmp_path, wrong)
    store = open_store(tmp_path, key)
    assert store.get("resp_1", "") == stored("resp_1")
    store.close()


def test_responses_are_rotated_while_a_server_uses_them(tmp_path: Path, key: Path) -> None:
    old, new = join_keys(tmp_path / "old.key", key), new_key(tmp_path / "new.key")
    store = open_store(tmp_path, key)
    store.save(stored("resp_1"))
    join_keys(key, new, old)
    encrypt_again(tmp_path / "state", key)
    join_keys(key, new)
    assert store.get("resp_1", "") == stored("resp_1")
    store.save(stored("resp_2"))
    store.close()
    with pytest.raises(CacheKeyError):
        open_store(tmp_path, old)
    reopened = open_store(tmp_path, new)
    assert [reopened.get(id, "").id for id in ("resp_1", "resp_2")] == ["resp_1", "resp_2"]
    reopened.close()


def test_a_server_without_the_new_key_stores_no_response(tmp_path: Path, key: Path) -> None:
    new = new_key(tmp_path / "new.key")
    store = open_store(tmp_path, key)
    store.save(stored("resp_1"))
    encrypt_again(tmp_path / "state", join_keys(tmp_path / "both.key", new, key))
    store.save(stored("resp_2"))
    for id in ("resp_1", "resp_2"):
        with pytest.raises(MissingResponseError):
            store.get(id, "")
    store.close()
    reopened = open_store(tmp_path, new)
    assert reopened.get("resp_1", "") == stored("resp_1")
    reopened.close()


def test_a_server_without_a_key_stops_using_an_encrypted_store(tmp_path: Path, key: Path) -> None:
    plain = open_store(tmp_path, None)
    plain.save(stored("resp_1"))
    encrypting = open_store(tmp_path, key)
    plain.save(stored("resp_2"))
    assert TEXT.encode() not in all_bytes(tmp_path / "state")
    with pytest.raises(MissingResponseError):
        plain.get("resp_1", "")
    plain.close()
    assert encrypting.get("resp_1", "") == stored("resp_1")
    with pytest.raises(MissingResponseError):
        encrypting.get("resp_2", "")
    encrypting.close()


def test_a_store_that_another_process_writes_to_is_busy(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("erllama.server.stored_responses._WAIT_SECONDS", 0.01)
    store = open_store(tmp_path, key)
    store.save(stored("resp_1"))
    with closing(sqlite3.connect(tmp_path / "state" / FILE_NAME)) as other:
        other.execute("BEGIN IMMEDIATE")  # as `rekey` does
        for call in (
            lambda: store.get("resp_1", ""),
            lambda: store.conversation("resp_1", ""),
            lambda: store.save(stored("resp_2")),
            lambda: store.delete("resp_1", ""),
        ):
            with pytest.raises(ApiError, match="try again") as busy:
                call()
            assert (busy.value.kind, busy.value.retry_after) == ("unavailable", 1)
        with pytest.raises(erllama.OptionError, match="when it has finished"):
            open_store(tmp_path, key)
    store.save(stored("resp_2"))
    assert [store.get(id, "").id for id in ("resp_1", "resp_2")] == ["resp_1", "resp_2"]
    store.close()


def test_a_restart_of_the_server_ends_the_use_of_the_old_key(tmp_path: Path, key: Path) -> None:
    """The steps of docs/encryption.md for a server with a `state_dir`."""
    store = open_store(tmp_path, key)
    store.save(stored("resp_1"))
    new = new_key(tmp_path / "new.key")
    join_keys(key, new, join_keys(tmp_path / "old.key", key))
    store.save(stored("resp_2"))
    store.close()
    open_store(tmp_path, key).close()
    restarted = open_store(tmp_path, new)
    assert [restarted.get(id, "").id for id in ("resp_1", "resp_2")] == ["resp_1", "resp_2"]
    restarted.close()


def test_swapped_responses_are_not_found(tmp_path: Path, key: Path) -> None:
    store = open_store(tmp_path, key)
    store.save(stored("resp_1", "one"))
    store.save(stored("resp_2", "two"))
    with closing(sqlite3.connect(tmp_path / "state" / FILE_NAME)) as database:
        rows = database.execute("SELECT id, response FROM responses ORDER BY id").fetchall()
        (a, one), (b, two) = rows
        database.executemany("UPDATE responses SET response = ? WHERE id = ?", [(two, a), (one, b)])
        database.commit()
    for id in ("resp_1", "resp_2"):
        with pytest.raises(MissingResponseError):
            store.get(id, "")
    store.close()


def test_the_server_uses_the_key_of_its_cache(tmp_path: Path, key: Path) -> None:
    from erllama.server.application import _open_responses
    from erllama.server.settings.options import ServerOptions

    with erllama.Cache(ram=0, disk=tmp_path / "state", key_file=key, watch=False) as cache:
        store = _open_responses(ServerOptions(), cache)
        store.save(stored("resp_1"))
        store.close()
    assert TEXT.encode() not in all_bytes(tmp_path / "state")
    store = open_store(tmp_path, key)
    assert store.get("resp_1", "") == stored("resp_1")
    store.close()
