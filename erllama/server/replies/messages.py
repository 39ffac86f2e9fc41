"""Messages and tools as clients send them, without what other servers' clients add.

The façade refuses unknown keys, since in a program they are mistakes. Over HTTP they are fields of newer APIs, so
they are removed here. Values that stay are the client's objects, unchanged: the template writes them into the
prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from erllama.server.conduct.bodies import Json, field_error
from erllama.server.conduct.errors import ApiError

_REASONING = frozenset({"reasoning_content", "reasoning", "thinking"})
# Keys that only messages of the assistant have. Clients send them empty in others.
_OF_ASSISTANT = _REASONING | {"tool_calls", "refusal", "function_call"}
_MESSAGE_KEYS = _OF_ASSISTANT | {"role", "content", "name", "tool_call_id"}
_CALL_KEYS = frozenset({"id", "type", "function"})
_FUNCTION_KEYS = frozenset({"name", "arguments"})
_TOOL_KEYS = frozenset({"name", "description", "parameters", "input_schema", "strict"})
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
T = TypeVar("T")


class _Part(msgspec.Struct):
    type: str
    text: str | None = None


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | Json | None = None


class _Call(msgspec.Struct):
    id: str | None = None
    type: str | None = None
    function: _Function | None = None


class _Message(msgspec.Struct):
    """The types of a message's fields. Values are checked, and the message stays as it is."""

    role: str
    content: str | list[str | _Part] | None = None
    name: str | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    refusal: str | None = None
    function_call: _Function | None = None


class _ToolFunction(msgspec.Struct):
    """The types of a tool's fields."""

    name: str
    description: str | None = None
    parameters: Json | None = None
    input_schema: Json | None = None
    strict: bool | None = None


class _Tool(msgspec.Struct):
    function: _ToolFunction


def read_messages(messages: Sequence[Json]) -> list[Json]:
    """Return messages of OpenAI's chat API as `Model.chat` takes them.

    Raises:
        ApiError: there is no message, or one has no role.
    """
    if not messages:
        raise ApiError("invalid_request", "messages is empty; send at least one", param="messages")
    return [_read_message(index, message) for index, message in enumerate(messages)]


def _read_message(index: int, message: Json) -> Json:
    role = message.get("role")
    if not isinstance(role, str):
        where = f"messages[{index}].role"
        raise ApiError("invalid_request", f"{where} is {role!r:.60}; send the name of a role", param=where)
    _check(message, _Message, f"messages[{index}]")
    read = {key: value for key, value in message.items() if key in _MESSAGE_KEYS and value is not None}
    for key in _REASONING & read.keys():
        if not read[key]:  # clients send one of these with a text, and another one empty
            del read[key]
    if role != "assistant":
        for key in _OF_ASSISTANT & read.keys():
            del read[key]
    if role != "tool" or not read.get("tool_call_id"):  # without an id, a result is that of the first open call
        read.pop("tool_call_id", None)
    if role != "assistant":
        read |= _joined_texts(read.get("content"))
    if isinstance(read.get("tool_calls"), list):
        read["tool_calls"] = [_read_call(call) for call in read["tool_calls"]]
    if not read.get("content") and not read.get("tool_calls") and "function_call" not in read:
        read["content"] = ""
    return read


def _joined_texts(content: object) -> Json:
    """Return the content of a message with several texts as one, with a line end between two, as llama-server does.

    Empty if it has other parts, or is one text: then it stays as it is.
    """
    if not isinstance(content, list) or len(content) < 2:
        return {}
    texts = [part if isinstance(part, str) else _text_of(part) for part in content]
    return {} if None in texts else {"content": "\n".join(text for text in texts if text)}


def _text_of(part: object) -> str | None:
    """Return the text of a part; None if it is not a text."""
    if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str):
        return None
    text: str = part["text"]
    return text


def _read_call(call: object) -> object:
    if not isinstance(call, Mapping):
        return call  # the façade refuses it
    read = {key: value for key, value in call.items() if key in _CALL_KEYS and value}
    if isinstance(read.get("function"), Mapping):
        read["function"] = {key: value for key, value in read["function"].items() if key in _FUNCTION_KEYS}
    return read


def read_tools(tools: Sequence[Json] | None, field: str = "tools") -> list[Json] | None:
    """Return the functions among the tools, as `Model.chat` takes them; None if no tool is a function.

    Args:
        field: the name of the body's field, for errors.

    Raises:
        ApiError: a field of a function has the wrong type.
    """
    read = []
    for index, tool in enumerate(tools or ()):
        if tool.get("type", "function") != "function":
            continue
        _check(tool, _Tool if "function" in tool else _ToolFunction, f"{field}[{index}]")
        function = tool.get("function", tool)
        known = {key: value for key, value in function.items() if key in _TOOL_KEYS and value is not None}
        read.append({"type": "function", "function": known})
    return read or None


def continues_final_message(add_generation_prompt: bool | None, continue_final_message: bool | None) -> bool:
    """Return whether the reply continues the last message, which is the assistant's, instead of following it.

    Raises:
        ApiError: both are asked for.
    """
    if add_generation_prompt and continue_final_message:
        message = "add_generation_prompt and continue_final_message exclude each other; send one of them"
        raise ApiError("invalid_request", message, param="continue_final_message")
    return bool(continue_final_message)


def _check(value: Json, type: type[T], path: str) -> None:
    """Raise ApiError, with a path, if a field has the wrong type."""
    try:
        msgspec.convert(value, type)
    except msgspec.ValidationError as error:
        raise field_error(error, path) from None
