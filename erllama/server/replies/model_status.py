"""The state of models as the lists of the server show it, in llama-server's form with fields of our own."""

from __future__ import annotations

from erllama.server.conduct.bodies import Json
from erllama.server.models import ConfiguredModel
from erllama.server.state import Server


def model_status(server: Server, model: ConfiguredModel) -> Json:
    """Return the state of a model.

    `value` is "unloaded", "loading", "loaded" or "unloading". After a failed load, there are `failed` and `error`.
    """
    n_prompt, n_cached = server.metrics.prompt_tokens(model.name)
    status: Json = {
        "value": model.state,
        "memory_bytes": model.memory,
        "slots": model.n_slots,
        "slots_in_use": model.n_slots_in_use,
        "waiting": model.n_waiting,
        "in_use": model.n_running > 0,
        "expires_in": model.expires_in,
        "prompt_tokens": n_prompt,
        "cached_tokens": n_cached,
    }
    if model.state == "loading":
        status["progress"] = round(model.progress, 3)
    if model.error:
        status |= {"failed": True, "error": model.error}
    return status
