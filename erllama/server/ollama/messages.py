"""Ollama's messages in the form of `replies.messages`.

Ollama names the tool of a result in `tool_name`, has texts as content, and images in a field of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from erllama.server.conduct.bodies import Json
from erllama.server.ollama.options import refuse_images
from erllama.server.replies.messages import read_messages


def read_ollama_messages(messages: Sequence[Json]) -> list[Json]:
    """Return messages as `Model.chat` takes them.

    A tool result without `tool_call_id` answers the earliest call of its `tool_name` that has no result. Without
    both, it answers the earliest call that has no result.

    Raises:
        ApiError: a message has no role, or has images.
    """
    read = []
    unanswered: list[_Call] = []
    for index, message in enumerate(messages):
        refuse_images(message.get("images"), f"messages[{index}].images")
        translated = {key: value for key, value in message.items() if key not in ("images", "tool_name")}
        if message.get("role") == "tool":
            result = _Call(message.get("tool_call_id") or None, message.get("tool_name") or message.get("name"))
            answered = next(filter(result.agrees, unanswered), None)
            if answered is not None:
                unanswered.remove(answered)
                result = answered
            translated |= {"tool_call_id": result.id, "name": result.name}
        unanswered += _calls(message)
        read.append(translated)
    return read_messages(read)


class _Call(NamedTuple):
    """A call, or what a result has of it: an id and a name. None for what is missing."""

    id: object
    name: object

    def agrees(self, call: _Call) -> bool:
        """Return whether this result may answer a call."""
        return self.id in (None, call.id) and self.name in (None, call.name)


def _calls(message: Json) -> list[_Call]:
    """Return the calls of a message."""
    calls = message.get("tool_calls")
    return [
        _Call(call.get("id") or None, call["function"].get("name"))
        for call in (calls if isinstance(calls, list) else ())
        if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping)
    ]
