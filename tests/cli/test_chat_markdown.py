"""Replies of `erllama chat` as Markdown: their blocks, hostile replies, and folded thinking."""

from __future__ import annotations

import io
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from erllama.cli.chat import markdown
from erllama.cli.chat.markdown import MarkdownWriter, rendered, split_blocks

FORBIDDEN = ("\x1b]", "\x07", "\x9b", "\x7f", "\u202e", "\u2066", "\x08", "\x1bc")


def drawn(text: str, width: int = 60) -> str:
    """Return what a terminal gets for a text."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, markup=False, highlight=False, emoji=False)
    console.print(rendered(text))
    return file.getvalue()


def plain(text: str) -> str:
    file = io.StringIO()
    Console(file=file, width=60).print(rendered(text))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    file = io.StringIO()
    monkeypatch.setattr(
        markdown,
        "rich_console",
        lambda: Console(
            file=file, force_terminal=True, width=60, height=10, markup=False, highlight=False, emoji=False
        ),
    )
    return file


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("one\ntwo", ""),
        ("one\n\n", ""),  # an indented line may follow
        ("one\n\nt", "one\n\n"),
        ("- one\n\n  more", ""),
        ("```py\na\n\nb\n", ""),
        ("```py\na\n```\n", "```py\na\n```\n"),
        ("```py\na\n```", ""),
        ("````\n```\n\nx\n", ""),
        ("~~~\n```\n~~~\nx", "~~~\n```\n~~~\n"),
        ("- a\n  ```\n  x\n  ```\n", ""),
    ],
)
def test_a_block_is_complete_when_the_next_one_begins(text: str, complete: str) -> None:
    assert split_blocks(text) == (complete, text[len(complete) :])


@given(st.text(alphabet="a `~\n-#", max_size=80), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_no_character_is_lost_between_blocks(text: str, size: int) -> None:
    done, rest = "", ""
    for at in range(0, len(text), size):
        complete, rest = split_blocks(rest + text[at : at + size])
        done += complete
    assert done + rest == text


def test_a_long_block_is_split_and_code_stays_code() -> None:
    done, rest = "", ""
    for line in ["```py\n", *["a = 1\n"] * 3000, "```\n", "end"]:
        complete, rest = split_blocks(rest + line)
        done += complete
        assert len(rest) <= 4000
    assert rest == "end"
    assert done.count("a = 1\n") == 3000
    assert done.count("```py\n") == done.count("\n```\n") > 1
    words, rest = split_blocks("word " * 1000)
    assert (words + rest, words[-1]) == ("word " * 1000, " ")


def test_markdown_is_drawn_and_no_text_is_lost() -> None:
    assert "\x1b[1mbold\x1b[0m" in drawn("**bold**")
    assert plain("one\ntwo") == "one\ntwo"
    assert plain("use vector<int>, <b>x</b>\n\n<div>shown</div>") == "use vector<int>, <b>x</b>\n\n<div>shown</div>"
    assert "x (http://e.org)" in plain("[x](http://e.org)")
    assert "return 1" in plain("```python\nreturn 1\n```")
    assert drawn("```python\nreturn 1\n```").count("\x1b[") > 1


@pytest.mark.parametrize(
    "text",
    [
        "\x1b]0;title\x07 \x9b7m \x1bc \x08\x7f\u202e",
        "&#x202e; &#x2066; &#27;]0;x&#7; &#x9b;",
        "[x](http://e.org/\x1b]8;;evil\x07)",
        "```\x1b]0;x\x07\n\x1bc\u202e\n```",
        "`\x1b]0;x\x07` **\u202e**",
        "![\u202e](x)",
    ],
)
def test_no_control_character_of_a_reply_is_drawn(text: str, screen: io.StringIO) -> None:
    writer = MarkdownWriter()
    writer.write_thinking(text)
    for character in text:
        writer.write_text(character)
    writer.finish()
    shown = drawn(text) + screen.getvalue()
    assert [each for each in FORBIDDEN if each in shown] == []
    assert "\ufffd" in shown


def test_a_long_thought_is_folded_and_the_screen_is_restored(screen: io.StringIO) -> None:
    writer = MarkdownWriter()
    for _ in range(200):
        writer.write_thinking("secret words ")
    writer.end_thinking()
    writer.write_text("# Title\n\nThe answer.")
    writer.finish()
    shown = screen.getvalue()
    assert "thought for 400 words" in shown
    assert shown.count("secret") < 20  # one line, drawn a few times
    assert "The answer." in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor


def test_a_block_higher_than_the_terminal_shows_its_end(screen: io.StringIO) -> None:
    writer = MarkdownWriter()
    writer.write_text("```\n" + "".join(f"line {i}\n" for i in range(100)))
    deadline = time.monotonic() + 60
    while "line 99" not in screen.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "line 50" not in screen.getvalue()
    writer.finish()
    assert "line 50" in screen.getvalue()


def test_a_call_is_shown_unless_something_else_shows_it(screen: io.StringIO) -> None:
    for shows_calls in (True, False):
        writer = MarkdownWriter(shows_calls=shows_calls)
        writer.write_call("called")
        writer.finish()
        assert ("called" in screen.getvalue()) is shows_calls
        screen.seek(0)
        screen.truncate()
