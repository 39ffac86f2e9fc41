"""The body of a chat completion, and what it asks of `Model.chat`."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from erllama._model.model import Model
from erllama._model.requests.options import ChatOptions
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.openai.bodies import MAX_CHOICES, StreamOptions
from erllama.server.replies.messages import continues_final_message, read_tools
from erllama.server.replies.sampling import SamplingBody
from erllama.server.replies.schemas import read_format
from erllama.server.replies.templates import thinking_options


class ChatBody(SamplingBody, kw_only=True):
    """The body of a chat completion: OpenAI's fields, llama-server's, and our own."""

    messages: list[Json]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Json] | None = None
    function_call: str | Json | None = None
    response_format: Json | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=100)] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Json | None = None
    prompt_cache_key: str | None = None

    @property
    def is_legacy(self) -> bool:
        """Whether the client uses `functions`, the form that `tools` replaced."""
        return bool(self.functions) and not self.tools

    @property
    def n_choices(self) -> int:
        """Number of replies."""
        return self.n or 1


def chat_options(body: ChatBody, model: Model) -> ChatOptions:
    """Return the options of `Model.chat` for a body.

    Raises:
        ApiError: fields contradict each other, or one has a value that it does not take.
    """
    options: dict[str, Any] = dict(body.sampling_options(model))
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if limit is not None and limit >= 0:  # llama-server's -1 is no limit
        options["max_tokens"] = limit
    options |= _tool_options(body)
    schema = read_format(body.response_format, "response_format", "json_schema")
    if schema is not None:
        if body.json_schema is not None or body.grammar is not None:
            other = "json_schema" if body.json_schema is not None else "grammar"
            message = f"response_format and {other} both constrain the reply; send one of them"
            raise ApiError("invalid_request", message, param=other)
        options["json_schema"] = schema
    if body.logprobs:
        options["logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        message = "top_logprobs has no effect without logprobs; send logprobs: true, too"
        raise ApiError("invalid_request", message, param="top_logprobs")
    if continues_final_message(body.add_generation_prompt, body.continue_final_message):
        options["continue_final_message"] = True
    elif body.add_generation_prompt is False:
        message = "add_generation_prompt is false, and a reply begins with it; leave it out, or continue a message"
        raise ApiError("invalid_request", message, param="add_generation_prompt")
    return {**options, **thinking_options(body.chat_template_kwargs, body.reasoning_effort)}  # type: ignore[typeddict-item]


def _tool_options(body: ChatBody) -> dict[str, Any]:
    """Return the options for tools, or for functions, which are tools that a reply calls one at a time."""
    tools, choice, parallel = read_tools(body.tools), body.tool_choice, body.parallel_tool_calls
    if body.is_legacy:
        tools = read_tools(body.functions, "functions")
        choice, parallel = body.function_call, False
        if isinstance(choice, dict):
            choice = {"type": "function", "function": choice}
    if tools is None:
        if choice in (None, "none", "auto"):
            return {}
        field = "function_call" if choice is body.function_call else "tool_choice"
        raise ApiError(
            "invalid_request", f"{field} requires a call, and there are no tools; send some", param=field
        )
    options: dict[str, Any] = {"tools": tools}
    if choice is not None:
        options["tool_choice"] = choice
    if parallel is not None:
        options["parallel_tool_calls"] = parallel
    return options
