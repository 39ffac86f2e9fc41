"""Completion requests of one model: built from a caller's arguments, submitted and awaited.

`Model` delegates completions, scores and infilling to `CompletionRequests`. `ChatRequests` runs its requests
through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from erllama._model.requests.options import CompletionOptions, PrefillOptions, prefill_options, request_options
from erllama._model.requests.prompts import PromptReader
from erllama._model.requests.scoring import infill_prompt, with_continuation
from erllama._model.requests.speculation import Verification
from erllama._model.requests.streams import TicketWaiter, wait_async
from erllama._model.runner import ModelRunner
from erllama._types import Prompt
from erllama.chat.chats import Chats
from erllama.engine import Backend, Completion, Request, RequestOptions, SamplingOptions, Ticket
from erllama.engine.requests.request import MAX_SPECULATIVE
from erllama.engine.speculation import ProposedTokens


class CompletionRequests:
    """Builds and runs the requests of one model. Thread-safe.

    A ticket is created before its request is submitted. An interrupt at any moment can then cancel the request:
    `run` and `run_async` do so, and so does a stream that is dropped.

    Args:
        id: the model's id, for error messages.
        chats: the model's chats, which find the markers of thinking.
        cache_salt: salt of the requests that set none.
    """

    def __init__(
        self,
        backend: Backend,
        id: str,
        runner: ModelRunner,
        prompts: PromptReader,
        chats: Chats,
        cache_salt: str | None,
    ) -> None:
        self._id = id
        self._runner, self._prompts, self._chats = runner, prompts, chats
        self.cache_salt = cache_salt
        self.vocabulary = backend.vocabulary

    # --- options

    def options(self, options: CompletionOptions, where: str) -> RequestOptions:
        """Return the checked options of the method named `where`."""
        return request_options(
            options,
            where,
            self.cache_salt,
            find_thinking=lambda: self._chats.thinking_markers,
            vocabulary=self.vocabulary,
        )

    def prefill_options(self, options: PrefillOptions, where: str) -> RequestOptions:
        """Return the checked options of a request that samples no token."""
        return prefill_options(options, where, self.cache_salt)

    def salt(self, cache_salt: str | None) -> str | None:
        """Return a checked salt; the model's own for None."""
        return RequestOptions(cache_salt=self.cache_salt if cache_salt is None else cache_salt).cache_salt

    def namespace(self, cache_salt: str | None) -> bytes:
        """Return the root key of the cache entries that requests with a salt share; None for the model's salt."""
        return self._runner.namespace(self.salt(cache_salt))

    # --- tickets

    def ticket(self, prompt: Prompt, options: RequestOptions, owner: object, *, streaming: bool = False) -> Ticket:
        """Return the ticket of a completion that is not submitted yet.

        Args:
            owner: the model. It stays loaded until the request ends, even if the caller drops it.
            streaming: whether the caller reads events.
        """
        self._prompts.check_generates()
        ticket = Ticket(Request(self._prompts.ids(prompt, options), options), streaming)
        ticket.model = owner
        return ticket

    def checked_prompt(self, prompt: Prompt, options: CompletionOptions, where: str) -> NDArray[np.int32]:
        """Return the token ids of a completion's prompt, int32, shape (n,). Checks everything that `run` does."""
        self._prompts.check_generates()
        return self._prompts.ids(prompt, self.options(options, where))

    def score_ticket(self, prompt: Prompt, continuation: Prompt, options: RequestOptions) -> Ticket:
        """Return the ticket of a request that scores a continuation of a prompt."""
        self._prompts.check_generates()
        self._prompts.check_length(prompt, continuation)
        ids, n_scored = with_continuation(prompt, continuation, self.vocabulary, self._prompts.ids)
        return Ticket(Request(ids, replace(options, logprobs=1), n_scored), streaming=False)

    def infill_prompt(self, prefix: object, suffix: object) -> NDArray[np.int32]:
        """Return the prompt, int32, shape (n,), whose completion is the text between two texts."""
        self._prompts.check_generates()
        self._prompts.check_length(prefix, suffix)
        return infill_prompt(prefix, suffix, self.vocabulary, self._id)

    # --- running

    def run(self, ticket: Ticket) -> Completion:
        """Submit a request and wait for its completion. An interrupt cancels it."""
        try:
            self._runner.submit(ticket)
            return ticket.result()
        except BaseException:
            ticket.cancel()
            raise

    async def run_async(self, ticket: Ticket) -> Completion:
        """Submit a request and await its completion. Cancelling the task cancels it."""
        waiter = TicketWaiter(ticket)
        try:
            self._runner.submit(ticket)
            return await wait_async(ticket, waiter)
        except BaseException:
            ticket.cancel()
            raise

    def verify(self, prefix: Prompt, candidates: Sequence[int]) -> Verification:
        """Compute proposed tokens together and return how many the model would have sampled."""
        ids = self._prompts.ids(prefix)
        proposed = self._prompts.checked_ids(candidates).tolist()
        options = RequestOptions(
            max_tokens=len(proposed) + 1,
            sampling=SamplingOptions(temperature=0.0),
            cache_salt=self.cache_salt,
            speculative=ProposedTokens(tuple(proposed)),
            speculative_tokens=min(max(len(proposed), 1), MAX_SPECULATIVE),
        )
        reply = self.run(Ticket(Request(ids, options), streaming=False))
        return Verification.of(reply, proposed)
