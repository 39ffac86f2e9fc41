"""OpenAI's client, with strict validation, of a server whose model has scripted replies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from openai import OpenAI
from openai.types.responses import Response

import erllama
from support.chat.scripted_model import model_replying
from support.http_server import running_server

CALL = '<tool_call>{"name":"get_time","arguments":{"city":"Oslo"}}</tool_call>'
GET_TIME = {
    "type": "function",
    "name": "get_time",
    "description": "The time in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": False,
}


def new_client(url: str, key: str = "none") -> OpenAI:
    """Return a client that refuses answers of another shape than OpenAI's, and does not try again."""
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, _strict_response_validation=True)


@contextmanager
def client_of(model: erllama.Model, **options: object) -> Iterator[OpenAI]:
    """Serve a model within a `with` block, and unload it."""
    with model, running_server(model, **options) as server, new_client(server.url) as client:
        yield client


@contextmanager
def client_of_replies(*replies: str, **options: object) -> Iterator[OpenAI]:
    """Serve a model whose turns reply with these texts; the last one repeats."""
    with client_of(model_replying(*replies), **options) as client:
        yield client


def n_computed(response: Response) -> int:
    """Return how many tokens of the prompt were not in the cache."""
    assert response.usage is not None
    return response.usage.input_tokens - response.usage.input_tokens_details.cached_tokens


def n_new(response: Response, previous: Response) -> int:
    """Return how many tokens the prompt has after those of the previous response's prompt and reply."""
    assert response.usage is not None
    assert previous.usage is not None
    return response.usage.input_tokens - previous.usage.total_tokens
