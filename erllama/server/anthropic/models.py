"""The models of a server in Anthropic's form, for `GET /v1/models` and `/v1/models/{id}` of its clients.

OpenAI's API has the same paths. `is_anthropic` distinguishes the clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from starlette.responses import Response

from erllama.server.anthropic.errors import ERRORS
from erllama.server.anthropic.messages import request_id_headers
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError, as_api_error
from erllama.server.endpoints import Call, error_response, json_response
from erllama.server.models import ServedModel

_DEFAULT_LIMIT, _MAX_LIMIT = 20, 1000  # Anthropic's


def is_anthropic(headers: Mapping[str, str]) -> bool:
    """Return whether a request is one of Anthropic's clients, which name the version of the API in a header."""
    return "anthropic-version" in headers


async def answer_list(call: Call) -> Response:
    """Answer with the models that the client's key may use, page by page; errors in Anthropic's form."""
    try:
        return json_response(list_models(call), headers=request_id_headers(call))
    except ApiError as error:
        return error_response(ERRORS, error, call.record)


async def answer_one(call: Call, name: str) -> Response:
    """Answer with one model; errors in Anthropic's form."""
    try:
        return json_response(model_json(call.find_model(name)), headers=request_id_headers(call))
    except ApiError as error:
        return error_response(ERRORS, as_api_error(error), call.record)


def list_models(call: Call) -> Json:
    """Return one page of the models.

    The query has `limit` (default 20, 1 to 1000), and `after_id` or `before_id`: the model next to the page.

    Raises:
        ApiError: one of these is wrong.
    """
    allowed = call.key.models if call.key is not None else None
    models = [each for each in call.server.models.models if allowed is None or each.name in allowed]
    query = call.request.query_params
    limit = _limit(query.get("limit"))
    after, before = query.get("after_id"), query.get("before_id")
    begin = 0 if after is None else _position(models, after, "after_id") + 1
    end = len(models) if before is None else _position(models, before, "before_id")
    page = models[max(begin, end - limit) : end] if before is not None else models[begin : min(begin + limit, end)]
    return {
        "data": [model_json(each) for each in page],
        "has_more": len(page) < end - begin,
        "first_id": page[0].name if page else None,
        "last_id": page[-1].name if page else None,
    }


def model_json(served: ServedModel) -> Json:
    """Return one model."""
    return {
        "type": "model",
        "id": served.name,
        "display_name": served.name,
        "created_at": datetime.fromtimestamp(served.created, UTC).isoformat().replace("+00:00", "Z"),
        "lifecycle": "active",
        "max_input_tokens": served.model.n_ctx,
        "max_tokens": served.model.n_ctx,
    }


def _limit(text: str | None) -> int:
    if text is None:
        return _DEFAULT_LIMIT
    if not text.isdecimal() or not 1 <= int(text) <= _MAX_LIMIT:
        raise ApiError("invalid_request", f"limit is {text!r:.40}; send 1 to {_MAX_LIMIT}", param="limit")
    return int(text)


def _position(models: list[ServedModel], name: str, param: str) -> int:
    for index, each in enumerate(models):
        if each.name == name:
            return index
    raise ApiError("invalid_request", f"{param} names no model: {name!r:.80}", param=param)
