"""Consecutive ticks in which the same sequences decode one token each, and nothing else happens.

Most ticks are like this. A decode empties the processor's caches, so a tick takes as long as reading the memory that
it touches. Such a tick touches little: a `DecodeRun` keeps the batch from one tick to the next, and the sequences,
cells and metrics are updated once, at the end of the run. The scheduler begins a run after a tick in which all
sequences decoded, and ends it before anything but such a tick.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
from numpy.typing import NDArray

from erllama.engine.sampling.batch import sample_rows
from erllama.engine.scheduling.batches import BatchBuilder, Part
from erllama.engine.scheduling.cells import Cells
from erllama.engine.scheduling.sequence import Sequence
from erllama.errors import Error


class DecodeRun:
    """The state of a run. Until `end`, the sequences and the cells are those before its first decode.

    The tokens of the run are in the sequences' buffers, behind the known ones.

    Args:
        sequences: all running sequences; plain, in the context, and at their last token.
        batches: builds the batch. Nobody else uses it during the run.
        ending: the tokens that end a reply.
        max_ticks: the maximum number of ticks.
        alone: whether the cells of one sequence lie as in a run from an empty context.

    Attributes:
        sequences: the argument.
        batch: the next decode.
        n_ticks: decodes of the run so far.
    """

    def __init__(
        self,
        sequences: SequenceOf[Sequence],
        batches: BatchBuilder,
        ending: frozenset[int],
        max_ticks: int,
        *,
        alone: bool,
    ) -> None:
        self.sequences = tuple(sequences)
        self.batch, _ = batches.build([Part(s, s.n_computed, s.n_tokens) for s in sequences])
        self.n_ticks = 0
        self._max_ticks = max_ticks
        self._ending = ending
        self._alone = alone
        self._last_token_at = sequences[0].last_token_at
        self._buffers = [sequence.buffer for sequence in sequences]
        self._starts = [sequence.n_tokens for sequence in sequences]
        self._samplers = [sequence.sampler for sequence in sequences]
        self._allowed = [None] * len(sequences)
        self._streamed = [(i, s.ticket) for i, s in enumerate(sequences) if s.ticket.streaming]

    @property
    def is_complete(self) -> bool:
        """Whether the next decode may end a reply, make a block due, or need cells that are not free."""
        return self.n_ticks >= self._max_ticks

    def sample(self, logits: NDArray[np.float32]) -> tuple[SequenceOf[int | Error], list[int] | None]:
        """Sample the tokens of a tick from logits of shape (n, n_vocab).

        Returns:
            the token or error of each sequence; and the tokens again for `append`, or None if one of them is an
            error or ends a reply.
        """
        n = self.n_ticks
        contexts = [buffer[: start + n] for buffer, start in zip(self._buffers, self._starts, strict=True)]
        sampled = sample_rows(self._samplers, logits, contexts, self._allowed)
        tokens = [token for token in sampled if isinstance(token, int)]
        if len(tokens) < len(sampled) or not self._ending.isdisjoint(tokens):
            return sampled, None
        return sampled, tokens

    def append(self, tokens: list[int], now: float) -> float:
        """Append the tokens of a tick, and send them to their readers.

        Returns:
            the time since the tick before, in seconds.
        """
        n = self.n_ticks
        for buffer, start, token in zip(self._buffers, self._starts, tokens, strict=True):
            buffer[start + n] = token
        self.batch.tokens[:] = tokens
        np.add(self.batch.positions, 1, out=self.batch.positions)
        self.n_ticks = n + 1
        seconds, self._last_token_at = now - self._last_token_at, now
        # Last: a woken reader needs the interpreter, which is free during a decode.
        for i, ticket in self._streamed:
            ticket.send_token(tokens[i])
        return seconds

    def end(self, cells: Cells) -> None:
        """Update the sequences and their cells."""
        n, self.n_ticks = self.n_ticks, 0
        if n:
            for sequence in self.sequences:
                assert sequence.slot is not None
                cells.extend(sequence.slot, n)
                sequence.advance(n, self._last_token_at, self._alone)
