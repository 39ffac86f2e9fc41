"""The tokens that may be drawn, as the steps of a sampling chain narrow them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_RULED_OUT = np.float32(-np.inf).view(np.int32)
_MANY = 1024  # from here on numpy's sort of integers wins
_GROUP = 64  # top-k looks at maxima of groups of this many logits first; 16 and 32 are no faster


class Candidates:
    """Tokens that may be drawn next, and their logits. A step makes new ones; it writes into none of the arrays.

    Attributes:
        ids: intp, shape (n,), n >= 1.
        logits: float32, shape (n,); -inf rules a token out.
        in_order: whether logits fall from first to last, ties by rising id; otherwise ids rise, unless a step
            left them in an order of its own.
        context: prompt and reply so far, int32, shape (m,).
        random: the request's own generator.
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
        """Some of them, by position or mask, in the order they have."""
        return Candidates(self.ids[which], self.logits[which], self.context, self.random, in_order=self.in_order)

    def with_logits(self, logits: NDArray[np.float32], *, in_order: bool = False) -> Candidates:
        """The same tokens with other logits, float32, shape (n,)."""
        return Candidates(self.ids, logits, self.context, self.random, in_order=in_order)

    def at(self, tokens: NDArray[np.int32]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Where some tokens are among them.

        Args:
            tokens: ids that rise, shape (k,).

        Returns:
            positions here, and which of `tokens` each is; tokens that are not here are left out.
        """
        if not len(tokens):
            return np.empty(0, np.intp), np.empty(0, np.intp)
        if self.ids[-1] == len(self.ids) - 1 and not self.in_order and self.ids[0] == 0:
            # Perhaps the whole vocabulary, where an id is its own position.
            inside = tokens < len(self.ids)
            if inside.all() and np.array_equal(self.ids[tokens], tokens):
                return tokens.astype(np.intp), np.arange(len(tokens))
        which = np.searchsorted(tokens, self.ids)
        which[which == len(tokens)] = 0
        positions = np.flatnonzero(tokens[which] == self.ids)
        return positions, which[positions]

    def ordered(self) -> Candidates:
        """The same, most likely first."""
        return self if self.in_order else self.top(len(self))

    def top(self, k: int) -> Candidates:
        """The `k` most likely, most likely first."""
        if self.in_order:
            return self if k >= len(self) else self.keep(slice(0, k))
        found = self.keep(top_k(self.logits, k))
        found.in_order = True
        return found

    def best(self) -> float:
        """The largest logit."""
        return float(self.logits[0]) if self.in_order else float(self.logits.max())

    def weights(self) -> NDArray[np.float32]:
        """exp(logit - largest), float32, shape (n,): what probabilities are proportional to."""
        with np.errstate(over="ignore"):  # of logits at both ends of float32: minus infinity, so no weight
            found: NDArray[np.float32] = np.exp(self.logits - np.float32(self.best()))
        return found

    def probabilities(self) -> NDArray[np.float64]:
        """Their softmax, float64, shape (n,)."""
        weights = self.weights()
        found: NDArray[np.float64] = weights / weights.sum(dtype=np.float64)
        return found


def masked(logits: NDArray[np.float32], allowed: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Logits with -inf where they are not allowed; new, shape (n,).

    Without a branch for each: where allowed and ruled out alternate, `np.where` takes ten times as long.
    """
    keep = allowed.view(np.int8).astype(np.int32)
    np.negative(keep, out=keep)  # all bits set where allowed
    bits = np.ascontiguousarray(logits).view(np.int32) ^ _RULED_OUT
    bits &= keep
    bits ^= _RULED_OUT
    return bits.view(np.float32)


def top_k(logits: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Positions of the k largest logits, largest first, ties by rising position; all of them for k = 0.

    Returns:
        shape (min(k, n),) or, for k = 0, (n,).
    """
    n = len(logits)
    k = min(k, n) if k else n
    groups = n // _GROUP
    if k < groups:
        # The k-th largest of the groups' maxima bounds the k-th largest logit from below, whatever the groups are.
        # Down columns numpy takes maxima ten times as fast as along rows: a group is every groups-th logit.
        maxima = logits[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
        bound = np.partition(maxima, groups - k)[groups - k]
        positions = np.flatnonzero(logits >= bound)
    else:
        positions = np.arange(n)
    return positions[order(logits[positions])[:k]]


def order(logits: NDArray[np.float32]) -> NDArray[np.intp]:
    """Positions by falling logit, ties by rising position; shape (n,)."""
    n = len(logits)
    if n < _MANY:
        return (-logits).argsort(kind="stable")
    # Sorting numbers is far faster than sorting positions by them: so each position goes into its logit's low bits.
    bits = (logits + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    keys = (~rising).astype(np.int64) << 32 | np.arange(n)
    keys.sort()
    return keys & 0xFFFFFFFF
