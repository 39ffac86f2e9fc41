"""Embeddings and rankings of one model: texts checked, batched and computed.

`Model` delegates `embed`, `rerank` and their asyncio forms to `EmbeddingRequests`. It computes in the caller's
thread with an embedder of the model's backend, so replies of the model thread continue. Concurrent calls take
turns, one decode at a time. All texts are checked before the first is computed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from erllama._model.requests.prompts import PromptReader
from erllama._model.runner import ModelRunner
from erllama._runtime.fair_lock import FairLock
from erllama._types import Prompt
from erllama.checks import boolean, choice, shown
from erllama.engine import Backend, Embedder, EmbeddingBackend
from erllama.engine.embedding import POOLINGS
from erllama.errors import BackendError, ModelUnloaded, PromptError, PromptTooLong, Unsupported

Texts = Prompt | Sequence[Prompt]
Pooling = Literal["mean", "cls", "last"]
Rows = NDArray[np.float32]

EMBED_OPTIONS = ("pooling", "normalize", "truncate")
_RANK = "rank"


class EmbeddingRequests:
    """Computes embeddings and rankings for one model. Thread-safe. Creates its embedder at the first call.

    Args:
        id: the model's id, for error messages.
    """

    def __init__(self, backend: Backend, id: str, runner: ModelRunner, prompts: PromptReader) -> None:
        self._backend, self._id = backend, id
        self._runner, self._prompts = runner, prompts
        self._lock = threading.Lock()
        self._embedder: Embedder | None = None
        self._decode_lock = FairLock()
        self._closed = False
        self._process = os.getpid()

    def embed(
        self, texts: object, pooling: object, normalize: object, truncate: object, cancelled: threading.Event
    ) -> Rows | list[Rows]:
        """Return the vectors of texts; see `Model.embed`.

        Args:
            cancelled: set to end the computation at the next decode.
        """
        embedder = self._open()
        chosen = None if pooling is None else choice("pooling", pooling, POOLINGS)
        normalize, truncate = boolean("normalize", normalize), boolean("truncate", truncate)
        if chosen is None:
            chosen = embedder.limits.pooling
            if chosen == _RANK:
                raise Unsupported(
                    f"model {self._id!r} ranks documents; use rerank(query, documents), or pass a pooling: "
                    f"{', '.join(map(repr, POOLINGS))}"
                )
        ids = self._ids(texts, embedder.limits.n_tokens, truncate)
        rows = self._compute(embedder, ids, chosen, cancelled)
        if normalize:
            rows = [_normalized(row) for row in rows]
        return rows if chosen == "none" else np.stack(rows)

    def rerank(self, query: object, documents: object, cancelled: threading.Event) -> Rows:
        """Return the scores of documents for a query; see `Model.rerank`."""
        embedder = self._open()
        pairs = self._pairs(embedder, query, documents)
        return np.array([row[0] for row in self._compute(embedder, pairs, _RANK, cancelled)], np.float32)

    def count_pair_tokens(self, query: object, documents: object) -> list[int]:
        """Return the number of tokens of the query with each document; errors as of `rerank`."""
        return [len(pair) for pair in self._pairs(self._open(), query, documents)]

    def _pairs(self, embedder: Embedder, query: object, documents: object) -> list[NDArray[np.int32]]:
        """Return the tokens of the query with each document, checked."""
        limits = embedder.limits
        if limits.pooling != _RANK:
            raise Unsupported(
                f"model {self._id!r} does not rank: its file asks for pooling {limits.pooling!r}, not 'rank'; "
                "load a reranker, or compare the embeddings that embed() returns"
            )
        _check_text("the query", query)
        if not isinstance(documents, list | tuple):
            raise PromptError(f"documents={shown(documents)}; pass a list of texts")
        if not documents:
            raise PromptError("there are no documents; pass at least one")
        pairs = []
        for at, document in enumerate(documents):
            _check_text(f"document {at}", document)
            self._prompts.tokenizer.check_length(str(query), str(document), n_ctx=limits.n_tokens)
            pairs.append(embedder.pair(str(query), document))
            if len(pairs[-1]) > limits.n_tokens:
                raise PromptTooLong(
                    f"the query and document {at} have {len(pairs[-1])} tokens together and the model takes "
                    f"{limits.n_tokens} at once; shorten them",
                    n_tokens=len(pairs[-1]),
                    n_ctx=limits.n_tokens,
                )
        return pairs

    def close(self) -> None:
        """Fail the running call with ModelUnloaded and close the embedder. Idempotent."""
        if self._process != os.getpid():
            return  # in a fork, a lock that another thread held stays locked
        with self._lock:
            self._closed = True
            embedder, self._embedder = self._embedder, None
        if embedder is not None:
            embedder.abort()
            with self._decode_lock.hold():
                embedder.close()

    def _open(self) -> Embedder:
        self._runner.check()
        with self._lock:
            if self._closed:
                raise self._unloaded()
            if self._embedder is None:
                if not isinstance(self._backend, EmbeddingBackend):
                    raise Unsupported(
                        f"model {self._id!r} cannot embed: its backend, {type(self._backend).__name__}, has no "
                        "`embedder`; use load_model, or a backend that has one"
                    )
                self._embedder = self._backend.embedder()
            return self._embedder

    def _unloaded(self) -> ModelUnloaded:
        return ModelUnloaded(f"model {self._id!r} was unloaded; load it again to embed with it")

    def _compute(
        self, embedder: Embedder, ids: list[NDArray[np.int32]], pooling: str, cancelled: threading.Event
    ) -> list[Rows]:
        rows: list[Rows] = []
        for batch in _batches(ids, embedder.limits.n_batch, embedder.limits.n_sequences):
            with self._decode_lock.hold():
                if self._closed:
                    raise self._unloaded()
                if cancelled.is_set():
                    break
                try:
                    rows += embedder.embed(batch, pooling)
                except BackendError as error:
                    if self._closed:
                        raise self._unloaded() from error
                    raise
        return rows

    def _ids(self, texts: object, max_tokens: int, truncate: bool) -> list[NDArray[np.int32]]:
        """Return the checked token ids of each text, cut to `max_tokens` tokens if `truncate`."""
        found = []
        for at, text in enumerate(_text_list(texts)):
            if isinstance(text, str) and not truncate:
                self._prompts.tokenizer.check_length(text, n_ctx=max_tokens)
            try:
                ids, end = self._tokenize(text) if isinstance(text, str) else (self._prompts.checked_ids(text), [])
            except PromptError as error:
                raise PromptError(f"text {at}: {error}") from None
            if not len(ids):
                raise PromptError(f"text {at} is empty; pass at least one token")
            if len(ids) > max_tokens:
                if not truncate:
                    raise PromptTooLong(
                        f"text {at} has {len(ids)} tokens and the model embeds {max_tokens} at once; "
                        "shorten it, or pass truncate=True",
                        n_tokens=len(ids),
                        n_ctx=max_tokens,
                    )
                kept = max(max_tokens - len(end), 0)
                ids = np.concatenate([ids[:kept], end[: max_tokens - kept]]).astype(np.int32)
            found.append(ids)
        if not found:
            raise PromptError("there are no texts; pass at least one")
        return found

    def _tokenize(self, text: str) -> tuple[NDArray[np.int32], list[int]]:
        """Return the tokens of a text, and those that the model requires at the end of every text."""
        if not text:
            return np.empty(0, np.int32), []
        tokenizer = self._prompts.tokenizer
        return tokenizer.tokenize(text), tokenizer.last


@contextmanager
def set_on_error() -> Iterator[threading.Event]:
    """Yield an event and set it if the `with` block raises, as it does when its task is cancelled."""
    cancelled = threading.Event()
    try:
        yield cancelled
    except BaseException:
        cancelled.set()
        raise


def _text_list(texts: object) -> list[object]:
    """Return one text or several as a list."""
    if isinstance(texts, list | tuple):
        one = bool(texts) and all(isinstance(item, int | np.integer) for item in texts)
        return [texts] if one else list(texts)
    if isinstance(texts, np.ndarray) and texts.ndim == 2:
        return list(texts)
    if isinstance(texts, str | range | np.ndarray):
        return [texts]
    raise PromptError(f"{shown(texts)} is neither text nor token ids, nor a list of those")


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise PromptError(f"{name} is {shown(text)}; pass text")
    if not text:
        raise PromptError(f"{name} is empty; pass some text")


def _batches(texts: list[NDArray[np.int32]], n_tokens: int, n_texts: int) -> Iterator[list[NDArray[np.int32]]]:
    """Yield runs of texts that fit one decode. A text that is too long for one forms a separate run."""
    batch: list[NDArray[np.int32]] = []
    room = n_tokens
    for text in texts:
        if batch and (len(text) > room or len(batch) == n_texts):
            yield batch
            batch, room = [], n_tokens
        batch.append(text)
        room -= len(text)
    yield batch


def _normalized(rows: Rows) -> Rows:
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    normalized: Rows = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return normalized
