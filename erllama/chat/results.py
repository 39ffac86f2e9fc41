"""What a chat gives: a reply told apart into text, thinking and tool calls, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from erllama.engine import Completion, ToolCall


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a chat.

    Attributes:
        prompt: of the whole conversation, as the template writes it.
        cached: those of them that were not computed again.
        completion: of the reply.
    """

    prompt: int
    cached: int
    completion: int

    @property
    def total(self) -> int:
        """Of prompt and reply."""
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True)
class ChatCompletion(Completion):
    """A reply in a conversation: a `Completion`, and what it says to the other side.

    `finish_reason` is "tool_calls" where the reply ended by itself, and calls tools.

    Attributes:
        tool_calls: the calls, in order.
        tool_call_errors: what is wrong with what looked like a call and is none; its text is part of
            `text`, at the place where the model wrote it.
        usage: tokens of prompt and reply.
        message: the reply as a message, to be added to the conversation for the next turn.
    """

    tool_calls: tuple[ToolCall, ...] = field(kw_only=True)
    tool_call_errors: tuple[str, ...] = field(kw_only=True)
    usage: Usage = field(kw_only=True)
    message: dict[str, object] = field(kw_only=True)
