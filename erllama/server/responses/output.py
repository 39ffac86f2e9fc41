"""The items of a reply, and the events that announce them, from the engine's events.

`OutputBuilder` takes the events in order. It keeps at most one item open: a message or reasoning. A function call
is complete when it is announced, because its text is only known to be a call at its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from erllama._model.model import Model
from erllama.chat.results import ChatCompletion
from erllama.engine import (
    Done,
    Event,
    TextDelta,
    ThinkingDelta,
    ThinkingEnd,
    ToolCall,
    ToolCallEnd,
)
from erllama.server.conduct.bodies import Json
from erllama.server.replies.logprobs import token_logprobs
from erllama.server.responses.reasoning import encode_thinking
from erllama.server.responses.tools import ToolNames


class OutputBuilder:
    """Builds the items of one reply.

    Args:
        id: hexadecimal digits that the ids of the items have.
        model: the model, for the texts of tokens.
        names: of the functions.
        encrypted: whether reasoning has `encrypted_content`.
        summary: whether reasoning has its text as a summary, too.

    Attributes:
        items: the items so far; those that are done, in order.
        n_reasoning_tokens: tokens of the thinking so far.
        completion: the reply, once it is done.
    """

    def __init__(self, id: str, model: Model, names: ToolNames, *, encrypted: bool, summary: bool) -> None:
        self.items: list[Json] = []
        self.n_reasoning_tokens = 0
        self.completion: ChatCompletion | None = None
        self._id, self._model, self._names = id, model, names
        self._encrypted, self._summary = encrypted, summary
        self._open: _OpenMessage | _OpenReasoning | None = None
        self._logprobs: list[Json] = []  # of tokens whose text has not come yet
        self._text = ""  # of all messages
        self._n_calls = 0

    @property
    def is_incomplete(self) -> bool:
        """Whether a limit cut the reply short."""
        return self.completion is not None and self.completion.finish_reason not in ("stop", "tool_calls")

    def add(self, event: Event) -> Iterator[Json]:
        """Yield the events of the API for an event of the engine, without their numbers."""
        match event:
            case TextDelta():
                self._logprobs += [token_logprobs(self._model, each) for each in event.logprobs]
                if event.text:
                    yield from self._add_text(event.text)
            case ThinkingDelta():
                self.n_reasoning_tokens += len(event.tokens)
                if event.text:
                    yield from self._add_thinking(event.text)
            case ThinkingEnd() if isinstance(self._open, _OpenReasoning):
                yield from self._close("completed")
            case ToolCallEnd(error=None):
                yield from self._add_calls(event.calls)
            case ToolCallEnd():  # the text is not a call; it is part of the reply where the model wrote it
                yield from self._add_text(event.full.decode("utf-8", "replace"))
            case Done(completion=completion):
                assert isinstance(completion, ChatCompletion)
                yield from self._finish(completion)

    def _finish(self, completion: ChatCompletion) -> Iterator[Json]:
        self.completion = completion
        rest = completion.text.removeprefix(self._text)
        if rest and len(rest) + len(self._text) == len(completion.text):
            yield from self._add_text(rest)  # of a call that a limit cut short
        yield from self._add_calls(completion.tool_calls[self._n_calls :])
        if not self.items and self._open is None:
            yield from self._open_item(_OpenMessage(self._next_id("msg"), 0))  # an empty reply is an empty message
        yield from self._close("incomplete" if self.is_incomplete else "completed")

    def _add_text(self, text: str) -> Iterator[Json]:
        if not isinstance(self._open, _OpenMessage):
            yield from self._close("completed")
            yield from self._open_item(_OpenMessage(self._next_id("msg"), len(self.items)))
        assert isinstance(self._open, _OpenMessage)
        logprobs, self._logprobs = self._logprobs, []
        self._text += text
        yield from self._open.add(text, logprobs)

    def _add_thinking(self, text: str) -> Iterator[Json]:
        if not isinstance(self._open, _OpenReasoning):
            yield from self._close("completed")
            item = _OpenReasoning(self._next_id("rs"), len(self.items), self._encrypted, self._summary)
            yield from self._open_item(item)
        assert isinstance(self._open, _OpenReasoning)
        yield from self._open.add(text)

    def _add_calls(self, calls: Sequence[ToolCall]) -> Iterator[Json]:
        for call in calls:
            yield from self._close("completed")
            id, index = self._next_id("fc"), len(self.items)
            namespace, name = self._names.split(call.name)
            item = {"id": id, "type": "function_call", "status": "completed", "call_id": call.id, "name": name}
            if namespace is not None:
                item["namespace"] = namespace
            item["arguments"] = call.arguments_json
            started = item | {"status": "in_progress", "arguments": ""}
            place = {"item_id": id, "output_index": index}
            done = place | {"name": name, "arguments": call.arguments_json}
            yield {"type": "response.output_item.added", "output_index": index, "item": started}
            yield {"type": "response.function_call_arguments.delta", **place, "delta": call.arguments_json}
            yield {"type": "response.function_call_arguments.done", **done}
            yield {"type": "response.output_item.done", "output_index": index, "item": item}
            self.items.append(item)
            self._n_calls += 1

    def _next_id(self, prefix: str) -> str:
        return f"{prefix}_{self._id}_{len(self.items)}"

    def _open_item(self, item: _OpenMessage | _OpenReasoning) -> Iterator[Json]:
        self._open = item
        yield from item.begin()

    def _close(self, status: str) -> Iterator[Json]:
        if self._open is not None:
            yield from self._open.end(status)
            self.items.append(self._open.item(status))
            self._open = None


class _OpenMessage:
    def __init__(self, id: str, index: int) -> None:
        self._id, self._index = id, index
        self._texts: list[str] = []
        self._logprobs: list[Json] = []

    def _place(self, kind: str) -> Json:
        return {
            "type": f"response.{kind}",
            "item_id": self._id,
            "output_index": self._index,
            "content_index": 0,
        }

    def _part(self) -> Json:
        text = "".join(self._texts)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}

    def item(self, status: str) -> Json:
        content = [self._part()]
        return {"id": self._id, "type": "message", "status": status, "role": "assistant", "content": content}

    def begin(self) -> Iterator[Json]:
        item = self.item("in_progress") | {"content": []}
        yield {"type": "response.output_item.added", "output_index": self._index, "item": item}
        yield self._place("content_part.added") | {"part": self._part() | {"logprobs": []}}

    def add(self, text: str, logprobs: list[Json]) -> Iterator[Json]:
        self._texts.append(text)
        self._logprobs += logprobs
        yield self._place("output_text.delta") | {"delta": text, "logprobs": logprobs}

    def end(self, status: str) -> Iterator[Json]:
        text = "".join(self._texts)
        yield self._place("output_text.done") | {"text": text, "logprobs": self._logprobs}
        yield self._place("content_part.done") | {"part": self._part()}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.item(status)}


class _OpenReasoning:
    def __init__(self, id: str, index: int, encrypted: bool, summary: bool) -> None:
        self._id, self._index = id, index
        self._encrypted, self._summary = encrypted, summary
        self._texts: list[str] = []

    def _place(self, kind: str, number: str = "content_index") -> Json:
        return {"type": f"response.{kind}", "item_id": self._id, "output_index": self._index, number: 0}

    def _summary_place(self, kind: str) -> Json:
        return self._place(f"reasoning_summary_{kind}", "summary_index")

    def item(self, status: str) -> Json:
        text = "".join(self._texts)
        summary = [{"type": "summary_text", "text": text}] if self._summary else []
        item = {"id": self._id, "type": "reasoning", "status": status, "summary": summary}
        item["content"] = [{"type": "reasoning_text", "text": text}]
        if self._encrypted:
            item["encrypted_content"] = encode_thinking(text)
        return item

    def begin(self) -> Iterator[Json]:
        item = {"id": self._id, "type": "reasoning", "status": "in_progress", "summary": [], "content": []}
        yield {"type": "response.output_item.added", "output_index": self._index, "item": item}
        if self._summary:
            yield self._summary_place("part.added") | {"part": {"type": "summary_text", "text": ""}}
        yield self._place("content_part.added") | {"part": {"type": "reasoning_text", "text": ""}}

    def add(self, text: str) -> Iterator[Json]:
        self._texts.append(text)
        yield self._place("reasoning_text.delta") | {"delta": text}
        if self._summary:
            yield self._summary_place("text.delta") | {"delta": text}

    def end(self, status: str) -> Iterator[Json]:
        text = "".join(self._texts)
        yield self._place("reasoning_text.done") | {"text": text}
        yield self._place("content_part.done") | {"part": {"type": "reasoning_text", "text": text}}
        if self._summary:
            yield self._summary_place("text.done") | {"text": text}
            yield self._summary_place("part.done") | {"part": {"type": "summary_text", "text": text}}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.item(status)}
