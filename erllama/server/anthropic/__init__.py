"""Anthropic's Messages API. `endpoints` lists its paths; `models` has the forms for `/v1/models`."""

from __future__ import annotations

from erllama.server.anthropic import messages
from erllama.server.endpoints import Endpoint

__all__ = ["endpoints"]


def endpoints() -> list[Endpoint]:
    """Return the endpoints of the API."""
    return messages.endpoints()
