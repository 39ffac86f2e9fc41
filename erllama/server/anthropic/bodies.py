"""Bodies of Anthropic's Messages API. A message and its token count have the same fields."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from erllama.server.conduct.bodies import Json
from erllama.server.replies.sampling import SamplingBody


class Thinking(msgspec.Struct):
    """`thinking`: whether the model thinks, and for how many tokens."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Meta(ge=0)] | None = None
    display: Literal["summarized", "omitted"] | None = None


class ToolChoice(msgspec.Struct):
    """`tool_choice`: whether the reply calls tools."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(msgspec.Struct):
    """`output_config.format`: the JSON schema that the text of a reply follows."""

    type: Literal["json_schema"]
    schema: Json


class OutputConfig(msgspec.Struct):
    """`output_config`: how much effort the reply takes, and its format."""

    effort: str | None = None
    format: OutputFormat | None = None


class MessagesBody(SamplingBody, kw_only=True):
    """The body of a message: Anthropic's fields, and the sampling options of the other APIs.

    `cache_control` is not declared, here and in blocks: the server caches every prefix by itself. `cache_control`
    reads the one of blocks.
    """

    messages: list[Json]
    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    stream: bool | None = None
    system: str | list[Json] | None = None
    stop_sequences: list[str] | None = None
    thinking: Thinking | None = None
    tools: list[Json] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    metadata: Json | None = None
