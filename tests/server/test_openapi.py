"""The OpenAPI document describes every endpoint, and no request that it allows, or nearly allows, is a 500.

ERLLAMA_FUZZ_N says how many requests each endpoint gets; `make fuzz`: 2000.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import erllama
from erllama.cache import Cache
from erllama.engine.backends.stub import StubBackend
from erllama.server.application import all_endpoints, make_app, make_server
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import NoBody
from erllama.server.openapi import describe, document_endpoint
from erllama.server.replies.openai_errors import ERRORS
from erllama.server.settings.options import ServerOptions
from support.cli import write_replying_model
from support.http_server import running, serve_command
from support.json_fuzz import ANYTHING, nearly

N_REQUESTS = int(os.environ.get("ERLLAMA_FUZZ_N", "8"))


@pytest.fixture(scope="module")
def model() -> Iterator[erllama.Model]:
    # A small context: every reply is short.
    backend = StubBackend(n_ctx=256)
    with Cache(block_size=32) as cache, erllama.load_backend(backend, id="stub", cache=cache) as model:
        yield model


def document() -> dict[str, Any]:
    endpoints = all_endpoints()
    return describe([*endpoints, document_endpoint(endpoints, ERRORS)])


OPERATIONS = [
    pytest.param(method, path, id=f"{method} {path}")
    for path, methods in document()["paths"].items()
    for method in methods
]


def test_the_document_is_served_and_names_every_endpoint(model: erllama.Model) -> None:
    with running(model) as server:
        served = httpx.get(server.url + "/openapi.json", timeout=120).json()
    assert served == document()
    assert served["openapi"].startswith("3.1")
    assert "/v1/chat/completions" in served["paths"]
    assert "/openapi.json" in served["paths"]


def test_every_reference_of_the_document_exists() -> None:
    described = document()
    schemas = described["components"]["schemas"]

    def check(value: object) -> None:
        if isinstance(value, dict):
            if "$ref" in value:
                assert value["$ref"].rsplit("/", 1)[1] in schemas
            for each in value.values():
                check(each)
        elif isinstance(value, list):
            for each in value:
                check(each)

    check(described)


def test_bodies_are_described_with_their_fields() -> None:
    described = document()
    content = described["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    name = content["application/json"]["schema"]["$ref"].removeprefix("#/components/schemas/")
    schema = described["components"]["schemas"][name]
    assert schema["required"] == ["messages"]
    assert {"temperature", "tools", "stream"} <= set(schema["properties"])


def test_parameters_of_paths_are_described() -> None:
    from erllama.server.endpoints import Call, Endpoint

    async def answer(call: Call, body: NoBody) -> Any:  # noqa: ANN401
        raise ApiError("not_found", "nothing")

    endpoint = Endpoint("GET", "/v1/things/{thing:path}", NoBody, answer, ERRORS, "Return a thing.")
    operation = describe([endpoint])["paths"]["/v1/things/{thing}"]["get"]
    assert operation["parameters"] == [
        {"name": "thing", "in": "path", "required": True, "schema": {"type": "string"}}
    ]


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_is_an_internal_error(
    method: str, path: str, model: erllama.Model, caplog: pytest.LogCaptureFixture
) -> None:
    described = document()
    operation = described["paths"][path][method]
    components = described["components"]["schemas"]
    content = operation.get("requestBody", {}).get("content", {})
    bodies = nearly(content["application/json"]["schema"], components) if content else st.none()
    names = [each["name"] for each in operation.get("parameters", ())]
    letters = st.characters(codec="ascii", exclude_categories=["Cc"])
    places = st.fixed_dictionaries({name: st.text(letters, min_size=1, max_size=9) for name in names})
    app = make_app(make_server(model, ServerOptions(keep_alive_seconds=600.0)))
    loop = asyncio.new_event_loop()

    async def ask(body: object, place: dict[str, str]) -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            target = path
            for name, value in place.items():
                target = target.replace(f"{{{name}}}", value.replace("/", "%2F").replace("?", "%3F"))
            return await client.request(method.upper(), target, json=body if content else None, timeout=60)

    @settings(max_examples=N_REQUESTS)
    @given(bodies, places)
    def check(body: object, place: dict[str, str]) -> None:
        caplog.clear()
        answer = loop.run_until_complete(ask(body, place))
        assert answer.status_code != 500, answer.text
        assert '"server_error"' not in answer.text
        unexpected = [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR]
        assert not unexpected, unexpected

    try:
        check()
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@given(st.binary(max_size=200) | ANYTHING.map(repr).map(str.encode))
@settings(max_examples=N_REQUESTS * 5)
def test_bytes_that_are_no_body_are_refused(raw: bytes) -> None:
    from erllama.server.conduct.bodies import decode_body
    from erllama.server.openai.chat import ChatBody

    with pytest.raises(ApiError) as error:
        asyncio.run(decode_body(raw, ChatBody, 20))
    assert error.value.kind == "invalid_request"


def test_schemathesis_finds_no_internal_error(tmp_path: Path) -> None:
    model_path = write_replying_model(tmp_path / "model.gguf", "Hi you")
    program = Path(sys.executable).with_name("schemathesis")
    with serve_command(tmp_path, model_path, "--threads", 1, "--n-ctx", 512) as server:
        url = f"{server.url}/openapi.json"
        # A model that does not rank answers 501.
        (tmp_path / "schemathesis.toml").write_text(
            'checks.not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "501"]'
        )
        phases = "coverage,fuzzing" if "ERLLAMA_FUZZ_N" in os.environ else "fuzzing"
        options = ["--checks", "not_a_server_error", "--phases", phases, "--seed", "1"]
        options += ["-n", str(N_REQUESTS)]
        finished = subprocess.run(
            [program, "run", url, *options], cwd=tmp_path, capture_output=True, text=True, timeout=3000, check=False
        )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-1000:]
    assert "unexpectedly" not in server.log.read_text()
