"""`POST /api/generate`: the reply to a prompt, by the chat template or raw, and the text in a gap.

A reply has `context`: the tokens of prompt and reply. A request that sends it back continues after these tokens, so
that only the new prompt is computed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response

from erllama._model.requests.options import ChatOptions, CompletionOptions, TemplateOptions
from erllama.chat.results import ChatCompletion
from erllama.engine import Completion, Done, TextDelta, ThinkingDelta
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, json_response
from erllama.server.models import ServedModel
from erllama.server.ollama.answers import ending, head, logprobs_json
from erllama.server.ollama.errors import ERRORS, encode_error
from erllama.server.ollama.options import (
    ReplyBody,
    completion_options,
    load_or_unload,
    read_keep_alive,
    refuse_images,
    thinking_options,
)
from erllama.server.replies.ndjson import encode_line, line_stream
from erllama.server.replies.running import Replies, open_chat, open_completion, open_completions

AnyReplies = Replies[Completion] | Replies[ChatCompletion]

# A finished exchange of any texts. The template renders what follows it as it renders what follows a context.
_EXCHANGE = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"})


class GenerateBody(ReplyBody, kw_only=True):
    """The body of a generation."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[str] | None = None


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of this module."""
    return [Endpoint("POST", "/api/generate", GenerateBody, answer, ERRORS, "Reply to a prompt.")]


async def answer(call: Call, body: GenerateBody) -> Response:
    """Answer a request with a stream of lines, or with a whole reply.

    Without a prompt, the model is loaded, or unloaded if `keep_alive` is 0.
    """
    _check(body)
    if not body.prompt and not body.suffix:
        reason = await load_or_unload(call, body)
        return json_response(head(call.record.model) | {"response": "", "done": True, "done_reason": reason})
    served = await call.use_model(body.model, read_keep_alive(body.keep_alive))
    replies = await _open(call, served, body)
    returns_context = not body.raw and not body.suffix
    if body.is_stream:
        lines = _stream(call, replies, served, returns_context)
        return line_stream(call, lines, encode_error, lambda: _line(served, ""))
    async with replies:
        (result,) = await replies.results()
    values = head(served.name) | _reply(result.text, result.thinking)
    if result.logprobs is not None:
        values["logprobs"] = logprobs_json(served.model, result.logprobs)
    last = _ending(call, result, returns_context)
    return json_response(values | last)


def _check(body: GenerateBody) -> None:
    """Raise ApiError for fields that the server refuses, or that contradict each other."""
    refuse_images(body.images, "images")
    if body.template:
        raise ApiError(
            "unsupported",
            "template: the server uses the model's own chat template, and does not run Ollama's; "
            'leave it out, or send a finished prompt with "raw": true',
            "unsupported",
            "template",
        )
    for alone, name in ((body.raw, "raw"), (body.suffix, "suffix")):
        for other in ("system", "context"):
            if alone and getattr(body, other):
                raise ApiError(
                    "invalid_request", f"{name} and {other} together; {name} uses no chat template", param=other
                )
    if body.raw and body.suffix:
        raise ApiError("invalid_request", "raw and suffix together; leave out raw", param="raw")


async def _open(call: Call, served: ServedModel, body: GenerateBody) -> AnyReplies:
    """Submit a request, and return its reply."""
    prompt, options = body.prompt or "", completion_options(call, served, body)
    if body.suffix:
        return await open_completions(call, served, [prompt], suffix=body.suffix, **options)
    if body.raw:
        return await open_completion(call, served, prompt, **options)
    thinking = thinking_options(served, body.think)
    if body.context:
        return await _open_continuation(call, served, body, options, thinking)
    messages = [{"role": "user", "content": prompt}]
    if body.system:
        messages.insert(0, {"role": "system", "content": body.system})
    chat_options: ChatOptions = {**options, **thinking}
    return await open_chat(call, served, messages, **chat_options)


async def _open_continuation(
    call: Call, served: ServedModel, body: GenerateBody, options: CompletionOptions, thinking: ChatOptions
) -> Replies[Completion]:
    """Submit a prompt that continues a context. The context already has the system message."""
    rendering: TemplateOptions = {"special_tokens_in_content": served.special_tokens_in_content}
    if "chat_template" in served.defaults:
        rendering["chat_template"] = cast(str, served.defaults["chat_template"])
    if "thinking" in thinking:
        rendering["thinking"] = thinking["thinking"]
    if "template_args" in thinking:
        rendering["template_args"] = thinking["template_args"]
    following = await asyncio.to_thread(_tokens_after_reply, served, body.prompt or "", rendering)
    options["thinking"] = "enabled"  # separates it from the answer
    if body.think is False and served.can_think:
        options["thinking_budget_tokens"] = 0
    return await open_completion(call, served, [*(body.context or ()), *following.tolist()], **options)


def _tokens_after_reply(served: ServedModel, prompt: str, options: TemplateOptions) -> NDArray[np.int32]:
    """Return the tokens from the end of a reply to the beginning of the next one, with a prompt between them.

    Raises:
        ApiError: the template does not render a conversation as the continuation of its beginning.
    """
    model = served.model
    continuing: TemplateOptions = {**options, "continue_final_message": True}
    before = model.apply_chat_template(_EXCHANGE, add_generation_prompt=False, **continuing)
    whole = model.apply_chat_template((*_EXCHANGE, {"role": "user", "content": prompt}), **options)
    if not np.array_equal(whole[: len(before)], before):
        raise ApiError(
            "unsupported",
            f"the chat template of {served.name!r} changes earlier turns, so it cannot continue a context; "
            "use /api/chat",
            "unsupported",
            "context",
        )
    return whole[len(before) :]


def _reply(text: str, thinking: str = "") -> Json:
    return {"response": text, "thinking": thinking} if thinking else {"response": text}


def _ending(call: Call, completion: Completion, returns_context: bool) -> Json:
    last = ending(call, completion)
    return last | {"context": completion.context_tokens} if returns_context else last


def _line(served: ServedModel, text: str, thinking: str = "", logprobs: list[Json] | None = None) -> bytes:
    values = head(served.name) | _reply(text, thinking) | {"done": False}
    return encode_line(values if logprobs is None else values | {"logprobs": logprobs})


async def _stream(
    call: Call, replies: AnyReplies, served: ServedModel, returns_context: bool
) -> AsyncGenerator[bytes]:
    async with replies:
        async for _, event in replies.events():
            if isinstance(event, Done):
                yield encode_line(head(served.name) | _reply("") | _ending(call, event.completion, returns_context))
            elif isinstance(event, TextDelta | ThinkingDelta) and (event.text or event.logprobs):
                logprobs = logprobs_json(served.model, event.logprobs) if event.logprobs else None
                is_text = isinstance(event, TextDelta)
                yield _line(served, event.text if is_text else "", "" if is_text else event.text, logprobs)
