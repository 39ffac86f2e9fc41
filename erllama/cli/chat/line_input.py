"""Input of `erllama chat`: an editable line with a history in a terminal, lines of stdin otherwise."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import platformdirs

from erllama.cli.console import print_note
from erllama.cli.files import private_directory

_QUOTES = '"""'


class Entry(NamedTuple):
    """What the user typed: a message, or a command, which starts with "/"."""

    text: str
    is_command: bool


def read_entries(commands: Sequence[str], *, history: bool) -> Iterator[Entry]:
    """Yield messages and commands, without empty ones, until Ctrl-D or the end of stdin.

    A message of several lines, such as a pasted text, begins and ends with three quotation marks. It is never a
    command.

    Args:
        commands: names of the commands that Tab completes after "/".
        history: keep the lines in a history file.
    """
    lines = _typed_lines(commands, history) if sys.stdin.isatty() else iter(sys.stdin)
    for line in lines:
        text = line.strip()
        if text.startswith(_QUOTES):
            while not _is_closed(text) and (further := next(lines, None)) is not None:
                text = f"{text}\n{further.rstrip()}"
            entry = Entry(text.removeprefix(_QUOTES).removesuffix(_QUOTES).strip(), False)
        else:
            entry = Entry(text, text.startswith("/"))
        if entry.text:
            yield entry


def _is_closed(text: str) -> bool:
    """Return whether a text that begins with quotation marks also ends with them."""
    return text.rstrip().endswith(_QUOTES) and len(text.strip()) >= 2 * len(_QUOTES)


def _typed_lines(commands: Sequence[str], history: bool) -> Iterator[str]:
    prompt = _line_editor(commands, history)
    while True:
        try:
            yield prompt()
        except EOFError:
            return
        except KeyboardInterrupt:
            print_note("press Ctrl-D or type /quit to leave")


def _line_editor(commands: Sequence[str], history: bool) -> Callable[[], str]:
    """Return a function that reads one line from the terminal."""
    # Imported here: the import is slow, and piped input does not need it.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output.defaults import create_output
    from prompt_toolkit.output.vt100 import Vt100_Output

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    def is_open(text: str) -> bool:
        return text.lstrip().startswith(_QUOTES) and not _is_closed(text)

    output = create_output()
    if isinstance(output, Vt100_Output):
        output.enable_cpr = False  # the cursor position is not needed, and some terminals do not report it
    file = _history_file() if history else None
    lines: History = FileHistory(str(file)) if file is not None else InMemoryHistory()
    session: PromptSession[str] = PromptSession(
        history=lines,
        completer=WordCompleter([f"/{name} " for name in commands], sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        output=output,
        enable_open_in_editor=True,
        # Enter starts a new line, until the quotation marks are closed.
        multiline=Condition(lambda: is_open(session.default_buffer.text)),
    )

    def prompt() -> str:
        # In raw mode Ctrl-C is a key. Before that, it would interrupt the creation of an event loop.
        before = signal.signal(signal.SIGINT, lambda signum, frame: None)
        try:
            return session.prompt("> ", prompt_continuation="  ")
        finally:
            signal.signal(signal.SIGINT, before)

    return prompt


def _history_file() -> Path | None:
    """Return the history file, which only its owner can read; None if it cannot be opened."""
    path = Path(platformdirs.user_state_dir("erllama")) / "history"
    try:
        private_directory(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
    except OSError as error:
        print_note(f"the history is not saved: {error}")
        return None
    return path
