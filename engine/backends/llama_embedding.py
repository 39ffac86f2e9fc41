"""Embeddings by libllama: a context of its own on the weights that the model's backend has loaded.

A context, one for each pooling that is asked for, is made for the length of the
texts that come, and made anew for longer ones: it holds a row as wide as the
vocabulary for each token that it can compute at once. Used by one thread at a
time; errors of the binding become this library's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from erllama.engine.backends.llama_library import llama_ffi
from erllama.engine.embedding import EmbeddingLimits
from erllama.errors import BackendError

# What libllama pools by where a file does not say: what most models were trained for.
_DEFAULT_POOLING = "mean"
_RANK_TEMPLATE = "rerank"
_PLACES = re.compile(r"\{(query|document)\}")


class LlamaEmbedder:
    """Embeds with a loaded model.

    Args:
        model: with weights; held as long as a context is.
        make_context: makes a context for a pooling and a number of tokens.
        n_tokens: most tokens of one text.
        n_batch: tokens of several texts that are computed together.
        n_sequences: texts that are computed together.
    """

    def __init__(
        self,
        model: llama_ffi.LlamaModel,
        make_context: Callable[[str, int], llama_ffi.EmbeddingContext],
        *,
        n_tokens: int,
        n_batch: int,
        n_sequences: int,
    ) -> None:
        self._model = model
        self._make_context = make_context
        self._contexts: dict[str, llama_ffi.EmbeddingContext] = {}
        self._ended = False
        pooling = llama_ffi.own_pooling(model) or _DEFAULT_POOLING
        self.limits = EmbeddingLimits(n_tokens, n_batch, n_sequences, pooling)

    def embed(self, texts: Sequence[NDArray[np.int32]], pooling: str) -> list[NDArray[np.float32]]:
        try:
            return self._context_for(sum(map(len, texts)), pooling).embed(texts)
        except llama_ffi.LlamaError as error:
            raise BackendError(str(error)) from error

    def _context_for(self, n_tokens: int, pooling: str) -> llama_ffi.EmbeddingContext:
        context = self._contexts.get(pooling)
        if context is None or context.n_tokens < n_tokens:
            if context is not None:
                context.close()
            # By powers of two, so that texts a little longer each time do not make one each time.
            size = min(1 << (n_tokens - 1).bit_length(), self.limits.n_tokens)
            context = self._make_context(pooling, max(self.limits.n_batch, size))
            self._contexts = {**self._contexts, pooling: context}  # another thread may look
        if self._ended:  # meanwhile, by another thread
            context.abort()
        return context

    def pair(self, query: str, document: str) -> NDArray[np.int32]:
        vocabulary = self._model.vocabulary
        texts = {"query": query, "document": document}
        try:
            template = self._model.chat_template(_RANK_TEMPLATE)
            if template is not None:
                written = _PLACES.sub(lambda place: texts[place[1]], template)
                return vocabulary.tokenize(written, add_special=False, parse_special=True)
            asked, told = (vocabulary.tokenize(text, add_special=False) for text in (query, document))
        except llama_ffi.LlamaError as error:
            raise BackendError(str(error)) from error
        # [BOS] query [EOS] [SEP] document [EOS], each where the model asks for it.
        end = vocabulary.eos if vocabulary.eos is not None else vocabulary.sep
        first = _mark(vocabulary.bos, vocabulary.add_bos)
        last, between = _mark(end, vocabulary.add_eos), _mark(vocabulary.sep, vocabulary.add_sep)
        return np.concatenate([first, asked, last, between, told, last]).astype(np.int32)

    def abort(self) -> None:
        self._ended = True
        for context in self._contexts.values():
            context.abort()

    def close(self) -> None:
        self.abort()
        for context in self._contexts.values():
            context.close()


def _mark(token: int | None, wanted: bool) -> list[int]:
    return [token] if wanted and token is not None else []
