"""Items of a request as the messages of a conversation, and as the API lists them.

A reply of a model is several items: reasoning, messages and function calls. They become one message of the
assistant again, so that the prompt of the next turn has the same text as the reply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.responses.reasoning import thinking_of
from erllama.server.responses.tools import name_in_prompt


class Conversation(NamedTuple):
    """The messages of a request.

    Attributes:
        messages: as `Model.chat` takes them.
        places: for each message, the index of the first item that it was made of; None for the instructions.
        skipped: the types of the items that are not part of it.
    """

    messages: list[Json]
    places: list[int | None]
    skipped: set[str]


def items_of(input: str | Sequence[Json] | None) -> list[Json]:
    """Return the items of `input`; a text is a message of the user."""
    if isinstance(input, str):
        return [{"type": "message", "role": "user", "content": input}]
    return list(input or ())


def read_items(instructions: str | None, items: Sequence[Json]) -> Conversation:
    """Return a conversation: the instructions as a system message, then the items in their order.

    Raises:
        ApiError: there is no message, or an item is invalid.
    """
    reader = _ItemReader()
    if instructions:
        reader.add_message(None, {"role": "system", "content": instructions})
    for index, item in enumerate(items):
        reader.add(index, item)
    reader.end_reply()
    if not reader.messages:
        raise ApiError("invalid_request", "input is empty; send a text or items", param="input")
    return Conversation(reader.messages, reader.places, reader.skipped)


class _ItemReader:
    def __init__(self) -> None:
        self.messages: list[Json] = []
        self.places: list[int | None] = []
        self.skipped: set[str] = set()
        self._reply: _Reply | None = None  # the items of the assistant since the last other one

    def add(self, index: int, item: Json) -> None:
        kind = item.get("type", "message" if "role" in item else None)
        if not isinstance(kind, str):
            where = f"input[{index}].type"
            raise ApiError("invalid_request", f"{where} is {kind!r:.60}; send the type of an item", param=where)
        if kind == "message" and item.get("role") != "assistant":
            self.add_message(index, _read_message(index, item))
        elif kind == "message":
            if self._reply is not None and self._reply.ends_with_message:
                self.end_reply()  # a reply has no two messages in a row: these are two replies
            self._open_reply(index).add_content(item.get("content"))
        elif kind == "reasoning":
            self._open_reply(index).thoughts.append(thinking_of(item))
        elif kind == "function_call":
            self._open_reply(index).add_call(item)
        elif kind == "function_call_output":
            content = item.get("output")
            message = {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
            self.add_message(index, {key: value for key, value in message.items() if value is not None})
        else:
            self.skipped.add(kind)

    def add_message(self, index: int | None, message: Json) -> None:
        self.end_reply()
        self.messages.append(message)
        self.places.append(index)

    def end_reply(self) -> None:
        reply, self._reply = self._reply, None
        if reply is not None:
            self.messages.append(reply.message())
            self.places.append(reply.index)

    def _open_reply(self, index: int) -> _Reply:
        if self._reply is None:
            self._reply = _Reply(index)
        return self._reply


class _Reply:
    """The items of one reply, from the item `index` on."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.thoughts: list[str] = []
        self.ends_with_message = False
        self._parts: list[object] = []
        self._calls: list[Json] = []

    def add_content(self, content: object) -> None:
        self._parts += content if isinstance(content, list) else [content] if content else []
        self.ends_with_message = True

    def add_call(self, item: Json) -> None:
        namespace, name = item.get("namespace"), item.get("name")
        if isinstance(name, str):
            name = name_in_prompt(namespace if isinstance(namespace, str) else None, name)
        function = {"name": name, "arguments": item.get("arguments")}
        self._calls.append({"id": item.get("call_id"), "type": "function", "function": function})
        self.ends_with_message = False

    def message(self) -> Json:
        message: Json = {"role": "assistant", "content": self._parts or ""}
        if any(self.thoughts):
            message["reasoning_content"] = "".join(self.thoughts)
        if self._calls:
            message["tool_calls"] = self._calls
        return message


def _read_message(index: int, item: Json) -> Json:
    role = item.get("role")
    if role not in ("system", "developer", "user"):
        where = f"input[{index}].role"
        raise ApiError(
            "invalid_request",
            f"{where} is {role!r:.60}; a message has the role system, developer, user or assistant",
            param=where,
        )
    return {"role": role, "content": item.get("content")}


def resolve_references(items: Sequence[Json], find: Callable[[str], Json | None]) -> list[Json]:
    """Return items with those that `item_reference`s name in their places.

    Args:
        find: returns a stored item by its id; None if it is not stored.

    Raises:
        ApiError: an item is not stored.
    """
    resolved = []
    for index, item in enumerate(items):
        if item.get("type") == "item_reference":
            found = find(str(item.get("id")))
            if found is None:
                raise ApiError(
                    "not_found",
                    f"the item {item.get('id')!r:.80} is not stored; send the item itself",
                    "item_not_found",
                    f"input[{index}].id",
                )
            item = found
        resolved.append(item)
    return resolved


def listed_item(item: Json, id: str) -> Json:
    """Return an item of a request as the API lists it.

    Args:
        id: for an item that has none.
    """
    kind = item.get("type", "message")
    listed = {"id": item.get("id") or id, "type": kind} | {
        key: value for key, value in item.items() if value is not None and key not in ("id", "type")
    }
    if kind == "message":
        listed["content"] = _listed_content(item.get("content"), item.get("role") == "assistant")
    if kind in ("message", "function_call", "function_call_output"):
        listed.setdefault("status", "completed")
    if kind == "reasoning":
        listed.setdefault("summary", [])
    return listed


def _listed_content(content: object, of_assistant: bool) -> list[object]:
    parts = [content] if isinstance(content, str) else content if isinstance(content, list) else []
    kind = "output_text" if of_assistant else "input_text"
    listed: list[object] = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": kind, "text": part}
        if isinstance(part, Mapping) and of_assistant:
            part = {"annotations": [], **part}
        listed.append(part)
    return listed
