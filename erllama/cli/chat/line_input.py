"""What the user types: with a history and editing in a terminal, line by line from a pipe."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import platformdirs

from erllama.cli.console import note
from erllama.cli.files import private_directory


def typed_lines(commands: Sequence[str], *, history: bool) -> Iterator[str]:
    """Messages and commands, without the empty ones, until Ctrl-D or the end of the pipe.

    Args:
        commands: what is completed after "/".
        history: keep what is typed in a file, for the next time.
    """
    if not sys.stdin.isatty():
        yield from (line for line in map(str.strip, sys.stdin) if line)
        return
    ask = _asker(commands, history)
    while True:
        try:
            line = ask().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            note("Ctrl-D, or /quit, leaves")
            continue
        if line:
            yield line


def _asker(commands: Sequence[str], history: bool) -> Callable[[], str]:
    # Imported here: it takes a while, and pipes do without.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output.defaults import create_output
    from prompt_toolkit.output.vt100 import Vt100_Output

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    output = create_output()
    if isinstance(output, Vt100_Output):
        output.enable_cpr = False  # nothing here needs to know where the cursor is, and not every terminal tells
    file = _history_file() if history else None
    kept: History = FileHistory(str(file)) if file is not None else InMemoryHistory()
    session: PromptSession[str] = PromptSession(
        history=kept,
        completer=WordCompleter([f"/{name} " for name in commands], sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        output=output,
        enable_open_in_editor=True,
    )

    def ask() -> str:
        # In raw mode Ctrl-C is a key. In the moment before, it would interrupt the making of an event loop.
        before = signal.signal(signal.SIGINT, lambda signum, frame: None)
        try:
            return session.prompt("> ", prompt_continuation="  ")
        finally:
            signal.signal(signal.SIGINT, before)

    return ask


def _history_file() -> Path | None:
    """A file that only its owner can read: what is typed is private. None where it cannot be had."""
    path = Path(platformdirs.user_state_dir("erllama")) / "history"
    try:
        private_directory(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
    except OSError as error:
        note(f"no history is kept: {error}")
        return None
    return path
