"""`erllama run`: writes one reply to one prompt."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import click

import erllama
from erllama._model.requests.options import ChatOptions, CompletionOptions
from erllama._runtime.printing import echo
from erllama.cli.console import EXIT_INTERRUPTED, print_json
from erllama.cli.loading import ModelOptions, existing_path
from erllama.cli.options import FILE, model_and_cache_options, model_or_demo, read_text, sampling_options
from erllama.cli.reply import reply_json, statistics_line, stream_reply
from erllama.models.names import has_model


@click.command()
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]...")
@click.option(
    "--model", "-m", metavar="MODEL", help="Path or name of the model. Overrides the positional argument."
)
@model_and_cache_options
@sampling_options
@click.option("--system", metavar="TEXT", help="System message of the chat.")
@click.option(
    "--chat/--raw",
    default=None,
    help="Apply the model's chat template, or continue the prompt as plain text. "
    "Default: --chat if the model has a template.",
)
@click.option(
    "--thinking/--no-thinking",
    default=None,
    help="Turn thinking on or off. Default: the setting of the model's template.",
)
@click.option("--json-schema", type=FILE, help="Constrain the reply to the JSON schema in this file.")
@click.option("--grammar", type=FILE, help="Constrain the reply to the GBNF grammar in this file.")
@click.option("--regex", metavar="PATTERN", help="Constrain the reply to a regular expression.")
@click.option("--stats", is_flag=True, help="Print timings and cache statistics to stderr.")
@click.option("--json", "as_json", is_flag=True, help="Print the reply and its statistics as JSON.")
def run(
    words: tuple[str, ...],
    model: str | None,
    loading: ModelOptions,
    sampling: dict[str, object],
    system: str | None,
    chat: bool | None,
    thinking: bool | None,
    json_schema: Path | None,
    grammar: Path | None,
    regex: str | None,
    stats: bool,
    as_json: bool,
) -> int:
    """Write one reply to a prompt.

    The first argument is the MODEL if it is a file, ends in .gguf, or is the whole name of a model on this machine
    (see `erllama models`). Without it, the command uses erllama's demo model. All other arguments form the PROMPT.
    An argument "-" stands for the text on stdin. Without a PROMPT, the command reads stdin.

    \b
      erllama run model.gguf "Why is the sky blue?"
      erllama run model.gguf "What does this do?" - < program.py
      erllama run model.gguf --json-schema person.json --json "Invent somebody." | jq .text
    """
    path, prompt = _model_and_prompt(model, words)
    options = sampling | _constraint(json_schema, grammar, regex)
    if thinking is not None:
        options["thinking"] = thinking
    if system is not None and chat is False:
        raise click.UsageError("--system cannot be used with --raw: plain text has no system message")
    with loading.open_model(existing_path(model_or_demo(path))) as loaded:
        if chat is None:
            chat = loaded.info.has_chat_template or system is not None
        reply = (
            _chat(loaded, system, prompt, options, as_json) if chat else _complete(loaded, prompt, options, as_json)
        )
        if as_json:
            print_json(reply_json(loaded, reply))
        if stats:
            echo(statistics_line(reply), stderr=True)
    return EXIT_INTERRUPTED if reply.finish_reason == "cancelled" else 0


def _constraint(json_schema: Path | None, grammar: Path | None, regex: str | None) -> dict[str, object]:
    """Return the option `grammar` of the request; empty if the reply has no constraint."""
    if sum(option is not None for option in (json_schema, grammar, regex)) > 1:
        raise click.UsageError("--json-schema, --grammar and --regex exclude each other; pass one of them")
    source = str(json_schema or grammar or "--regex")
    try:
        if json_schema is not None:
            return {"grammar": erllama.Grammar.json_schema(read_text(json_schema))}
        if grammar is not None:
            return {"grammar": erllama.Grammar.gbnf(read_text(grammar))}
        return {} if regex is None else {"grammar": erllama.Grammar.regex(regex)}
    except erllama.GrammarError as error:
        raise erllama.OptionError(f"{source}: {error}") from None


def _chat(
    model: erllama.Model, system: str | None, prompt: str, options: Mapping[str, object], silent: bool
) -> erllama.Completion:
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    chat_options = cast(ChatOptions, options)
    if silent:
        return model.chat(messages, **chat_options)
    return stream_reply(
        model, lambda: model.stream_chat(messages, **chat_options), lambda: len(model.apply_chat_template(messages))
    )


def _complete(model: erllama.Model, prompt: str, options: Mapping[str, object], silent: bool) -> erllama.Completion:
    completion_options = cast(CompletionOptions, options)
    if silent:
        return model.complete(prompt, **completion_options)
    return stream_reply(
        model, lambda: model.stream(prompt, **completion_options), lambda: len(model.tokenize(prompt))
    )


def _model_and_prompt(model: str | None, words: Sequence[str]) -> tuple[str | None, str]:
    if model is None and words and _is_model(words[0]):
        model, words = words[0], words[1:]
    if not words:
        if sys.stdin.isatty():
            raise click.UsageError("no prompt; pass one as an argument or on stdin")
        words = ("-",)
    parts = [sys.stdin.read() if word == "-" else word for word in words]
    # Arguments that are not UTF-8 arrive with surrogates; the model gets U+FFFD in their place.
    prompt = " ".join(parts).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if words == ("-",) and not prompt.strip():
        raise click.UsageError("no prompt: stdin is empty; pass one as an argument or on stdin")
    return model, prompt


def _is_model(word: str) -> bool:
    # A directory with a "/" was meant as a model. Loading it fails with a message that says so.
    # A name must be whole: the first word of a prompt may well begin some name.
    is_path = word.endswith(".gguf") or Path(word).is_file() or ("/" in word and Path(word).is_dir())
    return is_path or word.startswith("hf:") or has_model(word)
