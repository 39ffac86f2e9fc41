"""Requests that are made to harm a server, or the clients of other keys, cost it no more than others do."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

import erllama
from erllama.cache import Cache
from erllama.server import ApiKey
from erllama.server.conduct.errors import as_api_error
from support.engine_models import GatedBackend
from support.http_server import CHAT, RunningServer, chat_body, running

LONG = "the same words in every request " * 20


@pytest.fixture(scope="module")
def model() -> Iterator[erllama.Model]:
    with Cache(block_size=32) as cache, erllama.load_backend(GatedBackend(), id="stub", cache=cache) as model:
        yield model


@pytest.fixture(scope="module")
def server(model: erllama.Model) -> Iterator[RunningServer]:
    with running(model) as server:
        yield server


@pytest.mark.parametrize("tail", [b'\\"', b'"[', b"\\"])
def test_an_open_string_of_many_quotes_is_read_once(server: RunningServer, tail: bytes) -> None:
    body = b"[" * 200 + b'"' + tail * 200_000  # took hours when each quote began a search for the end
    answer = httpx.post(server.url + CHAT, content=body, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_brackets_within_strings_do_not_nest(server: RunningServer) -> None:
    text = '[{"' * 200 + "\\"
    assert server.post(chat_body(text, max_tokens=1)).status_code == 200


def test_a_salt_in_the_body_does_not_enter_that_of_another_key(model: erllama.Model) -> None:
    keys = (ApiKey(secret="salted", cache_salt="team"), ApiKey(secret="plain"))
    with running(model, keys=keys) as server:

        def cached(key: str, salt: str | None = None) -> int:
            body = chat_body("salted " + LONG, max_tokens=1, cache_salt=salt)
            usage = server.post(body, headers={"x-api-key": key}).json()["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        cached("salted")
        cached("salted", "inner")
        assert [cached("plain", salt) for salt in ("team", "4:team", "4:teaminner", "0:4:team")] == [0] * 4
        assert cached("plain", "team") > 0


def test_a_placeholder_beside_the_key_does_no_harm(model: erllama.Model) -> None:
    both = [("x-api-key", "right"), ("authorization", "Bearer none")]
    with running(model, keys=(ApiKey(secret="right"),)) as server:
        for headers in (both, [("x-api-key", "none"), ("authorization", "Bearer right")]):
            answer = httpx.post(server.url + CHAT, json=chat_body(max_tokens=1), headers=headers, timeout=60)
            assert answer.status_code == 200


@pytest.mark.parametrize("error", [erllama.errors.BackendError, erllama.errors.ModelFailed, OSError])
def test_failures_of_the_server_show_nothing_of_its_machine(error: type[Exception]) -> None:
    answer = as_api_error(error("cannot read /home/ada/models/secret.gguf"))
    assert answer.kind in ("internal", "unavailable")
    assert "/home" not in answer.message


def test_a_key_sees_its_models_alone(model: erllama.Model) -> None:
    with Cache() as cache, erllama.load_backend(GatedBackend(), id="second", cache=cache) as second:
        keys = (ApiKey(secret="one", models=("second",)),)
        with running([model, second], keys=keys) as server:
            unknown = server.post(chat_body(model="gone"), headers={"x-api-key": "one"})
            unnamed = server.post(chat_body(max_tokens=1, model=None), headers={"x-api-key": "one"})
    assert "second" in unknown.text
    assert "stub" not in unknown.text
    assert unnamed.json()["model"] == "second"
