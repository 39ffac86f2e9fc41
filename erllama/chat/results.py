"""Results of a chat: the reply with its text, thinking, tool calls and token counts.

`Turn.finish` creates a `ChatCompletion` from the engine's `Completion`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from erllama.engine import Completion, ToolCall


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a chat request.

    Attributes:
        prompt: tokens of the conversation, as the template renders it.
        cached: prompt tokens that came from the cache.
        completion: tokens of the reply.
    """

    prompt: int
    cached: int
    completion: int

    @property
    def total(self) -> int:
        """Tokens of prompt and reply."""
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True)
class ChatCompletion(Completion):
    """A reply in a conversation: a `Completion` with tool calls and the message for the next turn.

    `finish_reason` is "tool_calls" if the reply ended by itself and calls tools.

    Attributes:
        tool_calls: the calls, in order.
        tool_call_errors: an error for each span that looks like a call and is not one. Its text is part of `text`,
            where the model wrote it.
        usage: token counts of prompt and reply.
        message: the reply as a message. Append it to the conversation for the next turn.
    """

    tool_calls: tuple[ToolCall, ...] = field(kw_only=True)
    tool_call_errors: tuple[str, ...] = field(kw_only=True)
    usage: Usage = field(kw_only=True)
    message: dict[str, object] = field(kw_only=True)
