"""Requests of the forms that Open WebUI sends, in OpenAI's API and in Ollama's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from support.chat.scripted_model import model_replying, user
from support.http_server import running_server

TITLE = user("### Task:\nGenerate a concise title.\n<chat_history>\nUSER: hi\nASSISTANT: hello\n</chat_history>")


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with model_replying("hello", "bye") as model, running_server(model) as server:
        headers = {"authorization": "Bearer any", "x-openwebui-user-name": "someone"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
            yield client


def lines(answer: httpx.Response) -> list[Any]:
    """Return the JSON of a streamed answer: lines, or events."""
    assert answer.status_code == 200, answer.text
    texts = [line.removeprefix("data: ") for line in answer.text.splitlines()]
    return [json.loads(text) for text in texts if text.startswith("{")]


def test_openai_models_chats_and_titles(client: httpx.Client) -> None:
    (listed,) = client.get("/v1/models").json()["data"]
    body = {"model": listed["id"], "stream": True, "stream_options": {"include_usage": True}}
    messages = [user("hi")]
    cached = []
    for reply in ("hello", "bye"):
        chunks = lines(client.post("/v1/chat/completions", json={**body, "messages": messages}))
        texts = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
        assert "".join(texts) == reply
        cached.append(chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"])
        messages += [{"role": "assistant", "content": reply}, user("go on")]
    assert cached[0] == 0 < cached[1]
    title = {"model": listed["id"], "messages": [TITLE], "stream": False, "max_completion_tokens": 1000}
    answer = client.post("/v1/chat/completions", json=title).json()
    assert answer["choices"][0]["message"]["content"] == "hello"


def test_ollama_models_chats_and_titles(client: httpx.Client) -> None:
    assert client.get("/api/version").json()["version"]
    (listed,) = client.get("/api/tags").json()["models"]
    messages = [user("hi")]
    for reply in ("hello", "bye"):
        body = {"model": listed["model"], "messages": messages, "options": {}, "stream": True}
        chunks = lines(client.post("/api/chat", json=body))
        assert "".join(chunk["message"]["content"] for chunk in chunks) == reply
        assert chunks[-1]["done"]
        messages += [{"role": "assistant", "content": reply}, user("go on")]
    title = {"model": listed["model"], "messages": [TITLE], "stream": False, "options": {"num_predict": 1000}}
    assert client.post("/api/chat", json=title).json()["message"]["content"] == "hello"
