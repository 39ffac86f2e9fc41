"""The commands of `erllama chat`, which start with "/"."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple, Never

from erllama.cli.chat.conversations import (
    is_name,
    list_conversations,
    new_conversation_path,
    saved_conversation,
)
from erllama.cli.chat.session import ChatSession
from erllama.cli.console import format_count
from erllama.cli.options import parse_value
from erllama.cli.reply import prompt_tokens, tokens_per_second
from erllama.engine import Completion
from erllama.errors import Error, OptionError


class Quit(Exception):  # noqa: N818 - a request of the user, not an error
    """The user wants to leave."""


class CommandError(Error):
    """An unknown command, or a command with invalid arguments."""


class SlashCommand(NamedTuple):
    """A command: its function, its argument for the help, and its help text."""

    run: Callable[[ChatSession, str], str | Completion]
    argument: str
    help: str


def run_command(session: ChatSession, line: str) -> str | Completion:
    """Run a line that starts with "/"; return a message for the user, or a new reply.

    Raises:
        Quit: the user wants to leave.
        CommandError: the command is unknown, or its arguments are invalid.
        erllama.Error, OSError: the command fails.
    """
    name, _, argument = line.removeprefix("/").partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean /{near[0]}?" if near else "see /help"
        raise CommandError(f"unknown command /{name}; {hint}")
    return command.run(session, argument.strip())


def _help(session: ChatSession, argument: str) -> str:
    rows = [(f"/{name} {command.argument}".rstrip(), command.help) for name, command in COMMANDS.items()]
    return "\n".join(f"{name:<20} {text}" for name, text in rows + _KEYS)


def _quit(session: ChatSession, argument: str) -> Never:
    raise Quit


def _model(session: ChatSession, argument: str) -> str:
    if not argument:
        return session.loaded.list()
    name = _word(argument, "/model NAME: pass one name or file")
    if not session.loaded.switch(name):
        return f"{session.loaded.name} is loaded already"
    done = f"{session.loaded.name} is loaded, with {format_count(session.model.n_ctx, 'token')} of context"
    try:
        session.n_tokens()
    except Error as error:
        return f"{done}. Its template refuses this conversation: {error}; /reset starts a new one"
    return done


def _reset(session: ChatSession, argument: str) -> str:
    session.reset()
    return "new conversation" + ("; the system message is kept" if session.system else "")


def _file(session: ChatSession, argument: str) -> str:
    path = Path(_word(argument, "/file FILE: pass one file")).expanduser()
    n_tokens = session.attach(path)
    return f"{path.name}: {format_count(n_tokens, 'token')}, sent with the next message"


def _system(session: ChatSession, argument: str) -> str:
    session.system = argument or None
    return "the system message is set" if argument else "the system message is removed"


def _save(session: ChatSession, argument: str) -> str:
    if not argument and session.name is None:
        raise CommandError("/save NAME: pass the name of a conversation, or one file")
    target = _word(argument, "/save NAME: pass one name, or one file") if argument else str(session.name)
    n_messages = format_count(len(session.all_messages), "message")
    if is_name(target):
        session.save(new_conversation_path(target))
        session.name = target
        return f"{n_messages} saved as {target}; /resume {target} continues from there"
    session.save(Path(target).expanduser())
    return f"{n_messages} saved to {Path(target).expanduser()}"


def _resume(session: ChatSession, argument: str) -> str:
    if not argument:
        return list_conversations()
    return resume(session, _word(argument, "/resume NAME: pass one name"))


def resume(session: ChatSession, name: str) -> str:
    """Continue a saved conversation; return a message for the user.

    Raises:
        erllama.Error, OSError: there is none of this name, or it cannot be loaded.
    """
    session.load(saved_conversation(name))
    session.name = name
    return f"{name}: {format_count(len(session.all_messages), 'message')}"


def _load(session: ChatSession, argument: str) -> str:
    path = Path(_word(argument, "/load FILE: pass one file")).expanduser()
    session.load(path)
    return f"{format_count(len(session.all_messages), 'message')} loaded from {path}"


def _word(argument: str, usage: str) -> str:
    """Return the only word of an argument, which may be quoted."""
    try:
        words = shlex.split(argument)
    except ValueError as error:
        raise CommandError(f"{usage} ({error})") from None
    if len(words) != 1 or not words[0] or "\0" in words[0]:
        raise CommandError(usage)
    return words[0]


def _regenerate(session: ChatSession, argument: str) -> Completion:
    return session.regenerate()


def _set(session: ChatSession, argument: str) -> str:
    if not argument:
        lines = [f"{name} = {value!r}" for name, value in session.options.items()]
        return "\n".join(lines) or "all options have their defaults; to change one: /set temperature 0.2"
    name, _, text = argument.replace("=", " ", 1).partition(" ")
    name, text = name.replace("-", "_"), text.strip()
    if not text:
        if name not in session.options:
            raise CommandError(f"/set {name}: the option already has its default; pass a value")
        del session.options[name]
        return f"{name} is reset to its default"
    value = parse_value(name, text)
    session.set_options({name: value})
    return f"{name} = {value!r}"


def _think(session: ChatSession, argument: str) -> str:
    if argument == "show":
        thinking = session.replies[-1].thinking if session.replies else ""
        return thinking or "the last reply has no thinking"
    if argument not in ("on", "off"):
        raise OptionError(f"/think {argument}: pass on or off, or show".replace(" :", ":"))
    session.set_options({"thinking": argument == "on"})
    return f"thinking is {argument}, if the model supports it"


def _tokens(session: ChatSession, argument: str) -> str:
    used, n_ctx = session.n_tokens(), session.model.n_ctx
    return f"{used:,} of {format_count(n_ctx, 'token')} used, {max(n_ctx - used, 0):,} left"


def _stats(session: ChatSession, argument: str) -> str:
    replies = session.replies
    decoded, seconds = sum(r.timings.decode_tokens for r in replies), sum(r.timings.decode for r in replies)
    prompts, cached = sum(map(prompt_tokens, replies)), sum(r.cache.tokens for r in replies)
    share = f" ({cached / prompts:.0%})" if prompts else ""
    counters = session.model.cache.counters()
    hits = sum(int(counters[name]) for name in ("hits_exact", "hits_resume", "hits_longest_prefix"))
    misses, on_disk, in_ram = (int(counters[name]) for name in ("misses", "blocks_disk", "blocks_ram"))
    return "\n".join(
        (
            f"{format_count(len(replies), 'reply', 'replies')}, "
            f"{format_count(sum(len(r.tokens) for r in replies), 'token')}, "
            f"{tokens_per_second(decoded, seconds):.1f} tok/s",
            f"prompts: {format_count(prompts, 'token')}, {cached:,} of them cached{share}",
            f"cache: {format_count(hits, 'hit')}, {format_count(misses, 'miss', 'misses')}, "
            f"{format_count(on_disk, 'block')} on disk, {in_ram:,} in RAM",
        )
    )


COMMANDS = {
    "help": SlashCommand(_help, "", "list the commands"),
    "system": SlashCommand(_system, "TEXT", "set the system message; without TEXT, remove it"),
    "set": SlashCommand(
        _set, "NAME VALUE", "set an option of the replies, such as temperature 0.2; without VALUE, reset it"
    ),
    "think": SlashCommand(_think, "on|off|show", "turn thinking on or off; show the thinking of the last reply"),
    "file": SlashCommand(_file, "FILE", "add the text of a file to the next message"),
    "model": SlashCommand(_model, "NAME", "continue with another model; without NAME, list the models"),
    "regenerate": SlashCommand(_regenerate, "", "replace the last reply with another one"),
    "reset": SlashCommand(_reset, "", "start a new conversation"),
    "save": SlashCommand(_save, "NAME|FILE", "save the conversation under a name, or to a file, as JSON"),
    "resume": SlashCommand(_resume, "NAME", "continue a saved conversation; without NAME, list them"),
    "load": SlashCommand(_load, "FILE", "load the messages of a file, and continue from there"),
    "tokens": SlashCommand(_tokens, "", "show how much of the context is used"),
    "stats": SlashCommand(_stats, "", "show timings and cache statistics"),
    "quit": SlashCommand(_quit, "", "leave"),
}
_KEYS = [
    ("Alt-Enter", "start a new line"),
    ('"""', "begin and end a message of several lines"),
    ("Ctrl-C", "end the reply, and keep its text so far"),
    ("Ctrl-D", "leave"),
]
