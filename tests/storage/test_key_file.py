"""Files of secret keys: created, read, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from erllama.cache.blocks.key_file import SECRET_BYTES, SecretKeys, create_key_file, read_key_file
from erllama.errors import CacheError


def test_a_created_file_is_private_and_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "cache.key"
    keys = create_key_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_key_file(path).ids == keys.ids
    with pytest.raises(CacheError, match="not overwritten"):
        create_key_file(path)
    assert read_key_file(path).ids == keys.ids


def test_the_directory_of_a_new_file_is_created(tmp_path: Path) -> None:
    path = tmp_path / "config" / "erllama" / "cache.key"
    keys = create_key_file(path)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert read_key_file(path).ids == keys.ids
    with pytest.raises(CacheError, match="Not a directory"):
        create_key_file(path / "other.key")


def test_the_newest_key_is_the_first_and_comments_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "cache.key"
    path.write_text(f"# rotated in May\n{'ab' * SECRET_BYTES}\n\n  {'CD' * SECRET_BYTES}  \n")
    path.chmod(0o600)
    keys = read_key_file(path)
    assert keys.derive("x") == SecretKeys((b"\xab" * SECRET_BYTES, b"\xcd" * SECRET_BYTES)).derive("x")


def test_each_purpose_has_another_key_and_none_is_shown() -> None:
    keys = SecretKeys((b"\xab" * SECRET_BYTES,))
    found = {keys.derive("one"), keys.derive("two")}
    assert len(found) == 2
    assert (b"\xab" * SECRET_BYTES,) not in found
    assert "abab" not in repr(keys)


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        ("ab" * SECRET_BYTES, 0o640, "chmod 600"),
        ("ab" * 31, 0o600, "line 1: 31 bytes"),
        ("xy" * SECRET_BYTES, 0o600, "line 1: not a key"),
        ("ab" * SECRET_BYTES + "\n\u00e9", 0o600, "line 2: not a key"),
        ("# nothing\n", 0o600, "has no key"),
        ("#" * 70_000, 0o600, "more than 65536 bytes"),
    ],
    ids=["mode", "short", "not hexadecimal", "not ASCII", "empty", "large"],
)
def test_a_bad_file_is_refused_without_showing_keys(tmp_path: Path, content: str, mode: int, message: str) -> None:
    path = tmp_path / "cache.key"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(CacheError, match=message) as raised:
        read_key_file(path)
    assert content.strip()[:20] not in str(raised.value)


def test_a_missing_file_names_the_command_that_creates_one(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="erllama cache new-key"):
        read_key_file(tmp_path / "missing")
