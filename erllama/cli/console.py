"""How the command writes: tables, sizes and progress for people, plain columns and JSON for programs.

Answers go to stdout, everything else to stderr. Colours, boxes and moving
lines are for terminals only; what is piped is plain text.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from erllama._runtime.printing import json_text, one_line, printable, say

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

# Exit statuses beside 0, 1 for an error of ours and 2 for wrong usage, as shells have them.
INTERRUPTED, NO_READER = 130, 141

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"

Column = tuple[str, str]  # title, and "left" or "right"


def terminal(*, stderr: bool = False) -> Console:
    """A console that takes texts as they are: no markup, no guesses at what to colour."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def is_terminal(*, stderr: bool = False) -> bool:
    """Whether somebody watches."""
    return (sys.stderr if stderr else sys.stdout).isatty()


def told(error: Exception) -> str:
    """An error in a line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return str(error)


def note(text: str) -> None:
    """Say something that is no answer."""
    say(f"erllama: {one_line(text)}", stderr=True)


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    say(json_text(value, indent=2))


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Rows under titles: a table in a terminal, columns that nothing is cut from in a pipe."""
    rows = [[one_line(text) for text in row] for row in rows]
    if is_terminal():
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for title, side in columns:
            table.add_column(title, justify="right" if side == "right" else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        terminal().print(table)
        return
    widths = [max(len(row[i]) for row in [[title for title, _ in columns], *rows]) for i in range(len(columns))]
    for row in [[title for title, _ in columns], *rows]:
        cells = [
            text.rjust(width) if side == "right" else text.ljust(width)
            for text, width, (_, side) in zip(row, widths, columns, strict=True)
        ]
        say("  ".join(cells).rstrip())


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Names and values, a line each; further lines of a value are indented, so that none looks like a name."""
    named = [(one_line(name), value) for name, value in facts]
    width = max((len(name) for name, _ in named), default=0) + 2
    for name, value in named:
        say(f"{name + ':':{width}}{value}".replace("\n", "\n" + " " * width))


def print_dimmed(text: str) -> None:
    """Lines in the colour of remarks, in a terminal."""
    terminal().print(printable(text), style="dim", soft_wrap=True)


def write_reply(text: str) -> None:
    """Write what a model said, at once: printable in a terminal, and exact where it is piped."""
    sys.stdout.write(printable(text) if is_terminal() else text)
    sys.stdout.flush()


def dim(on: bool) -> None:
    """Begin or end a dimmed part of a reply, in a terminal."""
    sys.stdout.write(_DIM if on else _PLAIN)


def size(n_bytes: float) -> str:
    """Bytes as people read them: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"


def count(n: int, noun: str) -> str:
    """A number of things: "1 block", "1,234 blocks"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def ago(ns: int) -> str:
    """How long ago a time was, in ns since 1970: "3 min ago"."""
    seconds = max(time.time() - ns / 1e9, 0.0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


# --- progress ---------------------------------------------------------------------------------


@contextmanager
def progress(what: str) -> Iterator[Callable[[float], None]]:
    """A bar on stderr, where somebody watches; gives what is to be told the fraction done."""
    if not is_terminal(stderr=True):
        yield lambda fraction: None
        return
    with _bar() as bar:
        task = bar.add_task(one_line(what), total=1.0)
        yield lambda fraction: bar.update(task, completed=fraction)


@contextmanager
def watching(what: str, done: Callable[[], float]) -> Iterator[Callable[[], None]]:
    """A bar that asks by itself for the fraction done; gives what takes it away before the end."""
    if not is_terminal(stderr=True):
        yield lambda: None
        return
    with _bar(done) as bar:
        bar.add_task(one_line(what), total=1.0)
        yield bar.stop


def _bar(done: Callable[[], float] | None = None) -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    class Asking(Progress):
        """Asks for the fraction whenever it is drawn."""

        def get_renderables(self) -> Iterator[RenderableType]:
            if done is not None:
                for task in self.tasks:
                    self.update(task.id, completed=done())
            yield from super().get_renderables()

    return Asking(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=terminal(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
