"""OpenAI's form of errors, for every API that answers in it.

llama-server's fields for a prompt that is too long are added.
"""

from __future__ import annotations

from collections.abc import Mapping

from erllama.server.conduct.errors import STATUS, ApiError, ErrorKind
from erllama.server.replies.sse import encode_event

_TYPES: Mapping[ErrorKind, str] = {
    "invalid_request": "invalid_request_error",
    "authentication": "authentication_error",
    "permission": "permission_error",
    "not_found": "not_found_error",
    "conflict": "conflict_error",
    "too_large": "invalid_request_error",
    "timeout": "timeout_error",
    "rate_limited": "rate_limit_error",
    "overloaded": "rate_limit_error",
    "unavailable": "unavailable_error",
    "unsupported": "not_supported_error",
    "internal": "server_error",
}


class OpenAIErrors:
    """OpenAI's form of errors."""

    def status(self, error: ApiError) -> int:
        """Return the HTTP status."""
        return STATUS[error.kind]

    def body(self, error: ApiError) -> Mapping[str, object]:
        """Return the JSON of the answer."""
        values = {"message": error.message, "type": _TYPES[error.kind], "param": error.param, "code": error.code}
        return {"error": values | dict(error.details)}


ERRORS = OpenAIErrors()


def encode_error(error: ApiError) -> bytes:
    """Return an error as an event of a stream."""
    return encode_event(ERRORS.body(error))
