"""Endpoints: how an API declares a path, and what happens to each of its requests.

An `Endpoint` names a path, the type of its body and the function that answers. `make_routes` wraps the function
with what all endpoints share: the key, the rate limit, the body, the error's form and the access log. Two APIs may
declare the same path if a header distinguishes their clients.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from erllama.server.conduct.bodies import decode_body, read_body
from erllama.server.conduct.disconnects import until_disconnect
from erllama.server.conduct.errors import ApiError, ErrorForm, as_api_error
from erllama.server.conduct.keys import ApiKey, combined_salt, find_key
from erllama.server.models import ConfiguredModel, ServedModel
from erllama.server.state import Server

B = TypeVar("B")


class NoBody(msgspec.Struct, frozen=True):
    """The body of an endpoint that takes none."""


@dataclass(slots=True)
class CallRecord:
    """What the access log and the metrics know of one call.

    Attributes:
        id: of the call; the header `x-request-id` has it.
        endpoint: the path as declared.
        model: the name of its model; "" if none.
        began: time at its start, of `time.monotonic`.
        first_token: seconds until the first token; None if there was none.
        prompt_tokens, cached_tokens, completion_tokens: of all its replies.
        tier: the slowest tier that a part of the prompt was read from; None for a cold prompt.
        queue_seconds, prefill_seconds, decode_seconds: of its last reply: waiting, up to the first token, and from
            there to the last.
        finish_reason: of its last reply; "" if none.
        error: code or kind of its error; "" if none.
        notes: remarks for the log, such as how the prompt differs from the previous one.
        prompt: the messages or the prompt, if the option `log_prompts` is set.
        load_seconds: how long it waited until its model was loaded.
        ending: adds the counts of replies that the client abandoned; None if the client read all of them.
        held: the model that stays loaded until the response has ended; None before a model is used.
        release: ends that hold.
    """

    id: str
    endpoint: str
    model: str = ""
    began: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    tier: str | None = None
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finish_reason: str = ""
    error: str = ""
    notes: list[str] = field(default_factory=list)
    prompt: object = None
    load_seconds: float = 0.0
    ending: asyncio.Task[None] | None = None
    held: ConfiguredModel | None = None
    release: Callable[[], None] | None = None


@dataclass(slots=True)
class Call:
    """One request to an endpoint.

    Attributes:
        request: with headers and query.
        server: the models and options.
        key: the client's; None if the server has no keys.
        record: for the access log. `replies.running` adds the counts of tokens.
        errors: the API's form of errors, for those after the first byte.
    """

    request: Request
    server: Server
    key: ApiKey | None
    record: CallRecord
    errors: ErrorForm

    def find_model(self, name: str | None) -> ConfiguredModel:
        """Return the model of a name, loaded or not; for None or "", the first that the key may use.

        Raises:
            ApiError: the model does not exist, or the key may not use it.
        """
        allowed = self.allowed_models()
        found = self.server.models.find(name, allowed)
        self.record.model = found.name
        if found not in allowed:
            names = ", ".join(each.name for each in allowed) or "no model"
            raise ApiError("permission", f"this key may use {names}, not {name!r}", "model_not_allowed")
        return found

    async def use_model(self, name: str | None, keep_alive: float | None = None) -> ServedModel:
        """Return the model of a name, as `find_model`, but loaded. It stays loaded until the response has ended.

        Args:
            keep_alive: seconds after its last request until it is unloaded, from now on; None to leave that.

        Raises:
            ApiError: the model does not exist, the key may not use it, it cannot be loaded, or it does not fit.
        """
        found, record, pool = self.find_model(name), self.record, self.server.models
        if record.held is found and found.served is not None:
            return found.served
        assert record.held is None, "one request uses one model: with two it could wait for itself"
        began = time.monotonic()
        served = await pool.use(found, keep_alive)
        record.load_seconds = time.monotonic() - began
        record.held, record.release = found, lambda: pool.release(found)
        return served

    def allowed_models(self) -> Sequence[ConfiguredModel]:
        """Return the models that the client's key may use, loaded or not."""
        names = self.key.models if self.key is not None else None
        return [model for model in self.server.models.models if names is None or model.name in names]

    def cache_salt(self, requested: str | None) -> str | None:
        """Return the salt of a request: the key's and the requested one, each of which separates."""
        return requested if self.key is None else combined_salt(self.key.cache_salt, requested)


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[B]):
    """A path of an API.

    Attributes:
        method, path: such as "POST" and "/v1/completions".
        body: the type of the body; NoBody for none.
        answer: returns the response. An exception becomes an error in the form of `errors`.
        errors: the API's form of errors.
        summary: one line for the OpenAPI document.
        public: whether it needs no key.
        computes: whether it uses a model, and so counts for rate limits.
        header: name of a header. The endpoint answers requests that have it; another endpoint of the same method
            and path, without `header`, answers the others. None for an endpoint that answers any request.
    """

    method: str
    path: str
    body: type[B]
    answer: Callable[[Call, B], Awaitable[Response]]
    errors: ErrorForm
    summary: str
    public: bool = False
    computes: bool = True
    header: str | None = None


