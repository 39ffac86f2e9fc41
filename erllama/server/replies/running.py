"""Starts replies, follows their events, and ends them when the client leaves.

A reply that its client abandons ends at the next tick. What was computed stays in the cache.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, Generic, NamedTuple, TypeVar, Unpack, cast

import numpy as np
from numpy.typing import NDArray

from erllama._model.requests.chat_streams import AsyncChatStream
from erllama._model.requests.options import ChatOptions, CompletionOptions
from erllama._model.requests.streams import AsyncStream
from erllama._types import Messages, Prompt
from erllama.chat.results import ChatCompletion
from erllama.engine import Completion, Done, Event, Grammar, TextDelta
from erllama.errors import Error, SessionBusy
from erllama.server.conduct.errors import ApiError
from erllama.server.endpoints import Call
from erllama.server.models import ServedModel
from erllama.server.replies.sessions import SessionHint
from erllama.server.replies.unstable_prefixes import drop_unstable_headers, note_prefix_change

T = TypeVar("T")
Result = TypeVar("Result", bound=Completion)

_RESTART_POLL = 0.05  # seconds
_GATHER_SECONDS = 0.005


class Choice(NamedTuple):
    """An event of one of several replies.

    Attributes:
        index: number of the reply, from 0.
        event: what happened.
    """

    index: int  # type: ignore[assignment] # hides tuple.index
    event: Event


class Replies(Generic[Result]):
    """The replies to one request: one, or as many as `n` asks for. Leaving the `async with` block cancels them."""

    def __init__(self, call: Call, streams: Sequence[AsyncStream], hint: SessionHint | None = None) -> None:
        self._call, self._streams, self._hint = call, streams, hint
        self._unfinished = set(range(len(streams)))

    async def __aenter__(self) -> Replies[Result]:
        return self

    async def __aexit__(self, *error: object) -> None:
        for stream in self._streams:
            stream.cancel()
        if self._unfinished:
            # A task of its own: this one is being cancelled if the client left.
            self._call.record.ending = asyncio.ensure_future(self._note_abandoned())
        try:
            for stream in self._streams:
                await stream.__aexit__(*error)
        finally:
            if self._hint is not None:
                self._hint.release()

    def cancel(self, index: int) -> None:
        """End one reply at its next token. Its `Done` follows."""
        self._streams[index].cancel()

    async def _note_abandoned(self) -> None:
        """Note what the replies that nobody awaits have computed. They end at the next tick."""
        for index in sorted(self._unfinished):
            with suppress(Error):
                # Not the result of a chat: the model remembers the part that the client got.
                self._note(index, Done(await AsyncStream.result(self._streams[index])))

    @property
    def prompt(self) -> NDArray[np.int32]:
        """The token ids of the prompt, int32, shape (n,)."""
        return self._streams[0].prompt

    async def events(self) -> AsyncIterator[Choice]:
        """Yield the events of all replies, each reply's in order; `Done` is the last of each."""
        if len(self._streams) == 1:
            pace = _Pace(self._streams[0])
            async for event in self._streams[0]:
                self._note(0, event)
                yield Choice(0, event)
                await pace.rest(event)
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


class _Pace:
    """Lets the tokens of a fast reply gather, since an event costs as much for several tokens as for one.

    A reply with more than `_GATHER_SECONDS` between its tokens is never delayed.
    """

    def __init__(self, stream: AsyncStream) -> None:
        self._stream, self._last = stream, -math.inf

    async def rest(self, event: Event) -> None:
        """Wait after an event if the next one would come at once."""
        now = time.monotonic()
        is_fast = now - self._last < _GATHER_SECONDS or (isinstance(event, TextDelta) and len(event.tokens) > 1)
        self._last = now
        if is_fast:
            if not self._stream.has_ended:
                await asyncio.sleep(_GATHER_SECONDS)
            self._stream.join_unread()


async def _forward(index: int, stream: AsyncStream, queue: asyncio.Queue[Choice | Exception | None]) -> None:
    pace = _Pace(stream)
    try:
        async for event in stream:
            await queue.put(Choice(index, event))
            await pace.rest(event)
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)


def _note_completion(call: Call, completion: Completion) -> None:
    record = call.record
    n_prompt = completion.n_prompt
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
    call: Call,
    served: ServedModel,
    messages: Messages,
    *,
    n: int = 1,
    session_hint: str | None = None,
    **options: Unpack[ChatOptions],
) -> Replies[ChatCompletion]:
    """Submit a conversation, and return its replies.

    Errors of the messages and options, and a full queue, are raised here: before the response has a status.

    Args:
        n: number of replies. The prompt is computed once, and each has a seed of its own. The first one has the
            session, which takes one request at a time.
        session_hint: name of a session to use unless another request is using it. `session_id` overrides it.
    """
    options, messages = prepare_chat(call, served, messages, options)
    if call.server.options.log_prompts:
        call.record.prompt = messages
    await wait_for_process(call, served)
    hint = None
    if session_hint and options.get("session_id") is None:
        hint = SessionHint.claim(call, served, session_hint, options["cache_salt"])
    streams: list[AsyncChatStream] = []
    try:
        for index in range(n):
            own = _of_reply(options, index, has_session=index == 0)
            if hint is not None and index == 0:
                stream = await _start_hinted_chat(served, messages, own, hint)
            else:
                stream = await _start_chat(served, messages, own)
            streams.append(stream)
    except BaseException:
        for stream in streams:
            stream.cancel()
        if hint is not None:
            hint.release()
        raise
    replies: Replies[ChatCompletion] = Replies(call, streams, hint)
    note_prefix_change(call, served, replies.prompt)
    return replies


