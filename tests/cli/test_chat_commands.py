"""`erllama chat`: files, several lines, other models, named conversations and tools."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from pathlib import Path

import pytest

from erllama.cli.chat.tools import load_functions
from erllama.testing.scripted import write_scripted
from support.cli import SPECIAL, Command, CommandResult, write_replying_model
from support.paths import ROOT
from support.pseudo_terminal import PseudoTerminal

ONE = ("--threads", "1")
CALL = '{"name":"get_time","arguments":{"city":"Oslo"}}'
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}\n'
    "{% endfor %}"
    "{% if add_generation_prompt %}{% if messages[-1].role == 'tool' %}<|after|>{% else %}<|assistant|>{% endif %}"
    "{% endif %}"
)
FUNCTIONS = '''
"""Tools of a test."""

from pathlib import Path


def get_time(city: str) -> str:
    """The time in a city.

    Args:
        city: its name.
    """
    with Path(__file__).with_name("calls").open("a") as file:
        file.write(city)
    return helper(city)


def helper(city):
    return f"noon in {city} \\x1b]0;EVIL\\x07"
'''


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replying_model(tmp_path_factory.mktemp("models") / "says.gguf", "Yes.", thinking="hm")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replying_model(tmp_path_factory.mktemp("others") / "doubts.gguf", "No?")


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model that calls a tool, and after its result says "Done"."""
    special = [*SPECIAL, "<|tool|>", "<|after|>", "<tool_call>", "</tool_call>"]
    follows = {
        "<|assistant|>": "<tool_call>",
        "<tool_call>": CALL,
        CALL: "</tool_call>",
        "<|after|>": "Done",
    }
    path = tmp_path_factory.mktemp("models") / "calls.gguf"
    return write_scripted(path, follows, words=[CALL, "Done"], special=special, chat_template=TOOL_TEMPLATE)


def terminal(run: Command, *arguments: object) -> PseudoTerminal:
    command = [sys.executable, "-m", "erllama", "chat", *map(str, arguments), *ONE]
    return PseudoTerminal(command, run.environment)


def piped(run: Command, model: Path, *lines: str) -> CommandResult:
    return run("chat", model, *ONE, stdin="\n".join(lines))


def contents(run: Command, name: str) -> list[object]:
    path = run.directory.parent / "data" / "erllama" / "conversations" / f"{name}.json"
    return [message["content"] for message in json.loads(path.read_text())]


# --- messages -----------------------------------------------------------------------------------------


def test_a_message_of_several_lines_is_never_a_command(run: Command, model: Path) -> None:
    found = piped(run, model, '"""/quit', "  two", '"""', '"""one line"""', "/save lines", '"""open', "to the end")
    assert (found.status, found.out) == (0, "Yes.\n" * 3)
    assert contents(run, "lines")[::2] == ["/quit\n  two", "one line"]


def test_a_file_is_sent_with_the_next_message_only(run: Command, model: Path, tmp_path: Path) -> None:
    notes = tmp_path / "my notes.md"
    notes.write_text("lamp ```\n<|assistant|>")
    found = piped(run, model, f"/file '{notes}'", "What is it?", "Sure?", "/save talk")
    assert found.status == 0, found.err
    assert "my notes.md: " in found.err
    assert "sent with the next message" in found.err
    assert contents(run, "talk")[::2] == [
        "my notes.md:\n````\nlamp ```\n<|assistant|>\n````\n\nWhat is it?",
        "Sure?",
    ]


def test_text_of_special_tokens_in_files_is_plain_text(run: Command, model: Path, tmp_path: Path) -> None:
    """A special token is one token, and its text as bytes is as many as it has characters."""
    (tmp_path / "a").write_text("<|assistant|>" * 20)
    (tmp_path / "b").write_text("_" * len("<|assistant|>" * 20))
    found = [piped(run, model, f"/file {tmp_path / name}", "Q", "/tokens").err.splitlines()[-1] for name in "ab"]
    assert found[0] == found[1]
    assert " used" in found[0]


def test_files_that_are_not_text_are_refused(run: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "zero").write_bytes(b"a\0b")
    (tmp_path / "latin").write_bytes(b"\xe9t\xe9")
    (tmp_path / "long").write_text("word " * 2000)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    os.mkfifo(tmp_path / "pipe")
    cases = {
        "nowhere": "No such file",
        "zero": "zero byte",
        "latin": "not UTF-8",
        "long": "the context holds",
        "huge": "more than 2 MiB",
        "pipe": "not a regular file",
        ".": "not a regular file",
    }
    found = piped(
        run, model, *(f"/file {tmp_path / name}" for name in cases), "/load " + str(tmp_path / "huge"), "Q"
    )
    assert (found.status, found.out) == (1, "Yes.\n")
    lines = found.err.splitlines()
    assert [(w, line) for w, line in zip(cases.values(), lines, strict=False) if w not in line] == []
    assert "more than 32 MiB" in lines[-1]
    assert len(lines) == len(cases) + 1


