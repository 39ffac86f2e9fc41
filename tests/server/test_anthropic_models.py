"""The models of a server in Anthropic's form, as its client lists and retrieves them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import TypeVar

import anthropic
import httpx2
import pytest
from starlette.applications import Starlette
from starlette.responses import Response

import erllama
from erllama.engine.backends.stub import StubBackend
from erllama.server import ApiKey
from erllama.server.anthropic.errors import ERRORS
from erllama.server.anthropic.models import answer_list, answer_one, is_anthropic
from erllama.server.application import make_server
from erllama.server.endpoints import Call, Endpoint, NoBody
from erllama.server.options import ServerOptions

T = TypeVar("T")
NAMES = ["one", "two", "three"]


async def _list(call: Call, body: NoBody) -> Response:
    assert is_anthropic(call.request.headers)
    return await answer_list(call)


async def _one(call: Call, body: NoBody) -> Response:
    return await answer_one(call, call.request.path_params["name"])


def ask(question: Callable[[anthropic.AsyncAnthropic], Awaitable[T]], **options: object) -> T:
    """Return what a client answers, that is connected with a server of three models."""

    async def run() -> T:
        endpoints = [
            Endpoint("GET", "/v1/models", NoBody, _list, ERRORS, "List."),
            Endpoint("GET", "/v1/models/{name}", NoBody, _one, ERRORS, "One."),
        ]
        server = make_server(models, ServerOptions.of(options))
        app = Starlette(routes=[endpoint.route(server) for endpoint in endpoints])
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app)) as http:
            client = anthropic.AsyncAnthropic(
                base_url="http://localhost",
                api_key="secret",
                http_client=http,
                max_retries=0,
                _strict_response_validation=True,
            )
            return await question(client)

    with ExitStack() as stack:
        models = [stack.enter_context(erllama.load_backend(StubBackend(), id=name)) for name in NAMES]
        return asyncio.run(run())


async def _names(client: anthropic.AsyncAnthropic, **options: object) -> list[str]:
    return [model.id async for model in client.models.list(**options)]  # type: ignore[arg-type]


def test_the_client_lists_all_models_page_by_page() -> None:
    assert ask(_names) == NAMES
    assert ask(lambda client: _names(client, limit=1)) == NAMES
    assert ask(lambda client: _names(client, limit=2, after_id="one")) == ["two", "three"]
    assert ask(lambda client: _names(client, before_id="three")) == ["one", "two"]


def test_a_page_names_its_ends() -> None:
    page = ask(lambda client: client.models.list(limit=1, before_id="three"))
    assert (page.first_id, page.last_id, page.has_more) == ("two", "two", True)


def test_a_model_has_its_limits_and_lifecycle() -> None:
    model = ask(lambda client: client.models.retrieve("two"))
    assert (model.id, model.display_name, model.lifecycle) == ("two", "two", "active")
    assert model.max_input_tokens == model.max_tokens == StubBackend().limits.n_ctx
    assert model.created_at.tzinfo is not None


def test_a_key_lists_only_its_models() -> None:
    key = ApiKey(secret="secret", models=("three",))
    assert ask(_names, keys=(key,)) == ["three"]
    with pytest.raises(anthropic.PermissionDeniedError):
        ask(lambda client: client.models.retrieve("one"), keys=(key,))


def test_an_unknown_model_or_page_is_an_error_of_anthropics_form() -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        ask(lambda client: client.models.retrieve("four"))
    assert caught.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    for wrong in ({"limit": 0}, {"after_id": "four"}):
        with pytest.raises(anthropic.BadRequestError):
            ask(lambda client, wrong=wrong: _names(client, **wrong))
