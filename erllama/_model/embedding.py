"""Embeddings and rankings: `Model.embed`, `Model.rerank` and their forms for asyncio.

Computed in the caller's thread by an embedder of the model's backend, beside the
model's own thread, so replies go on meanwhile. Calls take turns, one decode at a
time. Texts are checked before anything is computed.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Literal, Never, overload

import numpy as np
from numpy.typing import NDArray

from erllama.checks import boolean, choice, reject_unknown, shown
from erllama.engine import Backend, Embedder, EmbeddingBackend
from erllama.engine.embedding import POOLINGS
from erllama.engine.requests.prompts import PromptTokenizer
from erllama.errors import BackendError, ModelUnloaded, PromptError, PromptTooLong, Unsupported

Text = str | Sequence[int] | NDArray[np.integer]
Texts = Text | Sequence[Text]
Pooling = Literal["mean", "cls", "last"]
Rows = NDArray[np.float32]

_OPTIONS = ("pooling", "normalize", "truncate")
_RANK = "rank"


class Embeddings:
    """What a model embeds with: made with the model, works from the first use on.

    Args:
        backend: the model's.
        id: the model's, for errors.
        check_loaded: raises ModelUnloaded where the model can compute nothing any more.
        checked_ids: makes token ids of what a caller gave as such, or raises PromptError.
    """

    def __init__(
        self,
        backend: Backend,
        id: str,
        check_loaded: Callable[[], None],
        checked_ids: Callable[[object], NDArray[np.int32]],
    ) -> None:
        self._backend, self._id = backend, id
        self._check_loaded, self._checked_ids = check_loaded, checked_ids
        self._lock = threading.Lock()
        self._embedder: Embedder | None = None
        self._turns = _Turns()
        self._closed = False
        self._process = os.getpid()

    def embed(
        self, texts: object, pooling: object, normalize: object, truncate: object, cancelled: threading.Event
    ) -> Rows | list[Rows]:
        embedder = self._open()
        chosen = None if pooling is None else choice("pooling", pooling, POOLINGS)
        normalize, truncate = boolean("normalize", normalize), boolean("truncate", truncate)
        if chosen is None:
            chosen = embedder.limits.pooling
            if chosen == _RANK:
                raise Unsupported(
                    f"model {self._id!r} ranks documents; use rerank(query, documents), or give a pooling: "
                    f"{', '.join(map(repr, POOLINGS))}"
                )
        ids = self._ids(texts, embedder.limits.n_tokens, truncate)
        rows = self._computed(embedder, ids, chosen, cancelled)
        if normalize:
            rows = [_normalized(row) for row in rows]
        return rows if chosen == "none" else np.stack(rows)

    def rerank(self, query: object, documents: object, cancelled: threading.Event) -> Rows:
        embedder = self._open()
        limits = embedder.limits
        if limits.pooling != _RANK:
            raise Unsupported(
                f"model {self._id!r} does not rank: its file asks for pooling {limits.pooling!r}, not 'rank'; "
                "load a reranker, or compare embeddings, from embed()"
            )
        _check_text("the query", query)
        if not isinstance(documents, list | tuple):
            raise PromptError(f"documents={shown(documents)}; give a list of texts")
        if not documents:
            raise PromptError("there are no documents; give at least one")
        pairs = []
        for at, document in enumerate(documents):
            _check_text(f"document {at}", document)
            self._tokenizer.check_length(str(query), str(document), n_ctx=limits.n_tokens)
            pairs.append(embedder.pair(str(query), document))
            if len(pairs[-1]) > limits.n_tokens:
                raise PromptTooLong(
                    f"the query and document {at} have {len(pairs[-1])} tokens together and the model takes "
                    f"{limits.n_tokens} at once; shorten them"
                )
        return np.array([row[0] for row in self._computed(embedder, pairs, _RANK, cancelled)], np.float32)

    def close(self) -> None:
        """End what is computed just now with ModelUnloaded, and release the embedder. Idempotent."""
        if self._process != os.getpid():
            return  # a lock that another thread held stays taken in a fork
        with self._lock:
            self._closed = True
            embedder, self._embedder = self._embedder, None
        if embedder is not None:
            embedder.abort()
            with self._turns.turn():
                embedder.close()

    def _open(self) -> Embedder:
        self._check_loaded()
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

    # --- what is computed

    def _computed(
        self, embedder: Embedder, ids: list[NDArray[np.int32]], pooling: str, cancelled: threading.Event
    ) -> list[Rows]:
        rows: list[Rows] = []
        for batch in _batches(ids, embedder.limits.n_batch, embedder.limits.n_sequences):
            with self._turns.turn():
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

    def _ids(self, texts: object, most: int, truncate: bool) -> list[NDArray[np.int32]]:
        """The token ids of each text, checked."""
        found = []
        for at, text in enumerate(_listed(texts)):
            if isinstance(text, str) and not truncate:
                self._tokenizer.check_length(text, n_ctx=most)
            try:
                ids, end = self._tokenized(text) if isinstance(text, str) else (self._checked_ids(text), [])
            except PromptError as error:
                raise PromptError(f"text {at}: {error}") from None
            if not len(ids):
                raise PromptError(f"text {at} is empty; give at least one token")
            if len(ids) > most:
                if not truncate:
                    raise PromptTooLong(
                        f"text {at} has {len(ids)} tokens and the model embeds {most} at once; "
                        "shorten it, or give truncate=True"
                    )
                kept = max(most - len(end), 0)
                ids = np.concatenate([ids[:kept], end[: most - kept]]).astype(np.int32)
            found.append(ids)
        if not found:
            raise PromptError("there are no texts; give at least one")
        return found

    def _tokenized(self, text: str) -> tuple[NDArray[np.int32], list[int]]:
        """The tokens of a text, and those among them that the model wants at its end."""
        if not text:
            return np.empty(0, np.int32), []
        tokenizer = self._tokenizer
        return tokenizer.tokenize(text), tokenizer.last

    @cached_property
    def _tokenizer(self) -> PromptTokenizer:
        return PromptTokenizer(self._backend.vocabulary)


class EmbeddingMethods:
    """What `Model` has of this."""

    _embeddings: Embeddings

    @overload
    def embed(
        self, texts: Texts, *, pooling: Pooling | None = None, normalize: bool = True, truncate: bool = False
    ) -> Rows: ...

    @overload
    def embed(
        self, texts: Texts, *, pooling: Literal["none"], normalize: bool = True, truncate: bool = False
    ) -> list[Rows]: ...

    def embed(
        self,
        texts: Texts,
        *,
        pooling: str | None = None,
        normalize: bool = True,
        truncate: bool = False,
        **unknown: Never,
    ) -> Rows | list[Rows]:
        """Turn texts into vectors: near each other where the texts mean the like, for models made for that.

        Many short texts are computed in one decode, beside the model's replies.

        Args:
            texts: a text, or several; or token ids, one sequence of them or several. Text is tokenized as a
                prompt is.
            pooling: how the vectors of a text's tokens become one: "mean", their average; "cls", the first; "last";
                or "none", all of them. None for what the model's file asks for, else "mean".
            normalize: make each vector's length 1.
            truncate: cut texts that are too long, in place of an error; what the model's tokenizer puts at the
                end of a text is kept.

        Returns:
            float32, shape (texts, d): a row a text, in their order; with pooling "none" a list of an array a text,
            of shape (tokens, d).

        Raises:
            PromptError: there is no text, one is empty, or none; or an id is outside the vocabulary.
            PromptTooLong: a text has more tokens than the model takes at once.
            OptionError: an option is unknown, ill-typed or out of range.
            Unsupported: the backend does not embed; or the model ranks, and no pooling was given.
            ModelUnloaded: the model is, or was meanwhile, unloaded.
            BackendError: the model could not compute them.
        """
        reject_unknown(unknown, _OPTIONS, "embed")
        return self._embeddings.embed(texts, pooling, normalize, truncate, threading.Event())

    @overload
    async def aembed(
        self, texts: Texts, *, pooling: Pooling | None = None, normalize: bool = True, truncate: bool = False
    ) -> Rows: ...

    @overload
    async def aembed(
        self, texts: Texts, *, pooling: Literal["none"], normalize: bool = True, truncate: bool = False
    ) -> list[Rows]: ...

    async def aembed(
        self,
        texts: Texts,
        *,
        pooling: str | None = None,
        normalize: bool = True,
        truncate: bool = False,
        **unknown: Never,
    ) -> Rows | list[Rows]:
        """`embed` for asyncio, in a thread. Cancelling the task ends it at its next decode."""
        reject_unknown(unknown, _OPTIONS, "aembed")
        with _cancelling() as cancelled:
            return await asyncio.to_thread(self._embeddings.embed, texts, pooling, normalize, truncate, cancelled)

    def rerank(self, query: str, documents: Sequence[str]) -> Rows:
        """How well documents answer a query, by a model that ranks.

        Query and document are put together as llama.cpp does it: by the file's template named "rerank", or with
        the tokens that the model wants between and around two texts.

        Returns:
            float32, shape (documents,), in their order: the higher, the better. What the numbers mean is the
            model's; most give logits.

        Raises:
            Unsupported: the model does not rank.
            Error: as of `embed`.
        """
        return self._embeddings.rerank(query, documents, threading.Event())

    async def arerank(self, query: str, documents: Sequence[str]) -> Rows:
        """`rerank` for asyncio, in a thread. Cancelling the task ends it at its next decode."""
        with _cancelling() as cancelled:
            return await asyncio.to_thread(self._embeddings.rerank, query, documents, cancelled)


class _Turns:
    """Lets threads in one at a time, in the order in which they asked: a mutex alone may favour who had it last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._taken = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        mine = threading.Lock()
        with self._lock:
            if self._taken:
                mine.acquire()
                self._waiting.append(mine)
            self._taken = True
        try:
            mine.acquire()  # released by who was before
        except BaseException:  # interrupted
            self._give_up(mine)
            raise
        try:
            yield
        finally:
            self._pass_on()

    def _give_up(self, mine: threading.Lock) -> None:
        with self._lock:
            waits = mine in self._waiting
            if waits:
                self._waiting.remove(mine)
        if not waits:
            self._pass_on()

    def _pass_on(self) -> None:
        with self._lock:
            self._taken = bool(self._waiting)
            if self._waiting:
                self._waiting.popleft().release()


@contextmanager
def _cancelling() -> Iterator[threading.Event]:
    """An event that is set where the task ends early."""
    cancelled = threading.Event()
    try:
        yield cancelled
    except BaseException:
        cancelled.set()
        raise


def _listed(texts: object) -> list[object]:
    """One text, or several, as a list."""
    if isinstance(texts, list | tuple):
        one = bool(texts) and all(isinstance(item, int | np.integer) for item in texts)
        return [texts] if one else list(texts)
    if isinstance(texts, np.ndarray) and texts.ndim == 2:
        return list(texts)
    if isinstance(texts, str | range | np.ndarray):
        return [texts]
    raise PromptError(f"{shown(texts)} is neither text nor token ids, nor a list of such")


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise PromptError(f"{name} is {shown(text)}; give text")
    if not text:
        raise PromptError(f"{name} is empty; give some text")


def _batches(texts: list[NDArray[np.int32]], n_tokens: int, n_texts: int) -> Iterator[list[NDArray[np.int32]]]:
    """Runs of texts that fit one decode; a text that does not fit one is one alone."""
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
