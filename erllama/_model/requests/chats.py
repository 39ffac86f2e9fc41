"""Chat requests of one model: conversations turned into completions and back.

`Model` delegates its chat methods to `ChatRequests`. Templates, tool calls and the memory of earlier replies are in
`erllama.chat`; `CompletionRequests` runs the requests.
"""

from __future__ import annotations

import asyncio

import numpy as np
from numpy.typing import NDArray

from erllama._model.requests.completions import CompletionRequests
from erllama._model.requests.options import ChatOptions, TemplateOptions, chat_request, template_request
from erllama._model.requests.prompts import PromptReader
from erllama._model.runner import ModelRunner
from erllama._types import Messages
from erllama.chat.chats import Chats
from erllama.chat.content_masking import remove_marks
from erllama.chat.results import ChatCompletion
from erllama.chat.turn import Turn
from erllama.checks import boolean
from erllama.engine import Ticket


class ChatRequests:
    """Builds and runs the chat requests of one model. Thread-safe.

    The argument `where` of the methods is the name of the public method, for error messages. `owner` is the model,
    which stays loaded until its request ends.
    """

    def __init__(
        self, runner: ModelRunner, prompts: PromptReader, requests: CompletionRequests, chats: Chats
    ) -> None:
        self._runner, self._prompts, self._requests = runner, prompts, requests
        self.chats = chats

    def run(self, messages: Messages, options: ChatOptions, where: str, owner: object) -> ChatCompletion:
        """Return the reply to a conversation."""
        ticket, turn = self.ticket(messages, options, where, owner)
        return turn.finish(self._requests.run(ticket))

    async def run_async(
        self, messages: Messages, options: ChatOptions, where: str, owner: object
    ) -> ChatCompletion:
        """Await the reply to a conversation."""
        # Rendering templates and compiling grammars would block the event loop.
        turn = await asyncio.to_thread(self._turn, messages, options, where)
        completion = await self._requests.run_async(self._requests.ticket(turn.prompt, turn.options, owner))
        return await asyncio.to_thread(turn.finish, completion)

    def ticket(
        self, messages: Messages, options: ChatOptions, where: str, owner: object, *, streaming: bool = False
    ) -> tuple[Ticket, Turn]:
        """Return the ticket of a chat that is not submitted yet, and its turn."""
        turn = self._turn(messages, options, where)
        return self._requests.ticket(turn.prompt, turn.options, owner, streaming=streaming), turn

    def prompt_ids(
        self, messages: Messages, options: TemplateOptions, add_generation_prompt: object, cache_salt: str | None
    ) -> NDArray[np.int32]:
        """Return the token ids of a rendered conversation, int32, shape (n,)."""
        text = self._rendered(messages, options, add_generation_prompt, "apply_chat_template")
        return self.chats.history.tokens(self._requests.namespace(cache_salt), text, as_text=False)

    def checked_prompt(self, messages: Messages, options: ChatOptions, where: str) -> NDArray[np.int32]:
        """Return the token ids of a chat's prompt, int32, shape (n,). Checks everything that `run` does."""
        return self._turn(messages, options, where).prompt

    def text(self, messages: Messages, options: TemplateOptions, add_generation_prompt: object) -> str:
        """Return the text of a rendered conversation."""
        return remove_marks(self._rendered(messages, options, add_generation_prompt, "render_chat"))

    def _rendered(
        self, messages: Messages, options: TemplateOptions, add_generation_prompt: object, where: str
    ) -> str:
        """Return a rendered conversation with the marks of plain content in it."""
        self._runner.check()
        request = template_request(messages, options, where)
        return self.chats.render_marked(
            request, add_generation_prompt=boolean("add_generation_prompt", add_generation_prompt)
        )

    def _turn(self, messages: Messages, options: ChatOptions, where: str) -> Turn:
        self._prompts.check_generates()
        request = chat_request(messages, options, where, self._requests.cache_salt, self.chats.vocabulary)
        return self.chats.prepare_turn(*request)
