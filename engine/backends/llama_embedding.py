"""Embeddings by libllama, in separate contexts on the weights of the model's backend.

There is one context for each requested pooling. It is created for the length of the texts, and replaced for longer
texts, because it holds a row as wide as the vocabulary for each token that it can compute at once. One thread at a
time may use it. Errors of the binding become `BackendError`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from erllama.engine.backends.llama_library import llama_ffi
from erllama.engine.backends.llama_weights import LlamaWeights
from erllama.engine.backends.thread_choice import ThreadChoice
from erllama.engine.embedding import EmbeddingLimits
from erllama.errors import BackendError

# The pooling if a file names none. Most models were trained for it.
_DEFAULT_POOLING = "mean"
_RANK_TEMPLATE = "rerank"
_PLACEHOLDERS = re.compile(r"\{(query|document)\}")


class LlamaEmbedder:
    """Embeds with a loaded model.

    Args:
        weights: the weights. Their model is held while a context exists.
        words: a model for its vocabulary and metadata. It stays loaded if the weights are loaded again.
        make_context: creates a context for a pooling and a number of tokens.
        n_tokens: maximum number of tokens in one text.
        n_batch: tokens of several texts that are computed together.
        n_sequences: texts that are computed together.
        threads: the number of threads of each computation.
    """

    def __init__(
        self,
        weights: LlamaWeights,
        words: llama_ffi.LlamaModel,
        make_context: Callable[[str, int], llama_ffi.EmbeddingContext],
        *,
        n_tokens: int,
        n_batch: int,
        n_sequences: int,
        threads: ThreadChoice,
    ) -> None:
        self._weights = weights
        self._model = weights.model  # whose weights the contexts use
        self._words = words
        self._threads = threads
        self._make_context = make_context
        self._contexts: dict[str, llama_ffi.EmbeddingContext] = {}
        self._ended = False
        pooling = llama_ffi.own_pooling(words) or _DEFAULT_POOLING
        self.limits = EmbeddingLimits(n_tokens, n_batch, n_sequences, pooling)

    def embed(self, texts: Sequence[NDArray[np.int32]], pooling: str) -> list[NDArray[np.float32]]:
        if self._weights.remote:
            self._follow_weights()
        n_tokens = sum(map(len, texts))
        n_threads = self._threads.begin(n_tokens)
        try:
            context = self._context_for(n_tokens, pooling)
            context.set_threads(n_threads)
            rows = context.embed(texts)
            self._threads.record(*context.times())
            return rows
        except llama_ffi.LlamaError as error:
            if self._weights.remote:
                self._weights.check()
            raise BackendError(str(error)) from error
        finally:
            self._threads.end()

    def _follow_weights(self) -> None:
        """Load the weights again if an RPC server was lost, and drop the contexts on earlier weights."""
        self._weights.reload()
        if self._weights.model is not self._model:
            self._model = self._weights.model
            lost, self._contexts = self._contexts, {}
            for context in lost.values():
                context.close()

    def _context_for(self, n_tokens: int, pooling: str) -> llama_ffi.EmbeddingContext:
        context = self._contexts.get(pooling)
        if context is None or context.n_tokens < n_tokens:
            if context is not None:
                context.close()
            # A power of two, so that slowly growing texts do not create a context each time.
            size = min(1 << (n_tokens - 1).bit_length(), self.limits.n_tokens)
            context = self._make_context(pooling, max(self.limits.n_batch, size))
            self._contexts = {**self._contexts, pooling: context}  # another thread may read it
        if self._ended:  # set by another thread meanwhile
            context.abort()
        return context

    def pair(self, query: str, document: str) -> NDArray[np.int32]:
        vocabulary = self._words.vocabulary
        texts = {"query": query, "document": document}
        try:
            template = self._words.chat_template(_RANK_TEMPLATE)
            if template is not None:
                written = _PLACEHOLDERS.sub(lambda place: texts[place[1]], template)
                return vocabulary.tokenize(written, add_special=False, parse_special=True)
            query_ids, document_ids = (vocabulary.tokenize(text, add_special=False) for text in (query, document))
        except llama_ffi.LlamaError as error:
            raise BackendError(str(error)) from error
        # [BOS] query [EOS] [SEP] document [EOS], each special token only if the model asks for it.
        end = vocabulary.eos if vocabulary.eos is not None else vocabulary.sep
        first = _special(vocabulary.bos, vocabulary.add_bos)
        last, between = _special(end, vocabulary.add_eos), _special(vocabulary.sep, vocabulary.add_sep)
        return np.concatenate([first, query_ids, last, between, document_ids, last]).astype(np.int32)

    def abort(self) -> None:
        self._ended = True
        for context in self._contexts.values():
            context.abort()

    def close(self) -> None:
        self._threads.close()
        self.abort()
        for context in self._contexts.values():
            context.close()


def _special(token: int | None, wanted: bool) -> list[int]:
    return [token] if wanted and token is not None else []