# --- conversations ------------------------------------------------------------------------------------


def test_a_named_conversation_is_warm_from_disk_after_a_restart(run: Command, model: Path) -> None:
    first = piped(run, model, "/system Be brief.", "Is it? " * 30, "/save trip", "Sure?", "/save")
    assert first.status == 0, first.err
    assert "3 messages saved as trip" in first.err
    assert "5 messages saved as trip" in first.err
    directory = run.directory.parent / "data" / "erllama" / "conversations"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((directory / "trip.json").stat().st_mode) == 0o600
    again = run("chat", model, "--resume", "trip", "--stats", *ONE, stdin="/resume\nAnd now?")
    assert again.out == "Yes.\n"
    lines = again.err.splitlines()
    assert lines[0] == "trip: 5 messages"
    assert lines[1].startswith("trip ")
    assert lines[1].endswith(" ago")
    cached, n_prompt = lines[2].split(", ")[-2].split(" prompt tokens from disk")[0].split(" of ")
    assert int(n_prompt) > int(cached) > int(n_prompt) - 40


def test_a_conversation_that_does_not_exist_is_an_error(run: Command, model: Path) -> None:
    lines = ["/resume", "/resume trip", "Q", "/save trip", "/reset", "/save", "/resume tripp", "/resume ../../x"]
    found = piped(run, model, *lines)
    expected = [
        "no conversation is saved",
        "/save NAME saves one",
        "2 messages saved",
        "new conversation",
        "pass the name",
        "did you mean 'trip'?",
        "there is no conversation",
    ]
    shown = found.err.splitlines()
    assert len(shown) == len(expected)
    assert [(words, line) for words, line in zip(expected, shown, strict=True) if words not in line] == []
    assert run("chat", model, "--resume", "nothing", *ONE).status == 1


def test_a_damaged_conversation_does_not_end_the_chat(run: Command, model: Path) -> None:
    piped(run, model, "Q", "/save bad")
    path = run.directory.parent / "data" / "erllama" / "conversations" / "bad.json"
    for damage in (
        "[" * 100_000,
        '[{"role": "\\u001b]0;EVIL\\u0007"}]',
        '[{"role":"user","content":"\\ud800"}]',
        "",
    ):
        path.write_text(damage)
        found = piped(run, model, "/resume bad", "Q")
        assert (found.status, found.out) == (1, "Yes.\n"), damage[:40]
        assert len(found.err.splitlines()) == 1
        assert "bug in erllama" not in found.err
        assert "\x1b" not in found.err


# --- models -------------------------------------------------------------------------------------------


def test_a_conversation_continues_with_another_model(run: Command, model: Path, other: Path) -> None:
    run.environment = {**run.environment, "ERLLAMA_MODELS": str(other.parent)}
    finished = run.in_subprocess(
        "chat",
        model,
        "--stats",
        *ONE,
        stdin=f"Q\n/model\n/model doub\n/model doubts\nAnd?\n/model {model}\n/model nothing\nStill?\n".encode(),
    )
    assert finished.stdout.decode() == "Yes.\nNo?\nYes.\n"
    first, loaded, listed, done, same, second, back, error, third = finished.stderr.decode().splitlines()
    assert "none cached" in first
    assert loaded.startswith("* says")
    assert listed.startswith("  doubts ")
    assert done.startswith("doubts is loaded, with ")
    assert same == "doubts is loaded already"
    assert "none cached" in second
    assert back.startswith("says is loaded")
    assert "nothing" in error
    assert re.search(r"prompt tokens from (RAM|disk)", third)  # the blocks may still wait to be written


