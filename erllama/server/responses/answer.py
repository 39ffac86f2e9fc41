"""The response object: the options of the request, and the reply."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from erllama.chat.results import ChatCompletion
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError, ErrorKind
from erllama.server.responses.body import ResponseBody

# OpenAI's codes for a response that failed. The others are "server_error".
_ERROR_CODES: Mapping[ErrorKind, str] = {
    "invalid_request": "invalid_prompt",
    "rate_limited": "rate_limit_exceeded",
    "overloaded": "rate_limit_exceeded",
}


class Answer(NamedTuple):
    """One response.

    Attributes:
        id: of the response.
        model: the name of the model.
        created: time of the request, in seconds since 1970.
        body: the request.
        tools: its functions and namespaces, as the client sent them.
        is_stored: whether the server keeps it.
    """

    id: str
    model: str
    created: int
    body: ResponseBody
    tools: Sequence[Json]
    is_stored: bool

    def in_progress(self) -> Json:
        """Return the response as it is before the reply."""
        return self._response("in_progress", [])

    def done(self, output: Sequence[Json], completion: ChatCompletion, n_reasoning: int, incomplete: bool) -> Json:
        """Return the response with its reply.

        Args:
            output: the items of the reply.
            n_reasoning: tokens of its thinking.
            incomplete: whether a limit cut it short.
        """
        response = self._response("incomplete" if incomplete else "completed", output)
        if incomplete:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        return response | {"usage": _usage(completion, n_reasoning)}

    def failed(self, output: Sequence[Json], error: ApiError) -> Json:
        """Return the response with the error that ended it."""
        values = {"code": _ERROR_CODES.get(error.kind, "server_error"), "message": error.message}
        return self._response("failed", output) | {"error": values}

    def _response(self, status: str, output: Sequence[Json]) -> Json:
        body = self.body
        text, reasoning = body.text, body.reasoning
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": list(output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {
                "effort": reasoning.effort if reasoning is not None else None,
                "summary": reasoning.summary if reasoning is not None else None,
            },
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": self.is_stored,
            "temperature": body.temperature,
            "text": {
                "format": (text.format if text is not None else None) or {"type": "text"},
                "verbosity": text.verbosity if text is not None else None,
            },
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": list(self.tools),
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }


def _usage(completion: ChatCompletion, n_reasoning: int) -> Json:
    """Return the token counts. `cached_tier` is an extension: the slowest tier that a part was read from."""
    n_reply = len(completion.tokens)
    n_prompt = len(completion.context_tokens) - n_reply
    return {
        "input_tokens": n_prompt,
        "input_tokens_details": {
            "cached_tokens": completion.cache.tokens,
            "cache_write_tokens": completion.cache_delta.created,
            "cached_tier": completion.cache.tier,
        },
        "output_tokens": n_reply,
        "output_tokens_details": {"reasoning_tokens": n_reasoning},
        "total_tokens": n_prompt + n_reply,
    }
