"""`/models/load` and `/models/unload`: loads and unloads models, as llama-server's router does.

`GET /models` lists them with their states. A load is answered when the model is loaded.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, json_response
from erllama.server.llama_server.errors import ERRORS
from erllama.server.models import ConfiguredModel
from erllama.server.replies.model_status import model_status


class ModelBody(msgspec.Struct):
    """The body of a load or an unload."""

    model: str


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of this module."""
    return [
        Endpoint("POST", "/models/load", ModelBody, load, ERRORS, "Load a model."),
        Endpoint("POST", "/models/unload", ModelBody, unload, ERRORS, "Unload a model once it is idle."),
    ]


async def load(call: Call, body: ModelBody) -> Response:
    """Load a model, and answer once it is loaded. If it is loaded already, answer at once."""
    await call.use_model(body.model)
    return _answer(call, call.find_model(body.model))


async def unload(call: Call, body: ModelBody) -> Response:
    """Unload a model once the requests that use it have ended, and answer at once."""
    model = call.find_model(body.model)
    if body.model not in (model.name, *model.aliases):  # the alias "*" is for requests
        known = ", ".join(each.name for each in call.allowed_models())
        raise ApiError("not_found", f"there is no model {body.model!r:.80}; this server has {known}", param="model")
    call.server.models.unload(model)
    return _answer(call, model)


def _answer(call: Call, model: ConfiguredModel) -> Response:
    return json_response({"success": True, "status": model_status(call.server, model)})
