"""`POST /v1/chat/completions`: a conversation, and its reply whole or as a stream of chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.responses import Response

from erllama._model.requests.options import ChatOptions
from erllama.chat.results import ChatCompletion
from erllama.engine import Done, Event, TextDelta, ThinkingDelta, ToolCall, ToolCallDelta, ToolCallEnd
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, json_response
from erllama.server.models import ServedModel
from erllama.server.openai.errors import ERRORS, encode_error
from erllama.server.openai.logprobs import chat_logprobs
from erllama.server.openai.usage import finish_reason, timings, usage
from erllama.server.replies.messages import read_messages, read_tools
from erllama.server.replies.running import Replies, open_chat
from erllama.server.replies.sampling import SamplingBody
from erllama.server.replies.sse import DONE, encode_event, event_stream

_MAX_CHOICES = 16


class StreamOptions(msgspec.Struct):
    """`stream_options`: whether the stream ends with token counts."""

    include_usage: bool | None = None


class ChatBody(SamplingBody, kw_only=True):
    """The body of a chat completion: OpenAI's fields, llama-server's, and our own."""

    messages: list[Json]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: Annotated[int, Meta(ge=1, le=_MAX_CHOICES)] | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    response_format: Json | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=100)] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: Json | None = None
    prompt_cache_key: str | None = None
    timings_per_token: bool | None = None
    user: Any = None


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of this module."""
    return [Endpoint("POST", "/v1/chat/completions", ChatBody, answer, ERRORS, "Reply to a conversation.")]


async def answer(call: Call, body: ChatBody) -> Response:
    """Answer a request with a whole reply, or with a stream."""
    served = call.find_model(body.model)
    n = body.n or 1
    replies = await open_chat(call, served, read_messages(body.messages), n=n, **chat_options(body))
    about = _About(served.name, body, call.record.id)
    if body.stream:
        return event_stream(call, _stream(replies, served, about), encode_error)
    async with replies:
        results = await replies.results()
    choices = [_choice(index, result, served, about) for index, result in enumerate(results)]
    values = about.head("chat.completion") | {"choices": choices, "usage": usage(results)}
    return json_response(values | {"timings": timings(results[0])}, headers={"x-request-id": call.record.id})


def chat_options(body: ChatBody) -> ChatOptions:
    """Return the options of `Model.chat` for a body."""
    options: dict[str, Any] = dict(body.sampling_options())
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if limit is not None and limit >= 0:  # llama-server's -1 is no limit
        options["max_tokens"] = limit
    tools = read_tools(body.tools)
    if tools is not None:
        options["tools"] = tools
        if body.tool_choice is not None:
            options["tool_choice"] = body.tool_choice
        if body.parallel_tool_calls is not None:
            options["parallel_tool_calls"] = body.parallel_tool_calls
    schema = _response_schema(body.response_format)
    if schema is not None:
        options["json_schema"] = schema
    if body.logprobs:
        options["logprobs"] = body.top_logprobs or 0
    thinking = _thinking(body)
    if thinking is not None:
        options["thinking"] = thinking
    args = {name: value for name, value in (body.chat_template_kwargs or {}).items() if name != "enable_thinking"}
    if body.reasoning_effort is not None:
        args.setdefault("reasoning_effort", body.reasoning_effort)
    if args:
        options["template_args"] = args
    return options  # type: ignore[return-value]


def _thinking(body: ChatBody) -> bool | None:
    """Return whether the model thinks; None for its default."""
    enabled = (body.chat_template_kwargs or {}).get("enable_thinking")
    if isinstance(enabled, bool):
        return enabled
    if body.reasoning_effort is None:
        return None
    return body.reasoning_effort != "none"


