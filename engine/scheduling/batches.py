"""Builds the batch of one decode, in arrays that are allocated once.

`Scheduler` chooses the parts; `BatchBuilder` turns them into a `Batch`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama.engine.backend import Batch, Limits
from erllama.engine.scheduling.sequence import Sequence


class Part(NamedTuple):
    """Rows of one sequence: its tokens from `start` to `end`; beyond its `n_tokens`, drafts."""

    sequence: Sequence
    start: int
    end: int


def prefill_budget(limits: Limits, chunk: int, n_rows: int, n_remaining: int) -> int:
    """Return how many prompt tokens a tick may compute.

    Args:
        chunk: maximum number beside rows of replies.
        n_rows: rows of replies in the tick.
        n_remaining: tokens of the prompts that are not computed.
    """
    n_batch, n_ubatch = limits.n_batch, limits.n_ubatch
    if not n_rows:
        return min(max(chunk, n_ubatch), n_batch)
    budget = min(chunk, n_batch - n_rows)
    excess = (n_rows + budget) % n_ubatch
    if n_rows + budget > n_ubatch and excess <= n_rows and excess < budget:
        # A micro-batch of a few tokens reads all weights, too, so the rows take the place of prompt tokens.
        budget -= excess
    if budget > 0 and n_remaining > 0 and limits.can_trim:
        # As many ticks, of about equal length: replies wait less for the longest. Other memory has ticks of blocks.
        n_ticks = -(-n_remaining // budget)
        budget = -(-n_remaining // n_ticks)
    return budget


class BatchBuilder:
    """Turns parts into a `Batch` of views of its own arrays, which is valid until the next one is built."""

    def __init__(self, n_batch: int) -> None:
        self._tokens = np.empty(n_batch, np.int32)
        self._positions = np.empty(n_batch, np.int32)
        self._sequences = np.empty(n_batch, np.int32)
        self._output = np.empty(n_batch, np.int8)
        self._counting = np.arange(0, dtype=np.int32)
        self._batch = Batch(self._tokens, self._positions, self._sequences, self._output)

    def build(self, parts: list[Part]) -> tuple[Batch, int]:
        """Return the batch, and how many of its rows output logits."""
        n = n_output = 0
        for sequence, start, end in parts:
            to = n + end - start
            output = sequence.output_positions(end)
            assert sequence.slot is not None
            if to == n + 1:
                self._tokens[n] = sequence.buffer[start]
                self._positions[n] = start
                self._sequences[n] = sequence.slot
                self._output[n] = len(output)
            else:
                self._tokens[n:to] = sequence.buffer[start:end]
                self._positions[n:to] = self._positions_from(start, end)
                self._sequences[n:to] = sequence.slot
                self._output[n:to] = 0
                if output:
                    self._output[n + output.start - start : n + output.stop - start] = 1
            n_output += len(output)
            n = to
        if len(self._batch.tokens) != n:
            self._batch = Batch(self._tokens[:n], self._positions[:n], self._sequences[:n], self._output[:n])
        return self._batch, n_output

    def _positions_from(self, start: int, end: int) -> NDArray[np.int32]:
        if end > len(self._counting):
            self._counting = np.arange(max(end, 2 * len(self._counting)), dtype=np.int32)
        return self._counting[start:end]
