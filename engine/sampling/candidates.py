"""The candidates of a draw: the tokens that sampler steps have left, with their logits.

The arrays are never written in place: each step makes new candidates. Called by the steps and by the draws.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LARGE = (
    1e30  # no float32 overflows when a number up to this is added: the largest ones are rounded in steps of 2e31
)
_FLOAT32 = Struct("f")
_EXCLUDED = np.float32(-np.inf).view(np.int32)
_MIN_INTEGER_SORT = 1024  # from this many logits on, numpy sorts integers faster than positions
_MAX_GROUP = 64  # logits of a group in `grouping`; larger groups are no faster
_EIGHTS = 2  # from this many groups of eight maxima for each of the k largest, `ranked_maxima` compares the eights
_MIN_GROUPS_READ = 1 << 16  # from this many logits on, it is faster to read groups again than to compare all logits


class Candidates:
    """Tokens that may be drawn next, and their logits. A step makes new candidates and writes into no array.

    Attributes:
        ids: intp, shape (n,), n >= 1.
        logits: float32, shape (n,); -inf excludes a token.
        in_order: whether logits fall from first to last, ties by rising id. Otherwise ids rise, unless a step
            chose another order.
        context: prompt and reply so far, int32, shape (m,).
        random: the request's generator.
        is_vocabulary: whether these are known to be all tokens of the vocabulary, so that each id is its own
            position.
    """

    __slots__ = ("context", "ids", "in_order", "is_vocabulary", "logits", "random")

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
        self.is_vocabulary = False

    @classmethod
    def of_vocabulary(
        cls,
        ids: NDArray[np.intp],
        logits: NDArray[np.float32],
        context: NDArray[np.int32],
        random: np.random.Generator,
    ) -> Candidates:
        """Return all tokens of a vocabulary as candidates; `ids` are 0, 1, 2 and so on."""
        candidates = cls(ids, logits, context, random)
        candidates.is_vocabulary = True
        return candidates

    def __len__(self) -> int:
        return len(self.ids)

    def keep(self, which: NDArray[np.intp] | NDArray[np.bool_] | slice) -> Candidates:
        """Return the candidates at some positions, or under a mask, in their present order."""
        return Candidates(self.ids[which], self.logits[which], self.context, self.random, in_order=self.in_order)

    def with_logits(self, logits: NDArray[np.float32], *, in_order: bool = False) -> Candidates:
        """Return the same tokens with other logits, float32, shape (n,)."""
        candidates = Candidates(self.ids, logits, self.context, self.random, in_order=in_order)
        candidates.is_vocabulary = self.is_vocabulary
        return candidates

    def at(self, tokens: NDArray[np.int32]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Find tokens among the candidates.

        Args:
            tokens: rising ids, shape (k,).

        Returns:
            the positions of the candidates found, and for each its index in `tokens`.
        """
        if not len(tokens):
            return np.empty(0, np.intp), np.empty(0, np.intp)
        if self.is_vocabulary and tokens[0] >= 0 and tokens[-1] < len(self.ids):
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
        largest = top_k(self.logits, k)
        # The positions of a vocabulary are its ids. Reading them would load one line of memory for each.
        ids = largest.positions if self.is_vocabulary else self.ids[largest.positions]
        return Candidates(ids, largest.logits, self.context, self.random, in_order=True)

    def best(self) -> float:
        """Return the largest logit."""
        return float(self.logits[0]) if self.in_order else float(np.maximum.reduce(self.logits))

    def weights(self) -> NDArray[np.float32]:
        """Return exp(logit - largest logit), float32, shape (n,). Probabilities are proportional to it."""
        best = np.float32(self.best())
        weights: NDArray[np.float32]
        if -np.inf < best <= LARGE:
            weights = np.exp(self.logits - best)
        else:
            # Logits at both ends of float32 differ by infinity: weight 0. If all logits are -inf, weights are NaN.
            with np.errstate(over="ignore", invalid="ignore"):
                weights = np.exp(self.logits - best)
        return weights

    def probabilities(self) -> NDArray[np.float64]:
        """Return the softmax of the logits, float64, shape (n,)."""
        weights = self.weights()
        probabilities: NDArray[np.float64] = weights / weights.sum(dtype=np.float64)
        return probabilities


