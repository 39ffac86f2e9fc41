"""Starts replies, follows their events, and ends them when the client leaves.

A reply that its client abandons ends at the next tick. What was computed stays in the cache.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Generic, NamedTuple, TypeVar, Unpack

from erllama._model.requests.chat_streams import AsyncChatStream
from erllama._model.requests.options import ChatOptions, CompletionOptions
from erllama._model.requests.streams import AsyncStream
from erllama._types import Messages, Prompt
from erllama.chat.results import ChatCompletion
from erllama.engine import Completion, Done, Event
from erllama.errors import Error
from erllama.server.conduct.disconnects import until_disconnect as until_disconnect  # for the APIs
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call
from erllama.server.models import ServedModel

T = TypeVar("T")
Result = TypeVar("Result", bound=Completion)

_RESTART_POLL = 0.05  # seconds


class Choice(NamedTuple):
    """An event of one of several replies.

    Attributes:
        index: number of the reply, from 0.
        event: what happened.
    """

    index: int  # type: ignore[assignment]  # tuples have a method of this name
    event: Event


class Replies(Generic[Result]):
    """The replies to one request: one, or as many as `n` asks for. Leaving the `async with` block cancels them."""

    def __init__(self, call: Call, streams: Sequence[AsyncStream]) -> None:
        self._call, self._streams = call, streams
        self._unfinished = set(range(len(streams)))

    async def __aenter__(self) -> Replies[Result]:
        return self

    async def __aexit__(self, *error: object) -> None:
        for stream in self._streams:
            stream.cancel()
        if self._unfinished:
            # A task of its own: this one is being cancelled if the client left.
            self._call.record.ending = asyncio.ensure_future(self._note_abandoned())
        for stream in self._streams:
            await stream.__aexit__(*error)

    async def _note_abandoned(self) -> None:
        """Note what the replies that nobody awaits have computed. They end at the next tick."""
        for index in sorted(self._unfinished):
            with suppress(Error):
                # Not the result of a chat: the model remembers the part that the client got.
                self._note(index, Done(await AsyncStream.result(self._streams[index])))

    async def events(self) -> AsyncIterator[Choice]:
        """Yield the events of all replies, each reply's in order; `Done` is the last of each."""
        if len(self._streams) == 1:
            async for event in self._streams[0]:
                self._note(0, event)
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
                    self._note(item.index, item.event)
                    yield item

    async def results(self) -> list[Result]:
        """Return the whole replies."""
        results = await asyncio.gather(*(stream.result() for stream in self._streams))
        for index, result in enumerate(results):
            self._note(index, Done(result))
        return results  # type: ignore[return-value]

    def _note(self, index: int, event: Event) -> None:
        record = self._call.record
        if record.first_token is None and not isinstance(event, Done):
            record.first_token = time.monotonic() - record.began
        if isinstance(event, Done) and index in self._unfinished:
            self._unfinished.remove(index)
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
    timings = completion.timings
    if record.first_token is None and completion.tokens:
        record.first_token = timings.queued + timings.restore + timings.prefill
    record.prompt_tokens += n_prompt
    record.cached_tokens += completion.cache.tokens
    record.completion_tokens += len(completion.tokens)
    record.tier = completion.cache.tier
    record.queue_seconds, record.decode_seconds = timings.queued, timings.decode
    record.prefill_seconds = timings.restore + timings.prefill
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
    if call.server.options.log_prompts:
        call.record.prompt = messages
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
    return Replies(call, streams)


async def open_completion(
    call: Call, served: ServedModel, prompt: Prompt, *, n: int = 1, **options: Unpack[CompletionOptions]
) -> Replies[Completion]:
    """Submit a prompt, and return its replies; as `open_chat`."""
    options["cache_salt"] = call.cache_salt(options.get("cache_salt"))
    if call.server.options.log_prompts:
        call.record.prompt = prompt if isinstance(prompt, str) else [int(token) for token in prompt]
    await wait_for_process(call, served)
    if isinstance(prompt, str):  # a long one takes a while
        prompt = await asyncio.to_thread(served.model.tokenize, prompt, parse_special=True)
    streams: list[AsyncStream] = []
    try:
        for index in range(n):
            stream = served.model.astream(prompt, **_with_seed(options, index))
            streams.append(stream)
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise
    return Replies(call, streams)


def _with_seed(options: T, index: int) -> T:
    """Return the options of reply `index`: equal seeds would give equal replies."""
    assert isinstance(options, dict)
    seed = options.get("seed")
    return options if seed is None or not index else {**options, "seed": seed + index}  # type: ignore[return-value]


async def wait_for_process(call: Call, served: ServedModel) -> None:
    """Wait while the process of a model is being replaced.

    Raises:
        ApiError: it takes longer than the option `restart_wait`.
        ModelFailed, ModelUnloaded: the process is not started again.
    """
    runner = served.model._runner
    if runner.pid:
        return
    deadline = time.monotonic() + call.server.options.restart_wait
    while not runner.pid:
        runner.check()
        if time.monotonic() >= deadline:
            raise ApiError(
                "unavailable",
                f"the model {served.name!r} is restarting; try again",
                "model_restarting",
                retry_after=1,
            )
        await asyncio.sleep(_RESTART_POLL)
