"""Runs of conversations in which the model calls Python functions: replies and results, until a reply has no call.

`Model.run_tools` and its streaming and asyncio forms create them.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from erllama._model.requests.chat_streams import AsyncChatStream, ChatStream
from erllama._types import Messages
from erllama.chat.functions import FunctionTools, ToolResult, is_async, raised, returned
from erllama.chat.results import ChatCompletion
from erllama.checks import integer
from erllama.engine import Done, Event, ToolCall
from erllama.errors import Error


@dataclass(frozen=True, slots=True)
class ToolRun:
    """A conversation in which the model called functions.

    Attributes:
        reply: the last reply. It has tool calls only if `max_turns` was reached, or the run was cancelled.
        messages: the conversation with all replies and results, for the next question.
        results: the results of all calls, in order.
        turns: number of replies.
    """

    reply: ChatCompletion
    messages: tuple[Mapping[str, object], ...]
    results: tuple[ToolResult, ...]
    turns: int

    @property
    def text(self) -> str:
        """The text of the last reply."""
        return self.reply.text


class _Conversation:
    """The messages of a run, its results, and whether another reply follows."""

    def __init__(self, messages: Messages, tools: object, max_turns: object, options: Mapping[str, Any]) -> None:
        self.functions = FunctionTools(tools)
        self.messages: list[Mapping[str, object]] = list(messages)
        self.options = {**options, "tools": self.functions.schemas}
        self._max_turns = integer("max_turns", max_turns, 1)
        self._results: list[ToolResult] = []
        self._turns = 0
        self._reply: ChatCompletion | None = None

    def add_reply(self, reply: ChatCompletion) -> bool:
        """Add a reply; return whether its calls are to be run."""
        self._reply, self._turns = reply, self._turns + 1
        self.messages.append(reply.message)
        return bool(reply.tool_calls) and self._turns < self._max_turns

    def add_result(self, result: ToolResult) -> None:
        self._results.append(result)
        self.messages.append(result.message)

    def result(self) -> ToolRun:
        if self._reply is None:
            raise Error("the run ended before its first reply did, so that it has no result; run it again")
        return ToolRun(self._reply, tuple(self.messages), tuple(self._results), self._turns)


def run(
    chat: Callable[..., ChatCompletion],
    messages: Messages,
    tools: object,
    max_turns: object,
    options: Mapping[str, Any],
) -> ToolRun:
    """Run a conversation and return it.

    Args:
        chat: `Model.chat`.
    """
    conversation = _Conversation(messages, tools, max_turns, options)
    conversation.functions.reject_async()
    while conversation.add_reply(reply := chat(conversation.messages, **conversation.options)):
        for call in reply.tool_calls:
            conversation.add_result(conversation.functions.call(call))
    return conversation.result()


class ToolStream:
    """A streamed run. Iterating over it yields the events of each reply, and a `ToolResult` after each call.

    Each reply ends with its `Done`. Leaving a `with` block cancels the present reply.
    """

    def __init__(
        self,
        stream_chat: Callable[..., ChatStream],
        messages: Messages,
        tools: object,
        max_turns: object,
        options: Mapping[str, Any],
    ) -> None:
        self._conversation = _Conversation(messages, tools, max_turns, options)
        self._conversation.functions.reject_async()
        self._stream_chat = stream_chat
        # The first request is submitted now, so that its errors are raised here.
        self._stream = stream_chat(self._conversation.messages, **self._conversation.options)
        self._events = self._run()
        self._cancelled = False

    def _run(self) -> Iterator[Event | ToolResult]:
        conversation = self._conversation
        while True:
            yield from self._stream
            reply = self._stream.result()
            if not conversation.add_reply(reply):
                return
            for call in reply.tool_calls:
                if self._cancelled:
                    return
                result = conversation.functions.call(call)
                conversation.add_result(result)
                yield result
            if self._cancelled:
                return
            self._submit()

    def _submit(self) -> None:
        """Send the next request. Cancel it if another thread has cancelled the previous one in between."""
        self._stream = self._stream_chat(self._conversation.messages, **self._conversation.options)
        if self._cancelled:
            self._stream.cancel()

    def __iter__(self) -> Iterator[Event | ToolResult]:
        return self

    def __next__(self) -> Event | ToolResult:
        return next(self._events)

    def cancel(self) -> None:
        """End the present reply at its next token, and the run with it: no further function is called.

        Idempotent. Safe from any thread.
        """
        self._cancelled = True
        self._stream.cancel()

    def result(self) -> ToolRun:
        """Read the rest of the run, and return the conversation."""
        for _ in self:
            pass
        return self._conversation.result()

    def __enter__(self) -> ToolStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        self._stream.__exit__()


async def run_async(
    achat: Callable[..., Awaitable[ChatCompletion]],
    messages: Messages,
    tools: object,
    max_turns: object,
    options: Mapping[str, Any],
) -> ToolRun:
    """Run a conversation in asyncio and return it.

    Args:
        achat: `Model.achat`.
    """
    conversation = _Conversation(messages, tools, max_turns, options)
    while conversation.add_reply(reply := await achat(conversation.messages, **conversation.options)):
        for call in reply.tool_calls:
            conversation.add_result(await _call_async(conversation.functions, call))
    return conversation.result()


async def _call_async(functions: FunctionTools, call: ToolCall) -> ToolResult:
    """Await a coroutine function, or call another function in a thread and await what it returns, if it can be."""
    function = functions.function(call)
    try:
        if is_async(function):
            value = function(**call.arguments)
        else:
            value = await asyncio.to_thread(function, **call.arguments)
        return returned(call, await value if inspect.isawaitable(value) else value)
    except Exception as error:  # any exception goes to the model
        return raised(call, error)


class AsyncToolStream:
    """`ToolStream` for asyncio: `async for event in model.astream_run_tools(...)`."""

    def __init__(
        self,
        astream_chat: Callable[..., AsyncChatStream],
        messages: Messages,
        tools: object,
        max_turns: object,
        options: Mapping[str, Any],
    ) -> None:
        self._conversation = _Conversation(messages, tools, max_turns, options)
        self._astream_chat = astream_chat
        self._stream: AsyncChatStream | None = None
        self._events = self._run()
        self._cancelled = False

    async def _run(self) -> AsyncIterator[Event | ToolResult]:
        conversation = self._conversation
        while True:
            self._stream = self._astream_chat(conversation.messages, **conversation.options)
            if self._cancelled:  # before the first read
                self._stream.cancel()
            reply: ChatCompletion | None = None
            async for event in self._stream:
                if isinstance(event, Done):
                    reply = cast(ChatCompletion, event.completion)
                yield event
            assert reply is not None
            if not conversation.add_reply(reply):
                return
            for call in reply.tool_calls:
                if self._cancelled:
                    return
                result = await _call_async(conversation.functions, call)
                conversation.add_result(result)
                yield result
            if self._cancelled:
                return

    def __aiter__(self) -> AsyncIterator[Event | ToolResult]:
        return self

    async def __anext__(self) -> Event | ToolResult:
        return await anext(self._events)

    def cancel(self) -> None:
        """End the present reply at the next token, and the run with it: no further function is called.

        Idempotent.
        """
        self._cancelled = True
        if self._stream is not None:
            self._stream.cancel()

    async def result(self) -> ToolRun:
        """Read the rest of the run, and return the conversation."""
        async for _ in self:
            pass
        return self._conversation.result()

    async def __aenter__(self) -> AsyncToolStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()
        if self._stream is not None:
            await self._stream.__aexit__()
