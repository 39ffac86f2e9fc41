"""The chunks of a streamed chat completion.

Only a choice's first delta has the role. A tool call is one delta, with its id, type, name and arguments, because a
call is known to be one when its last token has been written.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from erllama.chat.results import ChatCompletion
from erllama.engine import Done, Event, TextDelta, ThinkingDelta, ToolCall, ToolCallDelta, ToolCallEnd
from erllama.server.conduct.bodies import Json
from erllama.server.models import ServedModel
from erllama.server.openai.chat_options import ChatBody
from erllama.server.openai.logprobs import chat_logprobs
from erllama.server.openai.usage import finish_reason, usage
from erllama.server.replies.running import Replies
from erllama.server.replies.sse import DONE, encode_event
from erllama.server.replies.timings import timings

_CHUNK = "chat.completion.chunk"


class ChatHead:
    """The fields that the whole reply, or each chunk of a stream, begins with."""

    def __init__(self, served: ServedModel, id: str) -> None:
        self._served, self._id, self._created = served, f"chatcmpl-{id}", int(time.time())
        self._fingerprint = served.fingerprint

    def values(self, kind: str) -> Json:
        """Return the fields of an object of a kind."""
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._served.name,
            "system_fingerprint": self._fingerprint,
        }


def call_json(tool_call: ToolCall) -> Json:
    """Return a tool call as messages have it."""
    function = {"name": tool_call.name, "arguments": tool_call.arguments_json}
    return {"id": tool_call.id, "type": "function", "function": function}


def chat_finish_reason(result: ChatCompletion, body: ChatBody) -> str:
    """Return OpenAI's word for how a chat reply ended."""
    reason = finish_reason(result)
    return "function_call" if reason == "tool_calls" and body.is_legacy else reason


async def stream_chunks(
    replies: Replies[ChatCompletion], served: ServedModel, head: ChatHead, body: ChatBody
) -> AsyncIterator[bytes]:
    """Yield the events of a stream."""
    chunks = _Chunks(served, head, body)
    async with replies:
        for index in range(body.n_choices):
            yield chunks.encode(index, {"role": "assistant", "content": None})
        async for index, event in replies.events():
            for chunk in chunks.of_event(index, event):
                yield chunk
    if chunks.counts_usage:
        yield chunks.encode_usage()
    yield DONE


class _Chunks:
    """Encodes the chunks of one stream."""

    def __init__(self, served: ServedModel, head: ChatHead, body: ChatBody) -> None:
        self._served, self._head, self._body = served, head, body
        self._n_calls = [0] * body.n_choices
        self._results: dict[int, ChatCompletion] = {}
        self.counts_usage = bool(body.stream_options and body.stream_options.include_usage)

    def encode(self, index: int, delta: Json, logprobs: Json | None = None) -> bytes:
        """Return a chunk with a delta of one choice."""
        return encode_event(self._chunk(index, delta, logprobs))

    def encode_usage(self) -> bytes:
        """Return the chunk with the token counts of all choices, and the timings of the first."""
        results = [self._results[index] for index in sorted(self._results)]
        values = {"choices": [], "usage": usage(results), "timings": timings(results[0])}
        return encode_event(self._head.values(_CHUNK) | values)

    def of_event(self, index: int, event: Event) -> list[bytes]:
        """Return the chunks of an event of one choice."""
        if isinstance(event, Done):
            return [self._last(index, event)]
        deltas = self._deltas(index, event)
        logprobs = None
        if self._body.logprobs and isinstance(event, TextDelta | ThinkingDelta | ToolCallDelta) and event.logprobs:
            logprobs = chat_logprobs(self._served.model, event.logprobs)
            deltas = deltas or [{}]  # tokens without visible text have log-probabilities, too
        return [self.encode(index, delta, logprobs) for delta in deltas]

    def _last(self, index: int, event: Done) -> bytes:
        result = event.completion
        assert isinstance(result, ChatCompletion)
        self._results[index] = result
        chunk = self._chunk(index, {}, None, chat_finish_reason(result, self._body))
        if len(self._results) == self._body.n_choices:
            chunk["timings"] = timings(result)
        return encode_event(chunk)

    def _chunk(self, index: int, delta: Json, logprobs: Json | None, reason: str | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk = self._head.values(_CHUNK) | {"choices": [choice]}
        if self.counts_usage:
            chunk["usage"] = None
        return chunk

    def _deltas(self, index: int, event: Event) -> list[Json]:
        match event:
            case TextDelta(text=text) if text:
                return [{"content": text}]
            case ThinkingDelta(text=text) if text:
                return [{"reasoning_content": text}]
            case ToolCallEnd(calls=calls, error=None) if self._body.is_legacy:
                return [{"function_call": call_json(each)["function"]} for each in calls]
            case ToolCallEnd(calls=calls, error=None):
                first = self._n_calls[index]
                self._n_calls[index] += len(calls)
                return [{"tool_calls": [{"index": first + i, **call_json(each)}]} for i, each in enumerate(calls)]
            case ToolCallEnd(full=full):  # the text is not a call; it is part of the reply where the model wrote it
                return [{"content": full.decode("utf-8", "replace")}]
        return []
