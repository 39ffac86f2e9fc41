"""`erllama run`: one prompt, one reply."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import click

import erllama
from erllama._model.requests.options import ChatOptions, CompletionOptions
from erllama._runtime.printing import say
from erllama.cli import reply as replies
from erllama.cli.console import INTERRUPTED, print_json
from erllama.cli.loading import Setup, plain_file
from erllama.cli.options import FILE, chosen_model, loading_and_caching_options, sampling_options, text_of


@click.command()
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]...")
@click.option("--model", "-m", type=click.Path(path_type=Path), help="The model, in place of the first word.")
@loading_and_caching_options
@sampling_options
@click.option("--system", metavar="TEXT", help="What the conversation begins with.")
@click.option(
    "--chat/--raw", default=None, help="By the model's chat template, where it has one; or go on with the text."
)
@click.option("--thinking/--no-thinking", default=None, help="Let it think first; as its template has it.")
@click.option("--json-schema", type=FILE, help="Keep the reply to a JSON schema.")
@click.option("--grammar", type=FILE, help="Keep the reply to a grammar in GBNF.")
@click.option("--regex", metavar="PATTERN", help="Keep the reply to a regular expression.")
@click.option("--stats", is_flag=True, help="Tell on stderr what it cost.")
@click.option("--json", "as_json", is_flag=True, help="The reply, and what it cost, as JSON.")
def run(
    words: tuple[str, ...],
    model: Path | None,
    setup: Setup,
    drawing: dict[str, object],
    system: str | None,
    chat: bool | None,
    thinking: bool | None,
    json_schema: Path | None,
    grammar: Path | None,
    regex: str | None,
    stats: bool,
    as_json: bool,
) -> int:
    """Write one reply.

    MODEL is the first word where that is a file, or ends in .gguf; else it is the model that comes with erllama.
    PROMPT is the words after it; one that is "-" stands for stdin, which is also read where there are none.

    \b
      erllama run model.gguf "Why is the sky blue?"
      erllama run model.gguf "What does this do?" - < program.py
      erllama run model.gguf --json-schema person.json --json "Invent somebody." | jq .text
    """
    path, prompt = _model_and_prompt(model, words)
    options = drawing | _language(json_schema, grammar, regex)
    if thinking is not None:
        options["thinking"] = thinking
    if system is not None and chat is False:
        raise click.UsageError("--system with --raw: a text that is gone on with has no system message")
    with setup.model(plain_file(chosen_model(path))) as loaded:
        if chat is None:
            chat = loaded.info.has_chat_template or system is not None
        reply = (
            _chat(loaded, system, prompt, options, as_json) if chat else _complete(loaded, prompt, options, as_json)
        )
        if as_json:
            print_json(replies.as_json(loaded, reply))
        if stats:
            say(replies.cost(reply), stderr=True)
    return INTERRUPTED if reply.finish_reason == "cancelled" else 0


def _language(json_schema: Path | None, grammar: Path | None, regex: str | None) -> dict[str, object]:
    """The option that keeps a reply to a language, if one was given."""
    if sum(given is not None for given in (json_schema, grammar, regex)) > 1:
        raise click.UsageError("give one of --json-schema, --grammar and --regex")
    where = str(json_schema or grammar or "--regex")
    try:
        if json_schema is not None:
            return {"grammar": erllama.Grammar.json_schema(text_of(json_schema))}
        if grammar is not None:
            return {"grammar": erllama.Grammar.gbnf(text_of(grammar))}
        return {} if regex is None else {"grammar": erllama.Grammar.regex(regex)}
    except erllama.GrammarError as error:
        raise erllama.OptionError(f"{where}: {error}") from None


def _chat(
    model: erllama.Model, system: str | None, prompt: str, options: Mapping[str, object], silent: bool
) -> erllama.Completion:
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    given = cast(ChatOptions, options)
    if silent:
        return model.chat(messages, **given)
    return replies.show(
        model, lambda: model.stream_chat(messages, **given), lambda: len(model.apply_chat_template(messages))
    )


def _complete(model: erllama.Model, prompt: str, options: Mapping[str, object], silent: bool) -> erllama.Completion:
    given = cast(CompletionOptions, options)
    if silent:
        return model.complete(prompt, **given)
    return replies.show(model, lambda: model.stream(prompt, **given), lambda: len(model.tokenize(prompt)))


def _model_and_prompt(model: Path | None, words: Sequence[str]) -> tuple[Path | None, str]:
    if model is None and words and _names_a_model(words[0]):
        model, words = Path(words[0]), words[1:]
    if not words:
        if sys.stdin.isatty():
            raise click.UsageError("no prompt; give one, or pipe it in")
        words = ("-",)
    parts = [sys.stdin.read() if word == "-" else word for word in words]
    # Arguments that are no UTF-8 are still text to be read.
    prompt = " ".join(parts).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if words == ("-",) and not prompt.strip():
        raise click.UsageError("no prompt: stdin is empty; give words, or pipe some in")
    return model, prompt


def _names_a_model(word: str) -> bool:
    # A directory with a "/" was meant to be one, and is refused as such.
    return word.endswith(".gguf") or Path(word).is_file() or ("/" in word and Path(word).is_dir())
