"""Tools for models whose chat template does not know them: declared, called and answered in plain messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from erllama._model.model import Model

_Message = Mapping[str, object]


def needs_tool_prompt(model: Model, options: Mapping[str, Any]) -> bool:
    """Return whether a chat has tools, and its template does not use them."""
    if not options.get("tools"):
        return False
    template = model._chat_requests.chats.templates.choose(options.get("chat_template"), tools=True)
    return not template.uses("tools")


def with_tool_prompt(
    model: Model, messages: Sequence[_Message], options: Mapping[str, Any]
) -> tuple[list[_Message], dict[str, Any]]:
    """Return messages that declare the tools, and options with a template that leaves that to them."""
    templates = model._chat_requests.chats.templates
    source = templates.choose(options.get("chat_template"), tools=True).source
    plain = [_plain(message) for message in messages]
    at = next((i for i, message in enumerate(plain) if message.get("role") in ("system", "user")), 0)
    first, text = plain[at], _declaration(options["tools"])
    content = first.get("content")
    if isinstance(content, str):
        joined = f"{content}\n\n{text}" if first.get("role") == "system" else f"{text}\n\n{content}"
        plain[at] = {**first, "content": joined}
    return plain, {**options, "chat_template": "{%- if tools -%}{%- endif -%}" + source, "tool_format": "json"}


def _declaration(tools: Sequence[_Message]) -> str:
    functions = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    call = '{"name": <name>, "arguments": <object>}'
    return f"You may call these functions:\n{functions}\nTo call one, reply with this JSON object alone: {call}"


def _plain(message: _Message) -> _Message:
    """Return a message without calls: a call is the assistant's text, and a result is the user's."""
    if message.get("role") in ("tool", "function"):
        return {"role": "user", "content": f"The function returned: {message.get('content', '')}"}
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    texts = [str(message.get("content") or ""), *map(_call_text, calls)]
    return {"role": "assistant", "content": "\n".join(filter(None, texts))}


def _call_text(call: Mapping[str, Any]) -> str:
    function = call.get("function", {})
    return f'{{"name": {json.dumps(function.get("name"))}, "arguments": {function.get("arguments", "{}")}}}'
