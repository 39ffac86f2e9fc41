"""Consecutive ticks in which the same sequences decode one token each, and nothing else happens.

Most ticks are like this. A decode empties the processor's caches, so a tick takes as long as reading the memory
that it touches. Such a tick touches little: a `DecodeRun` keeps the batch from one tick to the next, and the
sequences, cells and metrics are updated once, at the end of the run. The scheduler begins a run after a tick in
which all sequences decoded, and ends it before anything but such a tick.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import overload

import numpy as np
from numpy.typing import NDArray

from erllama.engine.backend import RowSelector
from erllama.engine.sampling.batch import RowSampler
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
        selector: selects the largest logits; None for numpy.
        alone: whether the cells of one sequence lie as in a run from an empty context, and all its decodes have the
            bits of the backend's recipe.

    Attributes:
        sequences, max_ticks, alone: the arguments. After `max_ticks`, the next decode may end a reply, make a block
            due, or need cells that are not free.
        batch: the next decode.
        sampler: samples the tokens of a decode.
        contexts: for each sequence, prompt and reply so far.
        logits: what the last decode returned. A backend may return the same array for each decode.
        n_ticks: decodes of the run so far.
        last_token_at: when their last tokens were sampled.
    """

    def __init__(
        self,
        sequences: SequenceOf[Sequence],
        batches: BatchBuilder,
        ending: frozenset[int],
        max_ticks: int,
        selector: RowSelector | None,
        *,
        alone: bool,
    ) -> None:
        self.sequences = tuple(sequences)
        self.batch, _ = batches.build([Part(s, s.n_computed, s.n_tokens) for s in sequences])
        for sequence in sequences:
            sequence.run = self
        self.logits: NDArray[np.float32] | None = None
        self.n_ticks = 0
        self.max_ticks = max_ticks
        self._ending = ending
        self.alone = alone
        self.last_token_at = sequences[0].clock.last_token_at
        # memoryviews: numpy takes far longer to write single numbers while the caches are cold.
        self._tokens, self._positions = self.batch.tokens.data, self.batch.positions.data
        self._buffers = [sequence.buffer.data for sequence in sequences]
        self._starts = [sequence.n_tokens for sequence in sequences]
        self.sampler = RowSampler([s.sampler for s in sequences], [None] * len(sequences), selector)
        self.contexts = _Contexts(sequences)
        self._streamed = [(i, s.ticket) for i, s in enumerate(sequences) if s.ticket.streaming]

    def append(self, sampled: SequenceOf[int | Error], now: float) -> bool:
        """Append the tokens of a tick, and send them to their readers.

        Returns:
            False if one of them is an error or ends a reply. Nothing is appended then.
        """
        tokens: list[int] = []
        for token in sampled:
            if not isinstance(token, int) or token in self._ending:
                return False
            tokens.append(token)
        n = self.n_ticks
        token_of, position_of, buffers, starts = self._tokens, self._positions, self._buffers, self._starts
        for i, token in enumerate(tokens):
            at = starts[i] + n
            buffers[i][at] = token_of[i] = token
            position_of[i] = at
        self.n_ticks = self.contexts.n_added = n + 1
        self.last_token_at = now
        # Last: a woken reader needs the interpreter, which is free during a decode.
        for i, ticket in self._streamed:
            ticket.send_token(tokens[i])
        return True

    def end(self, cells: Cells) -> None:
        """Update the sequences and their cells."""
        n, self.n_ticks = self.n_ticks, 0
        for sequence in self.sequences:
            sequence.run = None
            if n:
                assert sequence.slot is not None
                cells.extend(sequence.slot, n)
                sequence.advance(n, self.last_token_at, self.alone)


class _Contexts(SequenceOf[NDArray[np.int32]]):
    """Prompt and reply so far of each sequence. Most samplers do not read them, so they are made on demand.

    Attributes:
        n_added: tokens that the run has added to each.
    """

    def __init__(self, sequences: SequenceOf[Sequence]) -> None:
        self._buffers = [sequence.buffer for sequence in sequences]
        self._starts = [sequence.n_tokens for sequence in sequences]
        self.n_added = 0

    def __len__(self) -> int:
        return len(self._buffers)

    @overload
    def __getitem__(self, at: int) -> NDArray[np.int32]: ...
    @overload
    def __getitem__(self, at: slice) -> list[NDArray[np.int32]]: ...
    def __getitem__(self, at: int | slice) -> NDArray[np.int32] | list[NDArray[np.int32]]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        return self._buffers[at][: self._starts[at] + self.n_added]
