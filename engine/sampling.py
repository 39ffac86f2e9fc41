"""From a row of logits to a token: temperature, top-k, top-p, min-p, and the draw.

The steps and their order are llama.cpp's: top-k, top-p, min-p, temperature,
then a draw from the softmax of what is left. Candidates are kept in order of
falling logits, ties by rising id, so that equal logits give equal tokens.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from erllama.errors import SamplingError, integer, real

_GROUP = 64  # top-k looks at maxima of groups of this many logits first; 16 and 32 are no faster
_MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the most likely token; higher is more random.
        top_k: keep the k most likely; 0 keeps all.
        top_p: keep the fewest most likely whose probabilities sum to this; 1 keeps all
            (Holtzman et al., "The Curious Case of Neural Text Degeneration", 2019).
        min_p: keep those at least this times as likely as the most likely; 0 keeps all
            (Nguyen et al., "Turning Up the Heat: Min-p Sampling", 2024).
        seed: fixes the draws, 0 to 2**64 - 1; None draws one.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "temperature", real("temperature", self.temperature, 0.0))
        set_field(self, "top_k", integer("top_k", self.top_k, 0))
        set_field(self, "top_p", real("top_p", self.top_p, 0.0, 1.0))
        set_field(self, "min_p", real("min_p", self.min_p, 0.0, 1.0))
        if self.seed is not None:
            set_field(self, "seed", integer("seed", self.seed, 0, _MAX_SEED))


class TokenLogprobs(NamedTuple):
    """How likely the model found a token, as natural logarithms of probabilities, before any sampling step.

    `top` has the most likely ids and theirs, most likely first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Draws the tokens of one request. `seed` is the one it uses."""

    def __init__(self, options: SamplingOptions) -> None:
        self._options = options
        self.seed = secrets.randbits(64) if options.seed is None else options.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Choose a token.

        Args:
            logits: shape (n_vocab,); not changed. -inf rules a token out.

        Raises:
            SamplingError: a logit is NaN, or none is finite.
        """
        best = int(logits.argmax())  # the first NaN, if there is one
        top = float(logits[best])
        if not math.isfinite(top):
            raise SamplingError(f"the logits leave nothing to sample from: the largest is {top}")
        options = self._options
        if options.temperature == 0:
            return best
        ids = top_k(logits, options.top_k)
        kept = logits[ids].astype(np.float64) - top
        keep = len(ids)
        if options.top_p < 1:
            cumulative = np.exp(kept).cumsum()
            keep = min(keep, int(cumulative.searchsorted(options.top_p * cumulative[-1])) + 1)
        if options.min_p > 0:
            keep = min(keep, int((-kept).searchsorted(-math.log(options.min_p), side="right")))
        with np.errstate(over="ignore"):  # of a tiny temperature: minus infinity, so no weight
            weights = np.exp(kept[: max(keep, 1)] / options.temperature).cumsum()
        chosen = int(weights.searchsorted(self._random.random() * weights[-1], side="right"))
        return int(ids[min(chosen, len(weights) - 1)])


def top_k(logits: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Ids of the k largest logits, largest first, ties by rising id; all of them for k = 0.

    Returns:
        shape (min(k, n_vocab),) or, for k = 0, (n_vocab,).
    """
    n = len(logits)
    k = min(k, n) if k else n
    groups = n // _GROUP
    if k < groups:
        # The k-th largest of the groups' maxima bounds the k-th largest logit from below, whatever the groups are.
        # Down columns numpy takes maxima ten times as fast as along rows: a group is every groups-th logit.
        maxima = logits[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
        bound = np.partition(maxima, groups - k)[groups - k]
        candidates = np.flatnonzero(logits >= bound)
    else:
        candidates = np.arange(n)
    order = (-logits[candidates]).argsort(kind="stable")
    return candidates[order[:k]]


def log_probabilities(logits: NDArray[np.float32], token: int, n_top: int) -> TokenLogprobs:
    """How likely a token was, and the `n_top` most likely ones, by the softmax of the logits.

    Args:
        logits: shape (n_vocab,), at least one finite.
    """
    top = float(logits.max())
    total = top + float(np.log(np.exp(logits - np.float32(top), dtype=np.float64).sum()))
    ids = top_k(logits, n_top) if n_top else np.empty(0, np.intp)
    return TokenLogprobs(
        token, float(logits[token]) - total, tuple((int(i), float(logits[i]) - total) for i in ids)
    )
