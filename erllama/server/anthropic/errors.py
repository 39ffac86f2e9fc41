"""Anthropic's form of errors, for answers and for events of a stream."""

from __future__ import annotations

from collections.abc import Mapping

from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import STATUS, ApiError, ErrorKind
from erllama.server.replies.sse import encode_event

_TYPES: Mapping[ErrorKind, str] = {
    "invalid_request": "invalid_request_error",
    "authentication": "authentication_error",
    "permission": "permission_error",
    "not_found": "not_found_error",
    "conflict": "invalid_request_error",
    "too_large": "request_too_large",
    "timeout": "timeout_error",
    "rate_limited": "rate_limit_error",
    "overloaded": "overloaded_error",
    "unavailable": "api_error",
    "unsupported": "invalid_request_error",
    "internal": "api_error",
}
# Kinds with a status of their own. Clients retry after 5xx, which does not help with what is unsupported.
_STATUS: Mapping[ErrorKind, int] = {"overloaded": 529, "unsupported": 400}


class AnthropicErrors:
    """Anthropic's form of errors."""

    def status(self, error: ApiError) -> int:
        """Return the HTTP status."""
        return _STATUS.get(error.kind, STATUS[error.kind])

    def body(self, error: ApiError) -> Json:
        """Return the JSON of the answer. `code` and the numbers of a long prompt are extensions."""
        values: Json = {"type": _TYPES[error.kind], "message": _message(error)}
        if error.code is not None:
            values["code"] = error.code
        return {"type": "error", "error": values | dict(error.details), "request_id": error.request_id}


ERRORS = AnthropicErrors()


def encode_error(error: ApiError) -> bytes:
    """Return an error as an event of a stream."""
    return encode_event(ERRORS.body(error), "error")


def _message(error: ApiError) -> str:
    """Return the text of an error. Agents compact their conversation when they read "prompt is too long"."""
    if error.code != "context_length_exceeded":
        return error.message
    n_tokens, n_ctx = error.details["n_prompt_tokens"], error.details["n_ctx"]
    return f"prompt is too long: {n_tokens} tokens > {n_ctx} maximum; {error.message}"
