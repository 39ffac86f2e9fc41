"""What the methods of a model are made of: prompts are checked, and requests made and awaited."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from erllama._model.info import Shape
from erllama._model.request_options import CompletionOptions, request_options
from erllama._model.streams import News, wait_async
from erllama.cache import Cache, Policy
from erllama.chat.chats import Chats
from erllama.engine import Backend, Completion, ModelThread, Request, RequestOptions, Ticket, Vocabulary
from erllama.engine.requests.prompts import PromptTokenizer
from erllama.errors import PromptError, PromptTooLong, Unsupported, shown

Prompt = str | Sequence[int] | NDArray[np.integer]


class Requests:
    """The part of `Model` that all its methods rest on.

    Attributes:
        id: its name in this process.
        cache: where its prompts are kept.
        policy: what of its contexts is saved, and when.
    """

    def __init__(
        self, backend: Backend, id: str, cache: Cache, policy: Policy, cache_salt: str | None, shape: Shape
    ) -> None:
        self.id = id
        self.cache = cache
        self.policy = policy
        self._cache_salt = cache_salt
        self._backend = backend
        self._n_seq_max = shape.n_seq_max or 1
        self._runner = self._make_runner(shape)
        self._chats = Chats(backend, cache, self._runner.namespace)

    def _make_runner(self, shape: Shape) -> ModelThread:
        return ModelThread(
            self._backend,
            self.cache,
            self.policy,
            self.id,
            n_seq_max=self._n_seq_max,
            prefill_chunk_size=shape.prefill_chunk_size or 1,
            parked_cells=shape.parked_cells or 0,
            max_pending=shape.max_pending,
        )

    def _options(self, options: CompletionOptions, where: str) -> RequestOptions:
        return request_options(
            options,
            where,
            self._cache_salt,
            find_thinking=lambda: self._chats.thinking_markers,
            vocabulary=self._backend.vocabulary,
        )

    def _salt(self, given: str | None) -> str | None:
        return self._cache_salt if given is None else given

    def _namespace(self, cache_salt: str | None) -> bytes:
        """The root key of what requests of a salt may share; None for the model's own."""
        return self._runner.namespace(RequestOptions(cache_salt=self._salt(cache_salt)).cache_salt)

    # A ticket is made before its request is submitted, so that whatever interrupts the caller, at whatever moment,
    # cancels the request: a stream that is dropped does it, and so do these.

    def _ticket(self, prompt: Prompt, options: RequestOptions, *, streaming: bool = False) -> Ticket:
        self._check_generates()
        ticket = Ticket(Request(self._prompt_ids(prompt, options), options), streaming)
        ticket.model = self
        return ticket

    def _wait(self, ticket: Ticket) -> Completion:
        try:
            self._runner.submit(ticket)
            return ticket.result()
        except BaseException:
            ticket.cancel()
            raise

    async def _wait_async(self, ticket: Ticket) -> Completion:
        news = News(ticket)
        try:
            self._runner.submit(ticket)
            return await wait_async(ticket, news)
        except BaseException:
            ticket.cancel()
            raise

    def _prompt_ids(self, prompt: object, options: RequestOptions | None = None) -> NDArray[np.int32]:
        self._check_loaded()
        # An empty text is refused even where the tokenizer would put a BOS before it: it is a mistake more
        # often than a wish, and who wishes it can give the id.
        if isinstance(prompt, str) and prompt:
            self._check_length(prompt)
            going_on = self._going_on(prompt, options) if options is not None else None
            ids = going_on if going_on is not None else self._tokenized(prompt)
        else:
            ids = self._checked_ids([] if isinstance(prompt, str) else prompt)
        if not len(ids):
            raise PromptError("the prompt is empty; give at least one token")
        n_ctx = self._backend.limits.n_ctx
        if len(ids) > n_ctx:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens and the context holds {n_ctx}; "
                "shorten it, or load the model with a larger n_ctx"
            )
        return ids

    def _check_length(self, *texts: str) -> None:
        """Raise PromptTooLong where texts cannot fit the context, before they are tokenized."""
        self._tokenizer.check_length(*texts, n_ctx=self._backend.limits.n_ctx)

    def _tokenized(self, text: str) -> NDArray[np.int32]:
        return self._tokenizer.tokenize(text)

    @cached_property
    def _tokenizer(self) -> PromptTokenizer:
        return PromptTokenizer(self._backend.vocabulary)

    def _going_on(self, text: str, options: RequestOptions) -> NDArray[np.int32] | None:
        """The tokens of a text that goes on from its parent: those that the parent was computed as come first."""
        key = options.parent_key
        if key is None or options.reproducible:
            return None
        block = self.cache.stored(key)
        if block is None or block.namespace != self._runner.namespace(options.cache_salt):
            return None
        context = self.cache.context(key)
        return None if context is None else self._chats.history.continue_context(context.astype(np.int32), text)

    def _checked_ids(self, ids: object) -> NDArray[np.int32]:
        return checked_ids(self._backend.vocabulary, ids)

    def _check_loaded(self) -> None:
        self._runner.check()

    def _check_generates(self) -> None:
        self._check_loaded()
        if not self._backend.limits.can_generate:
            raise Unsupported(
                f"model {self.id!r} only encodes: it writes no text, and has no next tokens; use embed, or rerank"
            )


def checked_ids(vocabulary: Vocabulary, ids: object) -> NDArray[np.int32]:
    """Token ids, int32, shape (n,), each in the vocabulary; or PromptError."""
    found = None
    if isinstance(ids, np.ndarray | list | tuple | range):
        with suppress(ValueError, OverflowError, TypeError):  # ragged lists and the like
            found = np.asarray(ids)
    if found is None or found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise PromptError(f"{shown(ids)} is neither text nor a sequence of token ids")
    n_vocab = vocabulary.n_tokens
    outside = (found < 0) | (found >= n_vocab)
    if outside.any():
        at = int(np.argmax(outside))
        raise PromptError(f"token id {found[at]} at {at} is outside the vocabulary; ids are 0 to {n_vocab - 1}")
    return np.ascontiguousarray(found, np.int32)
