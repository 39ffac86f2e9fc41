"""Rules for backends that embed; all are skipped for others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import SkipTest

import numpy as np
from numpy.typing import NDArray

from erllama.engine.embedding import POOLINGS, Embedder, EmbeddingBackend
from erllama.errors import BackendError
from erllama.testing.backends.rules import BackendRules, Ids, in_thread, refused
from erllama.testing.rules import must


class EmbedderRules(BackendRules):
    """Part of `BackendConformance`."""

    def test_texts_are_embedded_in_their_order(self) -> None:
        """`embed` gives one float32 array a text, in the order of the texts; each is what the text gives alone."""
        with self._embedder() as embedder:
            limits = embedder.limits
            must(limits.pooling in (*POOLINGS, "rank"), f"pooling is {limits.pooling!r}")
            must(min(limits.n_tokens, limits.n_batch, limits.n_sequences) >= 1, f"a size below 1: {limits}")
            n = min(5, limits.n_sequences)
            most = min(limits.n_tokens, limits.n_batch // n)
            if most < n:
                raise SkipTest(f"a rule for embedders of {n} tokens and more")
            texts = [self._ids(1 + (3 * i) % most, seed=80 + i) for i in range(n)]
            for pooling in (limits.pooling, "none") if limits.pooling != "rank" else ("rank",):
                alone = [embedder.embed([text], pooling)[0].copy() for text in texts]
                self._well_formed(alone, texts, pooling)
                self._compare(embedder, texts, alone, pooling)
                self._compare(embedder, texts[::-1], alone[::-1], pooling)
                must(
                    len({found.tobytes() for found in alone}) == len(texts),
                    f"embed() gives the same numbers for other texts (pooling {pooling!r})",
                )

    def _well_formed(self, found: list[NDArray[np.float32]], texts: list[Ids], pooling: str) -> None:
        width = found[0].shape[-1]
        for numbers, text in zip(found, texts, strict=True):
            must(numbers.dtype == np.float32, f"embed() gives {numbers.dtype}; it must be float32")
            must(bool(np.isfinite(numbers).all()), "embed() gives numbers that are not finite")
            shape = (len(text), width) if pooling == "none" else (width,)
            must(
                numbers.shape == shape,
                f"embed() gives shape {numbers.shape} for {len(text)} tokens, pooling {pooling!r}; not {shape}",
            )

    def _compare(
        self, embedder: Embedder, texts: list[Ids], alone: list[NDArray[np.float32]], pooling: str
    ) -> None:
        before = [text.copy() for text in texts]
        together = embedder.embed(texts, pooling)
        must(len(together) == len(texts), f"embed() gives {len(together)} arrays for {len(texts)} texts")
        for i, (found, expected) in enumerate(zip(together, alone, strict=True)):
            must(
                found.shape == expected.shape,
                f"embed() gives shape {found.shape} for text {i}, not {expected.shape}",
            )
            apart, largest = np.abs(found - expected).max(), np.abs(expected).max()
            must(
                bool(apart <= self.tolerance * largest),
                f"embed(): text {i} of {len(texts)} is {apart:.3g} from what it is alone, where the largest "
                f"number is {largest:.3g}; tolerance={self.tolerance}",
            )
        must(all(map(np.array_equal, before, texts)), "embed() changed the caller's texts")

    def test_embedding_can_be_aborted(self) -> None:
        """After `abort`, from any thread, `embed` raises BackendError; `close` may come twice."""
        with self._embedder() as embedder:
            embedder.embed([self._ids(2)], embedder.limits.pooling)
            in_thread(embedder.abort)
            with refused(BackendError, "an embedding that is aborted"):
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
                raise SkipTest(f"the backend makes no embedder: {error}") from error
            try:
                yield embedder
            finally:
                embedder.close()
