"""`erllama cache` on encrypted directories: creating keys, rotating them, and wiping."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from erllama.cache import Cache
from erllama.cache.blocks.key_file import read_key_file
from erllama.cli.cache.command import cache as command
from erllama.errors import CacheKeyError
from support.storage.blocks import SIZE, hit, save
from support.storage.keys import join_keys, new_key

TOKENS = np.arange(5 * SIZE + 3, dtype=np.int32)


def run(*arguments: object) -> str:
    """Run a command that succeeds, and return what it prints to stdout."""
    result = CliRunner().invoke(command, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A file with a new key."""
    return new_key(tmp_path / "cache.key")


@pytest.fixture
def directory(tmp_path: Path, key: Path) -> Path:
    """An encrypted directory with one context."""
    with Cache(ram=0, disk=tmp_path / "cache", block_size=SIZE, key_file=key) as cache:
        save(cache, TOKENS)
    return tmp_path / "cache"


def test_new_key_writes_a_private_file_once(tmp_path: Path) -> None:
    path = tmp_path / "new.key"
    printed = run("new-key", path)
    assert read_key_file(path).ids[0] in printed
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(CacheKeyError, match="exists"):
        run("new-key", path)


def test_commands_on_an_encrypted_directory_need_the_key(
    directory: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CacheKeyError, match="encrypted"):
        run("stats", "--dir", directory)
    [usage] = json.loads(run("stats", "--dir", directory, "--key-file", key, "--json"))
    assert usage["keys"] == list(read_key_file(key).ids)
    assert usage["encrypted"]
    assert usage["blocks"] == 6
    monkeypatch.setenv("ERLLAMA_KEY_FILE", str(key))
    assert "0 problems" in run("verify", "--dir", directory)
    assert len(json.loads(run("ls", "--dir", directory, "--json"))) == 1


def test_a_key_is_not_used_for_directories_without_encryption(tmp_path: Path, key: Path) -> None:
    with Cache(ram=0, disk=tmp_path / "plain", block_size=SIZE) as cache:
        save(cache, TOKENS)
    [usage] = json.loads(run("stats", "--dir", tmp_path / "plain", "--key-file", key, "--json"))
    assert not usage["encrypted"]
    assert usage["blocks"] == 6


def test_export_and_import_move_blocks_into_an_encrypted_directory(
    tmp_path: Path, directory: Path, key: Path
) -> None:
    run("export", tmp_path / "blocks.tar", "--dir", directory, "--key-file", key)
    assert "6 blocks stored" in run("import", tmp_path / "blocks.tar", "--dir", tmp_path / "to", "--key-file", key)
    with Cache(ram=0, disk=tmp_path / "to", block_size=SIZE, key_file=key) as cache:
        assert hit(cache, TOKENS) == len(TOKENS)


def test_rekey_ends_the_use_of_the_old_key(tmp_path: Path, directory: Path, key: Path) -> None:
    new = new_key(tmp_path / "new.key")
    both = join_keys(tmp_path / "both.key", new, key)
    [done] = json.loads(run("rekey", "--dir", directory, "--key-file", both, "--json"))
    assert done["key"] == read_key_file(new).ids[0]
    assert done["old_keys"] == list(read_key_file(key).ids)
    assert done["encrypted_blocks"] == 6
    assert "0 blocks" in run("rekey", "--dir", directory, "--key-file", new)
    with Cache(ram=0, disk=directory, block_size=SIZE, key_file=new) as cache:
        assert hit(cache, TOKENS) == len(TOKENS)
    result = CliRunner().invoke(command, ["rekey", "--dir", str(directory)], env={"ERLLAMA_KEY_FILE": None})
    assert result.exit_code == 2
    assert "--key-file" in result.output


def test_wipe_asks_and_needs_no_key(directory: Path) -> None:
    refused = CliRunner().invoke(command, ["wipe", "--dir", str(directory)], input="n\n")
    assert refused.exit_code == 1
    assert len(list((directory / "blocks").iterdir())) == 6
    printed = run("wipe", "--dir", directory, "--yes")
    assert "6 blocks removed" in printed
    assert "key file" in printed
    assert [path for path in directory.rglob("*") if path.is_file()] == []
