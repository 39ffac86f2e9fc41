"""`erllama chat`: a conversation at the prompt, or line by line from a pipe."""

from __future__ import annotations

import sys
from pathlib import Path

import click

import erllama
from erllama._runtime.printing import json_text, say
from erllama.cli import reply as replies
from erllama.cli.chat.session import Conversation
from erllama.cli.chat.line_input import typed_lines
from erllama.cli.chat.slash_commands import COMMANDS, Leave, run_command
from erllama.cli.console import is_terminal, note, print_dimmed, told, write_reply
from erllama.cli.loading import Setup, plain_file
from erllama.cli.options import chosen_model, loading_and_caching_options, model_argument, sampling_options


@click.command()
@model_argument
@loading_and_caching_options
@sampling_options
@click.option("--system", metavar="TEXT", help="What the conversation begins with.")
@click.option("--thinking/--no-thinking", default=None, help="Let it think first; as its template has it.")
@click.option("--history/--no-history", default=True, help="Keep what is typed, in a file of yours alone.")
@click.option("--stats/--no-stats", default=None, help="Tell what each reply cost; in a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Each reply, and what it cost, as a line of JSON.")
def chat(
    model: Path | None,
    setup: Setup,
    drawing: dict[str, object],
    system: str | None,
    thinking: bool | None,
    history: bool,
    stats: bool | None,
    as_json: bool,
) -> int:
    """Talk with a model.

    /help lists what can be typed beside messages. Piped in, each line is a message.
    """
    watched = sys.stdin.isatty() and is_terminal()
    with setup.model(plain_file(chosen_model(model))) as loaded:
        conversation = Conversation(loaded, system, silent=as_json)
        conversation.set(drawing if thinking is None else {**drawing, "thinking": thinking})
        if watched:
            print_dimmed(
                f"{loaded.info.name or loaded.id}, {loaded.n_ctx:,} tokens of context; /help lists the commands"
            )
        talk = _Talk(conversation, stats=watched if stats is None else stats, as_json=as_json, watched=watched)
        return talk.until_it_ends(history)


class _Talk:
    """The loop: a line is read, and done or answered."""

    def __init__(self, conversation: Conversation, *, stats: bool, as_json: bool, watched: bool) -> None:
        self._conversation = conversation
        self._stats, self._as_json, self._watched = stats, as_json, watched
        self._failed = False

    def until_it_ends(self, history: bool) -> int:
        """The exit status: 1 where something piped in could not be done."""
        for line in typed_lines(list(COMMANDS), history=history):
            try:
                self._do(line)
            except Leave:
                break
            except KeyboardInterrupt:  # before there was a reply to end
                if not self._watched:
                    raise
                note("cancelled")
            except (erllama.Error, OSError) as error:
                if isinstance(error, BrokenPipeError):
                    raise
                full = isinstance(error, erllama.PromptTooLong)
                note(told(error) + ("; /reset begins a new conversation" if full else ""))
                self._failed = True
        return 1 if self._failed and not self._watched else 0

    def _do(self, line: str) -> None:
        said = run_command(self._conversation, line) if line.startswith("/") else self._conversation.ask(line)
        if isinstance(said, str):
            self._tell(said)
        elif self._as_json:
            write_reply(json_text(replies.as_json(self._conversation.model, said)) + "\n")
        elif self._stats:
            self._tell(replies.cost(said))

    def _tell(self, text: str) -> None:
        if self._watched:
            print_dimmed(text)
        else:
            say(text, stderr=True)
