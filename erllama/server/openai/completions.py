"""`POST /v1/completions`: prompts, and their completions whole or as a stream; `/render`: the prompts' tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from msgspec import Meta
from starlette.responses import Response

from erllama.engine import Completion, Done, TextDelta, TokenLogprobs
from erllama.errors import Unsupported
from erllama.server.conduct.bodies import Json
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call, Endpoint, json_response
from erllama.server.models import ServedModel
from erllama.server.openai.bodies import MAX_CHOICES, Inputs, StreamOptions, read_inputs
from erllama.server.openai.logprobs import completion_logprobs
from erllama.server.openai.usage import finish_reason, usage_of_prompts
from erllama.server.replies.openai_errors import ERRORS, encode_error
from erllama.server.replies.rendering import render_completions, rendered
from erllama.server.replies.running import Replies, open_completions
from erllama.server.replies.sampling import SamplingBody
from erllama.server.replies.sse import DONE, encode_event, event_stream
from erllama.server.replies.timings import timings

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_MAX_PROMPTS = 128  # of one request; more would fill the queue of waiting requests


class CompletionBody(SamplingBody, kw_only=True):
    """The body of a completion: OpenAI's fields, llama-server's, and our own."""

    prompt: Inputs
    model: str | None = None
    suffix: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    best_of: int | None = None
    logprobs: Annotated[int, Meta(ge=0, le=100)] | None = None
    echo: bool | None = None


def endpoints() -> list[Endpoint[Any]]:
    """Return the endpoints of this module."""
    renders = "Return the token ids of prompts."
    return [
        Endpoint("POST", "/v1/completions", CompletionBody, answer, ERRORS, "Complete prompts."),
        Endpoint("POST", "/v1/completions/render", CompletionBody, render, ERRORS, renders),
    ]


async def answer(call: Call, body: CompletionBody) -> Response:
    """Answer a request with whole completions, or with a stream."""
    served = await call.use_model(body.model)
    prompts, options = _read(body, served)
    echoed = await asyncio.to_thread(_echoed, served, prompts) if body.echo else [""] * len(prompts)
    with _suffix_path(body):
        replies = await open_completions(call, served, prompts, suffix=body.suffix, n=body.n or 1, **options)
    answering = _Answer(served, body, echoed, call.record.id)
    if body.stream:
        return event_stream(call, answering.stream(replies), encode_error)
    async with replies:
        results = await replies.results()
    return json_response(answering.whole(results))


async def render(call: Call, body: CompletionBody) -> Response:
    """Answer with the token ids of the prompts that `answer` would compute."""
    served = await call.use_model(body.model)
    prompts, options = _read(body, served)
    with _suffix_path(body):
        found = await render_completions(call, served, prompts, suffix=body.suffix, **options)
    return json_response([rendered(call, served, "cmpl", tokens) for tokens in found])


def _read(body: CompletionBody, served: ServedModel) -> tuple[Sequence[str | list[int]], dict[str, Any]]:
    """Return the prompts and the options of a request, checked."""
    prompts = read_inputs(body.prompt, "prompt")
    _check(body, prompts)
    options: dict[str, Any] = dict(body.sampling_options(served.model))
    limit = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if limit >= 0:  # llama-server's -1 is no limit
        options["max_tokens"] = limit
    if body.logprobs is not None:
        options["logprobs"] = body.logprobs
    return prompts, options


@contextmanager
def _suffix_path(body: CompletionBody) -> Iterator[None]:
    """Give an error about the suffix its path."""
    try:
        yield
    except Unsupported as error:
        if body.suffix is None:
            raise
        raise ApiError("invalid_request", str(error), "unsupported", param="suffix") from error


def _check(body: CompletionBody, prompts: Sequence[object]) -> None:
    """Raise ApiError if fields contradict each other."""
    n_replies = len(prompts) * (body.n or 1)
    if n_replies > _MAX_PROMPTS:
        message = f"{n_replies} completions in one request, and the limit is {_MAX_PROMPTS}; send fewer prompts"
        raise ApiError("invalid_request", message, param="prompt")
    if body.best_of is not None and body.best_of > (body.n or 1):
        message = f"best_of is {body.best_of}, and all completions are returned; send n instead"
        raise ApiError("invalid_request", message, param="best_of")
    if body.echo and body.logprobs is not None:
        message = "echo with logprobs asks for log-probabilities of the prompt, which a completion does not have"
        raise ApiError("invalid_request", f"{message}; send one of them", param="echo")
    if body.suffix is not None and (body.echo or not all(isinstance(prompt, str) for prompt in prompts)):
        message = "suffix fills the gap after a prompt; send prompts as texts, without echo"
        raise ApiError("invalid_request", message, param="suffix")


def _echoed(served: ServedModel, prompts: Sequence[str | list[int]]) -> list[str]:
    """Return the texts of the prompts."""
    return [p if isinstance(p, str) else served.model.detokenize(p, special=True) for p in prompts]


class _Answer:
    """Encodes the completions of one request. Choice `i` is reply `i % n` to prompt `i // n`."""

    def __init__(self, served: ServedModel, body: CompletionBody, echoed: Sequence[str], id: str) -> None:
        self._served, self._body, self._echoed = served, body, echoed
        self._n = body.n or 1
        self._head = {
            "id": f"cmpl-{id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }

    def whole(self, results: Sequence[Completion]) -> Json:
        """Return the answer with all completions."""
        choices = []
        for index, result in enumerate(results):
            before = self._echoed[index // self._n]
            logprobs = self._logprobs(result.logprobs or (), len(before))
            choices.append(self._choice(index, before + result.text, logprobs, finish_reason(result)))
        counts = usage_of_prompts(results, self._n)
        return self._head | {"choices": choices, "usage": counts, "timings": timings(results[0])}

    async def stream(self, replies: Replies[Completion]) -> AsyncIterator[bytes]:
        """Yield the events of a stream."""
        body = self._body
        counts_usage = bool(body.stream_options and body.stream_options.include_usage)
        head = self._head | ({"usage": None} if counts_usage else {})
        results: dict[int, Completion] = {}
        n_written = [0] * (len(self._echoed) * self._n)  # characters
        async with replies:
            for index in range(len(n_written) if body.echo else 0):
                text = self._echoed[index // self._n]
                n_written[index] = len(text)
                yield encode_event(head | {"choices": [self._choice(index, text, None, None)]})
            async for index, event in replies.events():
                if isinstance(event, Done):
                    results[index] = event.completion
                    last = head | {"choices": [self._choice(index, "", None, finish_reason(event.completion))]}
                    if len(results) == len(n_written):
                        last["timings"] = timings(event.completion)
                    yield encode_event(last)
                elif isinstance(event, TextDelta) and (event.text or event.logprobs):
                    logprobs = self._logprobs(event.logprobs, n_written[index])
                    n_written[index] += len(event.text)
                    yield encode_event(head | {"choices": [self._choice(index, event.text, logprobs, None)]})
        if counts_usage:
            counts = usage_of_prompts([results[index] for index in sorted(results)], self._n)
            yield encode_event(head | {"choices": [], "usage": counts, "timings": timings(results[0])})
        yield DONE

    def _logprobs(self, logprobs: Sequence[TokenLogprobs], offset: int) -> Json | None:
        if self._body.logprobs is None:
            return None
        return completion_logprobs(self._served.model, logprobs, offset)

    def _choice(self, index: int, text: str, logprobs: Json | None, reason: str | None) -> Json:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
