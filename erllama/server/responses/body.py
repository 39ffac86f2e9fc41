"""The body of `POST /v1/responses`, and the options of `Model.chat` that it asks for."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from erllama._model.model import Model
from erllama._model.requests.options import ChatOptions, TemplateOptions
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.replies.sampling import SamplingBody
from erllama.server.replies.schemas import read_format
from erllama.server.replies.templates import thinking_options
from erllama.server.responses.tools import Tools, read_tool_choice

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED_REASONING = "reasoning.encrypted_content"


class ReasoningOptions(msgspec.Struct):
    """`reasoning`: whether and how long the model thinks, and whether the thinking is a summary, too."""

    effort: str | None = None
    summary: str | None = None


class TextOptions(msgspec.Struct):
    """`text`: the form of the reply."""

    format: Json | None = None
    verbosity: str | None = None


class ResponseBody(SamplingBody, kw_only=True):
    """The body of a request for a response: OpenAI's fields, llama-server's, and our own."""

    input: str | list[Json] | None = None
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    include: list[str] | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=100)] | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    chat_template_kwargs: Json | None = None
    background: bool | None = None
    conversation: str | Json | None = None
    prompt: Json | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer has log-probabilities."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    @property
    def wants_encrypted_reasoning(self) -> bool:
        """Whether reasoning items have `encrypted_content`."""
        return ENCRYPTED_REASONING in (self.include or ())

    @property
    def wants_summary(self) -> bool:
        """Whether reasoning items have a summary. A local model writes none, so it is the thinking itself."""
        return self.reasoning is not None and self.reasoning.summary not in (None, "none")

    def check(self) -> None:
        """Raise ApiError if the body asks for what this server does not have."""
        if self.background:
            message = "background responses are not supported; send stream instead"
            raise ApiError("invalid_request", message, "unsupported_parameter", "background")
        if self.conversation is not None:
            message = "conversations are not supported; send previous_response_id or the items instead"
            raise ApiError("invalid_request", message, "unsupported_parameter", "conversation")
        if self.prompt is not None:
            message = "prompt templates are stored by OpenAI; send the text as instructions instead"
            raise ApiError("invalid_request", message, "unsupported_parameter", "prompt")


def chat_options(body: ResponseBody, tools: Tools, model: Model) -> ChatOptions:
    """Return the options of `Model.chat` for a body.

    Raises:
        ApiError: `tool_choice` or `text.format` is invalid.
    """
    options: dict[str, Any] = dict(body.sampling_options(model))
    if body.max_output_tokens is not None:
        options["max_tokens"] = body.max_output_tokens
    choice = read_tool_choice(body.tool_choice, tools)
    if choice.functions:
        options["tools"] = choice.functions
        if body.parallel_tool_calls is not None:
            options["parallel_tool_calls"] = body.parallel_tool_calls
    if choice.tool_choice is not None and (choice.functions or choice.tool_choice not in ("auto", "none")):
        options["tool_choice"] = choice.tool_choice  # a call that is required without tools is an error
    schema = read_format(body.text.format if body.text is not None else None, "text.format")
    if schema is not None:
        options["json_schema"] = schema
    if body.wants_logprobs:
        options["logprobs"] = body.top_logprobs or 0
    return {**options, **template_options(body)}  # type: ignore[typeddict-item]


def template_options(body: ResponseBody) -> TemplateOptions:
    """Return the options of `Model.chat` that choose how the template renders."""
    effort = body.reasoning.effort if body.reasoning is not None else None
    return thinking_options(body.chat_template_kwargs, effort)
