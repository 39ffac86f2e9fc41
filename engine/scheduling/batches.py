"""The rows of one decode, put together in arrays that are made once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama.engine.backend import Batch
from erllama.engine.scheduling.sequence import Sequence


class Part(NamedTuple):
    """Rows of one sequence: its tokens from `start` to `end`; beyond those known, drafts."""

    sequence: Sequence
    start: int
    end: int


class BatchBuilder:
    """Turns parts into a `Batch` of views of its own arrays: valid until the next is built."""

    def __init__(self, n_batch: int) -> None:
        self._tokens = np.empty(n_batch, np.int32)
        self._positions = np.empty(n_batch, np.int32)
        self._sequences = np.empty(n_batch, np.int32)
        self._output = np.empty(n_batch, np.int8)
        self._counting = np.arange(0, dtype=np.int32)
        self._batch = Batch(self._tokens, self._positions, self._sequences, self._output)

    def build(self, parts: list[Part]) -> tuple[Batch, int]:
        """The batch, and how many of its rows give logits."""
        n = n_wanted = 0
        for sequence, start, end in parts:
            to = n + end - start
            wanted = sequence.wanted(end)
            assert sequence.number is not None
            if to == n + 1:
                self._tokens[n] = sequence.tokens[start]
                self._positions[n] = start
                self._sequences[n] = sequence.number
                self._output[n] = len(wanted)
            else:
                self._tokens[n:to] = sequence.tokens[start:end]
                self._positions[n:to] = self._positions_from(start, end)
                self._sequences[n:to] = sequence.number
                self._output[n:to] = 0
                if wanted:
                    self._output[n + wanted.start - start : n + wanted.stop - start] = 1
            n_wanted += len(wanted)
            n = to
        if len(self._batch.tokens) != n:
            self._batch = Batch(self._tokens[:n], self._positions[:n], self._sequences[:n], self._output[:n])
        return self._batch, n_wanted

    def _positions_from(self, start: int, end: int) -> NDArray[np.int32]:
        if end > len(self._counting):
            self._counting = np.arange(max(end, 2 * len(self._counting)), dtype=np.int32)
        return self._counting[start:end]
