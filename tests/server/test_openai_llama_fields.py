"""Fields of llama-server that OpenAI's endpoints take and answer with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

import erllama
from erllama.engine.backends.llama_library import llama_ffi
from erllama.server import ServedModel
from support.chat.scripted_model import model_replying
from support.cli import write_replying_model
from support.http_server import serve_command
from support.llama_server import client_of, post
from support.openai_server import USER

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PATHS = (CHAT, COMPLETIONS)


@pytest.fixture
def client() -> Iterator[TestClient]:
    """A client of a model that replies "hi" and ends."""
    with model_replying("hi") as model, client_of(ServedModel(model)) as client:
        yield client


def body(path: str, **fields: object) -> dict[str, Any]:
    start: dict[str, Any] = {"messages": [USER]} if path == CHAT else {"prompt": "a\t"}
    return {**start, **fields}


def text_of(path: str, answer: Any) -> str:  # noqa: ANN401
    choice = answer["choices"][0]
    text: str = choice["message"]["content"] if path == CHAT else choice["text"]
    return text


@pytest.mark.parametrize("path", PATHS)
def test_ignore_eos_continues_to_the_limit(client: TestClient, path: str) -> None:
    ended = post(client, path, **body(path, max_tokens=8))
    assert (ended["choices"][0]["finish_reason"], ended["usage"]["completion_tokens"]) == ("stop", 2)
    longer = post(client, path, **body(path, max_tokens=8, ignore_eos=True))
    assert (longer["choices"][0]["finish_reason"], longer["usage"]["completion_tokens"]) == ("length", 8)


@pytest.mark.parametrize("path", PATHS)
def test_a_bias_of_a_text_applies_to_its_tokens(client: TestClient, path: str) -> None:
    for bias in ({"Z": 100, "h": -100}, [["Z", 100], ["h", False]]):
        answer = post(client, path, **body(path, max_tokens=2, logit_bias=bias))
        assert text_of(path, answer) == "ZZ"


@pytest.mark.parametrize("path", PATHS)
def test_the_usage_chunk_has_timings(client: TestClient, path: str) -> None:
    fields = body(path, stream=True, stream_options={"include_usage": True})
    answer = client.post(path, json=fields)
    assert answer.text.rstrip().endswith("data: [DONE]")
    *_, last, _ = [line for line in answer.text.splitlines() if line]
    assert '"choices":[]' in last
    assert '"timings":{' in last
    assert '"predicted_n":2' in last


def test_the_fingerprint_names_the_build_of_libllama(tiny: erllama.Model) -> None:
    expected = f"{llama_ffi.build_info()['source']}-erllama-{erllama.__version__}"
    with client_of(tiny) as client:
        for path in PATHS:
            assert post(client, path, **body(path, max_tokens=1))["system_fingerprint"] == expected
        assert client.get("/props").json()["build_info"] == expected


def test_the_fingerprint_of_another_backend_names_no_libllama(client: TestClient) -> None:
    expected = f"erllama-{erllama.__version__}"
    assert post(client, CHAT, **body(CHAT))["system_fingerprint"] == expected


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/apply-template"])
def test_a_last_message_is_continued_or_followed(client: TestClient, path: str) -> None:
    messages = [USER, {"role": "assistant", "content": "h"}]
    both = {"add_generation_prompt": True, "continue_final_message": True}
    answer = client.post(path, json={"messages": messages, **both})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "continue_final_message"
    for start in (False, None):
        fields = {"messages": messages, "add_generation_prompt": start, "continue_final_message": True}
        answer = client.post(path, json=fields)
        assert answer.status_code == 200, answer.text
        if path == "/apply-template":
            assert answer.json()["prompt"].endswith("<|assistant|>\th")


def test_a_chat_begins_with_the_generation_prompt(client: TestClient) -> None:
    answer = client.post(CHAT, json=body(CHAT, add_generation_prompt=False))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "add_generation_prompt")


def test_the_command_shows_the_name_of_the_models_file(tmp_path: Path) -> None:
    path = write_replying_model(tmp_path / "little.gguf", "Hi")
    with serve_command(tmp_path, path, "--threads", 1, "--n-ctx", 512, "--in-process") as server:
        assert httpx.get(f"{server.url}/props", timeout=60).json()["model_path"] == "little.gguf"
