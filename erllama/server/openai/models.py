"""`GET /v1/models` and `GET /v1/models/{id}`: the models of the server.

The list has each model twice: in `data`, as OpenAI has it, with llama-server's `meta`; and in `models`, as Ollama
and llama-server have it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from erllama._model.info import ModelInfo
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, NoBody, json_response
from erllama.server.models import ConfiguredModel
from erllama.server.models.description import ModelDescription
from erllama.server.replies.model_status import model_status
from erllama.server.replies.openai_errors import ERRORS


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of this module."""
    # llama-server has both paths, and clients whose base URL has no version use the second one.
    lists = [
        Endpoint("GET", path, NoBody, list_models, ERRORS, "List the models.", computes=False)
        for path in ("/v1/models", "/models")
    ]
    one = Endpoint("GET", "/v1/models/{id:path}", NoBody, get_model, ERRORS, "Describe a model.", computes=False)
    return [*lists, one]


async def list_models(call: Call, _: NoBody) -> Response:
    """Answer with the models that the key may use, loaded or not."""
    found = await call.server.models.describe_all(call.allowed_models())
    values = {
        "object": "list",
        "data": [_entry(call, *each) for each in found],
        "models": [_listed(*each) for each in found],
    }
    return json_response(values)


async def get_model(call: Call, _: NoBody) -> Response:
    """Answer with one model. A name that only answers because the server has a single model is unknown here."""
    name = call.request.path_params["id"]
    for model in call.allowed_models():
        if name == model.name or name in model.aliases:
            return json_response(_entry(call, model, await call.server.models.describe(model)))
    known = ", ".join(model.name for model in call.allowed_models()) or "none"
    raise ApiError("not_found", f"there is no model {name!r}; this server has {known}", "model_not_found", "model")


def _entry(call: Call, model: ConfiguredModel, description: ModelDescription) -> Json:
    """Return a model as OpenAI has it, with llama-server's `meta` and `status`."""
    info = description.info
    meta = {
        "n_vocab": info.n_vocab,
        "n_ctx": info.n_ctx,
        "n_ctx_train": info.n_ctx_train,
        "n_embd": info.n_embd,
        "n_params": info.n_params,
        "size": info.file_bytes,
    }
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "erllama",
        "aliases": [alias for alias in model.aliases if alias != "*"],
        "meta": meta,
        "status": model_status(call.server, model),
    }


def _listed(model: ConfiguredModel, description: ModelDescription) -> Json:
    """Return a model as Ollama has it. Fields that only a registry of models knows are empty."""
    info = description.info
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": datetime.fromtimestamp(model.created, UTC).isoformat(),
        "size": info.file_bytes,
        "digest": "",
        "type": "model",
        "description": info.name,
        "tags": [],
        "parameters": "",
        "details": _details(info),
    }


def _details(info: ModelInfo) -> Json:
    return {
        "parent_model": "",
        "format": "gguf" if info.backend == "llama" else "",
        "family": info.architecture,
        "families": [info.architecture] if info.architecture else [],
        "parameter_size": _size(info.n_params) if info.n_params else "",
        "quantization_level": info.quantization,
    }


def _size(n_params: int) -> str:
    return f"{n_params / 1e9:.1f}B" if n_params >= 1e9 else f"{n_params / 1e6:.1f}M"
