"""Whether the server lives, and whether it can answer: for people, load balancers and orchestrators.

`/health` and `/readyz` answer 503 while the server stops, or while the processes of all models are being replaced.
A model that is not loaded counts as ready: a request loads it. `/livez` answers 200 as long as the server runs.
None of them needs a key, uses a model, or waits.
"""

from __future__ import annotations

from starlette.responses import Response

from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, NoBody, json_response
from erllama.server.llama_server.errors import ERRORS


def endpoints() -> list[Endpoint[NoBody]]:
    """Return the endpoints of this module."""
    ready = [
        Endpoint(
            "GET", path, NoBody, answer_ready, ERRORS, "Tell whether the server accepts requests.", True, False
        )
        for path in ("/health", "/v1/health", "/readyz")
    ]
    live = Endpoint("GET", "/livez", NoBody, answer_live, ERRORS, "Tell whether the server runs.", True, False)
    return [*ready, live]


async def answer_ready(call: Call, body: NoBody) -> Response:
    """Answer whether the server accepts requests now."""
    if call.server.is_stopping:
        raise ApiError("unavailable", "the server is stopping", "stopping")
    if not any(each.served is None or each.served.model.info.pid for each in call.server.models.models):
        raise ApiError("unavailable", "no model can answer now; try again", "model_restarting", retry_after=1)
    return json_response({"status": "ok"})


async def answer_live(call: Call, body: NoBody) -> Response:
    """Answer that the server runs."""
    return json_response({"status": "ok"})
