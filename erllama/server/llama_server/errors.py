"""llama-server's form of errors: the status as a number, a message, a type, and the numbers of a long prompt."""

from __future__ import annotations

from collections.abc import Mapping

from erllama.server.conduct.errors import STATUS, ApiError, ErrorKind
from erllama.server.replies.sse import encode_event

_TYPES: Mapping[ErrorKind, str] = {
    "invalid_request": "invalid_request_error",
    "authentication": "authentication_error",
    "permission": "permission_error",
    "not_found": "not_found_error",
    "conflict": "invalid_request_error",
    "too_large": "invalid_request_error",
    "timeout": "unavailable_error",
    "rate_limited": "unavailable_error",
    "overloaded": "unavailable_error",
    "unavailable": "unavailable_error",
    "unsupported": "not_supported_error",
    "internal": "server_error",
}


class LlamaServerErrors:
    """llama-server's form of errors."""

    def status(self, error: ApiError) -> int:
        """Return the HTTP status."""
        return STATUS[error.kind]

    def body(self, error: ApiError) -> Mapping[str, object]:
        """Return the JSON of the answer."""
        too_long = error.code == "context_length_exceeded"
        values: dict[str, object] = {
            "code": self.status(error),
            "message": error.message,
            "type": "exceed_context_size_error" if too_long else _TYPES[error.kind],
        }
        if error.param is not None:
            values["param"] = error.param
        return {"error": values | dict(error.details)}


ERRORS = LlamaServerErrors()


def encode_error(error: ApiError) -> bytes:
    """Return an error as an event of a stream."""
    return encode_event(ERRORS.body(error))
