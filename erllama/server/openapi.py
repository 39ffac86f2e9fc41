"""The OpenAPI document, made of the declared endpoints: `GET /openapi.json`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec
from starlette.responses import Response

import erllama
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ErrorForm
from erllama.server.endpoints import Call, Endpoint, NoBody, json_response

_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_SCHEMAS = "#/components/schemas/{name}"


def document_endpoint(described: Sequence[Endpoint[Any]], errors: ErrorForm) -> Endpoint[NoBody]:
    """Return the endpoint that answers with a document of these endpoints, and of itself."""

    @cache
    def document() -> Json:
        return describe([*described, endpoint])

    async def answer(call: Call, body: NoBody) -> Response:
        return json_response(document())

    endpoint = Endpoint(
        "GET", "/openapi.json", NoBody, answer, errors, "Describe the endpoints.", public=True, computes=False
    )
    return endpoint


def _any_value(type: type) -> Json:
    """Return the schema of a field of type `object`, which takes any JSON. msgspec calls this function."""
    if type is not object:
        raise TypeError(f"a body has a field of type {type.__name__}, which has no schema")
    return {"description": "Any JSON."}


def describe(endpoints: Sequence[Endpoint[Any]]) -> Json:
    """Return the OpenAPI 3.1 document of some endpoints."""
    bodies = [each.body for each in endpoints if not issubclass(each.body, NoBody)]
    schemas, components = msgspec.json.schema_components(bodies, schema_hook=_any_value, ref_template=_SCHEMAS)
    of_body = dict(zip(bodies, schemas, strict=True))
    paths: dict[str, Json] = {}
    for each in endpoints:
        path = _PARAMETER.sub(r"{\1}", each.path)
        operations = paths.setdefault(path, {})
        operations.setdefault(each.method.lower(), _operation(each, of_body.get(each.body)))
    return {
        "openapi": "3.1.0",
        "info": {"title": "erllama", "version": erllama.__version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _operation(endpoint: Endpoint[Any], body: Json | None) -> Json:
    described: Json = {
        "summary": endpoint.summary,
        "responses": {
            "200": {
                "description": "The answer. Endpoints that stream send events or lines instead of one document.",
                "content": {"application/json": {}, "text/event-stream": {}},
            },
            "default": {"description": "An error, in the form of the API.", "content": {"application/json": {}}},
        },
        "security": [] if endpoint.public else [{"bearer": []}, {"x-api-key": []}, {}],
    }
    names = _PARAMETER.findall(endpoint.path)
    if names:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return described
