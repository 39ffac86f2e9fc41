"""Ollama's API when something is wrong: refused requests, clients that leave, and replies that fail or pause."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable

import httpx
import ollama
import pytest

import erllama
from support.chat.scripted_model import TEMPLATE, VOCABULARY, model_replying
from support.http_server import running_server
from support.ollama_server import WAIT, WaitingReplies, ollama_client
from support.scripted_backend import ScriptedBackend

QUESTION = [{"role": "user", "content": "hello?"}]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("chat", {"messages": [{"role": "user", "content": "x", "images": ["QUJD"]}]}, "messages[0].images"),
        ("generate", {"prompt": "x", "images": ["QUJD"]}, "images: "),
        ("generate", {"prompt": "x", "template": "{{ .Prompt }}"}, '"raw": true'),
        ("generate", {"prompt": "x", "suffix": "y", "context": [1]}, "suffix and context together"),
        ("generate", {"prompt": "x", "raw": True, "suffix": "y"}, "raw and suffix together"),
        ("generate", {"prompt": "x", "context": [99999999]}, "99999999"),
        ("generate", {"prompt": "x", "options": {"temperature": "hot"}}, "options.temperature"),
        ("generate", {"prompt": "x", "options": {"mirostat": 7}}, "mirostat"),
        ("generate", {"prompt": "x", "format": "xml"}, "format is 'xml'"),
        ("generate", {"prompt": "x", "think": "deeply"}, '"low", "medium", "high"'),
        ("generate", {"prompt": "x", "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("generate", {"prompt": "x", "keep_alive": [1]}, "keep_alive"),
        ("generate", {"prompt": 1}, "prompt"),
        ("chat", {"messages": [{"content": "x"}]}, "messages[0].role"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only text is supported"),
        ("embed", {}, "input"),
        ("embed", {"input": "x", "dimensions": 0}, "dimensions"),
    ],
)
def test_a_wrong_request_is_400_with_the_reason(path: str, body: dict[str, object], message: str) -> None:
    with ollama_client(model_replying("hello there")) as client:
        answer = client._client.post(f"/api/{path}", json=body)
        assert answer.status_code == 400
        assert message in answer.json()["error"]


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers() -> None:
    with ollama_client(WaitingReplies("a", "b", n_ctx=256).load()) as client:
        for body in ({"messages": [{"role": "user", "content": "x" * 500}]}, {"prompt": "x" * 500, "raw": True}):
            path = "chat" if "messages" in body else "generate"
            answer = client._client.post(f"/api/{path}", json=body)
            assert (answer.status_code, answer.json()["code"]) == (400, "context_length_exceeded")
            assert answer.json()["n_prompt_tokens"] >= 500
            assert answer.json()["n_ctx"] == 256
            assert "256" in answer.json()["error"]


def test_null_is_the_same_as_an_absent_field() -> None:
    nothing = dict.fromkeys(("format", "think", "keep_alive", "options", "logprobs", "top_logprobs", "tools"))
    with ollama_client(model_replying("hello there")) as client:
        body = {"messages": QUESTION, "stream": False, "model": None, "unknown": 1, **nothing}
        assert client._client.post("/api/chat", json=body).json()["message"]["content"] == "hello there"
        nothing |= dict.fromkeys(("suffix", "system", "template", "context", "raw", "images"))
        body = {"prompt": "x", "stream": False, **nothing}
        assert client._client.post("/api/generate", json=body).json()["response"] == "hello there"


@pytest.mark.parametrize("path", ["chat", "generate"])
def test_an_error_after_the_first_line_is_a_line_of_its_own(path: str) -> None:
    def fail_late(tokens: list[int]) -> int:
        if tokens[-1] == ord("b"):
            raise RuntimeError("broken")
        return ord("b") if tokens[-1] == ord("a") else ord("a")

    backend = ScriptedBackend(VOCABULARY, fail_late, chat_templates={"default": TEMPLATE})
    with ollama_client(erllama.load_backend(backend, cache=erllama.Cache())) as client:
        body = {"messages": QUESTION, "prompt": "hello?"}
        answer = client._client.post(f"/api/{path}", json=body)
        first, *_, last = [json.loads(line) for line in answer.text.splitlines()]
        assert answer.status_code == 200
        assert not first["done"]
        assert last["error"]
        with pytest.raises(ollama.ResponseError):
            list(client.chat("any", QUESTION, stream=True))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "erllama.server.access")
    # Long enough that only a cancelled one ends soon.
    waiting = WaitingReplies("hello", "x" * 3500, seconds=0.01)
    model = waiting.load()
    try:
        with running_server(model) as server:
            body = json.dumps({"messages": QUESTION, "stream": stream})
            url = httpx.URL(server.url)
            request = f"POST /api/chat HTTP/1.1\r\nhost: {url.host}\r\ncontent-length: {len(body)}\r\n\r\n{body}"
            with socket.create_connection((url.host, url.port or 80), timeout=WAIT) as connection:
                connection.sendall(request.encode())
                if stream:
                    assert connection.recv(20).startswith(b"HTTP/1.1 200")
                assert waiting.reached.wait(WAIT)
            wait_until(lambda: bool(model.metrics.finished))
            assert model.metrics.finished == {"cancelled": 1}
            wait_until(lambda: '"error":"disconnected"' in caplog.text)
    finally:
        waiting.released.set()
        model.unload()


def test_a_quiet_stream_is_kept_open_by_lines_without_text() -> None:
    waiting = WaitingReplies("hello", " there")
    with ollama_client(waiting.load(), keep_alive_seconds=0.05) as client:
        texts = []
        for part in client.chat("any", QUESTION, stream=True):
            texts.append(part.message.content)
            if waiting.reached.is_set() and texts[-2:] == ["", ""]:
                waiting.released.set()
        assert "".join(text or "" for text in texts) == "hello there"
        assert texts.count("") >= 3


def test_an_endpoint_that_does_not_exist_answers_in_ollamas_form() -> None:
    with ollama_client(model_replying("hello there")) as client:
        with pytest.raises(ollama.ResponseError, match="there is no endpoint /api/pull") as refused:
            client.pull("demo")
        assert refused.value.status_code == 404
        answer = client._client.get("/api/chat")
        assert (answer.status_code, answer.json()["error"]) == (405, "/api/chat does not take GET")
