"""The remote tier from the command line and from a server's configuration."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from erllama.cache import Cache
from erllama.cache.blocks.key_file import create_key_file
from erllama.server.settings.configuration import read_configuration
from support.cli import Command, write_replying_model
from support.storage.blocks import SIZE, save

MANY = np.arange(10 * SIZE, dtype=np.int32)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    for name in ("ERLLAMA_REMOTE", "ERLLAMA_REMOTE_KEY_FILE", "ERLLAMA_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    return Command(tmp_path, monkeypatch, capsys)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    create_key_file(tmp_path / "key")
    return tmp_path / "key"


def fill(bucket: Path, key_file: Path) -> None:
    with Cache(ram=0, remote=bucket, remote_key_file=key_file, block_size=SIZE) as cache:
        save(cache, MANY)


def test_stats_describe_what_is_stored(run: Command, tmp_path: Path, key_file: Path) -> None:
    fill(tmp_path / "bucket", key_file)
    shown = run("cache", "remote", "stats", tmp_path / "bucket", "--remote-key-file", key_file)
    assert shown.status == 0, shown.err
    assert "10 blocks, 160 tokens" in shown.out
    found = run("cache", "remote", "stats", tmp_path / "bucket", "--remote-key-file", key_file, "--json").json
    assert (found["blocks"], found["manifests"], found["manifests_refused"]) == (10, 1, 0)
    assert [each["blocks"] for each in found["namespaces"]] == [10]
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "bucket/blocks").rglob("*-*"))


def test_verify_reads_every_block(run: Command, tmp_path: Path, key_file: Path) -> None:
    fill(tmp_path / "bucket", key_file)
    assert run("cache", "remote", "verify", tmp_path / "bucket", "--remote-key-file", key_file).status == 0
    damaged = next((tmp_path / "bucket/blocks").rglob("*-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shown = run("cache", "remote", "verify", tmp_path / "bucket", "--remote-key-file", key_file)
    assert shown.status == 1
    assert "10 blocks checked, 1 problem" in shown.out
    assert damaged.name in shown.out
    assert damaged.exists()


def test_gc_removes_objects_without_a_manifest(run: Command, tmp_path: Path, key_file: Path) -> None:
    bucket = tmp_path / "bucket"
    fill(bucket, key_file)
    fill(bucket, key_file)
    orphan = bucket / "blocks/orphan-1"
    orphan.write_bytes(b"left")
    os.utime(orphan, (1, 1))
    found = run("cache", "remote", "gc", bucket, "--remote-key-file", key_file, "--json").json
    assert found["removed"] == 1
    assert found["manifests_after"] == 1
    assert not orphan.exists()
    assert run("cache", "remote", "stats", bucket, "--remote-key-file", key_file, "--json").json["blocks"] == 10


def test_a_missing_key_is_an_error_with_a_remedy(run: Command, tmp_path: Path) -> None:
    shown = run("cache", "remote", "stats", tmp_path / "bucket")
    assert shown.status == 1
    assert "new-key" in shown.err


def test_a_prompt_of_one_machine_is_warm_on_the_next(run: Command, tmp_path: Path, key_file: Path) -> None:
    model = write_replying_model(tmp_path / "model.gguf", "Air.")
    options = ("--threads", "1", "--stats", "--remote", tmp_path / "bucket", "--remote-key-file", key_file)
    first = run("run", model, "Why is the sky blue?", "--cache-dir", tmp_path / "a", *options)
    assert first.status == 0, first.err
    assert "none cached" in first.err
    second = run("run", model, "Why is the sky blue?", "--cache-dir", tmp_path / "b", *options)
    assert second.status == 0, second.err
    assert second.out == first.out
    found = run("cache", "remote", "stats", tmp_path / "bucket", "--remote-key-file", key_file, "--json").json
    assert found["blocks"] > 0
    both = run("run", model, "x", "--no-cache", "--remote", tmp_path / "bucket")
    assert both.status == 2
    assert "exclude each other" in both.err


def test_the_configuration_of_a_server_takes_the_options(tmp_path: Path, key_file: Path) -> None:
    path = tmp_path / "erllama.toml"
    path.write_text('[cache]\nremote = "bucket"\nremote_key_file = "key"\nremote_lifetime = "30d"\n')
    found = read_configuration(path, {})
    assert found.mistakes == ()
    assert found.cache["remote"] == str(tmp_path / "bucket")
    assert found.cache["remote_key_file"] == str(key_file)
    path.write_text('[cache]\nremote = "s3://bucket/prefix"\nremote_key_file = "none"\n')
    (mistake,) = read_configuration(path, {}).mistakes
    assert "no such file" in str(mistake).lower()
    path.write_text('[cache]\nremote = "s3://bucket/prefix"\n')
    (mistake,) = read_configuration(path, {}).mistakes
    assert "new-key" in str(mistake)


def test_an_encrypted_tier_needs_the_key_file_that_encrypts(run: Command, tmp_path: Path, key_file: Path) -> None:
    create_key_file(tmp_path / "other")
    bucket = tmp_path / "bucket"
    with Cache(ram=0, remote=bucket, key_file=key_file, block_size=SIZE) as cache:
        save(cache, MANY)
    for name in ("stats", "verify", "gc"):
        shown = run("cache", "remote", name, bucket, "--key-file", key_file, "--json")
        assert shown.status == 0, shown.err
        assert shown.json.get("blocks", 10) == 10
        for options in (("--remote-key-file", key_file), ("--key-file", tmp_path / "other")):
            refused = run("cache", "remote", name, bucket, *options)
            assert refused.status == 1
            assert "is encrypted with" in refused.err
    assert run("cache", "remote", "verify", bucket, "--key-file", key_file, "--json").json["blocks"] == 10


def test_stats_count_manifests_with_other_keys(run: Command, tmp_path: Path, key_file: Path) -> None:
    bucket = tmp_path / "bucket"
    create_key_file(tmp_path / "new")
    options = {"ram": 0, "remote": bucket, "remote_key_file": key_file, "block_size": SIZE}
    with Cache(**options, key_file=key_file) as one, Cache(**options, key_file=tmp_path / "new") as two:  # type: ignore[arg-type]
        save(one, MANY)
        save(two, MANY + 1)
    keys = ("--remote-key-file", key_file, "--key-file", key_file)
    found = run("cache", "remote", "stats", bucket, *keys, "--json").json
    assert (found["blocks"], found["unknown_keys"]) == (10, 1)
    assert "other keys encrypt" in run("cache", "remote", "stats", bucket, *keys).out


def test_a_configuration_with_a_key_file_needs_no_other_key(tmp_path: Path, key_file: Path) -> None:
    path = tmp_path / "erllama.toml"
    path.write_text('[cache]\nremote = "bucket"\nkey_file = "key"\n')
    found = read_configuration(path, {})
    assert found.mistakes == ()
    assert found.cache["key_file"] == str(key_file)
    path.write_text('[cache]\nram = "1GiB"\nkey_file = "none"\n')
    (mistake,) = read_configuration(path, {}).mistakes
    assert "none" in str(mistake)
