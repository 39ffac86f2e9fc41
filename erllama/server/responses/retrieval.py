"""Stored responses: `GET` and `DELETE /v1/responses/{id}`, and `GET /v1/responses/{id}/input_items`."""

from __future__ import annotations

import asyncio
import hashlib

from starlette.responses import Response

from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, NoBody, json_response
from erllama.server.replies.openai_errors import ERRORS
from erllama.server.responses.items import listed_item
from erllama.server.stored_responses import MissingResponseError, ResponseStore

_MAX_LISTED = 100
_LISTED = 20  # OpenAI's default


def endpoints() -> list[Endpoint[NoBody]]:
    """Return the endpoints of this module."""
    path, listed = "/v1/responses/{id}", "List the items that a stored response replies to."
    return [
        Endpoint("GET", path, NoBody, retrieve, ERRORS, "Return a stored response.", computes=False),
        Endpoint("DELETE", path, NoBody, delete, ERRORS, "Delete a stored response.", computes=False),
        Endpoint("GET", f"{path}/input_items", NoBody, list_items, ERRORS, listed, computes=False),
    ]


def owner_of(call: Call) -> str:
    """Return whose responses a call may see: those of its key; "" on a server without keys."""
    if call.key is None:
        return ""
    return hashlib.blake2b(call.key.secret.encode(), digest_size=16).hexdigest()


def not_found(id: str, requested: str) -> ApiError:
    """Return the error for a response that is not stored.

    Args:
        requested: the response that the client named, which may continue the missing one.
    """
    missing = f"the response {id!r:.80}" + (f", which {requested!r:.80} continues," if id != requested else "")
    message = f"{missing} is not stored; send the whole conversation as input"
    return ApiError("invalid_request", message, "previous_response_not_found", "previous_response_id")


def find_item(store: ResponseStore, id: str, owner: str) -> Json | None:
    """Return a stored item of a reply by its id; None if it is not stored."""
    parts = id.split("_")
    if len(parts) != 3:
        return None
    try:
        output = store.get(f"resp_{parts[1]}", owner).response["output"]
    except MissingResponseError:
        return None
    return next((item for item in output if item["id"] == id), None)


async def retrieve(call: Call, body: NoBody) -> Response:
    """Answer with a stored response."""
    if call.request.query_params.get("stream") == "true":
        message = "stored responses are not streamed; leave stream out"
        raise ApiError("invalid_request", message, "unsupported_parameter", "stream")
    id = call.request.path_params["id"]
    try:
        stored = await asyncio.to_thread(call.server.responses.get, id, owner_of(call))
    except MissingResponseError:
        raise _unknown(id) from None
    return json_response(stored.response)


async def delete(call: Call, body: NoBody) -> Response:
    """Delete a stored response."""
    id = call.request.path_params["id"]
    try:
        await asyncio.to_thread(call.server.responses.delete, id, owner_of(call))
    except MissingResponseError:
        raise _unknown(id) from None
    return json_response({"id": id, "object": "response", "deleted": True})


async def list_items(call: Call, body: NoBody) -> Response:
    """Answer with a page of the items that a stored response replies to, those of earlier responses included."""
    id, query = call.request.path_params["id"], call.request.query_params
    try:
        conversation = await asyncio.to_thread(call.server.responses.conversation, id, owner_of(call))
    except MissingResponseError as error:
        raise _unknown(error.id) from None
    items: list[Json] = []
    for stored in conversation:
        digits = stored.id.removeprefix("resp_")
        items += [listed_item(item, f"item_{digits}_{n}") for n, item in enumerate(stored.input)]
        items += stored.output if stored is not conversation[-1] else ()
    if query.get("order", "desc") == "desc":
        items.reverse()
    limit = _limit(query.get("limit"))
    begin = _index_after(items, query.get("after"))
    page = items[begin : begin + limit]
    return json_response(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else "",
            "last_id": page[-1]["id"] if page else "",
            "has_more": begin + limit < len(items),
        }
    )


def _limit(value: str | None) -> int:
    if value is None:
        return _LISTED
    if not value.isdecimal() or not 1 <= int(value[:4]) <= _MAX_LISTED:
        raise ApiError(
            "invalid_request", f"limit is {value!r:.20}; send a number from 1 to {_MAX_LISTED}", param="limit"
        )
    return int(value)


def _index_after(items: list[Json], id: str | None) -> int:
    """Return the index of the first item after the one with an id; 0 for None."""
    if id is None:
        return 0
    for index, item in enumerate(items):
        if item["id"] == id:
            return index + 1
    raise ApiError("invalid_request", f"after is {id!r:.80}, which is not the id of an item", param="after")


def _unknown(id: str) -> ApiError:
    return ApiError("not_found", f"there is no stored response {id!r:.80}", "response_not_found", "response_id")
