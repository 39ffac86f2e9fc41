"""Anthropic's Messages API, and the list of models for its clients. `endpoints` lists its paths."""

from __future__ import annotations

from typing import Any

from erllama.server.anthropic import messages, models
from erllama.server.anthropic.errors import ERRORS
from erllama.server.endpoints import Endpoint

__all__ = ["ERRORS", "endpoints"]


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of the API."""
    return [*messages.endpoints(), *models.endpoints()]
