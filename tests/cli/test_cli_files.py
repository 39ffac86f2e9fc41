"""Files that the command writes: private, complete, and where the user asked for them."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from erllama.cli.chat import line_input as lines
from erllama.cli.files import new_file, private_directory
from support.cli import Command, CommandResult, write_replying_model

ONE = ("--threads", "1")
Write = Callable[[Path], CommandResult]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replying_model(tmp_path_factory.mktemp("models") / "says.gguf", "Yes.")


@pytest.fixture(params=["save", "export"])
def write(request: pytest.FixtureRequest, run: Command, model: Path) -> Write:
    """Return a function that writes a file through one of the two commands that do."""
    if request.param == "export":
        run("run", model, "Is it?", *ONE)
        return lambda path: run("cache", "export", path)
    return lambda path: run("chat", model, *ONE, stdin=f"Is it?\n/save '{path}'\n")


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_a_written_file_is_private(write: Write, tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("old")
    file.chmod(0o644)
    reader = file.open()  # a reader of the old file that keeps it open
    with umask(0):
        assert write(file).status == 0
    assert mode_of(file) == 0o600
    assert reader.read() == "old"
    reader.close()
    assert file.stat().st_size > 3
    assert list(tmp_path.glob(".erllama-*")) == []


def test_a_symbolic_link_is_replaced_and_not_followed(write: Write, tmp_path: Path) -> None:
    kept, link = tmp_path / "kept", tmp_path / "link"
    kept.write_text("kept")
    kept.chmod(0o644)
    link.symlink_to(kept)
    assert write(link).status == 0
    assert kept.read_text() == "kept"
    assert not link.is_symlink()
    assert mode_of(link) == 0o600
    hard = tmp_path / "hard"
    hard.hardlink_to(kept)
    assert write(hard).status == 0
    assert kept.read_text() == "kept"


def test_a_path_that_is_not_a_file_is_refused_and_kept(write: Write, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("directory", "pipe", "no/such", "directory/.", "directory/.."):
        found = write(tmp_path / name if "." not in name else Path(f"{tmp_path}/{name}"))
        assert found.status == 1
        assert str(tmp_path) in found.err
        assert ".erllama-" not in found.err
        assert "bug in erllama" not in found.err
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert list(tmp_path.rglob(".erllama-*")) == []


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def interrupted() -> None:
        with new_file(file) as out:
            out.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_saved_conversation_holds_every_character(run: Command, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    found = run("chat", model, *ONE, stdin=f"é \x1b 日本\n/save a\0b\n/save '{file}'\n/load '{file}'\n")
    assert "/save NAME: pass one name, or one file" in found.err
    assert "2 messages loaded" in found.err
    assert json.loads(file.read_text())[0]["content"] == "é \x1b 日本"


def test_history_is_stored_only_in_a_private_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home" / "state"))
    with umask(0):
        file = lines._history_file()
    assert file is not None
    assert [mode_of(each) for each in (file, *list(file.parents)[:3])] == [0o600, 0o700, 0o700, 0o700]
    file.chmod(0o644)
    assert lines._history_file() == file
    assert mode_of(file) == 0o600
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    assert lines._history_file() is None
    assert not (tmp_path / "elsewhere").exists()
    file.unlink()
    file.parent.chmod(0o777)
    assert lines._history_file() is None
    assert not file.exists()
    assert capsys.readouterr().err.count("the history is not saved: ") == 2


def test_an_existing_private_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(0o755)
    private_directory(tmp_path / "a" / "b")
    private_directory(tmp_path / "a" / "b")
    assert mode_of(tmp_path / "a") == 0o755
    assert mode_of(tmp_path / "a" / "b") == 0o700
