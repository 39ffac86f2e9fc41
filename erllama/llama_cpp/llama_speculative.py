"""Draft models: `LlamaPromptLookupDecoding`, and the base class of a program's own."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray


class LlamaDraftModel(ABC):
    """Proposes tokens that likely follow. The reply is the same; right proposals make it take fewer decodes."""

    @abstractmethod
    def __call__(self, input_ids: NDArray[np.intc], /, **kwargs: object) -> NDArray[np.intc]:
        """Return proposed tokens, shape (k,), for the tokens so far, shape (n,)."""


class LlamaPromptLookupDecoding(LlamaDraftModel):
    """Proposes the tokens that followed the last few tokens earlier in the text.

    Args:
        max_ngram_size: maximum number of last tokens to look for.
        num_pred_tokens: maximum number of proposed tokens.
    """

    def __init__(self, max_ngram_size: int = 2, num_pred_tokens: int = 10) -> None:
        self.max_ngram_size = max_ngram_size
        self.num_pred_tokens = num_pred_tokens

    @staticmethod
    def find_candidate_pred_tokens(
        input_ids: NDArray[np.intc], max_ngram_size: int, num_pred_tokens: int
    ) -> NDArray[np.intc]:
        """Return what followed the first earlier occurrence of the last tokens; empty without one.

        More tokens are looked for before fewer.
        """
        tokens = np.asarray(input_ids)
        for size in range(min(max_ngram_size, len(tokens) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(tokens, size)[:-1]  # not the last tokens themselves
            found = np.flatnonzero((windows == tokens[-size:]).all(axis=1))
            if len(found):
                begin = int(found[0]) + size
                return tokens[begin : begin + num_pred_tokens].astype(np.intc)
        return np.empty(0, np.intc)

    def __call__(self, input_ids: NDArray[np.intc], /, **kwargs: object) -> NDArray[np.intc]:
        """Return proposed tokens, shape (k,)."""
        return self.find_candidate_pred_tokens(input_ids, self.max_ngram_size, self.num_pred_tokens)
