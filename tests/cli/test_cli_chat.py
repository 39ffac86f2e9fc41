"""`erllama chat`: in a terminal and through a pipe, its slash commands, and the files it writes."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest

from support.cli import Command, write_replying_model
from support.pseudo_terminal import PseudoTerminal

ONE = ("--threads", "1")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replying_model(tmp_path_factory.mktemp("models") / "says.gguf", "Yes.", thinking="hm")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replying_model(tmp_path_factory.mktemp("models") / "endless.gguf", "abcdefg ", for_ever=True)


def terminal(run: Command, *arguments: object) -> PseudoTerminal:
    command = [sys.executable, "-m", "erllama", "chat", *map(str, arguments), *ONE]
    return PseudoTerminal(command, run.environment)


# --- in a terminal ------------------------------------------------------------------------------------


def test_a_conversation_works_in_a_terminal(run: Command, endless: Path) -> None:
    """Check streaming, Ctrl-C, slash commands, mistakes and Ctrl-D."""
    with terminal(run, endless, "--n-ctx", 65536) as screen:
        screen.wait_for("/help lists the commands")
        screen.wait_for(">")
        screen.send("hello\r")
        screen.wait_for("abcdefg abcdefg")
        screen.send("\x03")
        cost = screen.wait_for("cancelled")
        assert "tok/s" in cost
        assert "prompt" in cost
        screen.wait_for(">")
        screen.send("/save chat.json\r".replace("chat.json", str(run.directory.parent / "chat.json")))
        screen.wait_for("2 messages saved")
        screen.wait_for(">")
        screen.send("/sett temperature 1\r")
        screen.wait_for("did you mean /set?")
        screen.wait_for(">")
        screen.send("half a line\x03")
        screen.wait_for("/quit to leave")
        screen.wait_for(">")
        screen.send("\x04")
        assert screen.wait_for_end() == 0, screen.text
        assert "Traceback" not in screen.text
        assert "Warning" not in screen.text
    question, answer = json.loads((run.directory.parent / "chat.json").read_text())
    assert question == {"role": "user", "content": "hello"}
    assert ("abcdefg " * len(answer["content"])).startswith(answer["content"].strip())
    history = run.directory.parent / "state" / "erllama" / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert "+hello" in history.read_text().splitlines()


def test_thinking_is_dimmed_and_the_second_turn_is_cached(run: Command, model: Path) -> None:
    with terminal(run, model, "--no-history", "--no-markdown", "--max-tokens", 20) as screen:
        for cached in ("none cached", " prompt tokens from live cells"):
            screen.wait_for(">")
            screen.send("Is it?\r")
            screen.wait_for("hm\n\nYes.")
            assert cached in screen.wait_for("to first token")
        assert "\x1b[2mhm\x1b[0m" in screen.raw
        screen.wait_for(">")
        screen.send("/quit\r")
        assert screen.wait_for_end() == 0, screen.text
    assert not (run.directory.parent / "state").exists()


def test_tab_completes_commands_and_up_recalls_lines(run: Command, model: Path) -> None:
    with terminal(run, model) as screen:
        screen.wait_for("/help lists the commands")
        screen.wait_for(">")
        screen.send("/sys\t")
        screen.wait_for("tem")
        screen.send("Be brief.\r")
        screen.wait_for("the system message is set")
        screen.wait_for(">")
        screen.send("\x1b[A")
        screen.wait_for("Be brief.")
        screen.send("\r")
        screen.wait_for("the system message is set")
        screen.wait_for(">")
        screen.send("\x04")
        assert screen.wait_for_end() == 0, screen.text


# --- through a pipe -----------------------------------------------------------------------------------


def test_each_line_of_a_pipe_is_a_message(run: Command, model: Path) -> None:
    finished = run.in_subprocess("chat", model, "--stats", *ONE, stdin=b"Is it?\n\nSure?\n/tokens\n")
    assert finished.returncode == 0
    assert finished.stdout == b"Yes.\nYes.\n"
    assert b"\x1b" not in finished.stdout + finished.stderr
    first, second, tokens = finished.stderr.decode().splitlines()
    assert "none cached" in first
    assert " prompt tokens from live cells" in second
    assert "left" in tokens


def test_replies_are_written_as_json_lines(run: Command, model: Path) -> None:
    found = run("chat", model, "--json", *ONE, stdin="Is it?\nSure?\n/regenerate\n")
    first, second, _ = map(json.loads, found.out.splitlines())
    assert first["text"] == second["text"] == "Yes."
    assert second["cache"]["tokens"] >= first["usage"]["prompt_tokens"]


def test_an_invalid_line_is_reported_and_the_next_is_answered(run: Command, model: Path) -> None:
    lines = [
        "/xyz",
        "/set top_q 1",
        "/set top_p 7",
        "/think perhaps",
        "/load nowhere.json",
        "/save",
        "x" * 600,
        "Q",
    ]
    found = run("chat", model, "--n-ctx", "256", *ONE, stdin="\n".join(lines))
    assert (found.status, found.out) == (1, "Yes.\n")
    errors = found.err.splitlines()
    words = [
        "/help",
        "did you mean 'top_p'?",
        "at most 1",
        "on or off",
        "nowhere.json",
        "one file",
        "context holds 256",
    ]
    assert len(errors) == len(words)
    assert [(word, line) for word, line in zip(words, errors, strict=True) if word not in line] == []


# --- commands -----------------------------------------------------------------------------------------


def chat_messages(run: Command, model: Path, *lines: str) -> list[str]:
    found = run("chat", model, *ONE, stdin="\n".join(lines))
    assert found.status == 0, found.err
    return found.err.splitlines()


def test_help_names_every_command(run: Command, model: Path) -> None:
    lines = chat_messages(run, model, "/help")
    names = {line.split()[0] for line in lines if line.startswith("/")}
    known = "help system set think file model regenerate reset save resume load tokens stats quit"
    assert names == {f"/{name}" for name in known.split()}


def test_a_conversation_can_be_saved_loaded_and_restarted(run: Command, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "a talk.json"
    first = chat_messages(
        run, model, "/system Be brief.", "Is it?", f"/save '{file}'", "/tokens", "/reset", "/tokens"
    )
    assert first[0] == "the system message is set"
    assert "3 messages saved" in first[1]
    assert first[3] == "new conversation; the system message is kept"
    assert first[2] != first[4]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [message["role"] for message in json.loads(file.read_text())] == ["system", "user", "assistant"]
    again = chat_messages(run, model, f"/load '{file}'", "/tokens")
    assert "3 messages loaded" in again[0]
    assert again[1] == first[2]


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"role": "user"}', '[{"role": "nobody", "content": 1}]', '[{"role": "system"}]']
)
def test_a_file_without_a_conversation_is_refused(run: Command, model: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    found = run("chat", model, *ONE, stdin=f"/load {tmp_path / 'bad.json'}\nQ")
    assert (found.status, found.out) == (1, "Yes.\n")
    assert "Traceback" not in found.err
    assert "bug in erllama" not in found.err


def test_options_can_be_set_listed_and_reset(run: Command, model: Path) -> None:
    lines = chat_messages(
        run, model, "/set", "/set top_k 5", "/set stop=.", "/set", "/set top_k", "/set", "/think off"
    )
    assert "all options have their defaults" in lines[0]
    assert lines[1:4] == ["top_k = 5", "stop = '.'", "top_k = 5"]
    assert lines[-4:] == [
        "stop = '.'",
        "top_k is reset to its default",
        "stop = '.'",
        "thinking is off, if the model supports it",
    ]


def test_a_conversation_that_fills_the_context_can_be_restarted(run: Command, model: Path) -> None:
    found = run("chat", model, "--n-ctx", 256, *ONE, stdin=f"{'x' * 400}\n/reset\nIs it?\n")
    assert (found.status, found.out) == (1, "Yes.\n")
    assert "the context holds 256; " in found.err
    assert "/reset starts a new conversation" in found.err


def test_a_retried_reply_replaces_the_last_one(run: Command, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    found = run(
        "chat", model, *ONE, stdin=f"/regenerate\nIs it?\n/regenerate\n/stats\n/save {file}\n/quit\nunsaid\n"
    )
    assert found.out == "Yes.\nYes.\n"
    assert "there is no message to reply to" in found.err
    assert "2 replies, " in found.err
    assert len(json.loads(file.read_text())) == 2
    file.write_text('[{"role": "assistant", "content": "Hello."}]')
    assert "there is no message to reply to" in run("chat", model, *ONE, stdin=f"/load {file}\n/regenerate\n").err
