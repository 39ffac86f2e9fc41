"""`GET /v1/models` and `/v1/models/{id}` for Anthropic's clients, which send the header `anthropic-version`.

OpenAI's API has the same paths for other clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from starlette.responses import Response

from erllama.server.anthropic.errors import ERRORS
from erllama.server.anthropic.messages import request_id_headers
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, NoBody, json_response
from erllama.server.models import ConfiguredModel
from erllama.server.models.description import ModelDescription

_DEFAULT_LIMIT, _MAX_LIMIT = 20, 1000  # Anthropic's
_HEADER = "anthropic-version"


def endpoints() -> list[Endpoint[NoBody]]:
    """Return the endpoints of this module."""
    return [
        Endpoint("GET", path, NoBody, answer, ERRORS, summary, computes=False, header=_HEADER)
        for path, answer, summary in (
            ("/v1/models", list_models, "List the models."),
            ("/v1/models/{id:path}", get_model, "Describe a model."),
        )
    ]


async def list_models(call: Call, _: NoBody) -> Response:
    """Answer with one page of the models that the client's key may use.

    The query has `limit` (default 20, 1 to 1000), and `after_id` or `before_id`: the model next to the page.

    Raises:
        ApiError: one of these is wrong.
    """
    models = call.allowed_models()
    query = call.request.query_params
    limit = _limit(query.get("limit"))
    after, before = query.get("after_id"), query.get("before_id")
    begin = 0 if after is None else _position(models, after, "after_id") + 1
    end = len(models) if before is None else _position(models, before, "before_id")
    page = models[max(begin, end - limit) : end] if before is not None else models[begin : min(begin + limit, end)]
    values = {
        "data": [_model_json(*each) for each in await call.server.models.describe_all(page)],
        "has_more": len(page) < end - begin,
        "first_id": page[0].name if page else None,
        "last_id": page[-1].name if page else None,
    }
    return json_response(values, headers=request_id_headers(call))


async def get_model(call: Call, _: NoBody) -> Response:
    """Answer with one model. A name that only answers because the server has a single model is unknown here."""
    name = call.request.path_params["id"]
    for model in call.allowed_models():
        if name == model.name or name in model.aliases:
            values = _model_json(model, await call.server.models.describe(model))
            return json_response(values, headers=request_id_headers(call))
    known = ", ".join(model.name for model in call.allowed_models()) or "none"
    raise ApiError("not_found", f"there is no model {name!r:.80}; this server has {known}", "model_not_found")


def _model_json(model: ConfiguredModel, description: ModelDescription) -> Json:
    return {
        "type": "model",
        "id": model.name,
        "display_name": model.name,
        "created_at": datetime.fromtimestamp(model.created, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": description.info.n_ctx,
        "max_tokens": description.info.n_ctx,
    }


def _limit(text: str | None) -> int:
    if text is None:
        return _DEFAULT_LIMIT
    if not text.isdecimal() or not 1 <= int(text) <= _MAX_LIMIT:
        raise ApiError("invalid_request", f"limit is {text!r:.40}; send 1 to {_MAX_LIMIT}", param="limit")
    return int(text)


def _position(models: Sequence[ConfiguredModel], name: str, param: str) -> int:
    for index, each in enumerate(models):
        if each.name == name:
            return index
    raise ApiError("invalid_request", f"{param} names no model: {name!r:.80}", param=param)
