"""The end of a sampler chain: the choice of one token among the candidates that remain.

The choices follow llama.cpp's samplers `greedy`, `dist` and `mirostat`. `erllama.engine.sampling.sampler` calls
them in the model's thread.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from erllama.engine.sampling.candidates import Candidates, list_weights, running_sums
from erllama.engine.sampling.declaration import HasOptions, Option

MAX_SUMMED = 512  # candidates whose weights are summed one by one to draw one of them


class Draw(Protocol):
    """Chooses one of the candidates."""

    def draw(self, candidates: Candidates) -> int:
        """Choose a candidate and return its token id."""
        ...


class Greedy:
    """Takes the most likely candidate; of equal ones, the first."""

    def draw(self, candidates: Candidates) -> int:
        return int(candidates.ids[0 if candidates.in_order else candidates.logits.argmax()])


class Categorical:
    """Draws by the softmax of the candidates' logits."""

    def draw(self, candidates: Candidates) -> int:
        return int(candidates.ids[_draw_position(candidates)])


class Mirostat(HasOptions):
    """Keeps the surprise of the drawn tokens near `tau`. Each draw adjusts the cut-off at the rate `eta`.

    Basu et al., "Mirostat: A Neural Text Decoding Algorithm that Directly Controls Perplexity", 2021. `version` 1
    is the paper's algorithm 1, over a vocabulary of `n_vocab`; `version` 2 is the simpler one of its authors' code.

    Attributes:
        mu: the largest surprise that is kept now, in bits.
    """

    mirostat = Option(0, 0, 2)
    mirostat_tau = Option(5.0, 0.0)
    mirostat_eta = Option(0.1, 0.0, 1.0)

    _M = 100  # candidates from which the exponent of Zipf's law is estimated

    def __init__(self, version: int, tau: float, eta: float, n_vocab: int) -> None:
        self._version, self._tau, self._eta, self._n_vocab = version, tau, eta, n_vocab
        self.mu = 2 * tau

    @classmethod
    def from_options(cls, options: object, n_vocab: int) -> Mirostat | None:
        """Return the draw that `SamplingOptions` ask for; None if `mirostat` is 0."""
        version = cls.mirostat.of(options)
        if not version:
            return None
        return cls(version, cls.mirostat_tau.of(options), cls.mirostat_eta.of(options), n_vocab)

    def draw(self, candidates: Candidates) -> int:
        candidates = candidates.top(self._n_kept(candidates))
        at = _draw_position(candidates)
        surprise = -math.log2(float(candidates.probabilities()[at]))
        self.mu -= self._eta * (surprise - self._tau)
        return int(candidates.ids[at])

    def _n_kept(self, candidates: Candidates) -> int:
        if self._version == 2:
            bound = 2.0**-self.mu
            return max(int((candidates.probabilities() >= bound).sum()), 1)
        # The paper takes probabilities to fall by Zipf's law, and estimates the exponent from the most likely ones.
        first = candidates.top(self._M).weights().astype(np.float64)
        first = first[first > 0]
        ranks = np.arange(1, len(first))
        if not len(ranks):
            return 1
        steps = np.log((ranks + 1) / ranks)
        exponent = float((steps * np.log(first[:-1] / first[1:])).sum() / (steps**2).sum())
        epsilon = exponent - 1
        with np.errstate(all="ignore"):
            scale = 1 - np.float64(self._n_vocab) ** -epsilon
            k = np.float64(epsilon * 2**self.mu / scale) ** (1 / np.float64(exponent))
        return max(int(min(k, len(candidates))), 1) if math.isfinite(k) else len(candidates)


def draw_from_list(falling: list[float], share: float) -> int:
    """Draw a position from falling logits, as `Categorical` does, with a number from the request's generator."""
    sums = list(accumulate(list_weights(falling)))
    return bisect_right(sums, share * sums[-1])


def _draw_position(candidates: Candidates) -> int:
    """Draw a position by the softmax. Takes one number from the request's generator."""
    weights: NDArray[np.float32] = candidates.weights()
    share = candidates.random.random()
    if len(weights) <= MAX_SUMMED:
        sums = running_sums(weights)
        # A share below 1 of the last sum is below that sum, so the first larger sum has a weight.
        return bisect_right(sums, share * float(sums[-1]))
    # First the group, then the candidate in it: running sums of all weights take far longer than sums of groups.
    whole = len(weights) // MAX_SUMMED * MAX_SUMMED
    groups = weights[:whole].reshape(-1, MAX_SUMMED).sum(axis=1, dtype=np.float64)
    group_sums = np.append(groups, weights[whole:].sum(dtype=np.float64)).cumsum()
    target = share * float(group_sums[-1])
    group = int(group_sums.searchsorted(target, side="right"))
    start = group * MAX_SUMMED
    target -= float(group_sums[group - 1]) if group else 0.0
    weights = weights[start : start + MAX_SUMMED]
    at = bisect_right(running_sums(weights), target)
    # Rounding may lead past the last candidate that has any weight.
    return start + min(at, int(np.flatnonzero(weights)[-1]))
