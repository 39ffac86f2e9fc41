"""Ollama's endpoints about its version and its models, and `HEAD /` for clients that probe."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
from starlette.responses import Response

import erllama
from erllama.server.conduct.bodies import Json
from erllama.server.endpoints import Call, Endpoint, NoBody, json_response
from erllama.server.models import ServedModel
from erllama.server.ollama.errors import ERRORS
from erllama.server.ollama.facts import capabilities, chat_template, details, loaded_at, summary

# The version of Ollama whose API this is. Clients compare it with the oldest one that they work with.
API_VERSION = "0.12.11"

# Models stay loaded. Clients show a time so far away as "forever".
_NEVER = "9999-12-31T23:59:59Z"


class ShowBody(msgspec.Struct, kw_only=True):
    """The body of `/api/show`. Older clients send `name`."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of this module."""

    def get(path: str, answer: Callable[[Call, NoBody], Awaitable[Response]], summary: str) -> Endpoint[NoBody]:
        return Endpoint("GET", path, NoBody, answer, ERRORS, summary, computes=False)

    return [
        Endpoint(
            "HEAD", "/", NoBody, heartbeat, ERRORS, "Answer that the server runs.", public=True, computes=False
        ),
        get("/api/version", version, "Return the version of the API."),
        get("/api/tags", tags, "Return the models."),
        get("/api/ps", running, "Return the loaded models, which are all."),
        Endpoint("POST", "/api/show", ShowBody, show, ERRORS, "Describe a model.", computes=False),
    ]


async def heartbeat(call: Call, body: NoBody) -> Response:
    """Answer without a body."""
    return Response()


async def version(call: Call, body: NoBody) -> Response:
    """Answer with the version of Ollama's API, and that of erllama."""
    return json_response({"version": API_VERSION, "erllama_version": erllama.__version__})


async def tags(call: Call, body: NoBody) -> Response:
    """Answer with the models that the client may use."""
    return json_response(
        {"models": [summary(each) | {"modified_at": loaded_at(each)} for each in call.allowed_models()]}
    )


async def running(call: Call, body: NoBody) -> Response:
    """Answer with the models and the memory that they take."""
    return json_response({"models": [_running(each) for each in call.allowed_models()]})


def _running(served: ServedModel) -> Json:
    info = served.model.info
    vram = sum(each.n_bytes for each in info.buffers if not _is_host_memory(each.place))
    return summary(served) | {
        "size": info.weights_bytes + info.kv_bytes,
        "size_vram": vram,
        "expires_at": _NEVER,
        "context_length": info.n_ctx,
    }


def _is_host_memory(place: str) -> bool:
    return place.startswith("CPU") or place.endswith("_Host")


async def show(call: Call, body: ShowBody) -> Response:
    """Answer with a model's metadata, template and capabilities. Arrays are null unless `verbose` is true."""
    served = call.find_model(body.model or body.name)
    metadata = served.model.metadata
    values = {
        "details": details(served),
        "model_info": {
            name: _plain(value, bool(body.verbose))
            for name, value in metadata.items()
            if name != "tokenizer.chat_template"
        },
        "capabilities": capabilities(served),
        "modified_at": loaded_at(served),
    }
    template = chat_template(served)
    if template:
        values["template"] = template
    license = metadata.get("general.license")
    if isinstance(license, str):
        values["license"] = license
    return json_response(values)


def _plain(value: object, verbose: bool) -> object:
    """Return a value of a model's metadata as JSON has it."""
    if isinstance(value, np.ndarray):
        return value.tolist() if verbose else None
    if isinstance(value, list | tuple):
        return list(value) if verbose else None
    return value.item() if isinstance(value, np.generic) else value
