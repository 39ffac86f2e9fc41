"""Chat completions in llama-cpp-python's form: whole, or as a stream of chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

from erllama._model.model import Model
from erllama.chat.results import ChatCompletion
from erllama.checks import choice, shown
from erllama.engine import Done, TextDelta, ThinkingDelta, TokenLogprobs, ToolCall, ToolCallEnd
from erllama.errors import OptionError
from erllama.llama_cpp.completions import finish_reason, token_text
from erllama.llama_cpp.llama_types import (
    ChatCompletionLogprobs,
    ChatCompletionLogprobToken,
    ChatCompletionMessageToolCall,
    ChatCompletionResponseMessage,
    ChatCompletionStreamResponseDelta,
    ChatCompletionStreamResponseDeltaEmpty,
    CreateChatCompletionResponse,
    CreateChatCompletionStreamResponse,
)

_Reason = Literal["stop", "length", "tool_calls"]


class ChatRun:
    """One chat completion, which runs when its result is requested.

    Args:
        name: the model's name in the result.
        options: options of `Model.chat`.
        on_end: called with the tokens of prompt and reply.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        messages: Sequence[Mapping[str, object]],
        options: dict[str, Any],
        *,
        on_end: Callable[[Sequence[int]], None],
    ) -> None:
        self._model, self._name = model, name
        self._messages, self._options, self._on_end = messages, options, on_end
        self._id, self._created = f"chatcmpl-{uuid.uuid4()}", int(time.time())

    def whole(self) -> CreateChatCompletionResponse:
        """Run the chat completion and return it."""
        reply = self._model.chat(self._messages, **self._options)
        self._on_end(reply.context_tokens)
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._name,
            "choices": [
                {
                    "index": 0,
                    "message": _message(reply),
                    "logprobs": self._logprobs(reply.logprobs or ()),
                    "finish_reason": _finish_reason(reply),
                }
            ],
            "usage": {
                "prompt_tokens": reply.usage.prompt,
                "completion_tokens": reply.usage.completion,
                "total_tokens": reply.usage.total,
            },
        }

    def chunks(self) -> Iterator[CreateChatCompletionStreamResponse]:
        """Run the chat completion and yield its chunks. The first one has the role, the last one the reason."""
        n_calls = 0
        with self._model.stream_chat(self._messages, **self._options) as stream:
            yield self._chunk({"role": "assistant"})
            for event in stream:
                if isinstance(event, TextDelta) and (event.text or event.logprobs):
                    yield self._chunk({"content": event.text}, self._logprobs(event.logprobs))
                elif isinstance(event, ThinkingDelta) and event.text:
                    yield self._chunk({"reasoning_content": event.text}, self._logprobs(event.logprobs))
                elif isinstance(event, ToolCallEnd):
                    if event.error is not None:  # then the text is part of the answer
                        yield self._chunk({"content": event.full.decode("utf-8", "replace")})
                    for call in event.calls:
                        yield self._chunk(_call_delta(call, n_calls))
                        n_calls += 1
                elif isinstance(event, Done):
                    reply = cast(ChatCompletion, event.completion)
                    self._on_end(reply.context_tokens)
                    yield self._chunk({}, reason=_finish_reason(reply))

    def _chunk(
        self,
        delta: ChatCompletionStreamResponseDelta | ChatCompletionStreamResponseDeltaEmpty,
        logprobs: ChatCompletionLogprobs | None = None,
        reason: _Reason | None = None,
    ) -> CreateChatCompletionStreamResponse:
        return {
            "id": self._id,
            "model": self._name,
            "created": self._created,
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}],
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> ChatCompletionLogprobs | None:
        if self._options.get("logprobs") is None:
            return None
        content: list[ChatCompletionLogprobToken] = [
            {
                "token": token_text(self._model, each.token),
                "bytes": None,
                "logprob": each.logprob,
                "top_logprobs": [
                    {"token": token_text(self._model, token), "logprob": logprob, "bytes": None}
                    for token, logprob in each.top
                ],
            }
            for each in logprobs
        ]
        return {"content": content, "refusal": None}


def _message(reply: ChatCompletion) -> ChatCompletionResponseMessage:
    message: ChatCompletionResponseMessage = {"role": "assistant", "content": reply.text}
    if reply.thinking:
        message["reasoning_content"] = reply.thinking
    if reply.tool_calls:
        message["content"] = reply.text or None
        message["tool_calls"] = [_tool_call(call) for call in reply.tool_calls]
    if len(reply.tool_calls) == 1:  # the older form has one call
        message["function_call"] = {
            "name": reply.tool_calls[0].name,
            "arguments": reply.tool_calls[0].arguments_json,
        }
    return message


def _tool_call(call: ToolCall) -> ChatCompletionMessageToolCall:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments_json},
    }


def _call_delta(call: ToolCall, index: int) -> ChatCompletionStreamResponseDelta:
    delta: ChatCompletionStreamResponseDelta = {
        "tool_calls": [
            {
                "index": index,
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments_json},
            }
        ]
    }
    if index == 0:  # the older form has one call
        delta["function_call"] = {"name": call.name, "arguments": call.arguments_json}
    return delta


def _finish_reason(reply: ChatCompletion) -> _Reason:
    return "tool_calls" if reply.finish_reason == "tool_calls" else finish_reason(reply.finish_reason)


def tool_options(
    functions: Sequence[Mapping[str, object]] | None,
    function_call: str | Mapping[str, object] | None,
    tools: Sequence[Mapping[str, object]] | None,
    tool_choice: str | Mapping[str, object] | None,
) -> dict[str, Any]:
    """Return the options of `Model.chat` for tools, or for functions, which are their older form.

    Raises:
        OptionError: a call is required, and there are no tools.
    """
    if functions is not None:
        tools = [{"type": "function", "function": function} for function in functions]
    if isinstance(function_call, Mapping):
        tool_choice = {"type": "function", "function": {"name": function_call.get("name")}}
    elif function_call is not None:
        tool_choice = function_call
    if not tools:
        if tool_choice not in (None, "none", "auto"):
            raise OptionError(f"tool_choice={shown(tool_choice)} without tools; pass tools, too")
        return {}
    options: dict[str, Any] = {"tools": tools}
    if tool_choice is not None:
        options["tool_choice"] = tool_choice
    return options


def format_schema(response_format: Mapping[str, object] | None) -> Mapping[str, object] | None:
    """Return the JSON schema that a `response_format` demands; None for text.

    Raises:
        OptionError: its type is unknown, or its schema is not an object.
    """
    if response_format is None:
        return None
    kind = choice("response_format['type']", response_format.get("type"), ("text", "json_object", "json_schema"))
    if kind == "text":
        return None
    schema = response_format.get("schema")
    if schema is None:
        schema = {"type": "object"}
    if kind == "json_schema":
        declared = response_format.get("json_schema")
        schema = declared.get("schema") if isinstance(declared, Mapping) else None
    if not isinstance(schema, Mapping):
        raise OptionError(f"response_format has the schema {shown(schema)}; pass a JSON schema as a dict")
    return schema


def clean_messages(messages: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Return messages without keys that are None. Content that is None becomes empty if there are no calls."""
    return [_clean(message) if isinstance(message, Mapping) else message for message in messages]


def _clean(message: Mapping[str, object]) -> Mapping[str, object]:
    cleaned = {key: value for key, value in message.items() if value is not None}
    if "content" not in cleaned and not cleaned.get("tool_calls") and not cleaned.get("function_call"):
        cleaned["content"] = ""
    return cleaned
