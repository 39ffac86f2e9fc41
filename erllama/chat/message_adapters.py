"""Changes to messages that the templates of some families require.

A template's source shows which changes it needs. `erllama.chat.conversation` applies them before it renders for a
model. `render_chat_template` renders messages unchanged.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence

from erllama._types import Message

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NINE = re.compile(r"[a-zA-Z0-9]{9}")
_DEVELOPER = re.compile(r"""(['"])developer\1""")  # the role, not a variable such as developer_token


def adapt_messages(messages: Sequence[Message], template: str) -> list[Message]:
    """Return normalized messages as a template with this source requires them."""
    adapted = list(messages)
    if not _DEVELOPER.search(template):
        adapted = [_with_known_role(message) for message in adapted]
    if "length != 9" in template or "alphanumeric" in template:
        adapted = [_with_nine_character_ids(message) for message in adapted]
    if "thinking" in template and "reasoning_content" not in template:
        adapted = [_without_thinking_beside_text(message) for message in adapted]
    return adapted


def encode_arguments(messages: Sequence[Message]) -> list[Message]:
    """Return messages with the arguments of calls as JSON text."""

    def encode(call: Mapping[str, object]) -> Message:
        function = call["function"]
        assert isinstance(function, dict)
        return {
            **call,
            "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)},
        }

    return [_change_calls(message, encode) for message in messages]


def alternate_roles(messages: Sequence[Message]) -> list[Message]:
    """Return messages with one system message at most, at the beginning, and no two of the user in a row.

    For templates that refuse anything else. Agents begin with several messages of the developer and the user. The
    texts of joined messages have an empty line between them, and a later system message becomes text of the user.
    """
    joined: list[Message] = []
    for message in messages:
        role, last = message["role"], joined[-1] if joined else None
        if role in ("system", "developer"):
            role = "system" if last is None or last["role"] == "system" else "user"
        if last is not None and last["role"] == role and role in ("system", "user"):
            joined[-1] = {**last, "content": f"{last['content']}\n\n{message['content']}"}
        else:
            joined.append({**message, "role": role} if role != message["role"] else message)
    return joined


def _change_calls(message: Message, change: Callable[[Mapping[str, object]], Message]) -> Message:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [change(call) for call in calls]}


def _with_known_role(message: Message) -> Message:
    """Return a developer's message as a system message, for templates that do not mention developers.

    Templates that write any role into the prompt would otherwise write one that the model was not trained on.
    """
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _with_nine_character_ids(message: Message) -> Message:
    """Replace ids of tool calls. Mistral's templates accept only ids of nine letters and digits."""
    message = _change_calls(message, lambda call: {**call, "id": _nine_character_id(str(call["id"]))})
    if isinstance(id := message.get("tool_call_id"), str):
        message = {**message, "tool_call_id": _nine_character_id(id)}
    return message


def _nine_character_id(id: str) -> str:
    if _NINE.fullmatch(id):
        return id
    number, digits = int.from_bytes(hashlib.sha256(id.encode()).digest(), "big"), ""
    for _ in range(9):
        number, digit = divmod(number, len(_DIGITS))
        digits += _DIGITS[digit]
    return digits


def _without_thinking_beside_text(message: Message) -> Message:
    """Remove thinking from a message with calls and text.

    Harmony's template refuses the combination. It reads thinking under two names.
    """
    if message.get("tool_calls") and message.get("content"):
        return {name: value for name, value in message.items() if name != "reasoning_content"}
    return message
