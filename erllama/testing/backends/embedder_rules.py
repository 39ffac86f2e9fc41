"""Rules for backends that embed.

Part of `BackendConformance`; skipped for other backends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import SkipTest

import numpy as np
from numpy.typing import NDArray

from erllama.engine.embedding import POOLINGS, Embedder, EmbeddingBackend
from erllama.errors import BackendError
from erllama.testing.backends.rules import BackendRules, Ids, raises, run_in_thread
from erllama.testing.rules import require


class EmbedderRules(BackendRules):
    """Rules about embeddings."""

    def test_embeddings_are_in_text_order(self) -> None:
        """`embed` returns one float32 array per text, in the order of the texts, as each text gives alone."""
        with self._embedder() as embedder:
            limits = embedder.limits
            require(limits.pooling in (*POOLINGS, "rank"), f"pooling is {limits.pooling!r}")
            require(min(limits.n_tokens, limits.n_batch, limits.n_sequences) >= 1, f"a size below 1: {limits}")
            n = min(5, limits.n_sequences)
            max_tokens = min(limits.n_tokens, limits.n_batch // n)
            if max_tokens < n:
                raise SkipTest(f"a rule for embedders of {n} tokens and more")
            texts = [self._ids(1 + (3 * i) % max_tokens, seed=80 + i) for i in range(n)]
            for pooling in (limits.pooling, "none") if limits.pooling != "rank" else ("rank",):
                alone = [embedder.embed([text], pooling)[0].copy() for text in texts]
                self._check_form(alone, texts, pooling)
                self._compare(embedder, texts, alone, pooling)
                self._compare(embedder, texts[::-1], alone[::-1], pooling)
                require(
                    len({found.tobytes() for found in alone}) == len(texts),
                    f"embed() returns equal numbers for different texts (pooling {pooling!r})",
                )

    def _check_form(self, found: list[NDArray[np.float32]], texts: list[Ids], pooling: str) -> None:
        width = found[0].shape[-1]
        for numbers, text in zip(found, texts, strict=True):
            require(numbers.dtype == np.float32, f"embed() returns {numbers.dtype}; it must be float32")
            require(bool(np.isfinite(numbers).all()), "embed() returns numbers that are not finite")
            shape = (len(text), width) if pooling == "none" else (width,)
            require(
                numbers.shape == shape,
                f"embed() returns shape {numbers.shape} for {len(text)} tokens, pooling {pooling!r}; not {shape}",
            )

    def _compare(
        self, embedder: Embedder, texts: list[Ids], alone: list[NDArray[np.float32]], pooling: str
    ) -> None:
        before = [text.copy() for text in texts]
        together = embedder.embed(texts, pooling)
        require(len(together) == len(texts), f"embed() returns {len(together)} arrays for {len(texts)} texts")
        for i, (found, expected) in enumerate(zip(together, alone, strict=True)):
            require(
                found.shape == expected.shape,
                f"embed() returns shape {found.shape} for text {i}, not {expected.shape}",
            )
            apart, largest = np.abs(found - expected).max(), np.abs(expected).max()
            require(
                bool(apart <= self.tolerance * largest),
                f"embed(): text {i} of {len(texts)} differs by {apart:.3g} from its embedding alone; the largest "
                f"number is {largest:.3g}; tolerance={self.tolerance}",
            )
        require(all(map(np.array_equal, before, texts)), "embed() changed the caller's texts")

    def test_embedding_can_be_aborted(self) -> None:
        """After `abort`, from any thread, `embed` raises BackendError. `close` may be called twice."""
        with self._embedder() as embedder:
            embedder.embed([self._ids(2)], embedder.limits.pooling)
            run_in_thread(embedder.abort)
            with raises(BackendError, "an aborted embedding"):
                embedder.embed([self._ids(2)], embedder.limits.pooling)
            embedder.close()
            embedder.close()

    @contextmanager
    def _embedder(self) -> Iterator[Embedder]:
        with self._backend() as backend:
            if not isinstance(backend, EmbeddingBackend):
                raise SkipTest("a rule for backends that embed")
            try:
                embedder = backend.embedder()
            except BackendError as error:
                raise SkipTest(f"the backend creates no embedder: {error}") from error
            try:
                yield embedder
            finally:
                embedder.close()
