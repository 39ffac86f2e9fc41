"""Ollama's endpoints about its version and its models, and `HEAD /` for clients that probe."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import numpy as np
from starlette.responses import Response

import erllama
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.durations import FOREVER
from erllama.server.endpoints import Call, Endpoint, NoBody, json_response
from erllama.server.models import ConfiguredModel
from erllama.server.models.description import ModelDescription
from erllama.server.ollama.errors import ERRORS
from erllama.server.ollama.facts import capabilities, chat_template, created_at, details, summary, timestamp

# The version of Ollama whose API this is. Clients compare it with the oldest one that they work with.
API_VERSION = "0.12.11"

# For models that stay loaded. Clients show a time so far away as "forever".
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
        get("/api/ps", running, "Return the loaded models."),
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
    found = await call.server.models.describe_all(call.allowed_models())
    return json_response(
        {"models": [summary(model.name, each) | {"modified_at": created_at(model)} for model, each in found]}
    )


async def running(call: Call, body: NoBody) -> Response:
    """Answer with the loaded models and the memory that they take."""
    loaded = [model for model in call.allowed_models() if model.served is not None]
    found = await call.server.models.describe_all(loaded)
    return json_response({"models": [_running(model, each) for model, each in found]})


def _running(model: ConfiguredModel, description: ModelDescription) -> Json:
    info, seconds = description.info, model.expires_in
    if seconds is None and model.keep_alive < FOREVER:  # in use
        seconds = model.keep_alive
    vram = sum(each.n_bytes for each in info.buffers if not _is_host_memory(each.place))
    return summary(model.name, description) | {
        "size": info.weights_bytes + info.kv_bytes,
        "size_vram": vram,
        "expires_at": _NEVER if seconds is None else _in_future(seconds),
        "context_length": info.n_ctx,
    }


def _in_future(seconds: float) -> str:
    try:
        return timestamp(datetime.now(UTC) + timedelta(seconds=seconds))
    except OverflowError:
        return _NEVER


def _is_host_memory(place: str) -> bool:
    return place.startswith(("CPU", "AMX")) or place.endswith("_Host")


async def show(call: Call, body: ShowBody) -> Response:
    """Answer with a model's metadata, template and capabilities. Arrays are null unless `verbose` is true."""
    model = call.find_model(body.model or body.name)
    description = await call.server.models.describe(model)
    metadata = description.metadata
    values = {
        "details": details(description),
        "model_info": {
            name: _plain(value, bool(body.verbose))
            for name, value in metadata.items()
            if name != "tokenizer.chat_template"
        },
        "capabilities": capabilities(description),
        "modified_at": created_at(model),
    }
    template = chat_template(description)
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
