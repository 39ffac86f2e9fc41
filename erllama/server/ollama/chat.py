"""`POST /api/chat`: a conversation, and its reply as a stream of lines or whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.responses import Response

from erllama._model.requests.options import ChatOptions
from erllama.chat.results import ChatCompletion
from erllama.engine import Done, Event, TextDelta, ThinkingDelta, ToolCall, ToolCallDelta, ToolCallEnd
from erllama.server.conduct.bodies import Json
from erllama.server.endpoints import Call, Endpoint, json_response
from erllama.server.models import ServedModel
from erllama.server.ollama.answers import ending, head, logprobs_json
from erllama.server.ollama.errors import ERRORS, encode_error
from erllama.server.ollama.messages import read_ollama_messages
from erllama.server.ollama.options import (
    ReplyBody,
    completion_options,
    load_or_unload,
    read_keep_alive,
    thinking_options,
)
from erllama.server.replies.messages import read_tools
from erllama.server.replies.ndjson import encode_line, line_stream
from erllama.server.replies.running import Replies, open_chat


class ChatBody(ReplyBody, kw_only=True):
    """The body of a chat."""

    messages: list[Json] | None = None
    tools: list[Json] | None = None


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of this module."""
    return [Endpoint("POST", "/api/chat", ChatBody, answer, ERRORS, "Reply to a conversation.")]


async def answer(call: Call, body: ChatBody) -> Response:
    """Answer a request with a stream of lines, or with a whole reply.

    Without messages, the model is loaded, or unloaded if `keep_alive` is 0.
    """
    if not body.messages:
        reason = await load_or_unload(call, body)
        return json_response(
            head(call.record.model) | {"message": _message(""), "done": True, "done_reason": reason}
        )
    served = await call.use_model(body.model, read_keep_alive(body.keep_alive))
    options: ChatOptions = {**completion_options(call, served, body), **thinking_options(served, body.think)}
    tools = read_tools(body.tools)
    if tools is not None:
        options["tools"] = tools
    replies = await open_chat(call, served, read_ollama_messages(body.messages), **options)
    if body.is_stream:
        return line_stream(call, _stream(call, replies, served), encode_error, lambda: _line(served, ""))
    async with replies:
        (result,) = await replies.results()
    message = _message(result.text, result.thinking, result.tool_calls)
    values = head(served.name) | {"message": message}
    if result.logprobs is not None:
        values["logprobs"] = logprobs_json(served.model, result.logprobs)
    return json_response(values | ending(call, result))


def _message(text: str, thinking: str = "", calls: Sequence[ToolCall] = (), n_calls: int = 0) -> Json:
    """Return a message of the assistant, or a part of it.

    Args:
        n_calls: number of the reply's calls before these.
    """
    message: Json = {"role": "assistant", "content": text}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = [_call_json(each, index) for index, each in enumerate(calls, n_calls)]
    return message


def _call_json(call: ToolCall, index: int) -> Json:
    return {"id": call.id, "function": {"index": index, "name": call.name, "arguments": call.arguments}}


def _line(served: ServedModel, *parts: object, logprobs: list[Json] | None = None) -> bytes:
    values = head(served.name) | {"message": _message(*parts), "done": False}  # type: ignore[arg-type]
    return encode_line(values if logprobs is None else values | {"logprobs": logprobs})


async def _stream(call: Call, replies: Replies[ChatCompletion], served: ServedModel) -> AsyncGenerator[bytes]:
    n_calls = 0
    async with replies:
        async for _, event in replies.events():
            if isinstance(event, Done):
                yield encode_line(head(served.name) | {"message": _message("")} | ending(call, event.completion))
                continue
            logprobs = None
            if isinstance(event, TextDelta | ThinkingDelta | ToolCallDelta) and event.logprobs:
                logprobs = logprobs_json(served.model, event.logprobs)
            parts = _parts(event, n_calls)
            if parts or logprobs:
                yield _line(served, *(parts or ("",)), logprobs=logprobs)
            if isinstance(event, ToolCallEnd):
                n_calls += len(event.calls)


def _parts(event: Event, n_calls: int) -> tuple[object, ...]:
    """Return the arguments of `_message` for an event; empty if it adds no text, thinking or calls."""
    match event:
        case TextDelta(text=text) if text:
            return (text,)
        case ThinkingDelta(text=text) if text:
            return ("", text)
        case ToolCallEnd(calls=calls, error=None) if calls:
            return ("", "", calls, n_calls)
        case ToolCallEnd(full=full, error=str()):  # the text is not a call; it is part of the reply where it stands
            return (full.decode("utf-8", "replace"),)
    return ()
