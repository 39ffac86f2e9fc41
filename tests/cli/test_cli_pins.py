"""`erllama cache pin`, `pins` and `unpin`, and what other commands do with pinned blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from erllama.cache import Cache
from support.cli import Command, write_replying_model

FAST = ("--threads", "1", "--n-ctx", "512")
MESSAGES = [{"role": "system", "content": "Be terse."}]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_replying_model(tmp_path / "little.gguf", "Hi you")


def test_a_prefix_is_pinned_listed_kept_and_unpinned(run: Command, model: Path) -> None:
    made = run("cache", "pin", model, "--prompt", "Once upon a time", "--name", "a\x1b", "--ttl", "1h", *FAST)
    assert (made.status, made.out) == (2, "") or "printable" in made.err
    made = run("cache", "pin", model, "--prompt", "Once upon a time", "--name", "tale", "--ttl", "1h", *FAST)
    assert made.out.startswith("pinned tale: 16 tokens, ")
    assert made.out.endswith("expires in 60 min\n")
    run("run", model, "--raw", "Another text", "--max-tokens", "2", *FAST)
    assert "1 pin" in run("cache", "stats").out
    (stats,) = run("cache", "stats", "--json").json
    assert stats["pins"] == 1
    assert 0 < stats["pinned_bytes"] < stats["bytes"]
    assert run("cache", "gc", "--quota", "0").out.endswith(" pinned\n")
    assert run("cache", "evict", "--to-size", "0").out == "0 blocks removed, 0 B\n"
    (gc,) = run("cache", "gc", "--json").json
    assert gc["pinned_bytes"] == stats["pinned_bytes"]
    assert run("cache", "verify").status == 0
    (pin,) = run("cache", "pins", "--json").json
    assert (pin["name"], pin["tokens"], pin["stored_tokens"], pin["model"]) == ("tale", 16, 16, "little")
    assert "tale" in run("cache", "pins").out
    cached = run("run", model, "--raw", "--json", "Once upon a time!", "--max-tokens", "1", *FAST).json
    assert cached["cache"]["tokens"] == 16
    assert run("cache", "unpin", "tale").out == "unpinned tale\n"
    assert run("cache", "unpin", "tale").status == 1
    assert run("cache", "pins", "--json").json == []


def test_messages_tools_and_files_can_be_pinned(run: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "messages.json").write_text(json.dumps(MESSAGES))
    (tmp_path / "text").write_text("Once upon a time")
    by_messages = run("cache", "pin", model, "--messages", tmp_path / "messages.json", "--json", *FAST).json
    by_text = run("cache", "pin", model, "--file", tmp_path / "text", "--json", "--cache-salt", "x", *FAST).json
    assert by_messages["name"] != by_text["name"]
    assert by_text["tokens"] == 16
    listed = run("cache", "pins", "--json").json
    assert [pin["name"] for pin in listed] == [by_messages["name"], by_text["name"]]
    assert run("cache", "evict", "--all").status == 0
    assert run("cache", "pins", "--json").json == []
    with Cache(ram=0, disk=run.directory) as cache:
        assert cache.rows() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass one of --prompt, --file and --messages"),
        (["--prompt", "a", "--file", "FILE"], "pass one of"),
        (["--prompt", "a", "--tools", "FILE"], "--tools needs --messages"),
        (["--prompt", "a", "--no-cache"], "--no-cache"),
        (["--prompt", "a", "--ttl", "soon"], "pass seconds"),
        (["--messages", "FILE"], "not JSON"),
        (["--messages", "LIST"], "must have a JSON list of objects"),
    ],
)
def test_wrong_arguments_are_refused(
    run: Command, model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "list").write_text("[1]")
    paths = {"FILE": str(tmp_path / "file"), "LIST": str(tmp_path / "list")}
    result = run("cache", "pin", model, *(paths.get(each, each) for each in arguments), *FAST)
    assert result.status in (1, 2)
    assert message in result.err
