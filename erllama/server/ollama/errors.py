"""Ollama's form of errors: a JSON object with the message as `error`."""

from __future__ import annotations

from collections.abc import Mapping

from erllama.server.conduct.errors import STATUS, ApiError
from erllama.server.replies.ndjson import encode_line


class OllamaErrors:
    """Ollama's form of errors. `code` and the numbers of a prompt that is too long are additions."""

    def status(self, error: ApiError) -> int:
        """Return the HTTP status. A request for what the model cannot do is 400, as in Ollama."""
        return 400 if error.kind == "unsupported" else STATUS[error.kind]

    def body(self, error: ApiError) -> Mapping[str, object]:
        """Return the JSON of the answer."""
        code = {} if error.code is None else {"code": error.code}
        return {"error": error.message, **code, **error.details}


ERRORS = OllamaErrors()


def encode_error(error: ApiError) -> bytes:
    """Return an error as a line of a stream."""
    return encode_line(ERRORS.body(error))
