"""What can be typed at the prompt beside messages: `/commands`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Never

from erllama.cli import reply as replies
from erllama.cli.chat.session import Conversation
from erllama.cli.console import count
from erllama.cli.options import value_of
from erllama.engine import Completion
from erllama.errors import Error, OptionError


class Leave(Exception):  # noqa: N818 - what it says, not what went wrong
    """The conversation is over."""


class CommandError(Error):
    """A command that is none, or is given what it does not take."""


Run = Callable[[Conversation, str], str | Completion]


def run_command(conversation: Conversation, line: str) -> str | Completion:
    """Do what a line that begins with "/" says; returns what there is to tell, or the reply that was made.

    Raises:
        Leave: the user wants to.
        CommandError: there is no such command, or not so.
        erllama.Error, OSError: it cannot be done.
    """
    name, _, argument = line.removeprefix("/").partition(" ")
    found = COMMANDS.get(name)
    if found is None:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean /{near[0]}?" if near else "see /help"
        raise CommandError(f"there is no command /{name}; {hint}")
    run, _, _ = found
    return run(conversation, argument.strip())


def _help(conversation: Conversation, argument: str) -> str:
    lines = [(f"/{name} {takes}".rstrip(), does) for name, (_, takes, does) in COMMANDS.items()]
    keys = [("Alt-Enter", "a new line"), ("Ctrl-C", "ends a reply, and keeps what came"), ("Ctrl-D", "leaves")]
    return "\n".join(f"{what:<20} {does}" for what, does in lines + keys)


def _quit(conversation: Conversation, argument: str) -> Never:
    raise Leave


def _reset(conversation: Conversation, argument: str) -> str:
    conversation.messages.clear()
    return "a new conversation" + ("; the system message stays" if conversation.system else "")


def _system(conversation: Conversation, argument: str) -> str:
    conversation.system = argument or None
    return "the system message is set" if argument else "no system message"


def _save(conversation: Conversation, argument: str) -> str:
    path = _path(argument, "/save FILE")
    conversation.save(path)
    return f"{count(len(conversation.all_messages), 'message')} saved in {path}"


def _load(conversation: Conversation, argument: str) -> str:
    path = _path(argument, "/load FILE")
    conversation.load(path)
    return f"{count(len(conversation.all_messages), 'message')} loaded from {path}"


def _path(argument: str, usage: str) -> Path:
    try:
        words = shlex.split(argument)
    except ValueError as error:
        raise CommandError(f"{usage}: {error}") from None
    if len(words) != 1 or "\0" in words[0]:
        raise CommandError(f"{usage}: give one file")
    return Path(words[0]).expanduser()


def _regenerate(conversation: Conversation, argument: str) -> Completion:
    return conversation.regenerate()


def _set(conversation: Conversation, argument: str) -> str:
    if not argument:
        set_now = [f"{name} = {value!r}" for name, value in conversation.options.items()]
        return "\n".join(set_now) or "every option is at its default; /set temperature 0.2"
    name, _, text = argument.replace("=", " ", 1).partition(" ")
    name, text = name.replace("-", "_"), text.strip()
    if not text:
        if name not in conversation.options:
            raise CommandError(f"/set {name}: give a value, too")
        del conversation.options[name]
        return f"{name} is at its default"
    value = value_of(name, text)
    conversation.set({name: value})
    return f"{name} = {value!r}"


def _think(conversation: Conversation, argument: str) -> str:
    if argument not in ("on", "off"):
        raise OptionError(f"/think {argument}: give on or off".replace(" :", ":"))
    conversation.set({"thinking": argument == "on"})
    return f"thinking is {argument}, where the model can think"


def _tokens(conversation: Conversation, argument: str) -> str:
    used, room = conversation.n_tokens(), conversation.model.n_ctx
    return f"{count(used, 'token')} of {room:,}; {max(room - used, 0):,} left"


def _stats(conversation: Conversation, argument: str) -> str:
    done = conversation.replies
    written, decoding = sum(r.timings.decode_tokens for r in done), sum(r.timings.decode for r in done)
    prompts, cached = sum(map(replies.n_prompt_tokens, done)), sum(r.cache.tokens for r in done)
    share = f" ({cached / prompts:.0%})" if prompts else ""
    counted = conversation.model.cache.counters()
    hits = sum(int(counted[name]) for name in ("hits_exact", "hits_resume", "hits_longest_prefix"))
    return "\n".join(
        (
            f"{count(len(done), 'reply').replace('replys', 'replies')}, "
            f"{count(sum(len(r.tokens) for r in done), 'token')}, "
            f"{replies.tokens_per_second(written, decoding):.1f} tok/s",
            f"prompts: {count(prompts, 'token')}, {cached:,} of them cached{share}",
            f"cache: {count(hits, 'hit')}, {int(counted['misses']):,} missed, "
            f"{count(int(counted['blocks_disk']), 'block')} on disk, {int(counted['blocks_ram']):,} in RAM",
        )
    )


COMMANDS: dict[str, tuple[Run, str, str]] = {
    "help": (_help, "", "this list"),
    "system": (_system, "TEXT", "what the conversation begins with; without TEXT, nothing"),
    "set": (_set, "NAME VALUE", "an option of the replies, as temperature 0.2; without VALUE, its default"),
    "think": (_think, "on|off", "let the model think before it answers"),
    "regenerate": (_regenerate, "", "another reply to the last message"),
    "reset": (_reset, "", "begin anew"),
    "save": (_save, "FILE", "write the messages to a file, as JSON"),
    "load": (_load, "FILE", "go on with the messages of a file"),
    "tokens": (_tokens, "", "how much of the context is used"),
    "stats": (_stats, "", "what the replies cost"),
    "quit": (_quit, "", "leave"),
}
