"""Messages and tools as clients send them, without what other servers' clients add.

The façade refuses unknown keys, since in a program they are mistakes. Over HTTP they are fields of newer APIs, so
they are removed here. Values that stay are the client's objects, unchanged: the template writes them to the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError

_MESSAGE_KEYS = frozenset(
    {
        "role",
        "content",
        "name",
        "tool_calls",
        "tool_call_id",
        "reasoning_content",
        "reasoning",
        "thinking",
        "refusal",
    }
    | {"function_call"}
)
_CALL_KEYS = frozenset({"id", "type", "function"})
_FUNCTION_KEYS = frozenset({"name", "arguments"})
_TOOL_KEYS = frozenset({"name", "description", "parameters", "input_schema", "strict"})
# Keys that only some roles may have. Clients send them empty for the others.
_OF_ASSISTANT = frozenset({"tool_calls", "reasoning_content", "reasoning", "thinking", "refusal", "function_call"})


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
    read = {key: value for key, value in message.items() if key in _MESSAGE_KEYS and value is not None}
    if role != "assistant":
        for key in _OF_ASSISTANT & read.keys():
            del read[key]
    if role != "tool":
        read.pop("tool_call_id", None)
    if isinstance(read.get("tool_calls"), list):
        read["tool_calls"] = [_read_call(call) for call in read["tool_calls"]]
    if not read.get("content") and not read.get("tool_calls") and "function_call" not in read:
        read["content"] = ""
    return read


def _read_call(call: object) -> object:
    if not isinstance(call, Mapping):
        return call  # the façade refuses it
    read = {key: value for key, value in call.items() if key in _CALL_KEYS and value}
    if isinstance(read.get("function"), Mapping):
        read["function"] = {key: value for key, value in read["function"].items() if key in _FUNCTION_KEYS}
    return read


def read_tools(tools: Sequence[Json] | None) -> list[Json] | None:
    """Return the functions among the tools, as `Model.chat` takes them; None if there is none."""
    read = []
    for tool in tools or ():
        function = tool.get("function", tool)
        if tool.get("type", "function") == "function" and isinstance(function, Mapping):
            known = {key: value for key, value in function.items() if key in _TOOL_KEYS and value is not None}
            read.append({"type": "function", "function": known})
    return read or None
