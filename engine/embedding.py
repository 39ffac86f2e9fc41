"""The protocols of a backend that embeds, an optional part of a backend.

The library calls the method `embedder` at the first use, to make an `Embedder`. It runs in a thread of its own
beside the model's, so that replies continue meanwhile. It is closed before or after the backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

POOLINGS = ("mean", "cls", "last", "none")


@dataclass(frozen=True, slots=True)
class EmbeddingLimits:
    """The limits of an embedder.

    Attributes:
        n_tokens: maximum number of tokens of one text.
        n_batch: maximum number of tokens of texts that are computed together; a longer text is computed alone.
        n_sequences: maximum number of texts that can be computed together.
        pooling: the default, one of POOLINGS; "rank" for a model that scores pairs of texts.
    """

    n_tokens: int
    n_batch: int
    n_sequences: int
    pooling: str


class Embedder(Protocol):
    """Computes embeddings. Called by one thread at a time, except `abort` and `pair`."""

    @property
    def limits(self) -> EmbeddingLimits:
        """Its limits, and the pooling of the model. They never change."""

    def embed(self, texts: Sequence[NDArray[np.int32]], pooling: str) -> list[NDArray[np.float32]]:
        """Compute the embeddings of several texts together.

        Args:
            texts: ids, int32, each of shape (n,) and in the vocabulary, 1 <= n <= limits.n_tokens; as many as
                the limits allow.
            pooling: one of POOLINGS, or "rank" if that is limits.pooling.

        Returns:
            one float32 array for each text, in their order: shape (d,); (n, d) for "none"; the scores, shape (k,),
            for "rank".

        Raises:
            BackendError: they could not be computed.
        """
        ...

    def pair(self, query: str, document: str) -> NDArray[np.int32]:
        """Return the tokens, shape (n,), with which the model ranks a document for a query. Called from any thread.

        Called only if limits.pooling is "rank".
        """
        ...

    def abort(self) -> None:
        """Make a running or later `embed` end early with BackendError. Called from any thread."""
        ...

    def close(self) -> None:
        """Release everything. Idempotent."""
        ...


@runtime_checkable
class EmbeddingBackend(Protocol):
    """A backend that also embeds."""

    def embedder(self) -> Embedder:
        """Return a new embedder. Called from any thread.

        Raises:
            BackendError: it cannot be made.
        """
        ...
