"""Chats as `Model` has them, and their replies as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from erllama._model.request_options import ChatOptions, TemplateOptions, chat_request, template_request
from erllama._model.requests import Requests
from erllama._model.streams import AsyncStream, Stream
from erllama.chat.content_masking import remove_marks
from erllama.chat.results import ChatCompletion
from erllama.chat.turn import Turn
from erllama.engine import Done, Event, Ticket
from erllama.errors import boolean

Messages = Sequence[Mapping[str, object]]


class ChatStream(Stream):
    """A chat's reply as it comes: a `Stream` whose `Done`, and `result()`, have a `ChatCompletion`."""

    def __init__(self, ticket: Ticket, turn: Turn) -> None:
        super().__init__(ticket)
        self._turn = turn

    def __next__(self) -> Event:
        return self._turn.convert_event(super().__next__())

    def result(self) -> ChatCompletion:
        """Wait for the end and return the whole reply; raises the error of a failed one."""
        return self._turn.finish(super().result())

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._turn.abandon()

    def __del__(self) -> None:
        super().__del__()
        _abandon_dropped(self)


class AsyncChatStream(AsyncStream):
    """A chat's reply as it comes, in asyncio: its `Done`, and `result()`, have a `ChatCompletion`.

    The request is made when it is first awaited, beside the loop: a long conversation, or many tools, take a while.
    """

    def __init__(self, prepare: Callable[[], tuple[Ticket, Turn]], submit: Callable[[Ticket], None]) -> None:
        self._prepare, self._submit = prepare, submit
        self._beginning = asyncio.Lock()
        self._turn: Turn | None = None
        self._cancelled = self._ended = False

    async def _begun(self) -> Turn:
        async with self._beginning:
            if self._turn is None:
                ticket, turn = await asyncio.to_thread(self._prepare)
                self._attach(ticket)
                if self._cancelled:
                    ticket.cancel()
                self._turn = turn
                try:
                    self._submit(ticket)
                except Exception as error:
                    ticket.fail(error)  # to whoever waits for it later
                    raise
        return self._turn

    async def __anext__(self) -> Event:
        if self._ended:
            raise StopAsyncIteration
        try:
            turn = await self._begun()
        except BaseException:
            self._ended = True
            raise
        event = await super().__anext__()
        return (
            await asyncio.to_thread(turn.convert_event, event)
            if isinstance(event, Done)
            else turn.convert_event(event)
        )

    def cancel(self) -> None:
        """End the reply at the next token; `Done` still comes, with finish_reason "cancelled". Idempotent."""
        self._cancelled = True
        if self._turn is not None:
            super().cancel()

    async def result(self) -> ChatCompletion:
        """Wait for the end and return the whole reply; raises the error of a failed one."""
        turn = await self._begun()
        return await asyncio.to_thread(turn.finish, await super().result())

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        if self._turn is not None:
            await asyncio.to_thread(self._turn.abandon)

    def __del__(self) -> None:
        super().__del__()
        _abandon_dropped(self)


def _abandon_dropped(stream: ChatStream | AsyncChatStream) -> None:
    turn: Turn | None = getattr(stream, "_turn", None)
    if turn is not None:
        turn.abandon(later=True)


class ChatMethods(Requests):
    """What `Model` has of this."""

    def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> ChatCompletion:
        """The next message of a conversation; waits for the whole of it.

        Beside these options, those of `complete`, `thinking` otherwise:

        Args:
            messages: the conversation, as OpenAI's clients write it, or in Anthropic's blocks.
            tools: what may be called, in their forms, too.
            tool_choice: "auto", the default; "none"; "required", or the name of a tool, which the reply must call.
            parallel_tool_calls: whether one reply may call several, True.
            tool_format: how the model writes calls, by name (docs/chat.md); None to go by its template.
            chat_template: a template's text, the name of one of the model's, or the pathlib.Path of a file; None
                for the model's own, or ChatML where it has none.
            template_args: what the template gets beside the conversation.
            documents: what it gets as documents.
            continue_final_message: go on with the last message, the assistant's, instead of answering. The reply's
                `message` is then the whole of it, to take that one's place.
            special_tokens_in_content: whether content may spell special tokens out, True. With False, the content
                of messages that are not the assistant's, tools and documents are plain text.
            thinking: "enabled" or True, "disabled" or False; None for what the template does of itself. What was
                thought is always told from the answer.

        A reply is remembered as the tokens that it was sampled as: where it comes back in `messages`, they are
        what the next prompt has, whatever tokens its text would give. Not with `reproducible`, where the text alone
        decides.

        Raises:
            ChatError: the messages or tools are none; it names the message's index.
            TemplateError: the template does not parse, refuses the conversation, or takes too long.
            Error: as of `complete`.
        """
        turn = self._turn(messages, options, "chat")
        return turn.finish(self._wait(self._ticket(turn.prompt, turn.options)))

    def stream_chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> ChatStream:
        """The next message of a conversation as it comes; options and errors as for `chat`.

        Of a stream that is left before its end, what was read is remembered.
        """
        ticket, turn = self._streamed(messages, options, "stream_chat")
        stream = ChatStream(ticket, turn)
        self._runner.submit(ticket)
        return stream

    async def achat(self, messages: Messages, **options: Unpack[ChatOptions]) -> ChatCompletion:
        """`chat` for asyncio. Cancelling the task cancels the request."""
        # The loop goes on while templates are rendered and grammars compiled.
        turn = await asyncio.to_thread(self._turn, messages, options, "achat")
        completion = await self._wait_async(self._ticket(turn.prompt, turn.options))
        return await asyncio.to_thread(turn.finish, completion)

    def astream_chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> AsyncChatStream:
        """`stream_chat` for asyncio. What is wrong with the request is raised where it is first awaited."""
        return AsyncChatStream(lambda: self._streamed(messages, options, "astream_chat"), self._runner.submit)

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        cache_salt: str | None = None,
        **options: Unpack[TemplateOptions],
    ) -> NDArray[np.int32]:
        """The tokens of a conversation, int32, shape (n,), to be given to `complete`, `prefill` or `stream`.

        Args:
            add_generation_prompt: end with what a reply begins with.
            cache_salt: of the requests whose replies come back as the tokens that they were; None for the model's.

        Other options, and errors, as for `chat`.
        """
        text = self._marked(messages, add_generation_prompt, options, "apply_chat_template")
        return self._chats.history.tokens(self._namespace(cache_salt), text, as_text=False)

    def render_chat(
        self, messages: Messages, *, add_generation_prompt: bool = True, **options: Unpack[TemplateOptions]
    ) -> str:
        """The text of a conversation as the template writes it; options and errors as for `apply_chat_template`."""
        return remove_marks(self._marked(messages, add_generation_prompt, options, "render_chat"))

    def _marked(self, messages: Messages, add_generation_prompt: bool, options: TemplateOptions, where: str) -> str:
        self._check_loaded()
        request = template_request(messages, options, where)
        return self._chats.render_marked(
            request, add_generation_prompt=boolean("add_generation_prompt", add_generation_prompt)
        )

    def _streamed(self, messages: Messages, options: ChatOptions, where: str) -> tuple[Ticket, Turn]:
        turn = self._turn(messages, options, where)
        return self._ticket(turn.prompt, turn.options, streaming=True), turn

    def _turn(self, messages: Messages, options: ChatOptions, where: str) -> Turn:
        self._check_generates()
        request = chat_request(messages, options, where, self._cache_salt, self._backend.vocabulary)
        return self._chats.prepare_turn(*request)