def running_sums(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the sum of the weights up to each, added one by one in float64; along the last axis."""
    sums: NDArray[np.float64] = np.add.accumulate(weights, axis=-1, dtype=np.float64)
    return sums


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


class Largest(NamedTuple):
    """The k largest logits of a row, largest first, ties by rising position.

    Attributes:
        positions: intp, shape (k,).
        logits: float32, shape (k,).
        best: the largest logit; NaN if any logit is NaN.
    """

    positions: NDArray[np.intp]
    logits: NDArray[np.float32]
    best: float


def top_k(logits: NDArray[np.float32], k: int) -> Largest:
    """Return the `k` largest logits, or all for k = 0 and for k > n. With NaN, only `best` is defined.

    Each call of numpy costs some us when the processor's caches are cold, as after a decode. So the calls are few.
    """
    n = len(logits)
    k = min(k, n) if k else n
    size = grouping(n, k)
    if size == 1:
        positions = order(logits)[:k]
        return Largest(positions, logits[positions], float(np.maximum.reduce(logits)))
    # numpy takes maxima down columns ten times as fast as along rows, so a group is every n_groups-th logit.
    n_groups = n // size
    groups = logits[: n_groups * size].reshape(size, n_groups)
    maxima = np.maximum.reduce(groups)
    ranked = ranked_maxima(maxima, k)
    bound, best, rest = ranked[-k], float(ranked[-1]), logits[n_groups * size :]
    if len(rest):
        best = float(np.maximum(best, np.maximum.reduce(rest)))
    if bound == -np.inf:
        return _few_possible(logits, k, best)
    if n < _MIN_GROUPS_READ:
        positions = (logits >= bound).nonzero()[0]
        kept = logits[positions]
    else:
        # Only groups whose maximum reaches the bound have candidates. The others are not read again.
        chosen = (maxima >= bound).nonzero()[0]
        part = groups.take(chosen, axis=1)
        places = (part >= bound).ravel().nonzero()[0]  # in two dimensions, nonzero is slower
        row, column = np.divmod(places, len(chosen))
        positions, kept = row * n_groups + chosen[column], part[row, column]
        if len(rest):
            more = (rest >= bound).nonzero()[0]
            positions, kept = np.append(positions, more + n_groups * size), np.append(kept, rest[more])
    first = order(kept)[:k]
    return Largest(positions[first], kept[first], best)


def _few_possible(logits: NDArray[np.float32], k: int, best: float) -> Largest:
    """Return the k largest logits where perhaps fewer than k are possible. The others are minus infinity."""
    positions = (logits > -np.inf).nonzero()[0]
    excluded = (logits[:k] == -np.inf).nonzero()[0]
    positions = np.concatenate([positions[order(logits[positions])], excluded])[:k]
    return Largest(positions, logits[positions], best)


def grouping(n: int, k: int) -> int:
    """Return how many logits to compare as one group, to find the k largest of n; 1 for no groups.

    n / size maxima and k * size logits are then compared. Maxima are cheaper, so the size is a power of two between
    half the square root of n / k and all of it.
    """
    size = 1
    while size < _MAX_GROUP and 4 * size * size * k < n:
        size *= 2
    return size


def ranked_maxima(maxima: NDArray[np.float32], k: int) -> NDArray[np.float32]:
    """Return numbers in rising order: the last is the largest maximum, and at least k maxima reach the k-th last.

    Args:
        maxima: shape (..., n) with n >= k. NaN counts as the largest. Rows are ranked separately.
    """
    n = maxima.shape[-1] // 8
    if n < _EIGHTS * k:
        return np.sort(maxima, axis=-1)
    eights = maxima[..., : 8 * n].reshape(*maxima.shape[:-1], 8, n)
    ranked: NDArray[np.float32] = np.maximum.reduce(eights, axis=-2)
    if 8 * n < maxima.shape[-1]:
        last = np.maximum.reduce(maxima[..., 8 * n :], axis=-1)
        np.maximum(ranked[..., -1], last, out=ranked[..., -1])
    ranked.sort(axis=-1)
    return ranked


def order(logits: NDArray[np.float32]) -> NDArray[np.intp]:
    """Return the positions by falling logit, ties by rising position; shape (n,)."""
    n = len(logits)
    if n < _MIN_INTEGER_SORT:
        return (-logits).argsort(kind="stable")
    # Sorting numbers is far faster than sorting positions by numbers.
    keys = sort_keys(logits, np.arange(n))
    keys.sort()
    return keys & 0xFFFFFFFF


def sort_keys(logits: NDArray[np.float32], ids: NDArray[np.intp]) -> NDArray[np.int64]:
    """Return numbers that rise as logits fall, ties by rising id: a logit in the high bits, its id in the low."""
    bits = (logits + np.float32(0)).view(np.int32)  # -0.0 becomes 0.0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    keys: NDArray[np.int64] = (~rising).astype(np.int64) << 32 | ids
    return keys


def split_keys(keys: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return the ids and the logits of `sort_keys`."""
    rising = ~(keys >> 32).astype(np.int32)
    bits = rising ^ ((rising >> 31) & 0x7FFFFFFF)
    return keys & 0xFFFFFFFF, bits.view(np.float32)


def round_to_float32(number: float) -> float:
    """Return the nearest number of float32.

    The sum, difference and quotient of two such numbers have the bits of float32, although they are rounded to
    float64 first.
    """
    rounded: float = _FLOAT32.unpack(_FLOAT32.pack(number))[0]
    return rounded


def list_weights(falling: list[float]) -> list[float]:
    """Return `Candidates.weights` of falling logits within `LARGE`."""
    best = falling[0]
    weights: list[float] = np.exp(np.array([logit - best for logit in falling], np.float32)).tolist()
    return weights


def row_weights(falling: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return `Candidates.weights` of rows of falling logits; shape (n, k)."""
    weights: NDArray[np.float32] = np.exp(falling - falling[:, :1])
    return weights
