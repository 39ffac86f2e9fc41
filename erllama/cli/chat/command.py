"""`erllama chat`: a chat in the terminal, or with lines from stdin."""

from __future__ import annotations

import sys
from pathlib import Path

import click

import erllama
from erllama._runtime.printing import echo, json_text
from erllama.cli.chat.line_input import Entry, read_entries
from erllama.cli.chat.loaded_model import LoadedModel
from erllama.cli.chat.session import ChatSession
from erllama.cli.chat.slash_commands import COMMANDS, Quit, resume, run_command
from erllama.cli.console import error_message, is_terminal, print_dimmed, print_note, rich_console, write_reply
from erllama.cli.loading import ModelOptions, existing_path
from erllama.cli.options import FILE, model_and_cache_options, model_argument, model_or_demo, sampling_options
from erllama.cli.reply import reply_json, statistics_line


@click.command()
@model_argument
@model_and_cache_options
@sampling_options
@click.option("--system", metavar="TEXT", help="System message of the chat.")
@click.option(
    "--thinking/--no-thinking",
    default=None,
    help="Turn thinking on or off. Default: the setting of the model's template.",
)
@click.option("--resume", "name", metavar="NAME", help="Continue the conversation that /save NAME saved.")
@click.option(
    "--tools",
    "tools_file",
    type=FILE,
    metavar="FILE",
    help="Python file whose functions the model may call. You confirm each call. Needs a terminal.",
)
@click.option(
    "--markdown/--no-markdown",
    default=True,
    help="In a terminal, render replies as Markdown, and fold thinking.",
)
@click.option(
    "--history/--no-history", default=True, help="Save the lines you type in a file that only you can read."
)
@click.option(
    "--stats/--no-stats",
    default=None,
    help="Print timings and cache statistics after each reply. Default: in a terminal only.",
)
@click.option("--json", "as_json", is_flag=True, help="Print each reply and its statistics as one line of JSON.")
def chat(
    model: str | None,
    loading: ModelOptions,
    sampling: dict[str, object],
    system: str | None,
    thinking: bool | None,
    name: str | None,
    tools_file: Path | None,
    markdown: bool,
    history: bool,
    stats: bool | None,
    as_json: bool,
) -> int:
    """Chat with a model.

    Type a message, or /help for a list of commands. If stdin is not a terminal, each of its lines is a message.
    """
    interactive = sys.stdin.isatty() and is_terminal()
    if tools_file is not None and (as_json or not interactive):
        raise click.UsageError("--tools: each call is confirmed at the terminal; chat in one, without --json")
    path = existing_path(model_or_demo(model))
    with loading.open_cache() as cache, LoadedModel(loading, cache, path, model) as loaded:
        session = ChatSession(loaded, system, silent=as_json)
        session.set_options(sampling if thinking is None else {**sampling, "thinking": thinking})
        if interactive:
            print_dimmed(f"{loaded.name}, {loaded.model.n_ctx:,} tokens of context; /help lists the commands")
        if tools_file is not None:
            _add_tools(session, tools_file)
        if markdown and interactive and not rich_console().is_dumb_terminal:
            _render_markdown(session)
        show_stats = interactive if stats is None else stats
        loop = _ChatLoop(session, show_stats=show_stats, as_json=as_json, interactive=interactive)
        if name is not None:
            loop.show(resume(session, name))
        return loop.run(history)


def _add_tools(session: ChatSession, path: Path) -> None:
    # Imported here: other chats do not need it.
    from erllama.cli.chat.tools import Confirmation, load_functions

    confirmation = Confirmation()
    session.tools = [confirmation.confirmed(function) for function in load_functions(path)]
    print_dimmed("tools: " + ", ".join(function.__name__ for function in session.tools))


def _render_markdown(session: ChatSession) -> None:
    # Imported here: the import is slow, and piped output does not need it.
    from erllama.cli.chat.markdown import MarkdownWriter

    session.new_writer = lambda: MarkdownWriter(shows_calls=not session.tools)


class _ChatLoop:
    """Reads lines, and sends each as a message or runs it as a command."""

    def __init__(self, session: ChatSession, *, show_stats: bool, as_json: bool, interactive: bool) -> None:
        self._session = session
        self._show_stats, self._as_json, self._interactive = show_stats, as_json, interactive
        self._failed = False

    def run(self, history: bool) -> int:
        """Process all lines and return the exit status: 1 if a line failed and stdin is not a terminal."""
        for entry in read_entries(list(COMMANDS), history=history):
            try:
                self._process(entry)
            except Quit:
                break
            except KeyboardInterrupt:  # before a stream that it could cancel
                if not self._interactive:
                    raise
                print_note("cancelled")
            except (erllama.Error, OSError) as error:
                if isinstance(error, BrokenPipeError):
                    raise
                context_full = isinstance(error, erllama.PromptTooLong)
                print_note(error_message(error) + ("; /reset starts a new conversation" if context_full else ""))
                self._failed = True
        return 1 if self._failed and not self._interactive else 0

    def _process(self, entry: Entry) -> None:
        run = run_command if entry.is_command else ChatSession.ask
        result = run(self._session, entry.text)
        if isinstance(result, str):
            self.show(result)
        elif self._as_json:
            write_reply(json_text(reply_json(self._session.model, result)) + "\n")
        elif self._show_stats:
            self.show(statistics_line(result))

    def show(self, text: str) -> None:
        """Print a message of the command."""
        if self._interactive:
            print_dimmed(text)
        else:
            echo(text, stderr=True)
