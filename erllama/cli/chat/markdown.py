"""Replies as Markdown in a terminal: each block when it is complete, and the last one while it grows.

The writer of `erllama chat` in a terminal. Replies are hostile: control characters never reach the terminal, HTML
and links are shown as text, and the work for one block is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from erllama._runtime.printing import one_line, printable
from erllama.cli.console import format_count, rich_console

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

_REDRAWS_PER_SECOND = 8
# A longer block is rendered in parts: the open part is rendered with each redraw.
_MOST_OF_BLOCK = 4000

_FENCE = re.compile(r"^ *(`{3,}|~{3,})[^\n]*$")


class MarkdownWriter:
    """Writes replies as Markdown. Shows the end of the thinking in one line while it grows, and folds it then.

    Args:
        shows_calls: show tool calls as the model writes them. False if something else shows them.
    """

    def __init__(self, *, shows_calls: bool = True) -> None:
        self._shows_calls = shows_calls
        self._console = rich_console()
        self._live: Live | None = None
        self._tail: RenderableType = ""
        self._open = ""  # the text of the last block, which is not complete
        self._thinking = ""

    def write_text(self, text: str) -> None:
        """Add text of the reply."""
        self.end_thinking()
        self._open += text
        complete, self._open = split_blocks(self._open)
        if complete.strip():
            self._print(rendered(complete))
        self._show(rendered(self._open))

    def write_call(self, text: str) -> None:
        """Add text of a tool call."""
        if self._shows_calls:
            self.write_text(text)

    def write_thinking(self, text: str) -> None:
        """Add thinking."""
        self._thinking += text
        room = max(self._console.width - 16, 8)
        self._show(Text(f"thinking… {one_line(self._thinking[-room:]).strip()}", style="dim", no_wrap=True))

    def end_thinking(self) -> None:
        """Fold the thinking: replace it by a line with its length."""
        if n_words := len(self._thinking.split()):
            folded = f"▸ thought for {format_count(n_words, 'word')}; /think show shows the thinking"
            self._print(Text(folded + "\n", style="dim"))
        self._thinking = ""

    def finish(self) -> None:
        """Render the last block, and end the reply."""
        self.end_thinking()
        if self._open.strip():
            self._print(rendered(self._open))
        self._open = ""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, block: RenderableType) -> None:
        self._tail = ""
        self._console.print(block)

    def _show(self, tail: RenderableType) -> None:
        """Show the incomplete block below the complete ones until the next redraw."""
        self._tail = tail
        if self._live is None:
            self._live = Live(
                _Tail(lambda: self._tail),
                console=self._console,
                refresh_per_second=_REDRAWS_PER_SECOND,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start(refresh=True)


class _Tail:
    """The last lines of a block: as many as the terminal has, since lines above it could not be erased."""

    def __init__(self, block: Callable[[], RenderableType]) -> None:
        self._block = block

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._block(), options.update(height=None), pad=False, new_lines=True)
        for line in lines[-max(console.height - 2, 1) :]:
            yield from line


class _Printable:
    """A block without the control characters that its rendering produced, as of the reference "&#x202e;"."""

    def __init__(self, block: RenderableType) -> None:
        self._block = block

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self._block, options):
            if not control:
                yield Segment(printable(text), style)


def rendered(text: str) -> RenderableType:
    """Return Markdown, rendered. Line breaks are kept, and HTML is text."""
    from markdown_it import MarkdownIt

    markdown = Markdown("", code_theme="ansi_dark", hyperlinks=False)
    parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
    markdown.parsed = parser.parse(printable(text))
    for token in markdown.parsed:
        for child in token.children or []:
            if child.type == "softbreak":
                child.type = "hardbreak"
    return _Printable(markdown)


def split_blocks(text: str) -> tuple[str, str]:
    """Return the complete blocks of a text, and the rest.

    A block is complete when an unindented line follows an empty one, or when its code fence is closed. A block that
    is too long is split at the end of a line, or at a space; both parts of a block of code have a fence.
    """
    complete_at, fence, fence_line, is_after_blank = 0, "", "", False
    at = 0
    for line in text.splitlines(keepends=True):
        stripped, is_whole = line.rstrip("\n"), line.endswith("\n")
        match = _FENCE.match(stripped) if is_whole else None
        if fence:
            if match and match[1].startswith(fence) and stripped.strip() == match[1]:
                if not fence_line.startswith(" "):
                    complete_at = at + len(line)
                fence = ""
        else:
            if is_after_blank and stripped and not stripped[0].isspace():
                complete_at = at
            if match:
                fence, fence_line = match[1], stripped
            is_after_blank = is_whole and not stripped.strip()
        at += len(line)
    complete, rest = text[:complete_at], text[complete_at:]
    if len(rest) <= _MOST_OF_BLOCK:
        return complete, rest
    cut = rest.rfind("\n", 0, _MOST_OF_BLOCK) + 1 or rest.rfind(" ", 0, _MOST_OF_BLOCK) + 1 or _MOST_OF_BLOCK
    if fence and len(fence_line) < _MOST_OF_BLOCK // 4 and cut > len(fence_line) + 1:
        return f"{complete}{rest[:cut]}\n{fence}\n", f"{fence_line}\n{rest[cut:]}"
    return complete + rest[:cut], rest[cut:]
