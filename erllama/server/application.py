"""The ASGI application: every endpoint of every API, and what surrounds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from erllama._model.model import Model
from erllama.server import anthropic, llama_server, ollama, openai, responses
from erllama.server.conduct.access_log import AccessLog
from erllama.server.conduct.errors import ApiError
from erllama.server.conduct.hosts import HostCheck
from erllama.server.conduct.signing_key import load_signing_key
from erllama.server.endpoints import Endpoint, error_response
from erllama.server.models import ModelPool, ServedModel
from erllama.server.openai.errors import ERRORS
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
    return Server(ModelPool(served), options, load_signing_key(options.data_dir))


def all_endpoints() -> list[Endpoint]:
    """Return the endpoints of all APIs."""
    apis = (openai, responses, anthropic, llama_server, ollama)
    return [endpoint for api in apis for endpoint in api.endpoints()]


def make_app(server: Server) -> ASGIApp:
    """Return the application of a server."""
    routes = [endpoint.route(server) for endpoint in all_endpoints()]
    options = server.options
    middleware = [Middleware(AccessLog), Middleware(HostCheck, options.allowed_hosts)]
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
