"""`/completion` and `/completions`: llama-server's own completions, whole or as a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from starlette.responses import Response

from erllama.engine import Completion, Done, TextDelta
from erllama.server.endpoints import Call, Endpoint, json_response
from erllama.server.llama_server.completion_body import CompletionBody
from erllama.server.llama_server.completion_json import ReplyWriter
from erllama.server.llama_server.errors import ERRORS, encode_error
from erllama.server.llama_server.post_sampling import check_post_sampling
from erllama.server.models import ServedModel
from erllama.server.replies.prompts import Tokens, read_prompts
from erllama.server.replies.running import Choice, Replies, open_completions
from erllama.server.replies.sse import encode_event, event_stream


class PromptBody(CompletionBody, kw_only=True):
    """The body of `/completion`.

    Attributes:
        prompt: a text, token ids, both mixed, or a list of prompts.
    """

    prompt: object


def endpoints() -> list[Endpoint[PromptBody]]:
    """Return the endpoints of this module."""
    paths = ("/completion", "/completions")
    return [Endpoint("POST", path, PromptBody, answer, ERRORS, "Complete a prompt, or several.") for path in paths]


async def answer(call: Call, body: PromptBody) -> Response:
    """Answer a request with whole replies, or with a stream."""
    served = await call.use_model(body.model)
    return await answer_prompts(call, body, served, await read_prompts(served.model, body.prompt))


async def answer_prompts(
    call: Call, body: CompletionBody, served: ServedModel, prompts: Sequence[Tokens]
) -> Response:
    """Answer with the replies to prompts of token ids."""
    options = body.options(served)
    if body.post_sampling_probs and body.n_top:
        check_post_sampling(options)
    # In a thread, since a long prompt takes a while.
    texts = await asyncio.to_thread(lambda: [served.model.detokenize(each, special=True) for each in prompts])
    replies = await open_completions(call, served, prompts, n=body.n_replies, **options)
    indexed = enumerate(each for each in zip(prompts, texts, strict=True) for _ in range(body.n_replies))
    writers = [ReplyWriter(served, body, options, prompt, text, index) for index, (prompt, text) in indexed]
    if body.stream:
        return event_stream(call, _stream(replies, writers, body), encode_error)
    async with replies:
        results = await _collect(replies, body)
    values = [writer.end(result, result.text) for writer, result in zip(writers, results, strict=True)]
    return json_response(values if len(values) > 1 else values[0], headers={"x-request-id": call.record.id})


async def _collect(replies: Replies[Completion], body: CompletionBody) -> list[Completion]:
    """Return the whole replies."""
    results = {}
    async for index, event in _within_time(replies, body):
        if isinstance(event, Done):
            results[index] = event.completion
    return [results[index] for index in sorted(results)]


async def _stream(
    replies: Replies[Completion], writers: Sequence[ReplyWriter], body: CompletionBody
) -> AsyncIterator[bytes]:
    async with replies:
        async for index, event in _within_time(replies, body):
            writer = writers[index]
            if isinstance(event, TextDelta):
                for piece in writer.pieces(event):
                    yield encode_event(piece)
            elif isinstance(event, Done):
                yield encode_event(writer.end(event.completion, writer.withheld))


async def _within_time(replies: Replies[Completion], body: CompletionBody) -> AsyncIterator[Choice]:
    """Yield the events of replies. End those that take longer than `t_max_predict_ms` and have a line end."""
    seconds = body.t_max_predict_ms / 1000 if body.t_max_predict_ms and body.t_max_predict_ms > 0 else None
    began: dict[int, float] = {}
    has_line: set[int] = set()
    async for choice in replies.events():
        index, event = choice
        if seconds is not None and isinstance(event, TextDelta):
            first = began.setdefault(index, time.monotonic())
            if "\n" in event.text:
                has_line.add(index)
            if index in has_line and time.monotonic() - first > seconds:
                replies.cancel(index)
        yield choice
