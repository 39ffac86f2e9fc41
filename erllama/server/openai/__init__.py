"""OpenAI's API: chat completions, completions, embeddings and models. `endpoints` lists its paths."""

from __future__ import annotations

from typing import Any

from erllama.server.endpoints import Endpoint
from erllama.server.openai import chat

__all__ = ["endpoints"]


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of the API."""
    return [*chat.endpoints()]
