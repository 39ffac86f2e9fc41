"""Prompts of one model: checked and turned into token ids.

`Model`, `CompletionRequests`, `EmbeddingRequests` and `AdapterLoader` check their arguments here, so every method
refuses the same prompts with the same errors.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from erllama._model.runner import ModelRunner
from erllama.chat.chats import Chats
from erllama.checks import shown
from erllama.engine import Backend, RequestOptions
from erllama.engine.requests.prompts import PromptTokenizer
from erllama.errors import PromptError, PromptTooLong, Unsupported


class PromptReader:
    """Turns prompts of one model into token ids. Thread-safe.

    Args:
        id: the model's id, for error messages.
        chats: the model's chats, which remember the tokens of earlier conversations.
    """

    def __init__(self, backend: Backend, id: str, runner: ModelRunner, chats: Chats) -> None:
        self._backend, self._id = backend, id
        self._runner, self._chats = runner, chats

    def check_generates(self) -> None:
        """Raise an error unless the model can predict tokens.

        Raises:
            ModelUnloaded: the model is unloaded.
            VocabularyOnly: the model has no weights.
            Unsupported: the model only encodes.
        """
        self._runner.check_computes()
        if not self._backend.limits.can_generate:
            raise Unsupported(
                f"model {self._id!r} only encodes: it cannot write text or predict tokens; use embed or rerank"
            )

    def ids(self, prompt: object, options: RequestOptions | None = None) -> NDArray[np.int32]:
        """Return the token ids of a prompt, int32, shape (n,).

        Args:
            prompt: text, or token ids.
            options: of the request; a prompt that continues its `parent_key` keeps the parent's tokens.

        Raises:
            PromptError: the prompt is empty or has the wrong type, or an id is outside the vocabulary.
            PromptTooLong: the prompt does not fit the context.
        """
        self._runner.check_computes()
        # An empty text is an error even if the tokenizer would add a BOS to it: it is a mistake more often than an
        # intention, and a caller can pass the BOS as an id.
        if isinstance(prompt, str) and prompt:
            self.check_length(prompt)
            continued = self._continued(prompt, options) if options is not None else None
            ids = continued if continued is not None else self.tokenize(prompt)
        else:
            ids = self.checked_ids([] if isinstance(prompt, str) else prompt)
        if not len(ids):
            raise PromptError("the prompt is empty; pass at least one token")
        n_ctx = self._backend.limits.n_ctx
        if len(ids) > n_ctx:
            raise PromptTooLong(
                f"the prompt has {len(ids)} tokens and the context holds {n_ctx}; "
                "shorten it, or load the model with a larger n_ctx",
                n_tokens=len(ids),
                n_ctx=n_ctx,
            )
        return ids

    def check_length(self, *texts: object) -> None:
        """Raise PromptTooLong if the texts cannot fit the context, without tokenizing them; ignore other types."""
        found = (text for text in texts if isinstance(text, str))
        self.tokenizer.check_length(*found, n_ctx=self._backend.limits.n_ctx)

    def tokenize(self, text: str | bytes) -> NDArray[np.int32]:
        """Return the token ids of a text: special tokens parsed, and the model's BOS and EOS added once."""
        return self.tokenizer.tokenize(text)

    def checked_ids(self, ids: object) -> NDArray[np.int32]:
        """Return token ids, int32, shape (n,); raise PromptError if one is outside the vocabulary."""
        found = None
        if isinstance(ids, np.ndarray | list | tuple | range):
            with suppress(ValueError, OverflowError, TypeError):  # ragged lists, for example
                found = np.asarray(ids)
        if found is None or found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
            raise PromptError(f"{shown(ids)} is neither text nor a sequence of token ids")
        n_vocab = self._backend.vocabulary.n_tokens
        outside = (found < 0) | (found >= n_vocab)
        if outside.any():
            at = int(np.argmax(outside))
            raise PromptError(f"token id {found[at]} at {at} is outside the vocabulary; ids are 0 to {n_vocab - 1}")
        return np.ascontiguousarray(found, np.int32)

    @cached_property
    def tokenizer(self) -> PromptTokenizer:
        """The model's tokenizer of prompts."""
        return PromptTokenizer(self._backend.vocabulary)

    def _continued(self, text: str, options: RequestOptions) -> NDArray[np.int32] | None:
        """Return the token ids of a text that begins with its parent's context; None if it does not."""
        key = options.parent_key
        if key is None or options.reproducible:
            return None
        context = self._runner.stored_context(key, self._runner.namespace(options.cache_salt))
        return None if context is None else self._chats.history.continue_context(context, text)
