"""The candidates of a draw: the tokens that sampler steps have left, with their logits.

The arrays are never written in place: each step makes new candidates. Called by the steps and by the draws.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_EXCLUDED = np.float32(-np.inf).view(np.int32)
_MIN_INTEGER_SORT = 1024  # from this many logits on, numpy sorts integers faster than positions
_GROUP = 64  # logits of a group; top-k first compares the maxima of groups. 16 and 32 are no faster


class Candidates:
    """Tokens that may be drawn next, and their logits. A step makes new candidates and writes into no array.

    Attributes:
        ids: intp, shape (n,), n >= 1.
        logits: float32, shape (n,); -inf excludes a token.
        in_order: whether logits fall from first to last, ties by rising id. Otherwise ids rise, unless a step
            chose another order.
        context: prompt and reply so far, int32, shape (m,).
        random: the request's generator.
    """

    __slots__ = ("context", "ids", "in_order", "logits", "random")

    def __init__(
        self,
        ids: NDArray[np.intp],
        logits: NDArray[np.float32],
        context: NDArray[np.int32],
        random: np.random.Generator,
        *,
        in_order: bool = False,
    ) -> None:
        self.ids, self.logits, self.context, self.random = ids, logits, context, random
        self.in_order = in_order

    def __len__(self) -> int:
        return len(self.ids)

    def keep(self, which: NDArray[np.intp] | NDArray[np.bool_] | slice) -> Candidates:
        """Return the candidates at some positions, or under a mask, in their present order."""
        return Candidates(self.ids[which], self.logits[which], self.context, self.random, in_order=self.in_order)

    def with_logits(self, logits: NDArray[np.float32], *, in_order: bool = False) -> Candidates:
        """Return the same tokens with other logits, float32, shape (n,)."""
        return Candidates(self.ids, logits, self.context, self.random, in_order=in_order)

    def at(self, tokens: NDArray[np.int32]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Find tokens among the candidates.

        Args:
            tokens: rising ids, shape (k,).

        Returns:
            the positions of the candidates found, and for each its index in `tokens`.
        """
        if not len(tokens):
            return np.empty(0, np.intp), np.empty(0, np.intp)
        if self.ids[-1] == len(self.ids) - 1 and not self.in_order and self.ids[0] == 0:
            # These are perhaps the whole vocabulary, where each id is its own position.
            inside = tokens < len(self.ids)
            if inside.all() and np.array_equal(self.ids[tokens], tokens):
                return tokens.astype(np.intp), np.arange(len(tokens))
        which = np.searchsorted(tokens, self.ids)
        which[which == len(tokens)] = 0
        positions = np.flatnonzero(tokens[which] == self.ids)
        return positions, which[positions]

    def ordered(self) -> Candidates:
        """Return the same candidates, most likely first."""
        return self if self.in_order else self.top(len(self))

    def top(self, k: int) -> Candidates:
        """Return the `k` most likely candidates, most likely first."""
        if self.in_order:
            return self if k >= len(self) else self.keep(slice(0, k))
        kept = self.keep(top_k(self.logits, k))
        kept.in_order = True
        return kept

    def best(self) -> float:
        """Return the largest logit."""
        return float(self.logits[0]) if self.in_order else float(self.logits.max())

    def weights(self) -> NDArray[np.float32]:
        """Return exp(logit - largest logit), float32, shape (n,). Probabilities are proportional to it."""
        with np.errstate(over="ignore"):  # logits at both ends of float32 differ by infinity: no weight
            weights: NDArray[np.float32] = np.exp(self.logits - np.float32(self.best()))
        return weights

    def probabilities(self) -> NDArray[np.float64]:
        """Return the softmax of the logits, float64, shape (n,)."""
        weights = self.weights()
        probabilities: NDArray[np.float64] = weights / weights.sum(dtype=np.float64)
        return probabilities


def mask_logits(logits: NDArray[np.float32], allowed: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return a new array of logits with -inf where a token is not allowed, shape (n,).

    It works on bits, without a branch for each token. Where allowed and excluded tokens alternate, `np.where` takes
    ten times as long.
    """
    keep = allowed.view(np.int8).astype(np.int32)
    np.negative(keep, out=keep)  # all bits set where allowed
    bits = np.ascontiguousarray(logits).view(np.int32) ^ _EXCLUDED
    bits &= keep
    bits ^= _EXCLUDED
    return bits.view(np.float32)


def top_k(logits: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Return the positions of the k largest logits, largest first, ties by rising position; all for k = 0.

    Returns:
        shape (min(k, n),) or, for k = 0, (n,).
    """
    n = len(logits)
    k = min(k, n) if k else n
    groups = n // _GROUP
    if k < groups:
        # The k-th largest maximum of any groups is at most the k-th largest logit.
        # numpy takes maxima down columns ten times as fast as along rows, so a group is every groups-th logit.
        maxima = logits[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
        bound = np.partition(maxima, groups - k)[groups - k]
        positions = np.flatnonzero(logits >= bound)
    else:
        positions = np.arange(n)
    return positions[order(logits[positions])[:k]]


def order(logits: NDArray[np.float32]) -> NDArray[np.intp]:
    """Return the positions by falling logit, ties by rising position; shape (n,)."""
    n = len(logits)
    if n < _MIN_INTEGER_SORT:
        return (-logits).argsort(kind="stable")
    # Sorting numbers is far faster than sorting positions by numbers. So each key holds a logit in its high bits
    # and the position in its low bits.
    bits = (logits + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    keys = (~rising).astype(np.int64) << 32 | np.arange(n)
    keys.sort()
    return keys & 0xFFFFFFFF
