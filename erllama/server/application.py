"""The ASGI application: every endpoint of every API, and what surrounds them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from erllama._model.model import Model
from erllama.errors import OptionError
from erllama.server import anthropic, llama_server, ollama, openai, responses
from erllama.server.conduct.access_log import AccessLog
from erllama.server.conduct.errors import ApiError
from erllama.server.conduct.hosts import HostCheck
from erllama.server.conduct.signing import signing_key
from erllama.server.endpoints import Endpoint, error_response
from erllama.server.models import ModelPool, ServedModel
from erllama.server.openai.errors import ERRORS
from erllama.server.openapi import document_endpoint
from erllama.server.options import ServerOptions
from erllama.server.state import Server


def app(models: Model | ServedModel | Iterable[Model | ServedModel], **options: object) -> ASGIApp:
    """Return an ASGI application that serves loaded models.

    Args:
        models: one or several. Clients name a model by its `id`. A single one answers under any name.
        options: of `ServerOptions`.

    Raises:
        OptionError: there is no model, two have the same name, or an option is wrong.
    """
    return make_app(make_server(models, ServerOptions.of(options)))


def make_server(models: Model | ServedModel | Iterable[Model | ServedModel], options: ServerOptions) -> Server:
    """Return the state of a server of these models."""
    given = [models] if isinstance(models, Model | ServedModel) else list(models)
    served = [each if isinstance(each, ServedModel) else ServedModel(each) for each in given]
    if len(served) == 1 and not served[0].aliases:
        served = [ServedModel(served[0].model, ("*",), served[0].special_tokens_in_content)]
    pool = ModelPool(served)
    _check_keys(options, pool)
    return Server(pool, options, signing_key(pool.models[0].model.cache))


def _check_keys(options: ServerOptions, pool: ModelPool) -> None:
    """Raise OptionError if a key names a model that does not exist: its client could use no model."""
    known = [served.name for served in pool.models]
    for key in options.keys:
        for name in key.models or ():
            if name not in known:
                raise OptionError(f"the key {key.name!r} has the model {name!r}; the server has {', '.join(known)}")


def all_endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of all APIs."""
    apis = (openai, responses, anthropic, llama_server, ollama)
    return [endpoint for api in apis for endpoint in api.endpoints()]


def make_app(server: Server) -> ASGIApp:
    """Return the application of a server."""
    endpoints = all_endpoints()
    endpoints.append(document_endpoint(endpoints, ERRORS))
    routes = [endpoint.route(server) for endpoint in endpoints]
    options = server.options
    middleware = [
        Middleware(AccessLog, server.metrics.count),
        Middleware(HostCheck, options.allowed_hosts, options.cors_origins),
    ]
    if options.cors_origins:
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=options.cors_origins, allow_methods=["*"], allow_headers=["*"])
        )
    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _no_endpoint})


async def _no_endpoint(request: Request, error: Exception) -> Response:
    """Answer a path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        found = ApiError(
            "invalid_request", f"{request.url.path} does not take {request.method}", "method_not_allowed"
        )
        answer = error_response(ERRORS, found)
        answer.status_code = 405
        return answer
    return error_response(ERRORS, ApiError("not_found", f"there is no endpoint {request.url.path}", "not_found"))
