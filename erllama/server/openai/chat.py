"""`POST /v1/chat/completions`: a conversation, and its reply whole or as a stream; `/render`: its prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.responses import Response

from erllama.chat.results import ChatCompletion
from erllama.errors import ChatError
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, json_response
from erllama.server.models import ServedModel
from erllama.server.openai.chat_options import ChatBody, chat_options
from erllama.server.openai.chat_stream import ChatHead, call_json, chat_finish_reason, stream_chunks
from erllama.server.openai.logprobs import chat_logprobs
from erllama.server.openai.usage import usage
from erllama.server.replies.messages import read_messages
from erllama.server.replies.openai_errors import ERRORS, encode_error
from erllama.server.replies.rendering import render_chat, rendered
from erllama.server.replies.running import Replies, open_chat
from erllama.server.replies.sse import event_stream
from erllama.server.replies.timings import timings


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of this module."""
    path, renders = "/v1/chat/completions", "Return the token ids of a conversation's prompt."
    return [
        Endpoint("POST", path, ChatBody, answer, ERRORS, "Reply to a conversation."),
        Endpoint("POST", f"{path}/render", ChatBody, render, ERRORS, renders),
    ]


async def answer(call: Call, body: ChatBody) -> Response:
    """Answer a request with a whole reply, or with a stream."""
    served = await call.use_model(body.model)
    replies = await _open(call, served, body)
    head = ChatHead(served, call.record.id)
    if body.stream:
        return event_stream(call, stream_chunks(replies, served, head, body), encode_error)
    async with replies:
        results = await replies.results()
    choices = [_choice(index, result, served, body) for index, result in enumerate(results)]
    values = head.values("chat.completion") | {"choices": choices, "usage": usage(results)}
    return json_response(values | {"timings": timings(results[0])})


async def render(call: Call, body: ChatBody) -> Response:
    """Answer with the token ids of the prompt that `answer` would compute."""
    served = await call.use_model(body.model)
    messages, options = read_messages(body.messages), chat_options(body, served.model)
    with _message_paths():
        tokens = await render_chat(call, served, messages, **options)
    return json_response(rendered(call, served, "chatcmpl", tokens))


async def _open(call: Call, served: ServedModel, body: ChatBody) -> Replies[ChatCompletion]:
    """Submit the conversation."""
    messages, options = read_messages(body.messages), chat_options(body, served.model)
    with _message_paths():
        return await open_chat(
            call, served, messages, n=body.n_choices, session_hint=body.prompt_cache_key, **options
        )


@contextmanager
def _message_paths() -> Iterator[None]:
    """Give an error in one of the messages that message's path."""
    try:
        yield
    except ChatError as error:
        if error.index is None:
            raise
        raise ApiError("invalid_request", str(error), param=f"messages[{error.index}]") from error


def _choice(index: int, result: ChatCompletion, served: ServedModel, body: ChatBody) -> Json:
    message: Json = {
        "role": "assistant",
        "content": result.text or (None if result.tool_calls else ""),
        "refusal": None,
    }
    if result.thinking:
        message["reasoning_content"] = result.thinking
    if result.tool_calls and body.is_legacy:
        message["function_call"] = call_json(result.tool_calls[0])["function"]
    elif result.tool_calls:
        message["tool_calls"] = list(map(call_json, result.tool_calls))
    logprobs = None
    if body.logprobs and result.logprobs is not None:
        logprobs = chat_logprobs(served.model, result.logprobs)
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": chat_finish_reason(result, body),
    }