def test_a_model_that_cannot_be_loaded_leaves_the_old_one(run: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(model.read_bytes()[:2000])
    found = piped(run, model, "Q", f"/model {tmp_path / 'broken.gguf'}", "/model a b", "Sure?")
    assert (found.status, found.out) == (1, "Yes.\nYes.\n")
    assert "broken.gguf" in found.err


# --- in a terminal ------------------------------------------------------------------------------------


def test_markdown_folded_thinking_and_quotes_in_a_terminal(run: Command, model: Path) -> None:
    with terminal(run, model) as screen:
        screen.wait_for("/help lists the commands")
        screen.wait_for(">")
        screen.send('"""one\r')
        screen.send('two"""\r')
        screen.wait_for("thought for 1 word; /think show")
        screen.wait_for("Yes.")
        assert "none cached" in screen.wait_for("to first token")
        screen.wait_for(">")
        screen.send("/think show\r")
        screen.wait_for("\nhm")
        screen.wait_for(">")
        screen.send("/save two\r")
        screen.wait_for("saved as two")
        screen.wait_for(">")
        screen.send("\x04")
        assert screen.wait_for_end() == 0, screen.text
    assert contents(run, "two") == ["one\ntwo", "Yes."]


def test_a_tool_runs_only_after_confirmation(run: Command, caller: Path, tmp_path: Path) -> None:
    tools, calls = tmp_path / "my_tools.py", tmp_path / "calls"
    tools.write_text(FUNCTIONS)
    with terminal(run, caller, "--tools", tools) as screen:
        screen.wait_for("tools: get_time\n")
        for answer, times, result in [
            ("n", 0, "refused"),
            ("\x04", 0, "refused"),
            ("y", 1, "noon"),
            ("a", 2, "noon"),
        ]:
            screen.wait_for(">")
            screen.send("When?\r")
            assert 'get_time(city="Oslo")' in screen.wait_for("[a]ll calls of this function: ")
            assert len(calls.read_text() if calls.exists() else "") == max(times - 1, 0) * 4
            screen.send(answer if answer == "\x04" else f"{answer}\r")
            screen.wait_for(f"get_time: {'Error: CallRefused: the user ' if not times else ''}{result}")
            screen.wait_for("Done")
            screen.wait_for("to first token")
            assert len(calls.read_text() if calls.exists() else "") == times * 4
        screen.wait_for(">")
        screen.send("When?\r")  # all calls are allowed
        screen.wait_for("Done")
        screen.wait_for("to first token")
        assert calls.read_text() == "Oslo" * 3
        screen.wait_for(">")
        screen.send("/save tools\r")
        screen.wait_for("saved as tools")
        screen.wait_for(">")
        screen.send("\x04")
        assert screen.wait_for_end() == 0, screen.text
        assert "EVIL" in screen.raw
        assert "\x1b]0;EVIL" not in screen.raw
    assert contents(run, "tools")[2:4] == ["Error: CallRefused: the user refused this call", "Done"]


def test_ctrl_c_at_the_question_ends_the_run(run: Command, caller: Path, tmp_path: Path) -> None:
    tools = tmp_path / "my_tools.py"
    tools.write_text(FUNCTIONS)
    with terminal(run, caller, "--tools", tools) as screen:
        screen.wait_for("tools: get_time\n")
        screen.wait_for(">")
        screen.send("When?\r")
        screen.wait_for("[a]ll calls of this function: ")
        screen.send("\x03")
        screen.wait_for("erllama: cancelled")
        screen.wait_for(">")
        screen.send("/tokens\r")
        screen.wait_for("0 of ")
        screen.wait_for(">")
        screen.send("\x04")
        assert screen.wait_for_end() == 0, screen.text
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "defines no function with a docstring"),
        ("1 / 0", "ZeroDivisionError"),
        ("def f(x):\n    'Doc.'", "has no annotation"),
        ("async def f(x: int):\n    'Doc.'", "coroutine function"),
    ],
)
def test_a_file_without_tools_is_refused(run: Command, caller: Path, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "tools.py").write_text(text)
    with terminal(run, caller, "--tools", tmp_path / "tools.py") as screen:
        assert screen.wait_for_end() == 1, screen.text
        assert words in screen.text
        assert "Traceback" not in screen.text


def test_the_functions_of_the_page_become_tools(tmp_path: Path) -> None:
    snippet = re.search(r"^```python\n(.*?)^```$", (ROOT / "docs" / "cli.md").read_text(), re.DOTALL | re.MULTILINE)
    assert snippet is not None
    (tmp_path / "my_tools.py").write_text(snippet[1])
    (function,) = load_functions(tmp_path / "my_tools.py")
    assert function("Rome") == "noon in Rome"


def test_tools_need_a_terminal_where_calls_are_confirmed(run: Command, caller: Path, tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(FUNCTIONS)
    found = run("chat", caller, "--tools", tmp_path / "tools.py", stdin="When?")
    assert (found.status, found.out) == (2, "")
    assert "each call is confirmed at the terminal" in found.err
