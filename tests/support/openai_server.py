"""Clients of OpenAI's API for a server in the test, and the prompts that the server made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest

from erllama import Model
from erllama.engine import Completion
from erllama.server import ServedModel
from erllama.server.endpoints import Call
from erllama.server.replies import running
from support.http_server import RunningServer, running_server

Json = dict[str, object]
USER: Json = {"role": "user", "content": "hi"}


def client_of(server: RunningServer, api_key: str = "any") -> openai.OpenAI:
    """Return the official client, which validates each answer and does not retry."""
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=api_key, max_retries=0, _strict_response_validation=True
    )


@contextmanager
def without_validation(client: openai.OpenAI) -> Iterator[openai.OpenAI]:
    """Yield a client of the same server for two answers that the client's own types do not allow.

    These are the null as the reason of a streamed completion's chunks, which clients need to know that more follow,
    and the base64 of embeddings, which the client requests by default and decodes after the validation.
    """
    with openai.OpenAI(base_url=client.base_url, api_key=client.api_key, max_retries=0) as other:
        yield other


@contextmanager
def openai_client(*models: Model | ServedModel, **options: object) -> Iterator[openai.OpenAI]:
    """Serve models within a `with` block and yield the official client."""
    with running_server(list(models), **options) as server, client_of(server) as client:
        yield client


def stream_events(url: str, body: Json) -> list[Json | str]:
    """Return the events of a streamed answer as the server wrote them: JSON, or "[DONE]"."""
    answer = httpx.post(url, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def record_prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return a list to which the server appends the token ids of each prompt, once its reply is complete."""
    prompts: list[list[int]] = []
    note = running._note_completion

    def noting(call: Call, completion: Completion) -> None:
        n_prompt = len(completion.context_tokens) - len(completion.tokens)
        prompts.append(list(completion.context_tokens[:n_prompt]))
        note(call, completion)

    monkeypatch.setattr(running, "_note_completion", noting)
    return prompts