def prepare_chat(
    call: Call, served: ServedModel, messages: Messages, options: ChatOptions
) -> tuple[ChatOptions, Messages]:
    """Return the options of a chat with those of the model and the key, and its messages as the model gets them."""
    options = cast(ChatOptions, _within_context(served, served.with_defaults(options)))
    options.setdefault("special_tokens_in_content", served.special_tokens_in_content)
    options["cache_salt"] = call.cache_salt(options.get("cache_salt"))
    if call.server.options.drop_unstable_headers:
        messages = drop_unstable_headers(messages)
    return options, messages


async def _start_chat(served: ServedModel, messages: Messages, options: ChatOptions) -> AsyncChatStream:
    """Submit one reply to a conversation."""
    stream = served.model.astream_chat(messages, **options)
    try:
        await stream.start()
    except BaseException:
        stream.cancel()
        raise
    return stream


async def _start_hinted_chat(
    served: ServedModel, messages: Messages, options: ChatOptions, hint: SessionHint
) -> AsyncChatStream:
    """Submit one reply in a session, or without it if the session's previous request has not ended yet."""
    try:
        return await _start_chat(served, messages, {**options, "session_id": hint.session_id})
    except SessionBusy:
        hint.release()
        return await _start_chat(served, messages, options)


async def open_completion(
    call: Call, served: ServedModel, prompt: Prompt, *, n: int = 1, **options: Unpack[CompletionOptions]
) -> Replies[Completion]:
    """Submit a prompt, and return its replies; as `open_chat`."""
    return await open_completions(call, served, [prompt], n=n, **options)


async def open_completions(
    call: Call,
    served: ServedModel,
    prompts: Sequence[Prompt],
    *,
    suffix: str | None = None,
    n: int = 1,
    **options: Unpack[CompletionOptions],
) -> Replies[Completion]:
    """Submit prompts, and return their replies: the `n` of the first prompt, then those of the second, and so on.

    Args:
        suffix: the text after each reply, for models that fill gaps; the prompts are then texts.

    Raises:
        Unsupported: there is a suffix, and the model does not fill gaps.
        Error: as `open_chat`.
    """
    options = prepare_completion(call, served, options)
    if call.server.options.log_prompts:
        logged = [prompt if isinstance(prompt, str) else [int(token) for token in prompt] for prompt in prompts]
        call.record.prompt = logged if len(logged) > 1 else logged[0]
    await wait_for_process(call, served)
    await compile_grammar(served, options)
    streams: list[AsyncStream] = []
    try:
        for prompt in prompts:
            tokens = await tokenize(served, prompt, suffix)
            for index in range(n):
                own = _of_reply(options, index, has_session=not streams)
                streams.append(served.model.astream(tokens, **own))
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise
    replies: Replies[Completion] = Replies(call, streams)
    note_prefix_change(call, served, replies.prompt)
    return replies


def prepare_completion(call: Call, served: ServedModel, options: CompletionOptions) -> CompletionOptions:
    """Return the options of a completion with those of the model and the key."""
    options = cast(CompletionOptions, _within_context(served, {**completion_defaults(served), **options}))
    options["cache_salt"] = call.cache_salt(options.get("cache_salt"))
    return options


def _within_context(served: ServedModel, options: dict[str, Any]) -> dict[str, Any]:
    """Return options whose `max_tokens` is at most the context: clients send huge numbers for no limit."""
    limit = options.get("max_tokens")
    return options if limit is None else {**options, "max_tokens": min(limit, served.model.n_ctx)}


async def tokenize(served: ServedModel, prompt: Prompt, suffix: str | None) -> Prompt:
    """Return the token ids of a prompt. Texts are tokenized in a thread, since a long one takes a while."""
    if suffix is not None:
        return await asyncio.to_thread(served.model._requests.infill_prompt, prompt, suffix)
    if isinstance(prompt, str) and prompt:
        return await asyncio.to_thread(served.model.tokenize, prompt, parse_special=True)
    return prompt


def completion_defaults(served: ServedModel) -> CompletionOptions:
    """Return the default options of a model that completions have, too."""
    known = CompletionOptions.__annotations__
    return cast(CompletionOptions, {name: value for name, value in served.defaults.items() if name in known})


async def compile_grammar(served: ServedModel, options: CompletionOptions) -> None:
    """Compile the grammar of a request in a thread, so that a large schema does not block the event loop."""
    source, schema = options.get("grammar"), options.get("json_schema")
    if (source is None) == (schema is None):
        return  # there is no grammar, or there are two, which the model refuses

    def compile() -> Grammar:
        grammar = Grammar.json_schema(schema) if schema is not None else source
        grammar = Grammar.gbnf(grammar) if isinstance(grammar, str) else grammar
        assert isinstance(grammar, Grammar)
        served.model.compile_grammar(grammar)
        return grammar

    options["grammar"] = await asyncio.to_thread(compile)
    options.pop("json_schema", None)


def _of_reply(options: T, index: int, *, has_session: bool) -> T:
    """Return the options of reply `index` to a prompt: equal seeds would give equal replies.

    Args:
        has_session: whether the reply keeps the option `session_id`.
    """
    assert isinstance(options, dict)
    own: dict[str, Any] = dict(options)
    if not has_session:
        own.pop("session_id", None)
    if own.get("seed") is not None:
        own["seed"] += index
    return own  # type: ignore[return-value]


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
