"""Samples the next tokens of several sequences from the logits of one decode. Used by the scheduler."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
from numpy.typing import NDArray

from erllama.engine.sampling.batch import sample_rows
from erllama.engine.scheduling.sequence import SamplingInputs, Sequence


def sample_next(
    sequences: SequenceOf[Sequence], rows: SequenceOf[int], logits: NDArray[np.float32]
) -> list[int | BaseException | None]:
    """Sample the next token of each sequence.

    Args:
        rows: the row of each sequence in `logits`, rising.
        logits: shape (n, n_vocab).

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
    if last - first + 1 == len(sampled):
        chosen = logits[first : last + 1]
    else:
        chosen = logits[[rows[i] for i in sampled]]  # a copy, where other rows lie between
    samplers, contexts, allowed = zip(*inputs, strict=True)
    for i, token in zip(sampled, sample_rows(samplers, chosen, contexts, allowed), strict=True):
        results[i] = token
    return results
