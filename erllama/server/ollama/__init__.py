"""Ollama's API: chat, generate, embeddings, and the models.

`endpoints` lists its paths; `ERRORS` is its form of errors.
"""

from __future__ import annotations

from typing import Any

from erllama.server.endpoints import Endpoint
from erllama.server.ollama import chat, embeddings, generate, models
from erllama.server.ollama.errors import ERRORS

__all__ = ["ERRORS", "endpoints"]


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of the API."""
    return [*models.endpoints(), *chat.endpoints(), *generate.endpoints(), *embeddings.endpoints()]
