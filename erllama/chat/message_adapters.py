"""What some families' templates want messages to be, beside what all take. Found in a template's source.

Called before a conversation is rendered, by whoever renders for a model. A
template given to `render_chat_template` gets messages as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence

Message = dict[str, object]

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NINE = re.compile(r"[a-zA-Z0-9]{9}")


def as_template_takes(messages: Sequence[Message], template: str) -> list[Message]:
    """Messages in one form, as a template of this source has them."""
    found = list(messages)
    if "length != 9" in template or "alphanumeric" in template:
        found = [_with_ids_of_nine(message) for message in found]
    if "thinking" in template and "reasoning_content" not in template:
        found = [_without_thinking_beside_text(message) for message in found]
    return found


def with_arguments_as_text(messages: Sequence[Message]) -> list[Message]:
    """The arguments of calls as JSON text."""

    def as_text(call: Mapping[str, object]) -> Message:
        function = call["function"]
        assert isinstance(function, dict)
        return {
            **call,
            "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)},
        }

    return [_with_calls(message, as_text) for message in messages]


def _with_calls(message: Message, changed: object) -> Message:
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not callable(changed):
        return message
    return {**message, "tool_calls": [changed(call) for call in calls]}


def _with_ids_of_nine(message: Message) -> Message:
    """Mistral's templates take ids of nine letters and digits, and no others."""
    message = _with_calls(message, lambda call: {**call, "id": _nine(str(call["id"]))})
    if isinstance(id := message.get("tool_call_id"), str):
        message = {**message, "tool_call_id": _nine(id)}
    return message


def _nine(id: str) -> str:
    if _NINE.fullmatch(id):
        return id
    number, digits = int.from_bytes(hashlib.sha256(id.encode()).digest(), "big"), ""
    for _ in range(9):
        number, digit = divmod(number, len(_DIGITS))
        digits += _DIGITS[digit]
    return digits


def _without_thinking_beside_text(message: Message) -> Message:
    """Harmony's template takes no text beside thinking in a message that calls; it gets thinking by two names."""
    if message.get("tool_calls") and message.get("content"):
        return {name: value for name, value in message.items() if name != "reasoning_content"}
    return message
