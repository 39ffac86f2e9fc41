"""The models of a server in Anthropic's form, as its client lists and retrieves them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import anthropic
import httpx
import pytest

import erllama
from erllama.engine.backends.stub import StubBackend
from erllama.server import ApiKey
from support.anthropic_clients import client_of
from support.http_server import running_server

NAMES = ["one", "two", "three"]


@contextmanager
def client_of_three(**options: object) -> Iterator[anthropic.Anthropic]:
    """Serve three models, within a `with` block."""
    with ExitStack() as stack:
        models = [stack.enter_context(erllama.load_backend(StubBackend(), id=name)) for name in NAMES]
        server = stack.enter_context(running_server(models, **options))
        yield stack.enter_context(client_of(server.url, api_key="secret"))


def names(client: anthropic.Anthropic, **options: object) -> list[str]:
    return [model.id for model in client.models.list(**options)]  # type: ignore[arg-type]


def test_the_client_lists_all_models_page_by_page() -> None:
    with client_of_three() as client:
        assert names(client) == NAMES
        assert names(client, limit=1) == NAMES
        assert names(client, limit=2, after_id="one") == ["two", "three"]
        assert names(client, before_id="three") == ["one", "two"]
        page = client.models.list(limit=1, before_id="three")
        assert (page.first_id, page.last_id, page.has_more) == ("two", "two", True)


def test_a_model_has_its_limits_and_lifecycle() -> None:
    with client_of_three() as client:
        model = client.models.retrieve("two")
    assert (model.id, model.display_name, model.lifecycle) == ("two", "two", "active")
    assert model.max_input_tokens == model.max_tokens == StubBackend().limits.n_ctx
    assert model.created_at.tzinfo is not None


def test_a_key_lists_only_its_models() -> None:
    with client_of_three(keys=(ApiKey(secret="secret", models=("three",)),)) as client:
        assert names(client) == ["three"]
        with pytest.raises(anthropic.NotFoundError):
            client.models.retrieve("one")


def test_an_unknown_model_or_page_is_an_error_of_anthropics_form() -> None:
    with client_of_three() as client:
        with pytest.raises(anthropic.NotFoundError) as caught:
            client.models.retrieve("four")
        assert caught.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
        for wrong in ({"limit": 0}, {"after_id": "four"}):
            with pytest.raises(anthropic.BadRequestError):
                names(client, **wrong)


def test_other_clients_get_openais_list() -> None:
    with client_of_three() as client:
        url = str(client.base_url).rstrip("/")
        answer = httpx.get(f"{url}/v1/models", timeout=60.0).json()
    assert answer["object"] == "list"
    assert [model["id"] for model in answer["data"]] == NAMES
