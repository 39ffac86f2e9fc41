"""Starts replies, follows their events, and ends them when the client leaves.

A reply that its client abandons ends at the next tick. What was computed stays in the cache.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Generic, NamedTuple, TypeVar, Unpack

import numpy as np
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect, Request

from erllama._model.requests.chat_streams import AsyncChatStream
from erllama._model.requests.options import ChatOptions, CompletionOptions
from erllama._model.requests.streams import AsyncStream
from erllama._types import Messages, Prompt
from erllama.chat.results import ChatCompletion
from erllama.engine import Completion, Done, Event
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call
from erllama.server.models import ServedModel
from erllama.server.replies.unstable_prefixes import drop_unstable_headers, note_prefix_change

T = TypeVar("T")
Result = TypeVar("Result", bound=Completion)

_RESTART_POLL = 0.05  # seconds


class Choice(NamedTuple):
    """An event of one of several replies.

    Attributes:
        index: number of the reply, from 0.
        event: what happened.
    """

    index: int
    event: Event


class Replies(Generic[Result]):
    """The replies to one request: one, or as many as `n` asks for. Leaving the `async with` block cancels them."""

    def __init__(self, call: Call, streams: Sequence[AsyncStream]) -> None:
        self._call, self._streams = call, streams

    async def __aenter__(self) -> Replies[Result]:
        return self

    async def __aexit__(self, *error: object) -> None:
        for stream in self._streams:
            await stream.__aexit__(*error)

    @property
    def prompt(self) -> NDArray[np.int32]:
        """The token ids of the prompt, int32, shape (n,)."""
        return self._streams[0].prompt

    async def events(self) -> AsyncIterator[Choice]:
        """Yield the events of all replies, each reply's in order; `Done` is the last of each."""
        if len(self._streams) == 1:
            async for event in self._streams[0]:
                self._note(event)
                yield Choice(0, event)
            return
        queue: asyncio.Queue[Choice | Exception | None] = asyncio.Queue(maxsize=64)
        async with asyncio.TaskGroup() as tasks:
            for index, stream in enumerate(self._streams):
                tasks.create_task(_forward(index, stream, queue))
            n_open = len(self._streams)
            while n_open:
                item = await queue.get()
                if item is None:
                    n_open -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    self._note(item.event)
                    yield item

    async def results(self) -> list[Result]:
        """Return the whole replies.

        Raises:
            ClientDisconnect: the client left.
        """
        gathered = asyncio.gather(*(stream.result() for stream in self._streams))
        results = await until_disconnect(self._call.request, gathered)
        for result in results:
            self._note(Done(result))
        return results  # type: ignore[return-value]

    def _note(self, event: Event) -> None:
        record = self._call.record
        if record.first_token is None and not isinstance(event, Done):
            record.first_token = time.monotonic() - record.began
        if isinstance(event, Done):
            _note_completion(self._call, event.completion)


async def _forward(index: int, stream: AsyncStream, queue: asyncio.Queue[Choice | Exception | None]) -> None:
    try:
        async for event in stream:
            await queue.put(Choice(index, event))
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)


def _note_completion(call: Call, completion: Completion) -> None:
    record = call.record
    n_prompt = len(completion.context_tokens) - len(completion.tokens)
    if record.first_token is None:
        timings = completion.timings
        record.first_token = timings.queued + timings.restore + timings.prefill
    record.prompt_tokens += n_prompt
    record.cached_tokens += completion.cache.tokens
    record.completion_tokens += len(completion.tokens)
    record.tier = completion.cache.tier
    record.finish_reason = completion.finish_reason
    if call.key is not None:
        call.server.rate_limits.charge(call.key, n_prompt - completion.cache.tokens + len(completion.tokens))


async def open_chat(
    call: Call, served: ServedModel, messages: Messages, *, n: int = 1, **options: Unpack[ChatOptions]
) -> Replies[ChatCompletion]:
    """Submit a conversation, and return its replies.

    Errors of the messages and options, and a full queue, are raised here: before the response has a status.

    Args:
        n: number of replies. The prompt is computed once, and each has a seed of its own.
    """
    options.setdefault("special_tokens_in_content", served.special_tokens_in_content)
    options["cache_salt"] = call.cache_salt(options.get("cache_salt"))
    if call.server.options.drop_unstable_headers:
        messages = drop_unstable_headers(messages)
    await wait_for_process(call, served)
    streams: list[AsyncChatStream] = []
    try:
        for index in range(n):
            stream = served.model.astream_chat(messages, **_with_seed(options, index))
            streams.append(stream)
            await stream.start()
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise
    replies: Replies[ChatCompletion] = Replies(call, streams)
    note_prefix_change(call, served, replies.prompt)
    return replies


async def open_completion(
    call: Call, served: ServedModel, prompt: Prompt, *, n: int = 1, **options: Unpack[CompletionOptions]
) -> Replies[Completion]:
    """Submit a prompt, and return its replies; as `open_chat`."""
    options["cache_salt"] = call.cache_salt(options.get("cache_salt"))
    await wait_for_process(call, served)
    if isinstance(prompt, str):  # a long one takes a while
        prompt = await asyncio.to_thread(served.model.tokenize, prompt, parse_special=True)
    streams: list[AsyncStream] = []
    try:
        for index in range(n):
            streams.append(served.model.astream(prompt, **_with_seed(options, index)))
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise
    replies: Replies[Completion] = Replies(call, streams)
    note_prefix_change(call, served, replies.prompt)
    return replies


def _with_seed(options: T, index: int) -> T:
    """Return the options of reply `index`: equal seeds would give equal replies."""
    assert isinstance(options, dict)
    seed = options.get("seed")
    return options if seed is None or not index else {**options, "seed": seed + index}  # type: ignore[return-value]


async def wait_for_process(call: Call, served: ServedModel) -> None:
    """Wait while the process of a model is being replaced.

    Raises:
        ApiError: it takes longer than the option `restart_wait`.
    """
    if served.model.info.pid:
        return
    deadline = time.monotonic() + call.server.options.restart_wait
    while not served.model.info.pid:
        if time.monotonic() >= deadline:
            raise ApiError(
                "unavailable",
                f"the model {served.name!r} is restarting; try again",
                "model_restarting",
                retry_after=1,
            )
        await asyncio.sleep(_RESTART_POLL)


async def until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """Return the result of some work; cancel it if the client leaves.

    Raises:
        ClientDisconnect: the client left.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        leaving.cancel()
        task.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
