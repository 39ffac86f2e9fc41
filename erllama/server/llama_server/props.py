"""`/props` and `/slots`: the settings of the server, and how many requests run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, NoBody, json_response
from erllama.server.llama_server.errors import ERRORS
from erllama.server.llama_server.settings import generation_settings
from erllama.server.models import ServedModel
from erllama.server.replies.running import completion_defaults

_TEMPLATE = "tokenizer.chat_template"


class AnyBody(msgspec.Struct):
    """The body of an endpoint that refuses what it asks for."""


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of this module."""
    return [
        Endpoint("GET", "/props", NoBody, answer_props, ERRORS, "Return the settings of the server.", False, False),
        Endpoint("POST", "/props", AnyBody, refuse_props, ERRORS, "Refuse new settings.", False, False),
        Endpoint("GET", "/slots", NoBody, answer_slots, ERRORS, "Return what runs now.", False, False),
        Endpoint("POST", "/slots/{id}", AnyBody, refuse_slot, ERRORS, "Refuse slot files.", False, False),
    ]


async def answer_props(call: Call, body: NoBody) -> Response:
    """Answer with the settings of the server, and of the model that the query names, or the first."""
    served = call.find_model(call.request.query_params.get("model"))
    model, info, options = served.model, served.model.info, call.server.options
    tokens = info.special_tokens
    values: Json = {
        "default_generation_settings": {
            "params": generation_settings(model, completion_defaults(served)),
            "n_ctx": model.n_ctx,
        },
        "total_slots": info.n_seq_max,
        "model_alias": served.name,
        "model_ftype": info.quantization,
        "model_path": served.file,
        "modalities": {"vision": False, "video": False, "audio": False},
        "endpoint_slots": options.slots,
        "endpoint_props": False,
        "endpoint_metrics": options.metrics,
        "ui": False,
        "chat_template": _chat_template(served),
        "bos_token": tokens["bos"].text if "bos" in tokens else "",
        "eos_token": tokens["eos"].text if "eos" in tokens else "",
        "build_info": served.fingerprint,
        "is_sleeping": False,
    }
    return json_response(values)


def _chat_template(served: ServedModel) -> str:
    template = served.defaults.get("chat_template")
    if template is None:
        template = served.model.metadata.get(_TEMPLATE, "")
    return str(template)


async def refuse_props(call: Call, body: AnyBody) -> Response:
    """Answer that settings do not change while the server runs."""
    raise ApiError("unsupported", "the settings of the server do not change while it runs; restart it")


async def answer_slots(call: Call, body: NoBody) -> Response:
    """Answer with one entry for each request that can run at once. Requests have no slot of their own."""
    if not call.server.options.slots:
        raise ApiError("unsupported", "this server does not show its slots; start it with the option `slots`")
    served = call.find_model(call.request.query_params.get("model"))
    n_slots, n_running = served.model.info.n_seq_max, served.model.queue_depth
    if call.request.query_params.get("fail_on_no_slot") and n_running >= n_slots:
        raise ApiError("unavailable", f"all {n_slots} slots are in use; try again", "no_slot", retry_after=1)
    slots: list[Mapping[str, object]] = [
        {"id": id, "n_ctx": served.model.n_ctx, "speculative": False, "is_processing": id < n_running}
        for id in range(n_slots)
    ]
    return json_response(slots)


async def refuse_slot(call: Call, body: AnyBody) -> Response:
    """Answer that slots are not saved to files and not erased: the cache keeps all prompts by itself."""
    raise ApiError("unsupported", "slots have no files here; the cache keeps the prompts of all requests by itself")
