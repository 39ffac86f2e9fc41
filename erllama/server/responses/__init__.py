"""OpenAI's Responses API, /v1/responses. `endpoints` lists its paths.

Imports run one way: create -> retrieval, answer, output -> body, items -> tools, reasoning.
"""

from __future__ import annotations

from typing import Any

from erllama.server.endpoints import Endpoint
from erllama.server.responses import create, retrieval

__all__ = ["endpoints"]


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of the API."""
    return [*create.endpoints(), *retrieval.endpoints()]
