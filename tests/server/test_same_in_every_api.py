"""What the APIs have in common is the same in each of them: options, counts, and limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from starlette.testclient import TestClient

import erllama
from erllama.server import ServedModel
from erllama.testing.bert import write_bert
from support.chat.scripted_model import model_replying
from support.llama_server import client_of, post

TEMPLATE = (
    "{{ style }}{{ reasoning_effort }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: \t{% endif %}"
)
SYSTEM = "x-anthropic-billing-header: cc_version=2.1; cch=a5145;\nBe brief."
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "hi"}]
BODIES: Mapping[str, Mapping[str, object]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/responses": {"input": MESSAGES},
    "/v1/messages": {"messages": MESSAGES[1:], "system": SYSTEM},
}
COUNTS = {
    "/v1/chat/completions": "/v1/chat/completions/input_tokens",
    "/v1/responses": "/v1/responses/input_tokens",
    "/v1/messages": "/v1/messages/count_tokens",
}
LENGTHS = {"/v1/chat/completions": "max_tokens", "/v1/responses": "max_output_tokens", "/v1/messages": "max_tokens"}


@pytest.fixture
def model() -> Iterator[erllama.Model]:
    with model_replying("Hello.", "Hello.", template=TEMPLATE) as model:
        yield model


@pytest.fixture
def client(model: erllama.Model) -> Iterator[TestClient]:
    defaults = {"template_args": {"style": "plain "}}
    with client_of(ServedModel(model, defaults=defaults)) as client:
        yield client


def prompt_tokens(path: str, answer: dict[str, dict[str, int]]) -> int:
    usage = answer["usage"]
    if path == "/v1/messages":
        return sum(number for name, number in usage.items() if name != "output_tokens")
    return usage["prompt_tokens" if path == "/v1/chat/completions" else "input_tokens"]


@pytest.mark.parametrize("path", BODIES)
def test_a_count_is_the_length_of_the_prompt(client: TestClient, path: str) -> None:
    body = BODIES[path]
    expected = prompt_tokens(path, post(client, path, **body, **{LENGTHS[path]: 1}))
    assert post(client, COUNTS[path], **body)["input_tokens"] == expected


def test_a_shown_prompt_is_the_prompt_of_a_chat(client: TestClient) -> None:
    shown = post(client, "/apply-template", messages=MESSAGES, reasoning_effort="low")["prompt"]
    assert shown == "plain lowsystem: Be brief.\nuser: hi\nassistant: \t"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/apply-template"])
def test_whether_to_think_is_true_or_false(client: TestClient, path: str) -> None:
    body = BODIES.get(path, {"messages": MESSAGES})
    answer = client.post(path, json={**body, "chat_template_kwargs": {"enable_thinking": "no"}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "chat_template_kwargs.enable_thinking"


@pytest.mark.parametrize("path", BODIES)
def test_a_reply_may_be_kept_from_its_end(client: TestClient, path: str) -> None:
    body = {**BODIES[path], "ignore_eos": True, LENGTHS[path]: 40}
    answer = post(client, path, **body)
    usage = answer["usage"]
    assert usage["completion_tokens" if path == "/v1/chat/completions" else "output_tokens"] == 40


@pytest.mark.parametrize("path", BODIES)
def test_a_bias_of_a_long_text_is_refused(client: TestClient, path: str) -> None:
    answer = client.post(path, json={**BODIES[path], "logit_bias": [["x" * 3000, 1.0]]})
    assert answer.status_code == 400
    assert "3,000 characters" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/embeddings", "input"),
        ("/embedding", "content"),
        ("/api/embed", "input"),
        ("/rerank", "documents"),
        ("/completion", "prompt"),
    ],
)
def test_a_request_has_a_bounded_number_of_texts(client: TestClient, path: str, field: str) -> None:
    answer = client.post(path, json={"query": "q", field: ["x"] * 2049})
    assert answer.status_code == 400
    assert "2,049 texts" in answer.text


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embedding", "/api/embed", "/api/embeddings"])
def test_tokens_of_vectors_count_for_the_limit_of_a_key(tmp_path: Path, path: str) -> None:
    keys = (erllama.server.ApiKey(secret="k", tokens_per_minute=1),)
    with (
        erllama.Cache() as cache,
        erllama.load_model(write_bert(tmp_path / "m.gguf"), cache=cache, n_ctx=256, n_threads=1) as model,
        client_of(model, keys=keys) as client,
    ):
        body = {"input": "two words", "content": "two words", "prompt": "two words"}
        del body["input" if path in ("/embedding", "/api/embeddings") else "content"]
        statuses = [client.post(path, json=body, headers={"x-api-key": "k"}).status_code for _ in range(2)]
    assert statuses == [200, 429]


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/api/tags", "/slots"])
def test_every_answer_names_its_request(client: TestClient, path: str) -> None:
    assert len(client.get(path).headers["x-request-id"]) == 32


def test_a_limit_beyond_the_context_is_no_limit(tiny_gguf: Path) -> None:
    options = {"process": True, "n_ctx": 256, "n_threads": 1}
    bodies = {
        "/v1/chat/completions": {"messages": MESSAGES, "max_completion_tokens": 2**70},
        "/v1/completions": {"prompt": "Once", "max_tokens": 2**70},
        "/v1/responses": {"input": "hi", "max_output_tokens": 2**70},
        "/v1/messages": {"messages": MESSAGES[1:], "max_tokens": 2**70},
        "/completion": {"prompt": "Once", "n_predict": 2**70},
        "/api/chat": {"messages": MESSAGES, "stream": False, "options": {"num_predict": 2**70}},
    }
    with (
        erllama.Cache(ram=None) as cache,
        erllama.load_model(tiny_gguf, cache=cache, **options) as model,  # type: ignore[arg-type]
        client_of(model) as client,
    ):
        answers = {path: client.post(path, json={"seed": 1, **body}) for path, body in bodies.items()}
    assert {path: answer.status_code for path, answer in answers.items()} == dict.fromkeys(bodies, 200)


def test_empty_reasoning_beside_reasoning_does_not_count(client: TestClient) -> None:
    reply = {"role": "assistant", "content": "Hello.", "reasoning_content": "", "reasoning": "Hm."}
    post(client, "/v1/chat/completions", messages=[*MESSAGES, reply, MESSAGES[1]])
