"""The endpoints of llama-server: health, settings, metrics, tokens, completions, embeddings, rankings,
adapters, and the loading of models.

`endpoints` lists its paths. `ERRORS` is its form of errors.
"""

from __future__ import annotations

from typing import Any

from erllama.server.endpoints import Endpoint
from erllama.server.llama_server import (
    adapters,
    completion,
    embedding,
    health,
    infill,
    metrics,
    models,
    props,
    rerank,
    tokens,
)
from erllama.server.llama_server.errors import ERRORS

__all__ = ["ERRORS", "endpoints"]


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of the API."""
    modules = (health, props, metrics, models, tokens, completion, infill, embedding, rerank, adapters)
    return [endpoint for module in modules for endpoint in module.endpoints()]
