"""Errors of the server, before an API gives them its own form.

`ApiError` is an answer other than success. `as_api_error` makes one of any exception. `ErrorForm` is what each API
implements: which status an error has, and its JSON.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Literal, Protocol

from erllama.errors import (
    DeadlineExceeded,
    Error,
    GrammarError,
    MemoryLimitExceeded,
    ModelFailed,
    ModelMismatch,
    ModelNotFound,
    ModelUnloaded,
    OptionError,
    PromptError,
    PromptTooLong,
    QueueFull,
    RequestCrashed,
    ServerLost,
    SessionBusy,
    Unsupported,
)

log = logging.getLogger("erllama.server")

ErrorKind = Literal[
    "invalid_request",
    "authentication",
    "permission",
    "not_found",
    "conflict",
    "too_large",
    "timeout",
    "rate_limited",
    "overloaded",
    "unavailable",
    "unsupported",
    "internal",
]

# The status of each kind. An API may have its own for some of them.
STATUS: Mapping[ErrorKind, HTTPStatus] = {
    "invalid_request": HTTPStatus.BAD_REQUEST,
    "authentication": HTTPStatus.UNAUTHORIZED,
    "permission": HTTPStatus.FORBIDDEN,
    "not_found": HTTPStatus.NOT_FOUND,
    "conflict": HTTPStatus.CONFLICT,
    "too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "timeout": HTTPStatus.REQUEST_TIMEOUT,
    "rate_limited": HTTPStatus.TOO_MANY_REQUESTS,
    "overloaded": HTTPStatus.TOO_MANY_REQUESTS,
    "unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "unsupported": HTTPStatus.NOT_IMPLEMENTED,
    "internal": HTTPStatus.INTERNAL_SERVER_ERROR,
}

# Seconds after which a client may try again, where the server cannot know it.
_RETRY_AFTER = 1


@dataclass(eq=False)
class ApiError(Exception):
    """An answer other than success.

    Attributes:
        kind: what went wrong.
        message: for the reader, with the value, the limit and the remedy.
        code: the error's name for programs, such as "context_length_exceeded"; None for an error without a name.
        param: path of the field of the body that is wrong, such as "messages[2].role"; None if it is not one field.
        retry_after: seconds after which the client may try again; None if trying again does not help.
        details: further fields for programs, such as the numbers of a prompt that is too long.
        request_id: the request that it answers; "" before it is answered.
        status: the HTTP status; None for that of the kind in the API's form.
    """

    kind: ErrorKind
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None
    details: Mapping[str, int] = field(default_factory=dict)
    request_id: str = ""
    status: HTTPStatus | None = None

    def __str__(self) -> str:
        return self.message


class ErrorForm(Protocol):
    """How one API reports errors."""

    def status(self, error: ApiError) -> int:
        """Return the HTTP status."""
        ...

    def body(self, error: ApiError) -> Mapping[str, object]:
        """Return the JSON of the answer."""
        ...


def as_api_error(error: Exception) -> ApiError:
    """Return the answer for an exception.

    Failures of the server are logged, and their texts stay in the log: these may name files and other machines.
    """
    message = str(error)
    match error:
        case ApiError():
            return error
        case PromptTooLong():
            details = {"n_prompt_tokens": error.n_tokens, "n_ctx": error.n_ctx}
            return ApiError("invalid_request", message, "context_length_exceeded", details=details)
        case GrammarError():
            return ApiError("invalid_request", message, "invalid_grammar")
        case OptionError() | PromptError():
            return ApiError("invalid_request", message)
        case QueueFull():
            return ApiError("overloaded", message, "queue_full", retry_after=_RETRY_AFTER)
        case SessionBusy():
            return ApiError("conflict", message, "session_busy", retry_after=_RETRY_AFTER)
        case DeadlineExceeded():
            return ApiError("timeout", message, "deadline_exceeded")
        case Unsupported():
            return ApiError("unsupported", message, "unsupported")
        case ModelNotFound():
            return ApiError("not_found", message, "model_not_found")
        case MemoryLimitExceeded():
            if error.is_busy:
                return ApiError("unavailable", message, "memory_in_use", retry_after=_RETRY_AFTER)
            return ApiError("unavailable", message, "model_too_large")
        case ModelUnloaded():
            return ApiError("unavailable", message, "model_unavailable", retry_after=_RETRY_AFTER)
        case ModelFailed() | ModelMismatch() | ServerLost():
            log.error("a request failed: %s", message)
            answer = "the model cannot compute now; the server's log has the cause"
            return ApiError("unavailable", answer, "model_unavailable", retry_after=_RETRY_AFTER)
        case RequestCrashed():
            return ApiError("internal", message, "request_crashed")
        case Error() if isinstance(error, ValueError):  # a chat that cannot be rendered
            return ApiError("invalid_request", message)
        case Error():
            log.error("a request failed: %s", message)
            return ApiError("internal", "the model could not compute the reply; the server's log has the cause")
        case _:
            log.exception("a request failed unexpectedly", exc_info=error)
            return ApiError("internal", "the server failed unexpectedly; its log has the cause")
