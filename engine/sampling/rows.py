"""Candidates of several requests in one array: the largest logits of each row, and draws from all rows at once.

A call of numpy takes longer than the arithmetic for a few candidates, so one call serves many rows. Each row gets
the same bits as alone: the order of candidates, the operations on each number, and the order of sums are the same.
`erllama.engine.sampling.batch` calls these functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from erllama.engine.backend import LargestLogits
from erllama.engine.sampling.candidates import (
    grouping,
    ranked_maxima,
    row_weights,
    running_sums,
    sort_keys,
    split_keys,
)
from erllama.engine.sampling.declaration import OrderedRowsStep, Step, WholeRowsStep
from erllama.engine.sampling.draws import MAX_SUMMED, Categorical, Draw, Greedy
from erllama.engine.sampling.steps import TopK

# Candidates of a row that are sorted with those of other rows, as a multiple of k. Only equal logits make more, and
# they would take memory for every row.
_MAX_FOUND = 4
_MIN_FOUND = 256  # candidates that are never too many
_LOWEST = np.finfo(np.float32).min
# The key of a candidate that is not there: minus infinity, after all ids.
_ABSENT = np.int64((0x7F800000 << 32) | 0xFFFFFFFF)


class RowPlan:
    """The kinds of steps of a chain that many rows can run together. Equal plans are the same object.

    Attributes:
        whole: the steps that change the logits of the whole vocabulary.
        ordered: the steps after them, on candidates in falling order, `TopK` first. None at temperature 0: the most
            likely token is taken.
    """

    __slots__ = ("ordered", "whole")

    def __init__(self, whole: tuple[type[WholeRowsStep], ...], ordered: tuple[type[OrderedRowsStep], ...]) -> None:
        self.whole, self.ordered = whole, ordered

    @staticmethod
    def of(steps: Sequence[Step], draw: Draw, n_vocab: int) -> RowPlan | None:
        """Return the plan of a chain; None if its rows run one by one."""
        n = 0
        while n < len(steps) and isinstance(steps[n], WholeRowsStep):
            n += 1
        whole, rest = tuple(map(type, steps[:n])), steps[n:]
        if isinstance(draw, Greedy):
            # Without steps, the argmax of each row is one call, and two dimensions save nothing.
            return _plan(whole, ()) if whole and not rest else None
        if not isinstance(draw, Categorical) or not rest or not isinstance(rest[0], TopK):
            return None
        if min(rest[0].k, n_vocab) > MAX_SUMMED or not all(isinstance(step, OrderedRowsStep) for step in rest):
            return None
        return _plan(whole, tuple(map(type, rest)))


@lru_cache(256)  # bounded, because callers may define classes of steps for each request
def _plan(whole: tuple[type[WholeRowsStep], ...], ordered: tuple[type[OrderedRowsStep], ...]) -> RowPlan:
    return RowPlan(whole, ordered)


class RowSelection:
    """Selects the k largest logits of rows that arrive in blocks.

    Args:
        k: candidates for each row, at most `n_vocab`.
        n_vocab: logits of each row.
    """

    def __init__(self, k: int, n_vocab: int) -> None:
        self._k, self._n_vocab, self._n_rows = k, n_vocab, 0
        self._size, self._max_found = grouping(n_vocab, k), max(_MAX_FOUND * k, _MIN_FOUND)
        self._rows: list[NDArray[np.intp]] = []
        self._keys: list[NDArray[np.int64]] = []
        self._best: list[NDArray[np.float32]] = []

    def add(self, block: NDArray[np.float32]) -> None:
        """Select from the next rows, shape (n, n_vocab), C-contiguous. The block may change afterwards."""
        n_rows, n, size = len(block), self._n_vocab, self._size
        n_groups = n // size
        n_grouped = n_groups * size
        # As in `top_k`, a group is every n_groups-th logit of a row.
        groups = block[:, :n_grouped].reshape(n_rows, size, n_groups)
        maxima = np.maximum.reduce(groups, axis=1)
        ranked = ranked_maxima(maxima, self._k)
        best, bounds = ranked[:, -1], np.maximum(ranked[:, -self._k], _LOWEST)
        rows, chosen = _reaching(maxima, bounds)
        if len(rows) > n_rows * self._max_found:
            is_usual = np.bincount(rows, minlength=n_rows) <= self._max_found
            best[~is_usual] = np.nan
            rows, chosen = rows[is_usual[rows]], chosen[is_usual[rows]]
        part = groups[rows, :, chosen]
        which, at = _reaching(part, bounds[rows])
        self._put(rows[which], at * n_groups + chosen[which], part[which, at])
        if n_grouped < n:
            rest = block[:, n_grouped:]
            best = np.maximum(best, np.maximum.reduce(rest, axis=1))
            rows, at = _reaching(rest, bounds)
            self._put(rows, at + n_grouped, rest[rows, at])
        self._best.append(best)
        self._n_rows += n_rows

    def _put(self, rows: NDArray[np.intp], ids: NDArray[np.intp], logits: NDArray[np.float32]) -> None:
        self._rows.append(rows + self._n_rows)
        self._keys.append(sort_keys(logits, ids))

    def largest(self) -> LargestLogits:
        """Return the largest logits of all rows.

        The first logit is NaN in a row whose largest logit is not finite, or that has too many equal ones. The
        others of such a row are not defined.
        """
        rows, keys = np.concatenate(self._rows), np.concatenate(self._keys)
        if len(self._rows) > len(self._best):  # logits without a group were put after the others of their block
            by_row = rows.argsort(kind="stable")
            rows, keys = rows[by_row], keys[by_row]
        counts = np.bincount(rows, minlength=self._n_rows)
        is_plain = np.isfinite(np.concatenate(self._best))
        is_plain &= counts <= self._max_found
        if not is_plain.all():
            rows, keys = rows[is_plain[rows]], keys[is_plain[rows]]
            counts = counts * is_plain
        columns = np.arange(len(rows)) - (counts.cumsum() - counts)[rows]
        table = np.full((self._n_rows, max(int(counts.max()), self._k)), _ABSENT)
        table[rows, columns] = keys
        table.sort(axis=1)
        ids, logits = split_keys(table[:, : self._k])
        logits[~is_plain, 0] = np.nan
        return LargestLogits(ids, logits)


def _reaching(
    numbers: NDArray[np.float32], bounds: NDArray[np.float32]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the rows and columns of the numbers that are at least the bound of their row; shape (m,) each."""
    places = (numbers >= bounds[:, np.newaxis]).ravel().nonzero()[0]  # in two dimensions, nonzero is slower
    rows, columns = np.divmod(places, numbers.shape[1])
    return rows, columns


def draw_positions(logits: NDArray[np.float32], shares: NDArray[np.float64]) -> NDArray[np.intp]:
    """Draw a position from each row by the softmax, as `Categorical` does.

    Args:
        logits: shape (n, k), falling, the first of each row finite.
        shares: shape (n,): a number from each request's generator.
    """
    sums = running_sums(row_weights(logits))
    # A share below 1 of the last sum is below that sum, so the first larger sum has a weight.
    targets = shares * sums[:, -1]
    positions: NDArray[np.intp] = np.count_nonzero(sums <= targets[:, np.newaxis], axis=1)
    return positions
