"""Ollama's API. `endpoints` lists its paths."""

from __future__ import annotations

from typing import Any

from erllama.server.endpoints import Endpoint

__all__ = ["endpoints"]


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of the API."""
    return []
