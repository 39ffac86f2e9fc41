"""`/props` and `/slots`: the settings of the server, and how many requests run."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, NoBody, json_response
from erllama.server.llama_server.errors import ERRORS
from erllama.server.llama_server.settings import generation_settings
from erllama.server.models import ConfiguredModel
from erllama.server.replies.running import completion_defaults


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
    model, options = call.find_model(call.request.query_params.get("model")), call.server.options
    served, description = model.served, await call.server.models.describe(model)
    info = description.info
    tokens = info.special_tokens
    defaults = completion_defaults(served) if served is not None else {}
    values: Json = {
        "default_generation_settings": {
            "params": generation_settings(served.model.adapters if served is not None else (), defaults),
            "n_ctx": info.n_ctx,
        },
        "total_slots": info.n_seq_max,
        "model_alias": model.name,
        "model_ftype": info.quantization,
        "model_path": model.file,
        "modalities": {"vision": False, "video": False, "audio": False},
        "endpoint_slots": options.slots,
        "endpoint_props": False,
        "endpoint_metrics": options.metrics,
        "ui": False,
        "chat_template": description.chat_template,
        "bos_token": tokens["bos"].text if "bos" in tokens else "",
        "eos_token": tokens["eos"].text if "eos" in tokens else "",
        "build_info": description.fingerprint,
        "is_sleeping": served is None,
    }
    return json_response(values)


async def refuse_props(call: Call, body: AnyBody) -> Response:
    """Answer that settings do not change while the server runs."""
    raise ApiError("unsupported", "the settings of the server do not change while it runs; restart it")


async def answer_slots(call: Call, body: NoBody) -> Response:
    """Answer with one entry for each request that can run at once, of the model that the query names, or of all.

    Requests have no slot of their own. A model that is not loaded has none.
    """
    if not call.server.options.slots:
        raise ApiError("unsupported", "this server does not show its slots; start it with the option `slots`")
    name = call.request.query_params.get("model")
    models = [call.find_model(name)] if name else call.allowed_models()
    slots = [slot for model in models for slot in _slots(model)]
    if call.request.query_params.get("fail_on_no_slot") and slots and all(slot["is_processing"] for slot in slots):
        raise ApiError("unavailable", f"all {len(slots)} slots are in use; try again", "no_slot", retry_after=1)
    return json_response(slots)


def _slots(model: ConfiguredModel) -> list[Json]:
    """Return the slots of a model, and its memory with each; none if it is not loaded."""
    served = model.served
    if served is None:
        return []
    loaded, memory = served.model, model.memory
    return [
        {
            "id": id,
            "n_ctx": loaded.n_ctx,
            "speculative": False,
            "is_processing": id < loaded.queue_depth,
            "model": model.name,
            "model_memory_bytes": memory,
        }
        for id in range(loaded.info.n_seq_max)
    ]


async def refuse_slot(call: Call, body: AnyBody) -> Response:
    """Answer that slots are not saved to files and not erased: the cache keeps all prompts by itself."""
    raise ApiError("unsupported", "slots have no files here; the cache keeps the prompts of all requests by itself")
