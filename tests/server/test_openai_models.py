"""`/v1/models`, as the official client calls it, and the choice of an API by a header."""

from __future__ import annotations

import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.testclient import TestClient

from erllama.server import ApiKey, ServedModel, ServerOptions
from erllama.server.application import make_server
from erllama.server.endpoints import Call, Endpoint, NoBody, json_response, make_routes
from erllama.server.replies.openai_errors import ERRORS
from support.chat.scripted_model import model_replying
from support.http_server import running_server
from support.openai_server import client_of, openai_client


def test_all_models_are_listed() -> None:
    with model_replying("x") as one, model_replying("x") as two, openai_client(one, two) as client:
        listed = list(client.models.list())
        assert [model.id for model in listed] == [one.id, two.id]
        assert all(model.object == "model" and model.created > 0 for model in listed)


def test_a_model_is_described_by_its_name_or_alias() -> None:
    with model_replying("x") as model, openai_client(ServedModel(model, ("team/gpt",))) as client:
        for name in (model.id, "team/gpt"):
            assert client.models.retrieve(name).id == model.id
        with pytest.raises(openai.NotFoundError) as raised:
            client.models.retrieve("unknown")
        assert raised.value.code == "model_not_found"


def test_the_list_also_has_the_form_of_llama_server() -> None:
    with model_replying("x") as model, running_server(model) as server:
        for path in ("/v1/models", "/models"):
            values = httpx.get(server.url + path, timeout=60).json()
            assert [entry["id"] for entry in values["data"]] == [model.id]
            assert values["data"][0]["meta"]["n_ctx"] == model.n_ctx
            assert [(entry["name"], entry["model"]) for entry in values["models"]] == [(model.id, model.id)]
            assert "quantization_level" in values["models"][0]["details"]


def test_a_key_sees_the_models_that_it_may_use() -> None:
    with model_replying("x") as one, model_replying("x") as two:
        keys = (ApiKey(secret="all"), ApiKey(secret="few", models=(two.id,)))
        with running_server([one, two], keys=keys) as server:
            for secret, names in (("all", [one.id, two.id]), ("few", [two.id])):
                with client_of(server, secret) as client:
                    assert [model.id for model in client.models.list()] == names
            with client_of(server, "few") as client, pytest.raises(openai.NotFoundError):
                client.models.retrieve(one.id)


def test_a_header_chooses_between_two_apis_of_a_path() -> None:
    def answering(text: str, header: str | None) -> Endpoint[NoBody]:
        async def answer(call: Call, body: NoBody) -> Response:
            return json_response(text)

        return Endpoint("GET", "/both", NoBody, answer, ERRORS, "", header=header)

    default, other = answering("default", None), answering("other", "anthropic-version")
    with model_replying("x") as model:
        server = make_server(model, ServerOptions())
        for order in ([default, other], [other, default]):
            with TestClient(Starlette(routes=make_routes(order, server))) as client:
                assert client.get("/both").json() == "default"
                assert client.get("/both", headers={"Anthropic-Version": "2023-06-01"}).json() == "other"
        with pytest.raises(ValueError, match="two endpoints are GET /both"):
            make_routes([default, default], server)
