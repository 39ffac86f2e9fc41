"""OpenAI's form of errors, which other APIs share."""

from __future__ import annotations

from erllama.server.replies.openai_errors import ERRORS, OpenAIErrors, encode_error

__all__ = ["ERRORS", "OpenAIErrors", "encode_error"]
