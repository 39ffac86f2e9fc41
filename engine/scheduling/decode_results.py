"""Passes the results of a decode to the sequences: computed rows, sampled tokens, accepted drafts, and metrics.

The scheduler owns a `DecodeResults` and ends the requests that fail here. All rows of a decode are sampled
together.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama.engine.backend import Backend, RowSelector
from erllama.engine.metrics import EngineMetrics
from erllama.engine.sampling.batch import sample_rows
from erllama.engine.scheduling.batches import Part
from erllama.engine.scheduling.sequence import SamplingInputs, Sequence
from erllama.engine.scheduling.slots import Slots
from erllama.engine.speculation import DecodeCosts


class Failure(NamedTuple):
    """A sequence that cannot continue, and why."""

    sequence: Sequence
    error: BaseException


class DecodeResults:
    """Passes the results of decodes to the sequences of one model.

    Args:
        backend: the model.
        slots: the context's slots.
        metrics: counts what is decoded.
        selector: selects the largest logits; None for numpy.

    Attributes:
        speculating: whether a request of the last tick may compute ahead.
    """

    def __init__(
        self, backend: Backend, slots: Slots, metrics: EngineMetrics, selector: RowSelector | None
    ) -> None:
        self._backend, self._slots, self._metrics, self._selector = backend, slots, metrics, selector
        self._costs = DecodeCosts()
        self.speculating = False

    def add_drafts(self, rows: list[Part]) -> list[Part]:
        """Extend rows by drafts, in cells that no other row needs. Only for ticks without prefill."""
        self.speculating = any([part.sequence.speculates for part in rows])  # noqa: C419 - quicker
        if not self.speculating:
            return rows
        spare = min(self._backend.limits.n_batch, self._slots.cells.free) - len(rows)
        parts = []
        for part in rows:
            n = part.sequence.draft(spare, len(rows), self._costs) if part.sequence.speculates else 0
            parts.append(part._replace(end=part.end + n))
            spare -= n
        return parts

    def count(self, parts: list[Part], n_rows: int, seconds: float) -> int:
        """Count a decode, before its results are processed. Returns the tokens of prompts that it computed."""
        generated = sum([not sequence.prefilling for sequence, _, _ in parts])
        drafts = sum([end - sequence.n_tokens for sequence, _, end in parts if end > sequence.n_tokens])
        self._metrics.ticks += 1
        self._metrics.decoded_tokens += generated
        self._metrics.drafted_tokens += drafts
        self._metrics.drafts += drafts > 0
        n_prefilled = n_rows - generated - drafts
        self._metrics.prefilled_tokens += n_prefilled
        if self.speculating and generated == len(parts):
            self._costs.record(n_rows, seconds)
        return n_prefilled

    def process(self, parts: list[Part], logits: NDArray[np.float32], now: float, alone: bool) -> list[Failure]:
        """Update the sequences after a decode, and sample their next tokens.

        Args:
            logits: shape (rows with output, n_vocab).
            now: when they were computed.
            alone: as for `Sequence.finish_slice`.

        Returns:
            the sequences that failed.
        """
        failures = []
        sampled: list[Sequence] = []
        rows: list[int] = []
        row = 0
        for sequence, start, end in parts:
            assert sequence.slot is not None
            self._slots.cells.extend(sequence.slot, end - start)
            output = sequence.output_positions(end)
            try:
                if end > sequence.n_tokens:
                    self._verify_drafts(sequence, end, logits[row : row + len(output)], now, alone)
                else:
                    sequence.finish_slice(end, alone)
                    if sequence.is_scored:
                        sequence.score(logits[row : row + len(output)])
                    elif output:
                        sampled.append(sequence)
                        rows.append(row)
            except BaseException as error:
                failures.append(Failure(sequence, error))
            row += len(output)
        tokens = _sample(sampled, rows, logits, self._selector)
        return failures + self._accept(sampled, tokens, [logits[row] for row in rows], now)

    def process_sampled(
        self,
        sequences: SequenceOf[Sequence],
        sampled: SequenceOf[int | BaseException],
        logits: NDArray[np.float32],
        now: float,
        alone: bool,
    ) -> list[Failure]:
        """Update the sequences after a decode of their last tokens, with the tokens that were sampled.

        Other arguments and the result are those of `process`.
        """
        for sequence in sequences:
            assert sequence.slot is not None
            self._slots.cells.extend(sequence.slot, 1)
            sequence.finish_slice(sequence.n_computed + 1, alone)
        return self._accept(sequences, sampled, logits, now)

    def _accept(
        self,
        sequences: SequenceOf[Sequence],
        sampled: SequenceOf[int | BaseException | None],
        logits: SequenceOf[NDArray[np.float32]] | NDArray[np.float32],
        now: float,
    ) -> list[Failure]:
        """Append tokens, as `Sequence.accept` does."""
        failures = []
        for sequence, token, row in zip(sequences, sampled, logits, strict=True):
            try:
                if isinstance(token, BaseException):
                    raise token
                sequence.accept(token, row, now, self._metrics)
            except BaseException as error:
                failures.append(Failure(sequence, error))
        return failures

    def _verify_drafts(
        self, sequence: Sequence, end: int, logits: NDArray[np.float32], now: float, alone: bool
    ) -> None:
        """Keep the drafts that equal the samples, and cut the others from the cells."""
        start, n_before = sequence.n_computed, sequence.n_tokens
        sequence.verify_drafts(end, logits, now, self._metrics)
        if alone:
            sequence.kv.add_ordered(start, sequence.n_computed)
        self._metrics.accepted_tokens += sequence.n_computed - n_before
        if sequence.n_computed < end:
            assert sequence.slot is not None
            self._backend.cut(sequence.slot, sequence.n_computed)
            self._slots.cells.cut(sequence.slot, sequence.n_computed)


def _sample(
    sequences: SequenceOf[Sequence],
    rows: SequenceOf[int],
    logits: NDArray[np.float32],
    selector: RowSelector | None,
) -> list[int | BaseException | None]:
    """Sample the next token of each sequence.

    Args:
        rows: the row of each sequence in `logits`, rising.

    Returns:
        for each sequence its token, its error, or None if its next token is queued.
    """
    results: list[int | BaseException | None] = [None] * len(sequences)
    sampled: list[int] = []  # indices of `sequences`
    inputs: list[SamplingInputs] = []
    for i, sequence in enumerate(sequences):
        try:
            given = sequence.sampling_inputs()
        except BaseException as error:
            results[i] = error
            continue
        if given is not None:
            sampled.append(i)
            inputs.append(given)
    if not sampled:
        return results
    first, last = rows[sampled[0]], rows[sampled[-1]]
    is_contiguous = last - first + 1 == len(sampled)  # otherwise the rows are copied
    chosen = logits[first : last + 1] if is_contiguous else logits[[rows[i] for i in sampled]]
    samplers, contexts, allowed = zip(*inputs, strict=True)
    for i, token in zip(sampled, sample_rows(samplers, chosen, contexts, allowed, selector), strict=True):
        results[i] = token
    return results
