"""`erllama chat`: a chat in the terminal, or with lines from stdin."""

from __future__ import annotations

import sys

import click

import erllama
from erllama._runtime.printing import echo, json_text
from erllama.cli.chat.line_input import read_lines
from erllama.cli.chat.session import ChatSession
from erllama.cli.chat.slash_commands import COMMANDS, Quit, run_command
from erllama.cli.console import error_message, is_terminal, print_dimmed, print_note, write_reply
from erllama.cli.loading import ModelOptions, existing_path
from erllama.cli.options import model_and_cache_options, model_argument, model_or_demo, sampling_options
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
    history: bool,
    stats: bool | None,
    as_json: bool,
) -> int:
    """Chat with a model.

    Type a message, or /help for a list of commands. If stdin is not a terminal, each of its lines is a message.
    """
    interactive = sys.stdin.isatty() and is_terminal()
    with loading.open_model(existing_path(model_or_demo(model))) as loaded:
        session = ChatSession(loaded, system, silent=as_json)
        session.set_options(sampling if thinking is None else {**sampling, "thinking": thinking})
        if interactive:
            print_dimmed(
                f"{loaded.info.name or loaded.id}, {loaded.n_ctx:,} tokens of context; /help lists the commands"
            )
        show_stats = interactive if stats is None else stats
        loop = _ChatLoop(session, show_stats=show_stats, as_json=as_json, interactive=interactive)
        return loop.run(history)


class _ChatLoop:
    """Reads lines, and sends each as a message or runs it as a command."""

    def __init__(self, session: ChatSession, *, show_stats: bool, as_json: bool, interactive: bool) -> None:
        self._session = session
        self._show_stats, self._as_json, self._interactive = show_stats, as_json, interactive
        self._failed = False

    def run(self, history: bool) -> int:
        """Process all lines and return the exit status: 1 if a line failed and stdin is not a terminal."""
        for line in read_lines(list(COMMANDS), history=history):
            try:
                self._process(line)
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

    def _process(self, line: str) -> None:
        result = run_command(self._session, line) if line.startswith("/") else self._session.ask(line)
        if isinstance(result, str):
            self._print(result)
        elif self._as_json:
            write_reply(json_text(reply_json(self._session.model, result)) + "\n")
        elif self._show_stats:
            self._print(statistics_line(result))

    def _print(self, text: str) -> None:
        if self._interactive:
            print_dimmed(text)
        else:
            echo(text, stderr=True)
