"""Sampling of all rows of a tick: rows with the same kinds of steps are computed together.

Each row gets the token that `Sampler.sample` returns for it alone, and takes the same numbers from its generator.
`Sampler.sample` samples a row if one of its steps has no form for many rows, and if its logits leave no token: it
then raises the error that describes them. A backend that is a `RowSelector` selects the largest logits of rows. The
scheduler calls `sample_rows` once for each tick, or keeps a `RowSampler` for ticks that have the same samplers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from erllama._runtime.log import logger
from erllama.engine.backend import LargestLogits, RowSelector
from erllama.engine.sampling.candidates import mask_logits
from erllama.engine.sampling.declaration import WholeRowsStep
from erllama.engine.sampling.rows import RowPlan, RowSelection, draw_positions
from erllama.engine.sampling.sampler import Sampler
from erllama.errors import Error, SamplingError

log = logger("erllama.engine")
# Rows with the same plan from which on computing them together is faster. The calls take as long as eleven rows do
# alone, if the caches of the processor are cold, as after a decode.
_MIN_ROWS = 12
# Bytes of logits that are computed together. They are read more than once, so more would not stay in the caches of
# the processor. Fewer make more calls.
_BLOCK = 4 << 20
_NO_CONTEXT = np.empty(0, np.int32)
_ALONE = -1  # in place of a token: the row must be sampled alone


def sample_rows(
    samplers: Sequence[Sampler],
    logits: NDArray[np.float32],
    contexts: Sequence[NDArray[np.int32]],
    allowed: Sequence[NDArray[np.bool_] | None],
    selector: RowSelector | None = None,
) -> list[int | Error]:
    """Sample one token for each row of logits.

    Args:
        samplers: the sampler of each row; no sampler twice.
        logits: shape (n, n_vocab); not changed. -inf excludes a token.
        contexts: for each row, prompt and reply so far, int32.
        allowed: for each row, the tokens that a grammar allows, shape (n_vocab,); None for all.
        selector: selects the largest logits; None for numpy.

    Returns:
        the token of each row; of a row that fails, its error.
    """
    return RowSampler(samplers, allowed, selector).sample(logits, contexts)


class RowSampler:
    """Samples the rows of ticks that have the same samplers, and the same tokens allowed.

    Args:
        samplers, allowed, selector: as for `sample_rows`.
    """

    def __init__(
        self,
        samplers: Sequence[Sampler],
        allowed: Sequence[NDArray[np.bool_] | None],
        selector: RowSelector | None,
    ) -> None:
        self._samplers, self._allowed, self._selector = samplers, allowed, selector
        plans: dict[RowPlan | None, list[int]] = {}
        for row, sampler in enumerate(samplers):
            plans.setdefault(sampler.row_plan, []).append(row)
        self._groups: list[_Group] = []
        others: list[int] = []
        for plan, rows in plans.items():
            if plan is None or len(rows) < _MIN_ROWS:
                others += rows
            else:
                self._groups.append(_Group(plan, rows, samplers, allowed, selector))
        self._selections: list[_Selection] = []
        if selector is not None:
            rows = sorted(row for row in others if allowed[row] is None and samplers[row].first_k is not None)
            self._selections = [_Selection(run, samplers, selector) for run in _runs(rows, samplers)]

    def sample(self, logits: NDArray[np.float32], contexts: Sequence[NDArray[np.int32]]) -> list[int | Error]:
        """Sample one token for each row. Arguments and result are those of `sample_rows`."""
        results: list[int | Error] = [_ALONE] * len(self._samplers)
        for selection in self._selections:
            selection.sample(logits, contexts, results)
        for group in self._groups:
            for row, token in zip(group.rows, group.sample(logits, contexts), strict=True):
                results[row] = token
        if _ALONE in results:
            for row, result in enumerate(results):
                if result == _ALONE:
                    try:
                        results[row] = self._samplers[row].sample(logits[row], contexts[row], self._allowed[row])
                    except BaseException as error:
                        results[row] = _error_of(error)
        return results


def _runs(rows: Sequence[int], samplers: Sequence[Sampler]) -> list[range]:
    """Return the runs of consecutive rows whose samplers have the same `first_k`; `rows` rise."""
    runs: list[range] = []
    for row in rows:
        last = runs[-1] if runs else None
        if last is not None and last.stop == row and samplers[last.start].first_k == samplers[row].first_k:
            runs[-1] = range(last.start, row + 1)
        else:
            runs.append(range(row, row + 1))
    return runs


class _Selection:
    """Consecutive rows that begin with their k largest logits, with the same k, and continue alone.

    Args:
        rows: their indices.
        samplers: of all rows of the tick.
        selector: selects the largest logits.
    """

    def __init__(self, rows: range, samplers: Sequence[Sampler], selector: RowSelector) -> None:
        self._rows, self._selector = rows, selector
        k = samplers[rows.start].first_k
        assert k is not None
        self._k, self._is_all = k, len(rows) == len(samplers)
        self._largest = _empty(len(rows), k)
        # Views of each row, made once: such a tick calls few functions of numpy.
        ids, logits = self._largest
        self._each = [(row, samplers[row], ids[i], logits[i]) for i, row in enumerate(rows)]

    def sample(
        self, logits: NDArray[np.float32], contexts: Sequence[NDArray[np.int32]], results: list[int | Error]
    ) -> None:
        """Set the results of the rows. A row that must be sampled alone keeps its result."""
        rows = self._rows
        block = logits if self._is_all else logits[rows.start : rows.stop]
        try:
            if not self._k:
                for row, token in zip(rows, self._selector.argmax(block), strict=True):
                    results[row] = token
                return
            self._selector.top_k(block, self._largest)
        except BaseException:  # SystemExit, too: the rows can be sampled without the selector
            log.exception("the largest logits could not be selected")
            return
        for row, sampler, ids, row_logits in self._each:
            try:
                context = contexts[row] if sampler.reads_context else _NO_CONTEXT
                results[row] = sampler.sample_largest(ids, row_logits, context)
            except BaseException as error:
                results[row] = _error_of(error)


def _empty(n: int, k: int) -> LargestLogits:
    return LargestLogits(np.empty((n, k), np.intp), np.empty((n, k), np.float32))


def _error_of(error: BaseException) -> Error:
    """Return the error with which a row ends, after a sampler raised one."""
    if isinstance(error, Error):
        return error
    log.error("sampling failed unexpectedly", exc_info=error)
    failure = SamplingError(f"sampling failed unexpectedly: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


class _Group:
    """Rows with the same plan."""

    def __init__(
        self,
        plan: RowPlan,
        rows: list[int],
        samplers: Sequence[Sampler],
        allowed: Sequence[NDArray[np.bool_] | None],
        selector: RowSelector | None,
    ) -> None:
        self.rows = rows
        self._plan, self._selector = plan, selector
        self._samplers = [samplers[row] for row in rows]
        self._allowed = [allowed[row] for row in rows]
        self._steps = list(zip(*(sampler.steps[len(plan.whole) :] for sampler in self._samplers), strict=True))
        self._is_all = len(rows) == len(samplers)
        self._is_changed = bool(plan.whole) or any(mask is not None for mask in self._allowed)
        self._out: LargestLogits | None = None

    def sample(self, logits: NDArray[np.float32], contexts: Sequence[NDArray[np.int32]]) -> list[int]:
        """Return the token of each row; -1 for a row that must be sampled alone. Such a row draws no number."""
        blocks = self._blocks(logits, contexts)
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                if self._plan.ordered:
                    return self._draw(*self._largest(logits, blocks))
                argmax = _argmax if self._selector is None else self._selector.argmax
                return [token for block in blocks for token in argmax(block)]
        except BaseException:  # SystemExit, too: one row must not make the others fail
            log.exception("rows could not be sampled together")
            return [_ALONE] * len(self.rows)

    def _draw(self, ids: NDArray[np.intp], logits: NDArray[np.float32]) -> list[int]:
        is_possible = np.isfinite(logits[:, 0])
        possible = is_possible.tolist()
        if not all(possible):
            # The steps expect falling logits, of which the first is finite.
            logits[~is_possible] = -np.inf
            logits[~is_possible, 0] = 0
        for kind, of_rows in zip(self._plan.ordered, self._steps, strict=True):
            logits = kind.change_ordered_rows(of_rows, logits)
        shares = [sampler.random() if ok else 0.0 for sampler, ok in zip(self._samplers, possible, strict=True)]
        at = draw_positions(logits, np.array(shares))
        tokens = ids[np.arange(len(ids)), at].tolist()
        return [token if ok else _ALONE for token, ok in zip(tokens, possible, strict=True)]

    def _largest(self, logits: NDArray[np.float32], blocks: Iterator[NDArray[np.float32]]) -> LargestLogits:
        """Return the largest logits of each row. The first is not finite if the row must be sampled alone."""
        n_vocab = logits.shape[1]
        k = min(max(step.k for step in self._steps[0]), n_vocab)
        if self._selector is None:
            selection = RowSelection(k, n_vocab)
            for block in blocks:
                selection.add(block)
            return selection.largest()
        if self._out is None:
            self._out = _empty(len(self.rows), k)
        if self._is_all and not self._is_changed:
            self._selector.top_k(logits, self._out)
            return self._out
        ids, largest = self._out
        start = 0
        for block in blocks:
            part = slice(start, start + len(block))
            self._selector.top_k(block, LargestLogits(ids[part], largest[part]))
            start += len(block)
        return self._out

    def _blocks(
        self, logits: NDArray[np.float32], contexts: Sequence[NDArray[np.int32]]
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the logits of the rows, a block at a time, after the steps that change whole rows.

        A block is valid until the next one.
        """
        copies: NDArray[np.float32] | None = None
        n = max(_BLOCK // (logits.itemsize * logits.shape[1]), 1)
        for start in range(0, len(self.rows), n):
            part = slice(start, start + n)
            rows, masks = self.rows[part], self._allowed[part]
            is_masked = any(mask is not None for mask in masks)
            if not self._plan.whole and not is_masked and rows[-1] - rows[0] == len(rows) - 1:
                yield logits[rows[0] : rows[-1] + 1]
                continue
            if copies is None:
                # Once: writing to fresh memory takes several times as long as to memory that is in use.
                copies = np.empty((min(n, len(self.rows)), logits.shape[1]), np.float32)
            block = logits.take(rows, axis=0, out=copies[: len(rows)], mode="clip")  # "raise" copies twice
            if is_masked:
                _mask_rows(block, masks)
            for at, kind in enumerate(self._plan.whole):
                steps = [cast(WholeRowsStep, sampler.steps[at]) for sampler in self._samplers[part]]
                kind.change_rows(steps, block, [contexts[row] for row in rows])
            yield block


def _mask_rows(block: NDArray[np.float32], masks: Sequence[NDArray[np.bool_] | None]) -> None:
    """Exclude the tokens that grammars do not allow, in place."""
    for row, mask in zip(block, masks, strict=True):
        # A mask must not hide NaN from the check of the model's logits.
        if mask is not None and np.isfinite(np.maximum.reduce(row)):
            row[:] = mask_logits(row, mask)


def _argmax(block: NDArray[np.float32]) -> list[int]:
    """Return the first of the largest logits of each row; -1 where it is not finite."""
    best: list[int] = block.argmax(axis=1).tolist()  # the first NaN, if there is one
    # Few functions of numpy: each takes 10 us while the processor's caches are cold, as they are after a decode.
    return [token if math.isfinite(block.item(row, token)) else _ALONE for row, token in enumerate(best)]