def _response_schema(format: Json | None) -> Json | None:
    """Return the JSON schema of `response_format`; None for text.

    Raises:
        ApiError: its type is unknown, or it has no schema.
    """
    kind = "text" if format is None else format.get("type")
    if format is None or kind == "text":
        return None
    if kind == "json_object":
        schema = format.get("schema")
        return schema if isinstance(schema, dict) else {"type": "object"}
    if kind == "json_schema":
        declared = format.get("json_schema")
        schema = declared.get("schema") if isinstance(declared, Mapping) else format.get("schema")
        if isinstance(schema, dict):
            return schema
        where = "response_format.json_schema.schema"
        raise ApiError("invalid_request", f"{where} is missing; send a JSON schema", param=where)
    raise ApiError(
        "invalid_request",
        f"response_format.type is {kind!r:.60}; it takes text, json_object and json_schema",
        param="response_format.type",
    )


class _About:
    """What all chunks of an answer repeat."""

    def __init__(self, model: str, body: ChatBody, id: str) -> None:
        self.model, self.body = model, body
        self.id, self.created = f"chatcmpl-{id}", int(time.time())

    def head(self, kind: str) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": "erllama",
        }

    def chunk(self, index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.head("chat.completion.chunk") | {"choices": [choice]}


def _choice(index: int, result: ChatCompletion, served: ServedModel, about: _About) -> Json:
    message: Json = {
        "role": "assistant",
        "content": result.text or (None if result.tool_calls else ""),
        "refusal": None,
    }
    if result.thinking:
        message["reasoning_content"] = result.thinking
    if result.tool_calls:
        message["tool_calls"] = list(map(call_json, result.tool_calls))
    logprobs = None
    if about.body.logprobs and result.logprobs is not None:
        logprobs = chat_logprobs(served.model, result.logprobs)
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason(result)}


def call_json(tool_call: ToolCall) -> Json:
    """Return a tool call as messages have it."""
    function = {"name": tool_call.name, "arguments": tool_call.arguments_json}
    return {"id": tool_call.id, "type": "function", "function": function}


async def _stream(replies: Replies[ChatCompletion], served: ServedModel, about: _About) -> AsyncIterator[bytes]:
    body = about.body
    n_calls = [0] * (body.n or 1)
    results: dict[int, ChatCompletion] = {}
    async with replies:
        for index in range(body.n or 1):
            yield encode_event(about.chunk(index, {"role": "assistant", "content": None}))
        async for index, event in replies.events():
            if isinstance(event, Done):
                assert isinstance(event.completion, ChatCompletion)
                results[index] = event.completion
                last = about.chunk(index, {}, reason=finish_reason(event.completion))
                if len(results) == len(n_calls):
                    last["timings"] = timings(event.completion)
                yield encode_event(last)
                continue
            for delta in _deltas(event, n_calls[index]):
                logprobs = None
                if (
                    body.logprobs
                    and isinstance(event, TextDelta | ThinkingDelta | ToolCallDelta)
                    and event.logprobs
                ):
                    logprobs = chat_logprobs(served.model, event.logprobs)
                yield encode_event(about.chunk(index, delta, logprobs))
            if isinstance(event, ToolCallEnd):
                n_calls[index] += len(event.calls)
    if body.stream_options is not None and body.stream_options.include_usage:
        totals = {"choices": [], "usage": usage([results[index] for index in sorted(results)])}
        yield encode_event(about.head("chat.completion.chunk") | totals)
    yield DONE


def _deltas(event: Event, n_calls: int) -> list[Json]:
    """Return the deltas of an event.

    Args:
        n_calls: number of the reply's calls before it.
    """
    match event:
        case TextDelta(text=text) if text:
            return [{"content": text}]
        case ThinkingDelta(text=text) if text:
            return [{"reasoning_content": text}]
        case ToolCallEnd(calls=calls, error=None):
            return [{"tool_calls": [{"index": n_calls + i, **call_json(each)}]} for i, each in enumerate(calls)]
        case ToolCallEnd(full=full):  # the text is not a call; it is part of the reply where the model wrote it
            return [{"content": full.decode("utf-8", "replace")}]
    return []
