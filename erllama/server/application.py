"""The ASGI application: every endpoint of every API, and what surrounds them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Scope

from erllama._model.model import Model
from erllama.cache import Cache
from erllama.errors import CacheKeyError, OptionError
from erllama.server import anthropic, llama_server, ollama, openai, page, responses
from erllama.server.conduct.access_log import AccessLog
from erllama.server.conduct.errors import ApiError, ErrorForm
from erllama.server.conduct.hosts import HostCheck
from erllama.server.conduct.signing import signing_key
from erllama.server.conduct.upgrades import RefuseUpgrades
from erllama.server.endpoints import Endpoint, error_response, make_routes
from erllama.server.models import ModelPool, ServedModel
from erllama.server.openapi import document_endpoint
from erllama.server.replies.openai_errors import ERRORS
from erllama.server.settings.options import ServerOptions
from erllama.server.state import Server
from erllama.server.stored_responses import ResponseStore

log = logging.getLogger("erllama.server")

# llama-server has these endpoints of OpenAI without the prefix, too, with errors in its own form.
_ALSO_WITHOUT_PREFIX = ("/v1/chat/completions", "/v1/responses")


def app(models: Model | ServedModel | Iterable[Model | ServedModel], **options: object) -> ASGIApp:
    """Return an ASGI application that serves loaded models.

    Args:
        models: one or several. Clients name a model by its `id`. A single one answers under any name.
        options: of `ServerOptions`.

    Raises:
        OptionError: there is no model, two have the same name, or an option is wrong.
    """
    return make_app(make_server(models, ServerOptions.of(options)))


def make_server(
    models: ModelPool | Model | ServedModel | Iterable[Model | ServedModel], options: ServerOptions
) -> Server:
    """Return the state of a server of these models."""
    if not isinstance(models, ModelPool):
        given = [models] if isinstance(models, Model | ServedModel) else list(models)
        models = ModelPool([each if isinstance(each, ServedModel) else ServedModel(each) for each in given])
    for key in options.keys:
        key.check_names([model.name for model in models.models])
    cache = models.cache
    return Server(models, options, signing_key(cache), responses=_open_responses(options, cache))


def _open_responses(options: ServerOptions, cache: Cache) -> ResponseStore:
    """Return the stored responses: in `state_dir`, or in the cache's first disk directory, or in memory."""
    n = options.max_stored_responses
    if options.state_dir is not None:
        return ResponseStore(n, options.state_dir, key_file=cache.key_file)
    for status in cache.tiers():
        if status.tier == "disk" and not status.read_only and status.error is None:
            try:
                return ResponseStore(n, status.location, key_file=cache.key_file)
            except (OptionError, CacheKeyError) as error:
                log.warning("%s; they are in memory until the server stops", error)
                break
    return ResponseStore(n)


def all_endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of all APIs."""
    apis = (openai, responses, anthropic, llama_server, ollama, page)
    found = [endpoint for api in apis for endpoint in api.endpoints()]
    known = {each.path for each in found}
    shorter = [_without_prefix(each) for each in found if each.path in _ALSO_WITHOUT_PREFIX]
    return found + [each for each in shorter if each.path not in known]


def _without_prefix(endpoint: Endpoint[Any]) -> Endpoint[Any]:
    return replace(endpoint, path=endpoint.path.removeprefix("/v1"), errors=llama_server.ERRORS)


def make_app(server: Server) -> ASGIApp:
    """Return the application of a server."""
    endpoints = all_endpoints()
    endpoints.append(document_endpoint(endpoints, ERRORS))
    options = server.options
    files = page.page_endpoints() if options.page else []  # not a part of the API, so not in its document
    routes = make_routes([*endpoints, *files], server)
    middleware = [
        Middleware(AccessLog, server.count),
        Middleware(HostCheck, options.allowed_hosts, options.cors_origins, _refuse),
        Middleware(RefuseUpgrades, _refuse),
    ]
    if options.cors_origins:
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=options.cors_origins, allow_methods=["*"], allow_headers=["*"])
        )
    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _no_endpoint})


def _error_form(path: str, headers: Headers) -> ErrorForm:
    """Return the form of errors of the API that a request calls, for errors that no endpoint makes."""
    if path.startswith("/api/"):
        return ollama.ERRORS
    return anthropic.ERRORS if "anthropic-version" in headers else ERRORS


def _refuse(scope: Scope, error: ApiError) -> Response:
    return error_response(_error_form(scope["path"], Headers(scope=scope)), error)


async def _no_endpoint(request: Request, error: Exception) -> Response:
    """Answer a path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    found = ApiError("not_found", f"there is no endpoint {path}", "not_found")
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{path} does not take {request.method}"
        found = ApiError("invalid_request", message, "method_not_allowed", status=HTTPStatus.METHOD_NOT_ALLOWED)
    return _refuse(request.scope, found)
