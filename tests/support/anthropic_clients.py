"""Anthropic's client for a server of a test, and models with scripted replies for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import anthropic

import erllama
from support.chat.scripted_model import TEMPLATE, VOCABULARY, model_replying
from support.http_server import running_server
from support.scripted_backend import ScriptedBackend

# Renders the thinking of every reply, so that a lost thought changes the prompt.
THINKING_TEMPLATE = TEMPLATE.replace("keep_thinking and ", "")
TOOLS = [
    {
        "name": "get_time",
        "description": "The time in a city.",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "cache_control": {"type": "ephemeral"},
    },
    {"type": "web_search_20250305", "name": "web_search"},
]


def client_of(url: str, **options: object) -> anthropic.Anthropic:
    """Return a client that checks every answer against the types of its API."""
    given = {"api_key": "none", "max_retries": 0, "timeout": 120.0, **options}
    return anthropic.Anthropic(base_url=url, _strict_response_validation=True, **given)  # type: ignore[arg-type]


@contextmanager
def client_replying(
    *replies: str, template: str = THINKING_TEMPLATE, cache: erllama.Cache | None = None, **options: object
) -> Iterator[anthropic.Anthropic]:
    """Serve a model whose turns reply with these texts, within a `with` block.

    Args:
        options: of the server.
    """
    with (
        model_replying(*replies, template=template, cache=cache) as model,
        running_server(model, **options) as server,
        client_of(server.url) as client,
    ):
        yield client


def model_replying_slowly() -> erllama.Model:
    """Load a model whose reply fills the context, which takes most of a minute."""

    def next_token(tokens: list[int]) -> int:
        time.sleep(0.01)
        return ord("x")

    backend = ScriptedBackend(VOCABULARY, next_token, chat_templates={"default": TEMPLATE})
    return erllama.load_backend(backend, cache=erllama.Cache())


def prompt_tokens(usage: anthropic.types.Usage | anthropic.types.MessageDeltaUsage) -> int:
    """Return the length of a prompt."""
    counts = (usage.input_tokens, usage.cache_creation_input_tokens, usage.cache_read_input_tokens)
    assert None not in counts
    return sum(count or 0 for count in counts)