def make_routes(endpoints: Iterable[Endpoint[Any]], server: Server) -> list[Route]:
    """Return a route for each method and path.

    Raises:
        ValueError: two endpoints have the same method, path and header.
    """
    groups: dict[tuple[str, str], list[Endpoint[Any]]] = {}
    for endpoint in endpoints:
        group = groups.setdefault((endpoint.method, endpoint.path), [])
        if endpoint.header in [other.header for other in group]:
            raise ValueError(f"two endpoints are {endpoint.method} {endpoint.path}; give one of them a header")
        group.append(endpoint)
    return [_make_route(group, server) for group in groups.values()]


def _make_route(endpoints: Sequence[Endpoint[Any]], server: Server) -> Route:
    """Return the route of endpoints with the same method and path."""
    ordered = sorted(endpoints, key=lambda endpoint: endpoint.header is None)  # the one for all requests is last

    async def handle(request: Request) -> Response:
        fitting = (each for each in ordered if each.header is None or each.header in request.headers)
        return await _handle(next(fitting, ordered[-1]), server, request)

    return Route(ordered[0].path, handle, methods=[ordered[0].method])


async def _handle(endpoint: Endpoint[B], server: Server, request: Request) -> Response:
    record = CallRecord(uuid.uuid4().hex, endpoint.path)
    request.state.record = record  # the access log writes it once the response has ended
    try:
        key = None if endpoint.public else find_key(request.headers, server.options.keys)
        request.state.key = key
        if key is not None and endpoint.computes:
            server.rate_limits.admit(key)
        call = Call(request, server, key, record, endpoint.errors)
        body = await _read(endpoint, server, request)
        if server.is_stopping and endpoint.computes:
            raise ApiError("unavailable", "the server is stopping; try again", "server_stopping", retry_after=1)
        response = await until_disconnect(request, endpoint.answer(call, body))
        response.headers.setdefault("x-request-id", record.id)
        return response
    except ClientDisconnect:
        record.error = "disconnected"
        return Response(status_code=499)  # nobody reads it
    except Exception as error:
        return error_response(endpoint.errors, as_api_error(error), record)


async def _read(endpoint: Endpoint[B], server: Server, request: Request) -> B:
    if isinstance(endpoint.body, type) and issubclass(endpoint.body, NoBody):  # a body may be a list
        return endpoint.body()
    options = server.options
    body = await read_body(request, options.max_body_bytes, options.body_timeout)
    return await decode_body(body, endpoint.body, options.max_json_depth)


def error_response(form: ErrorForm, error: ApiError, record: CallRecord | None = None) -> Response:
    """Return the answer for an error, in an API's form."""
    if record is not None:
        record.error = error.code or error.kind
        error.request_id = record.id
    headers = {"retry-after": str(error.retry_after)} if error.retry_after is not None else {}
    if error.request_id:  # Anthropic's clients read the second one
        headers |= {"x-request-id": error.request_id, "request-id": error.request_id}
    if error.kind == "authentication":
        headers["www-authenticate"] = "Bearer"
    return json_response(form.body(error), error.status or form.status(error), headers)


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with JSON."""
    return Response(msgspec.json.encode(value), status, headers, "application/json")
