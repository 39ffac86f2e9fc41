"""`/lora-adapters`: the LoRA adapters of a model and their scales. No request loads a file."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, NoBody, json_response
from erllama.server.llama_server.errors import ERRORS


class AdapterScale(msgspec.Struct):
    """A new scale of an adapter.

    Attributes:
        id: place of the adapter in the list of loaded ones, from 0.
    """

    id: int
    scale: float


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of this module."""
    path = "/lora-adapters"
    return [
        Endpoint("GET", path, NoBody, answer_list, ERRORS, "List the adapters of a model.", computes=False),
        Endpoint("POST", path, list[AdapterScale], answer_scale, ERRORS, "Set their scales.", computes=False),
    ]


async def answer_list(call: Call, body: NoBody) -> Response:
    """Answer with the adapters of the model that the query names, or the first; none if it is not loaded."""
    served = call.find_model(call.request.query_params.get("model")).served
    adapters = served.model.adapters if served is not None else ()
    return json_response(
        [
            {"id": id, "path": adapter.path.name, "scale": adapter.scale, "task_name": "", "prompt_prefix": ""}
            for id, adapter in enumerate(adapters)
        ]
    )


async def answer_scale(call: Call, body: list[AdapterScale]) -> Response:
    """Set the scales of adapters, for requests from now on. Those that the body does not name get 0."""
    adapters = (await call.use_model(call.request.query_params.get("model"))).model.adapters
    for each in body:
        if not 0 <= each.id < len(adapters):
            known = f"the ids are 0 to {len(adapters) - 1}" if adapters else "the model has no adapters"
            raise ApiError("invalid_request", f"there is no adapter {each.id}; {known}", param="id")
    scales = {each.id: each.scale for each in body}
    for id, adapter in enumerate(adapters):
        adapter.scale = scales.get(id, 0.0)
    return json_response({"success": True})
