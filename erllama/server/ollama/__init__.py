"""Ollama's API. `endpoints` lists its paths."""

from __future__ import annotations

from erllama.server.endpoints import Endpoint

__all__ = ["endpoints"]


def endpoints() -> list[Endpoint]:
    """Return the endpoints of the API."""
    return []
