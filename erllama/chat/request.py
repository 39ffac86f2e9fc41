"""The options of a chat request that other requests do not have.

The façade creates a `ChatRequest` from the caller's arguments; `erllama.chat.chats` turns it into a `Turn`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from erllama.chat.functions import tool_schemas
from erllama.engine import Markers


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A caller's conversation and the options that only chats have.

    Attributes:
        messages: as OpenAI's or Anthropic's clients write them.
        tools: likewise. Functions become their schemas.
        tool_choice: "auto", "none", "required" or a tool's name, or those clients' forms of it.
        parallel_tool_calls: whether one reply may call several tools.
        tool_format: name of the format in which the model writes calls; None for the template's.
        chat_template: a template's text, the name of one of the model's templates, or the path of a file; None for
            the model's default.
        template_args: further variables of the template.
        documents: the template's documents.
        continue_final_message: continue the last message, which is the assistant's, instead of answering.
        special_tokens_in_content: whether messages, except the assistant's, may spell out special tokens.
        thinking: whether the model thinks; None for the template's default.
        thinking_markers, tool_markers, tool_payload_markers: markers. Override the template's.
        thinking_budget, budget_message, signing_key: as for `PhaseOptions`.
    """

    messages: object
    tools: object = None
    tool_choice: object = None
    parallel_tool_calls: bool = True
    tool_format: str | None = None
    chat_template: str | Path | None = None
    template_args: Mapping[str, object] | None = None
    documents: Sequence[Mapping[str, object]] | None = None
    continue_final_message: bool = False
    special_tokens_in_content: bool = True
    thinking: bool | None = None
    thinking_markers: Markers | None = None
    tool_markers: Markers | None = None
    tool_payload_markers: Markers | None = None
    thinking_budget: int | None = None
    budget_message: str = ""
    signing_key: bytes | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tools", tool_schemas(self.tools))
