"""Requests that compute vectors or scores: how many texts they may have, and their tokens in the access log."""

from __future__ import annotations

from collections.abc import Sequence

from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call

# OpenAI's. Each text has a vector of some KiB, and a body has room for millions of short texts.
_MAX_TEXTS = 2048


def check_number(texts: Sequence[object], field: str) -> None:
    """Raise ApiError if there are more texts than one request may have."""
    if len(texts) > _MAX_TEXTS:
        message = f"{field} has {len(texts):,} texts, and the limit is {_MAX_TEXTS:,}; send several requests"
        raise ApiError("invalid_request", message, param=field)


def note_tokens(call: Call, n_tokens: int) -> None:
    """Count the tokens of a request for the access log and for the limits of its key."""
    call.record.prompt_tokens += n_tokens
    if call.key is not None:
        call.server.rate_limits.charge(call.key, n_tokens)
