"""`POST /v1/messages`: messages, whole or as streams; `/count_tokens`, `/render`: length and tokens of prompts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from starlette.responses import Response

from erllama.chat.results import ChatCompletion
from erllama.engine import Done
from erllama.server.anthropic.blocks import BlockWriter
from erllama.server.anthropic.bodies import MessagesBody
from erllama.server.anthropic.cache_control import pin_prefixes
from erllama.server.anthropic.conversation import ConversationReader
from erllama.server.anthropic.errors import ERRORS, encode_error
from erllama.server.anthropic.options import chat_options, template_options
from erllama.server.anthropic.signatures import ThoughtSigner
from erllama.server.conduct.bodies import Json
from erllama.server.endpoints import Call, Endpoint, json_response
from erllama.server.models import ServedModel
from erllama.server.replies.rendering import render_chat, rendered
from erllama.server.replies.running import Replies, open_chat
from erllama.server.replies.sse import encode_event, event_stream
from erllama.server.replies.templates import count_prompt_tokens

_STOP_REASONS: Mapping[str, str] = {
    "stop": "end_turn",
    "tool_calls": "tool_use",
    "length": "max_tokens",
    "context_full": "model_context_window_exceeded",
    "cancelled": "max_tokens",  # cut short; Anthropic has no word for it
}


def endpoints() -> list[Endpoint[MessagesBody]]:
    """Return the endpoints of this module."""
    counts, renders = "Count the tokens of a conversation's prompt.", "Return the token ids of the prompt."
    return [
        Endpoint("POST", "/v1/messages", MessagesBody, answer, ERRORS, "Reply to a conversation."),
        Endpoint("POST", "/v1/messages/count_tokens", MessagesBody, count_tokens, ERRORS, counts),
        Endpoint("POST", "/v1/messages/render", MessagesBody, render, ERRORS, renders),
    ]


@dataclass(frozen=True, slots=True)
class _Reply:
    """A reply in progress."""

    call: Call
    served: ServedModel
    replies: Replies[ChatCompletion]
    writer: BlockWriter

    def message(self) -> Json:
        """Return the message without what only its end shows."""
        return {
            "id": f"msg_{self.call.record.id}",
            "type": "message",
            "role": "assistant",
            "model": self.served.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }


async def answer(call: Call, body: MessagesBody) -> Response:
    """Answer a request with a whole message, or with a stream."""
    served = await call.use_model(body.model)
    messages = _read_messages(call, body)
    options = chat_options(body, served, messages, call.server.signing_key)
    replies = await open_chat(call, served, messages, **options)
    hides_thinking = body.thinking is not None and body.thinking.display == "omitted"
    writer = BlockWriter(ThoughtSigner(call.server.signing_key), hides_thinking=hides_thinking)
    reply = _Reply(call, served, replies, writer)
    if body.stream:
        response = event_stream(call, _stream(reply, body), encode_error, _ping)
        response.headers.update(request_id_headers(call))
        return response
    async with replies:
        completion = await _collect(reply)
    pin_prefixes(call, served, body, replies.prompt)
    values = reply.message() | {"content": writer.content} | _ending(completion) | {"usage": usage(completion)}
    return json_response(values, headers=request_id_headers(call))


async def count_tokens(call: Call, body: MessagesBody) -> Response:
    """Answer with the number of tokens of a message's prompt."""
    served = await call.use_model(body.model)
    messages = _read_messages(call, body)
    options = template_options(body, messages)
    n_tokens = await count_prompt_tokens(call, served, messages, body.cache_salt, **options)
    return json_response({"input_tokens": n_tokens}, headers=request_id_headers(call))


async def render(call: Call, body: MessagesBody) -> Response:
    """Answer with the token ids of the prompt that `answer` would compute."""
    served = await call.use_model(body.model)
    messages = _read_messages(call, body)
    options = chat_options(body, served, messages, call.server.signing_key)
    tokens = await render_chat(call, served, messages, **options)
    return json_response(rendered(call, served, "msg", tokens), headers=request_id_headers(call))


def request_id_headers(call: Call) -> dict[str, str]:
    """Return the headers that name a request: Anthropic's clients read the second one."""
    return {"x-request-id": call.record.id, "request-id": call.record.id}


def usage(completion: ChatCompletion) -> Json:
    """Return the token counts of a reply. The three counts of input tokens add up to the prompt."""
    n_prompt = completion.n_prompt
    read, created = completion.cache_delta
    created = min(created, n_prompt - read)  # without the tokens of the reply
    return _input_usage(n_prompt, read, created) | {"output_tokens": len(completion.tokens)}


def _input_usage(n_prompt: int, read: int, created: int) -> Json:
    return {
        "input_tokens": n_prompt - read - created,
        "cache_creation_input_tokens": created,
        "cache_read_input_tokens": read,
    }


def _read_messages(call: Call, body: MessagesBody) -> list[Json]:
    reader = ConversationReader(ThoughtSigner(call.server.signing_key))
    messages = reader.read(body.system, body.messages)
    if reader.n_unverified:
        call.record.notes.append(f"{reader.n_unverified} thoughts skipped: this server did not sign them")
    return messages


async def _collect(reply: _Reply) -> ChatCompletion:
    """Read a reply to its end, and return it. The writer has its blocks."""
    completion = None
    async for _, event in reply.replies.events():
        if isinstance(event, Done):
            completion = event.completion
        else:
            reply.writer.feed(event)
    reply.writer.finish()
    assert isinstance(completion, ChatCompletion)
    return completion


async def _stream(reply: _Reply, body: MessagesBody) -> AsyncIterator[bytes]:
    """Yield the events of a message.

    The first one has the length of the prompt, and how much of it the cache has now. How much is read is known once
    the model begins, so the numbers of `message_delta` are the final ones.
    """
    async with reply.replies:
        prompt = reply.replies.prompt
        salt = reply.call.cache_salt(body.cache_salt)
        n_cached = await asyncio.to_thread(reply.served.model.cached_prefix, prompt, cache_salt=salt)
        counts = _input_usage(len(prompt), min(n_cached, len(prompt) - 1), 0) | {"output_tokens": 0}
        yield _encode({"type": "message_start", "message": reply.message() | {"usage": counts}})
        completion = None
        async for _, event in reply.replies.events():
            if isinstance(event, Done):
                completion = event.completion
                continue
            for written in reply.writer.feed(event):
                yield _encode(written)
        for written in reply.writer.finish():
            yield _encode(written)
        assert isinstance(completion, ChatCompletion)
        yield _encode({"type": "message_delta", "delta": _ending(completion), "usage": usage(completion)})
        yield _encode({"type": "message_stop"})
    pin_prefixes(reply.call, reply.served, body, prompt)


def _ending(completion: ChatCompletion) -> Json:
    reason, sequence = completion.finish_reason, completion.stop_sequence
    if reason == "stop" and sequence is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": sequence}
    return {"stop_reason": _STOP_REASONS[reason], "stop_sequence": None}


def _encode(event: Json) -> bytes:
    return encode_event(event, event["type"])


def _ping() -> bytes:
    return _encode({"type": "ping"})
