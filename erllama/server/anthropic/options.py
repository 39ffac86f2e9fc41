"""The options of `Model.chat` for a body of Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Mapping

from erllama._model.requests.options import ChatOptions, TemplateOptions
from erllama._types import Messages
from erllama.server.anthropic.bodies import MessagesBody, Thinking, ToolChoice
from erllama.server.anthropic.conversation import read_tools
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.models import ServedModel

_EFFORTS: Mapping[str, str] = {"xhigh": "high", "max": "high"}  # templates know low, medium and high


def template_options(body: MessagesBody, messages: Messages) -> TemplateOptions:
    """Return the options that change the prompt.

    Args:
        messages: the conversation as `Model.chat` takes it. A reply continues a last message of the assistant.
    """
    options: TemplateOptions = {}
    tools = read_tools(body.tools)
    if tools:
        options["tools"] = tools
    if messages[-1]["role"] == "assistant":
        options["continue_final_message"] = True
    thinking = _thinks(body.thinking, messages)
    if thinking is not None:
        options["thinking"] = thinking
    effort = body.output_config.effort if body.output_config is not None else None
    if effort is not None:
        options["template_args"] = {"reasoning_effort": _EFFORTS.get(effort, effort)}
    return options


def chat_options(body: MessagesBody, served: ServedModel, messages: Messages, signing_key: bytes) -> ChatOptions:
    """Return all options; arguments as for `template_options`.

    Args:
        signing_key: signs thinking.
    """
    options: dict[str, object] = {**body.sampling_options(served.model), **template_options(body, messages)}
    options["thinking_signing_key"] = signing_key
    if body.max_tokens is not None:
        options["max_tokens"] = body.max_tokens
    if body.stop_sequences:
        options["stop"] = body.stop_sequences
    budget = body.thinking.budget_tokens if body.thinking is not None and body.thinking.type == "enabled" else None
    if budget is not None and served.can_think:
        options["thinking_budget_tokens"] = budget
    choice = body.tool_choice
    if choice is not None and ("tools" in options or choice.type in ("any", "tool")):
        options["tool_choice"] = _tool_choice(choice)
        options["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if body.output_config is not None and body.output_config.format is not None:
        options["json_schema"] = body.output_config.format.schema
    return options  # type: ignore[return-value]


def _thinks(thinking: Thinking | None, messages: Messages) -> bool | None:
    """Return whether the model thinks; None for the default of its template."""
    if thinking is None:
        return None
    if thinking.type == "between_tools":
        content = messages[-1]["content"]
        return isinstance(content, list) and any(block["type"] == "tool_result" for block in content)
    return thinking.type != "disabled"


def _tool_choice(choice: ToolChoice) -> str | Json:
    if choice.type != "tool":
        return {"type": choice.type}
    if choice.name is None:
        raise ApiError("invalid_request", "tool_choice.name is missing; send the tool's", param="tool_choice.name")
    return {"type": "tool", "name": choice.name}
