"""What the library asks of a backend that embeds: an optional part of one.

A backend that has a method `embedder` gives an `Embedder`: made at its first
use, used by one thread of its own beside the model's, so that replies go on
meanwhile, and closed before or after the backend, whichever comes first.
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
    """What an embedder can take.

    Attributes:
        n_tokens: most tokens of one text.
        n_batch: tokens of several texts that are best computed together; a longer text comes alone.
        n_sequences: most texts that can be computed together.
        pooling: what is used where nothing is asked for, one of POOLINGS; "rank" for a model that scores pairs
            of texts.
    """

    n_tokens: int
    n_batch: int
    n_sequences: int
    pooling: str


class Embedder(Protocol):
    """Turns texts into numbers. Called by one thread at a time, `abort` and `pair` apart."""

    @property
    def limits(self) -> EmbeddingLimits:
        """Its sizes, and the pooling that the model asks for. They never change."""

    def embed(self, texts: Sequence[NDArray[np.int32]], pooling: str) -> list[NDArray[np.float32]]:
        """Compute some texts together.

        Args:
            texts: ids, int32, each of shape (n,) and in the vocabulary, 1 <= n <= limits.n_tokens; as many as
                limits allow.
            pooling: one of POOLINGS, or "rank" where that is limits.pooling.

        Returns:
            one array a text, in their order: shape (d,); (n, d) for "none"; the scores, shape (k,), for "rank".

        Raises:
            BackendError: they could not be computed.
        """
        ...

    def pair(self, query: str, document: str) -> NDArray[np.int32]:
        """The tokens, shape (n,), by which the model ranks a document for a query; from any thread.

        Asked only where limits.pooling is "rank".
        """
        ...

    def abort(self) -> None:
        """Make `embed`, running or to come, end early with BackendError; from any thread."""
        ...

    def close(self) -> None:
        """Release everything. Idempotent."""
        ...


@runtime_checkable
class EmbeddingBackend(Protocol):
    """A backend that embeds, too."""

    def embedder(self) -> Embedder:
        """A new embedder; from any thread.

        Raises:
            BackendError: none can be made.
        """
        ...
