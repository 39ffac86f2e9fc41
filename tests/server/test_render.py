"""`/render` answers with the token ids of the prompt that the same request would compute, and computes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
from starlette.testclient import TestClient

import erllama
from erllama.server import ApiKey, ServedModel
from support.chat.scripted_model import model_replying
from support.llama_server import client_of, post
from support.openai_server import record_prompts

TEMPLATE = (
    "{{ style }}{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: \t{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi <there>"}]
FUNCTION = {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}
BODIES: Mapping[str, Mapping[str, object]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "tools": [{"type": "function", "function": FUNCTION}]},
    "/v1/completions": {"prompt": "Once upon a time\t"},
    "/v1/responses": {"input": MESSAGES, "instructions": "Think.", "tools": [{"type": "function", **FUNCTION}]},
    "/v1/messages": {"messages": MESSAGES[1:], "system": "Be brief.", "max_tokens": 9},
}
REFUSED: list[tuple[str, Mapping[str, object]]] = [
    ("/v1/chat/completions", {"messages": []}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 9000}]}),
    ("/v1/chat/completions", {"messages": MESSAGES, "tool_choice": "required"}),
    ("/v1/completions", {"prompt": [1, 99999]}),
    ("/v1/completions", {"prompt": "x", "grammar": "root ::= ("}),
    ("/v1/completions", {"prompt": "x", "suffix": "y"}),
    ("/v1/completions", {"prompt": ["x"] * 129}),
    ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}),
    ("/v1/responses", {"input": "x", "previous_response_id": "resp_none"}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "x" * 9000}], "max_tokens": 9}),
    ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}),
]


@pytest.fixture
def model() -> Iterator[erllama.Model]:
    with model_replying("Hello.", template=TEMPLATE) as model:
        yield model


@pytest.fixture
def client(model: erllama.Model) -> Iterator[TestClient]:
    with client_of(ServedModel(model, defaults={"template_args": {"style": "plain "}})) as client:
        yield client


def token_ids(answer: object) -> list[int]:
    first = answer[0] if isinstance(answer, list) else answer
    assert isinstance(first, dict)
    return list(first["token_ids"])


@pytest.mark.parametrize("path", BODIES)
def test_the_tokens_are_those_of_the_prompt(
    client: TestClient, model: erllama.Model, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    computed = record_prompts(monkeypatch)
    answer = client.post(f"{path}/render", json=BODIES[path])
    assert answer.status_code == 200, answer.text
    assert model.metrics.prompt_tokens == 0
    post(client, path, **BODIES[path])
    assert computed == [token_ids(answer.json())]


@pytest.mark.parametrize("path", BODIES)
def test_a_stream_has_the_same_prompt(client: TestClient, path: str) -> None:
    plain = post(client, f"{path}/render", **BODIES[path])
    streamed = post(client, f"{path}/render", **BODIES[path], stream=True)
    assert token_ids(streamed) == token_ids(plain)


@pytest.mark.parametrize(("path", "body"), REFUSED)
def test_what_an_endpoint_refuses_its_render_refuses(
    client: TestClient, path: str, body: Mapping[str, object]
) -> None:
    refused, rendered = client.post(path, json=body), client.post(f"{path}/render", json=body)
    assert refused.status_code >= 400
    assert rendered.status_code == refused.status_code
    assert error_of(rendered.json()) == error_of(refused.json())


def error_of(answer: dict[str, object]) -> dict[str, object]:
    error = answer["error"]
    assert isinstance(error, dict)
    return {name: value for name, value in error.items() if name != "request_id"}


def test_each_prompt_of_a_list_is_rendered(client: TestClient) -> None:
    answer = client.post("/v1/completions/render", json={"prompt": ["one", "three"]}).json()
    assert [len(each["token_ids"]) for each in answer] == [3, 5]


def test_a_stored_response_is_part_of_the_prompt(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    first = post(client, "/v1/responses", input="hi")
    body = {"input": "and?", "previous_response_id": first["id"]}
    computed = record_prompts(monkeypatch)
    rendered = token_ids(post(client, "/v1/responses/render", **body))
    post(client, "/v1/responses", **body)
    assert computed == [rendered]


def test_render_needs_a_key(model: erllama.Model) -> None:
    with client_of(ServedModel(model), keys=(ApiKey(secret="k"),)) as client:
        body = BODIES["/v1/chat/completions"]
        path = "/v1/chat/completions/render"
        assert client.post(path, json=body).status_code == 401
        assert client.post(path, json=body, headers={"authorization": "Bearer k"}).status_code == 200


def test_the_document_describes_render(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {f"{path}/render" for path in BODIES} <= paths.keys()
