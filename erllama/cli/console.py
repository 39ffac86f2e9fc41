"""Output of the command: tables, sizes and progress for people, plain columns and JSON for programs.

Results go to stdout, everything else to stderr. Colours and progress bars appear
in terminals only; piped output is plain text.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from erllama._runtime.printing import echo, json_text, one_line, printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

# Exit statuses other than 0, 1 for an error and 2 for invalid arguments. As in shells, they are 128 + signal.
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"

Column = tuple[str, str]  # title, and "left" or "right"


def rich_console(*, stderr: bool = False) -> Console:
    """Return a console that prints texts unchanged: without markup, highlighting or emoji codes."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def is_terminal(*, stderr: bool = False) -> bool:
    """Return whether stdout, or stderr, is a terminal."""
    return (sys.stderr if stderr else sys.stdout).isatty()


def error_message(error: Exception) -> str:
    """Return an error as one message; for an OSError, the file and the reason."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fspath(error.filename)}: {error.strerror}"
    return str(error)


def print_note(text: str) -> None:
    """Print a message of the command, in one line on stderr."""
    echo(f"erllama: {one_line(text)}", stderr=True)


def print_json(value: object) -> None:
    """Print one JSON document on stdout."""
    echo(json_text(value, indent=2))


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under titles: a table that fits a terminal, or untruncated columns in a pipe."""
    rows = [[one_line(text) for text in row] for row in rows]
    if is_terminal():
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for title, side in columns:
            table.add_column(title, justify="right" if side == "right" else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        rich_console().print(table)
        return
    lines = [[title for title, _ in columns], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        cells = [
            text.rjust(width) if side == "right" else text.ljust(width)
            for text, width, (_, side) in zip(line, widths, columns, strict=True)
        ]
        echo("  ".join(cells).rstrip())


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one line each. Further lines of a value are indented, unlike names."""
    named = [(one_line(name), value) for name, value in fields]
    width = max((len(name) for name, _ in named), default=0) + 2
    for name, value in named:
        echo(f"{name + ':':{width}}{value}".replace("\n", "\n" + " " * width))


def print_dimmed(text: str) -> None:
    """Print secondary text, dimmed, to a terminal."""
    rich_console().print(printable(text), style="dim", soft_wrap=True)


def write_reply(text: str) -> None:
    """Write a part of a model's reply without buffering: escaped for a terminal, unchanged for a pipe."""
    sys.stdout.write(printable(text) if is_terminal() else text)
    sys.stdout.flush()


def write_dim_escape(on: bool) -> None:
    """Write the escape sequence that starts or ends dimmed text."""
    sys.stdout.write(_DIM if on else _PLAIN)


def format_count(n: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 block", "1,234 blocks"."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def format_age(ns: int) -> str:
    """Return how long ago a time was: "3 min ago". The time is in ns since 1970."""
    seconds = max(time.time() - ns / 1e9, 0.0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


# --- progress ---------------------------------------------------------------------------------


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[float], None]]:
    """Show a bar on stderr if that is a terminal; yields a function that sets the fraction done."""
    if not is_terminal(stderr=True):
        yield lambda fraction: None
        return
    with _bar() as bar:
        task = bar.add_task(one_line(description), total=1.0)
        yield lambda fraction: bar.update(task, completed=fraction)


@contextmanager
def polled_progress_bar(description: str, fraction_done: Callable[[], float]) -> Iterator[Callable[[], None]]:
    """Show a bar that calls `fraction_done` whenever it is drawn; yields a function that removes the bar."""
    if not is_terminal(stderr=True):
        yield lambda: None
        return
    with _bar(fraction_done) as bar:
        bar.add_task(one_line(description), total=1.0)
        yield bar.stop


def _bar(fraction_done: Callable[[], float] | None = None) -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    class PolledProgress(Progress):
        """Updates the fraction done whenever it is drawn."""

        def get_renderables(self) -> Iterator[RenderableType]:
            if fraction_done is not None:
                for task in self.tasks:
                    self.update(task.id, completed=fraction_done())
            yield from super().get_renderables()

    return PolledProgress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=rich_console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
