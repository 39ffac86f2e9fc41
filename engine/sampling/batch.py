"""Samples the tokens of several sequences together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from erllama.engine.sampling.sampler import Sampler
from erllama.errors import Error, SamplingError


def sample_rows(
    samplers: Sequence[Sampler],
    logits: NDArray[np.float32],
    contexts: Sequence[NDArray[np.int32]],
    allowed: Sequence[NDArray[np.bool_] | None],
) -> list[int | Error]:
    """Sample one token for each row of logits, shape (n, n_vocab). A row that fails has its error in the list."""
    results: list[int | Error] = []
    for row, sampler in enumerate(samplers):
        try:
            results.append(sampler.sample(logits[row], contexts[row], allowed[row]))
        except Error as error:
            results.append(error)
        except BaseException as error:
            results.append(SamplingError(f"sampling failed: {type(error).__name__}: {error}"))
    return results
